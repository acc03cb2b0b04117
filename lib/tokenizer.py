"""Text to token ids and back: tiktoken with the tokenizer.json of Gemma-3, Qwen2.5, SmolLM2 or GPT-2.

    tokenizer = Tokenizer.from_file("toy")      a folder, or its tokenizer.json
    tokenizer.encode("a text")                  ids; data.py makes prompts of them
    tokenizer.decode(ids)                       a text; lib/evaluate.py reads what a model wrote
"""
import gc
import json
import re
import unicodedata
from functools import cache
from itertools import chain, groupby, pairwise
from pathlib import Path

import tiktoken

from lib.read import naming, read_json

MAX_CHARS = 500_000     # tiktoken's regex engine panics at a million spaces, and a panic is not an Exception

# A byte-level tokenizer.json shows each byte as one visible character: a printable byte as itself, the 68
# others as the characters 256 to 323 (GPT-2's table). So " é", the bytes 20 C3 A9, is written "ĠÃ©". (Byte
# 0x20 has 32 such bytes before it, and "Ġ" is character 256 + 32.) Code point -> byte:
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = dict(zip(SHOWN + [*range(256, 324)], SHOWN + [b for b in range(256) if b not in SHOWN]))

# How GPT-2 cuts a text into words. `\s+(?!\S)` takes white space but leaves the last to the next word.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2's cuts off each digit beforehand, so that white space before a digit stays together.
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# A regex of these parts alone means the same to tiktoken and to Oniguruma, which `tokenizers` uses.
ALIKE = r"(\\[pP]\{\w+\}|\\[sSrnt]|\[\^|\((\?(i?:|!|=))?|\{\d+(,\d*)?\}(?!\+)|[^\\^$.({}])+"

