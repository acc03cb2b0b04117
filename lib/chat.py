"""Conversations as tokens: the checkpoint's own chat template writes them, and the assistant's turns have a
loss.

    ids, turns = encode_chat(tokenizer, messages)       # which of the tokens are the assistant's

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

# Characters that no text has. BEGIN and END stand around what a template marks, and INSIDE within what looks
# like a control token in a message.
BEGIN, END, INSIDE = "\ufdd0", "\ufdd1", "\ufdd2"

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
        env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        with failing("the chat template cannot be read"):
            self.template = env.from_string(source)
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self.variables = variables

    def write(self, messages, **options):
        with failing("the chat template fails"):
            options |= dict(messages=messages, tools=None, documents=None)
            text = self.template.render(**self.variables, **options)
        return re.sub("[\ud800-\udfff]", "\ufffd", text)        # lone surrogates, which are no text

    def turns(self, messages, control):
        """control: the control tokens. -> the text, and (begin, end) of each turn of the assistant in it"""
        if self.marks:
            return find_marks(self.write(messages, add_generation_prompt=False))
        text = self.write(messages, add_generation_prompt=False)
        found = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.write(messages[:i], add_generation_prompt=True)
                after = self.write(messages[:i + 1], add_generation_prompt=False)
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
        source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        raise TemplateError(f"{folder} has no chat template (chat_template.jinja, or chat_template in "
                            f"tokenizer_config.json): use a checkpoint that has one, or rows with prompt and "
                            f"completion")
    tokens = {key: token.get("content") if isinstance(token, dict) else token
              for key, token in config.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: token for key, token in tokens.items() if isinstance(token, str)})

def encode_chat(tokenizer, messages):
    """messages: [{"role", "content"}, ...] -> token ids, and the places of the assistant's tokens in them"""
    hide = lambda found: found[0][0] + INSIDE + found[0][1:]
    clean = lambda text: tokenizer.find_control.sub(hide, re.sub(f"[{BEGIN}{END}{INSIDE}]", "\ufffd", text))
    safe = [m | {"role": clean(m["role"]), "content": clean(m["content"])} for m in messages]
    text, turns = template_of(tokenizer.folder).turns(safe, tuple(tokenizer.control))
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
    if not places:
        raise TemplateError("the chat template marks no turn of the assistant")
    return ids, places

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
