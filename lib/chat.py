"""Conversations as tokens: the checkpoint's own chat template writes them, and the assistant's turns have a
loss.

    ids, mask = encode_chat(tokenizer, messages)        # 1 where a token is the assistant's

A template is a Jinja program among the model's files. It runs in jinja2's sandbox, with what `transformers`
gives to one, so its text is the same. A template may mark what the assistant writes by {% generation %}.
Where it does not, a turn is what is added to the text that asks for it, up to the control token that ends it.

What people have written stays text: "<|im_end|>" in a message is no control token, though the same characters
in the template are.
"""
import datetime
import json
import re
from functools import cache, partial
from itertools import accumulate

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lib.read import naming, read_json
from lib.tokenizer import MAX_CHARS

# Characters that no text has. BEGIN and END stand around what a template marks, and INSIDE within what looks
# like a control token in a message.
BEGIN, END, INSIDE = "\ufdd0", "\ufdd1", "\ufdd2"

# What a template takes for today. A run that goes on tomorrow must see the same text. (It is the date in the
# templates of Llama 3, for those who have no clock.)
DATE = datetime.datetime(2024, 7, 26)

class TemplateError(ValueError):
    """A conversation cannot be written."""

class Generation(Extension):
    """{% generation %} ... {% endgeneration %}"""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return BEGIN + caller() + END

def raise_exception(message):
    raise ValueError(message)

class ChatTemplate:
    def __init__(self, source, variables):
        """variables: those that a template expects, like bos_token"""
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[Generation, "jinja2.ext.loopcontrols"])
        env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        env.globals["raise_exception"] = raise_exception
        env.globals["strftime_now"] = DATE.strftime
        with failing("the chat template cannot be read"):
            self.template = env.from_string(source)
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.variables = variables

    def write(self, messages, **options):
        with failing("the chat template fails"):
            text = self.template.render(messages=messages, documents=None, **self.variables, **options)
        return re.sub("[\ud800-\udfff]", "\ufffd", text)        # lone surrogates, which are no text

    def turns(self, messages, tools, control):
        """control: the control tokens. -> the text, and (begin, end) of each turn of the assistant in it"""
        if self.marks:
            return find_marks(self.write(messages, tools=tools, add_generation_prompt=False))
        text = self.write(messages, tools=tools, add_generation_prompt=False)
        found = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.write(messages[:i], tools=tools, add_generation_prompt=True)
                after = self.write(messages[:i + 1], tools=tools, add_generation_prompt=False)
                if not (after.startswith(before) and text.startswith(after)):
                    raise TemplateError(f"the chat template writes message {i + 1} otherwise when others "
                                        f"follow, so its place is not known: mark it by {{% generation %}}")
                turn = after[len(before):].rstrip()         # nobody waits for the line break behind the end
                found.append((len(before), len(before) + len(turn) if turn.endswith(control) else len(after)))
        return text, found

def failing(what):
    return naming(what, TemplateError)

def find_marks(text):
    """-> the text without BEGIN and END, and the (begin, end) that they stood at"""
    plain, found = "", []
    for part in re.split(f"({BEGIN}|{END})", text):
        if part == BEGIN:
            begin = len(plain)
        elif part == END:
            found.append((begin, len(plain)))
        else:
            plain += part
    return plain, found

@cache
def template_of(folder):
    """The chat template of a checkpoint: chat_template.jinja, or what tokenizer_config.json has."""
    config = folder / "tokenizer_config.json"
    config = read_json(config) if config.exists() else {}
    source = config.get("chat_template")
    if isinstance(source, list):                # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    file = folder / "chat_template.jinja"
    if file.exists():
        with failing(file):
            source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise TemplateError(f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                            f"tokenizer_config.json): use a checkpoint that has one, or rows with prompt and "
                            f"completion")
    tokens = {key: token.get("content") if isinstance(token, dict) else token
              for key, token in config.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: token for key, token in tokens.items() if isinstance(token, str)})

def safe(value, find_control):
    """A copy of what a row says, in which no text is, or will be taken for, what this file puts in. Fields
    without a value are left out, for a table has them in each row."""
    if isinstance(value, dict):
        return {safe(k, find_control): safe(v, find_control) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [safe(v, find_control) for v in value]
    if not isinstance(value, str):
        return value
    text = re.sub(f"[{BEGIN}{END}{INSIDE}]", "\ufffd", value)
    return find_control.sub(lambda found: found[0][0] + INSIDE + found[0][1:], text)

def encode_chat(tokenizer, messages, tools=None):
    """messages: [{"role", "content"}, ...] -> token ids, and a byte for each: 1 where it is the assistant's,
    and some token stands before it"""
    if tokenizer.control_strips:
        raise TemplateError("control tokens that take white space with them are not supported")
    messages, tools = safe([messages, tools], tokenizer.find_control)
    text, turns = template_of(tokenizer.folder).turns(messages, tools, tuple(tokenizer.control))
    if len(text) > MAX_CHARS:
        raise ValueError(f"a conversation of {len(text):,} characters: at most {MAX_CHARS:,}")
    ids, places = [], []
    at = 0                                      # characters of the text before this part
    for part in tokenizer.find_control.split(text):
        new, sizes = encode_part(tokenizer, part)
        for begin, end in turns:
            if begin < at + len(part) and end > at:
                first, last = (len_bytes(tokenizer, part[:max(0, place - at)]) for place in (begin, end))
                places += [len(ids) + i for i in overlapping(sizes, first, last)]
        ids += new
        at += len(part)
    mask = bytearray(len(ids))
    for place in places:
        mask[place] = place > 0
    if not any(mask):
        raise TemplateError("the chat template marks no turn of the assistant")
    return ids, bytes(mask)

def overlapping(sizes, first, last):
    """sizes: bytes of each token -> the numbers of the tokens that have one of the bytes first:last"""
    ends = list(accumulate(sizes))
    return [i for i, (size, end) in enumerate(zip(sizes, ends)) if end > first and end - size < last]

def encode_part(tokenizer, part):
    """-> the ids of a control token or of text between two, and how many bytes each stands for"""
    if part in tokenizer.control:
        return [tokenizer.control[part]], [len(part.encode())]
    ids = tokenizer.encode(part.replace(INSIDE, ""))
    return ids, [len(tokenizer.bytes[i]) for i in ids]

def len_bytes(tokenizer, text):
    return len(tokenizer.normalize(text.replace(INSIDE, "")).encode())