def split_regex(norm, pre, model):
    """The regex that cuts a text as the pre_tokenizer does; None for Gemma's, which does not cut."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    odd = [key for key in ("byte_fallback", "dropout", "ignore_merges", "continuing_subword_prefix",
                           "end_of_word_suffix") if model.get(key)]
    match [model["type"], *odd], norm, [{"use_regex": True, **step} for step in steps]:
        # Gemma-3: its normalizer has made each space a "▁", so the split at spaces finds none.
        case (["BPE", "byte_fallback"], {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
              [{"type": "Split", "pattern": {"String": " "}}]):
            return None
        # GPT-2: the regex is a part of ByteLevel.
        case (["BPE"], None | {"type": "NFC"},
              [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]):
            return GPT2
        # SmolLM2: each digit is cut off before.
        case (["BPE"], None | {"type": "NFC"}, [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]):
            return DIGITS
        # Qwen: the file brings its regex. What that does not match is a piece too; tiktoken would drop it.
        case (["BPE"], None | {"type": "NFC"},
              [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
               {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
              ) if re.fullmatch(ALIKE, regex):
            return f"{regex}|(?:(?!{regex})(?s:.))+"
    raise ValueError(f"model {' with '.join([model['type'], *odd])}, normalizer {norm and norm['type']}, "
                     f"pre_tokenizer {' + '.join(s['type'] for s in steps)} is not supported: Gemma-3's is, "
                     f"and byte-level BPE as in Qwen, SmolLM2, GPT-2. Found {json.dumps([norm, pre])[:500]}")

def normalize(text):
    """NFC. Python sorts a run of combining marks in quadratic time: a long text may have none above 1,000."""
    if len(text) > 10_000:
        runs = groupby(text, lambda c: unicodedata.combining(c) > 0)
        if any(marks and sum(1 for _ in run) > 1000 for marks, run in runs):
            raise ValueError("more than 1,000 combining marks in a row")
    return unicodedata.normalize("NFC", text)

def find_eos(configs, ids):
    """The ids that end a generation: from generation_config, config or tokenizer_config (.json), whichever
    names one first, else the usual token. ids: token -> id"""
    usual = "<eos>" if "<eos>" in ids else "<|endoftext|>"
    given = [c.get("eos_token_id", c.get("eos_token")) for c in configs] + [usual]
    first = next(e for e in given if e not in (None, []))
    tokens = first if isinstance(first, list) else [first["content"] if isinstance(first, dict) else first]
    found = [ids.get(e, e) for e in tokens]
    if not all(type(i) is int for i in found) or not set(found) <= set(ids.values()):
        raise ValueError(f"no end-of-sequence token {found}: give eos_token_id in generation_config.json")
    return found

def check_ids(vocab, added):
    """-> {token: id} of a vocabulary and the added tokens. ValueError if two have one id, or one has two."""
    ids = vocab | {a["content"]: a["id"] for a in added}
    for token, i in ids.items():
        if not token or type(i) is not int or not 0 <= i < 2 ** 31:
            raise ValueError(f"token {token!r} has the id {i!r}, which is not a whole number from 0")
        if vocab.get(token, i) != i:
            raise ValueError(f"token {token!r} has two ids, {vocab[token]} and {i}")
    if len(set(ids.values())) < len(ids):
        tokens = sorted(ids, key=ids.get)
        pair = next(pair for pair in pairwise(tokens) if ids[pair[0]] == ids[pair[1]])
        raise ValueError(f"tokens {pair[0]!r} and {pair[1]!r} have one id, {ids[pair[0]]}")
    return ids

def gemma_tables(vocab, made):
    """vocab: token -> id; made: tokens that merges make. -> (id -> bytes, bytes -> ids of what merges start
    from, the regex that cuts a text).
    Gemma's merges start from characters, tiktoken's from bytes, so tiktoken first builds the characters. The
    euro sign is E2 82 AC: E2 and 82 become E2 82, and that and AC the sign. A character that the vocabulary
    lacks, say E2 82 BF, gets no further than E2 82 and BF: its ids are those of <0xE2> <0x82> <0xBF>."""
    byte_ids = [vocab[f"<0x{b:02X}>"] for b in range(256)]
    spelling = {i: t.replace("▁", " ").encode() for t, i in vocab.items()}
    chars = {spelling[i]: [i] for t, i in vocab.items() if len(t) == 1}
    starts = [bytes([b]) for b in range(256)] + [c[:n] for c in chars for n in range(2, len(c))]
    spelling |= {i: bytes([b]) for b, i in enumerate(byte_ids)}
    # A text can be cut before spaces, but not after a character that some token has before a space: with a
    # token "> <" the text "a > <b" is cut into "a" and " > <b".
    joins = sorted({c for t in made if "▁" in t[1:] for c in re.findall("[^▁](?=▁)", t)})
    regex = " *(?:" + "".join(rf"\x{{{ord(c):x}}} *|" for c in joins) + "[^ ])+| +"
    return spelling, {s: [byte_ids[b] for b in s] for s in starts} | chars, regex

def added_regex(added):
    """The regex that finds added tokens, longest first. Those that begin alike are grouped: Gemma has 6,400,
    and `re` tries one after the other."""
    alike = groupby(sorted(added, reverse=True), lambda t: t[:3])
    groups = [re.escape(start) + f"(?:{'|'.join(re.escape(t[3:]) for t in ts)})" for start, ts in alike]
    return re.compile(f"({'|'.join(groups) or '(?!)'})")

def made_in_order(merges):
    """What the merges make, each token once, in their order.
    A token has one rank here, so all merges that make it must stand together (Gemma has one for each way to
    cut it). The runs at the head of Gemma's file do not: no harm, each grows by one character at a time."""
    made = [token for token, _ in groupby(map("".join, merges))]
    runs = [[c * a, c * b] for a in range(30, 0, -1) for b in range(31 - a, 0, -1) for c in "\n▁\t"][:-1]
    rest = made[len(runs):] if merges[:len(runs)] == runs else made
    if len(set(rest)) < len(rest):
        raise ValueError("merges that make one token are in several places: it would need several ranks")
    return list(dict.fromkeys(made))

class Tokenizer:
    """Encodes as the `tokenizers` library does, except that text is data: it never becomes a control token.

    tiktoken merges the two neighbours whose joined bytes have the lowest rank. So the first ranks go to what
    the merges start from, and the next to what they make, in their order. Ranks are not ids."""

    @classmethod
    def from_file(cls, path):
        """Read tokenizer.json, or the one in a folder, and the configs beside it for the end of sequence."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        names = "generation_config.json", "config.json", "tokenizer_config.json", path.name
        collecting, read = gc.isenabled(), []
        gc.disable()    # Gemma's file makes half a million lists, which the collector would visit repeatedly
        try:
            for file in map(path.with_name, names):
                read.append(read_json(file) if file == path or file.exists() else {})
            with naming(path):
                tokenizer = cls(read.pop(), read)
                tokenizer.folder = path.parent
                return tokenizer
        finally:
            if collecting:
                gc.enable()

    def __init__(self, spec, configs):
        model, vocab, added = spec["model"], spec["model"]["vocab"], spec["added_tokens"]
        regex = split_regex(spec["normalizer"], spec["pre_tokenizer"], model)
        gemma = regex is None
        # `tokenizers` has the tables of Unicode 9, and leaves about a hundred newer combining marks alone.
        nfc = normalize if spec["normalizer"] else str
        self.normalize = (lambda text: text.replace("▁", " ")) if gemma else nfc
        ids = check_ids(vocab, added)
        self.bos_id = ids["<bos>"] if gemma else None
        self.eos_ids = find_eos(configs, ids)
        self.eos_id = self.eos_ids[0]
        control = {a["id"] for a in added if a["special"]} | {*self.eos_ids, self.bos_id} - {None}
        specials = [a for a in added if a["id"] in control]
        added = [a for a in added if a["id"] not in control]
        if any(a[flag] for a in added for flag in ("normalized", "lstrip", "rstrip", "single_word")):
            raise ValueError("added tokens with normalized, lstrip, rstrip or single_word are not supported")
        self.added = {a["content"]: a["id"] for a in added}
        self.split = added_regex(self.added)
        self.control = {token: i for token, i in ids.items() if i in control}   # for lib/chat.py
        self.find_control = added_regex(self.control)
        self.control_strips = any(a["lstrip"] or a["rstrip"] for a in specials)
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]   # "a b", or a pair
        made = made_in_order(merges)
        if gemma:
            self.bytes, first, regex = gemma_tables(vocab, made)
        else:
            self.bytes = {i: t.translate(BYTE_OF).encode("latin-1", "replace") for t, i in vocab.items()}
            first = {bytes([b]): [vocab[chr(c)]] if chr(c) in vocab else [] for c, b in BYTE_OF.items()}
        self.unit = re.compile(rb"(?s)[\xc0-\xff][\x80-\xbf]*|." if gemma else rb"(?s).")
        self.left = {} if gemma else {self.bytes[vocab[a + b]]: len(a) for a, b in merges}
        self.ids = [*first.values(), *([vocab[t]] for t in made)]
        self.ranks = {b: rank for rank, b in enumerate(chain(first, (self.bytes[vocab[t]] for t in made)))}
        if len(self.ranks) < len(self.ids):
            raise ValueError("two tokens of the vocabulary stand for the same bytes")
        reached = {*chain.from_iterable(self.ids), *self.added.values()}
        if reached & control:
            raise ValueError(f"plain text would become control tokens {reached & control}")
        self.vocab_size = 1 + max(*reached, *self.eos_ids, self.bos_id or 0)    # rows an embedding needs
        self.bytes |= {i: self.normalize(t).encode() for t, i in self.added.items()}
        self.bytes |= dict.fromkeys(control, b"")
        self.bpe = tiktoken.Encoding("", pat_str=regex, mergeable_ranks=self.ranks, special_tokens={})
        self.ids_of = cache(self.ids_of)

    def ids_of(self, rank):
        """The ids of a rank: several for a part of a character, and for a token that its merges never make.
        tiktoken finds such tokens (Gemma has four), because it looks a piece up before it merges anything.
        So every token is merged once as the file says, to see what ids that gives."""
        token = self.bpe.decode_single_token_bytes(rank)
        parts = self.unit.findall(token)
        while pairs := [(self.ranks[x + y], n) for n, (x, y) in enumerate(pairwise(parts))
                        if x + y in self.ranks and self.left.get(x + y, len(x)) == len(x)]:
            n = min(pairs)[1]
            parts[n:n + 2] = [parts[n] + parts[n + 1]]
        ids = [i for p in parts for i in self.ids[self.ranks[p]]]
        if not ids or (len(parts) > 1 and self.left):   # (byte-level: tiktoken may also merge what must not)
            raise ValueError(f"this tokenizer.json has no token {token}, or no merges that make it")
        return ids

    def encode(self, text):
        """Ids, without <bos> and <eos>. Special tokens count as plain text, lone surrogates as U+FFFD."""
        if len(text) > MAX_CHARS:
            raise ValueError(f"a text of {len(text):,} characters: encode at most {MAX_CHARS:,} at a time")
        ids = []
        for part in self.split.split(text):
            if part in self.added:
                ids.append(self.added[part])
            else:
                with naming("tiktoken cannot encode it"):       # a regex may be too much for it
                    ranks = self.bpe.encode_ordinary(self.normalize(part))
                ids += chain.from_iterable(map(self.ids_of, ranks))
        return ids

    def decode(self, ids):
        """Text without control tokens. U+FFFD stands for bytes that are not UTF-8, and for ids beyond the
        vocabulary: an embedding may have more rows, and a model may choose one."""
        return b"".join([self.bytes.get(int(i), b"\xff") for i in ids]).decode("utf-8", "replace")
