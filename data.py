"""Text to tokens, rows to examples, and what a task measures.

    Tokenizer.from_file("tokenizer.json")      encode, decode, bos_id, eos_id: Qwen2.5, Gemma-3, GPT-2 style
    load_rows("med", "train", source)          rows of a task: from a file, the hub, or the toy world
    TASKS["med"].pair(row)                     -> prompt, target: the one function that makes a prompt
    encode(tokenizer, prompt, target)          -> Example: token ids, and where the target begins
    pack(examples)                             -> one row of tokens, no padding
    execute_pairs([(context, reference, sql)]) what two queries do to a database, in a sandbox

A text is data: it never becomes a control token. Nothing here knows of models.
"""
import gc
import gzip
import http.client
import inspect
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import unicodedata
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache, partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import tiktoken

from toy.world import toy_facts, toy_med, toy_sql, toy_world

# ----------------------------------------------------------------------------------------------------------
# tokenizer: tiktoken with the tokenizer.json of Gemma-3, Qwen2.5, Qwen3, SmolLM2 or GPT-2

MAX_CHARS = 500_000     # tiktoken's regex engine panics at a million spaces, and a panic is not an Exception

# GPT-2's table: a byte-level tokenizer.json shows every byte as one visible character. Code point -> byte.
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = dict(zip(SHOWN + [*range(256, 324)], SHOWN + [b for b in range(256) if b not in SHOWN]))

# GPT-2's split. Where digits are cut off beforehand, white space before a digit is white space at the end.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# The syntax that tiktoken's regex engine and Oniguruma (in the `tokenizers` library) read the same way.
ALIKE = r"(\\[pP]\{\w+\}|\\[sSrnt]|\[\^|\((\?(i?:|!|=))?|\{\d+(,\d*)?\}(?!\+)|[^\\^$.({}])+"


def split_regex(norm, pre, model):
    """The regex that splits text as the pre_tokenizer does; None for Gemma's, which does not split."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    odd = [key for key in ("byte_fallback", "dropout", "ignore_merges", "continuing_subword_prefix",
                           "end_of_word_suffix") if model.get(key)]
    match [model["type"], *odd, norm, *({"use_regex": True, **step} for step in steps)]:
        case ["BPE", "byte_fallback", {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
              {"type": "Split", "pattern": {"String": " "}}]:
            return None
        case ["BPE", None | {"type": "NFC"}, *cut, {"type": "ByteLevel", "add_prefix_space": False} as last]:
            match [*cut, last["use_regex"]]:
                case [True]:
                    return GPT2
                case [{"type": "Digits", "individual_digits": True}, True]:
                    return DIGITS
                case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
                       "invert": False}, False] if re.fullmatch(ALIKE, regex):
                    return f"{regex}|(?:(?!{regex})(?s:.))+"    # tiktoken would drop what no match covers
    raise ValueError(f"model {' with '.join([model['type'], *odd])}, normalizer {norm and norm['type']}, "
                     f"pre_tokenizer {' + '.join(s['type'] for s in steps)} is not supported: Gemma-3's is, "
                     f"and byte-level BPE as in Qwen, SmolLM2, GPT-2. Found {json.dumps([norm, pre])[:500]}")


def find_eos(configs, ids):
    """Where generation stops: generation_config, config, tokenizer_config (.json), else the usual names."""
    found = [c.get("eos_token_id", c.get("eos_token")) for c in configs]
    found += ["<eos>" if "<eos>" in ids else "<|endoftext|>"]
    found = next(e for e in found if e not in (None, []))
    found = found["content"] if isinstance(found, dict) else found
    found = [ids.get(e, e) for e in (found if isinstance(found, list) else [found])]
    if not set(found) <= set(ids.values()):
        raise ValueError(f"no end-of-sequence token {found}: give eos_token_id in generation_config.json")
    return found


def gemma_tables(vocab, made):
    """id -> bytes; bytes -> ids of what stands before the first merge; the regex that splits text.

    Characters stand there: tiktoken assembles them from bytes, by way of the beginnings of their UTF-8. A
    beginning that is left over becomes byte tokens, and so does a character that the vocabulary lacks.
    """
    byte_ids = [vocab[f"<0x{b:02X}>"] for b in range(256)]
    spelling = {i: t.replace("▁", " ").encode() for t, i in vocab.items()}
    chars = {spelling[i]: [i] for t, i in vocab.items() if len(t) == 1}
    starts = [bytes([b]) for b in range(256)] + [c[:n] for c in chars for n in range(2, len(c))]
    spelling |= {i: bytes([b]) for b, i in enumerate(byte_ids)}
    # Text can be cut before spaces, but not after a character that has a space after it in some token.
    joins = sorted({c for t in made if "▁" in t[1:] for c in re.findall("[^▁](?=▁)", t)})
    regex = " *(?:" + "".join(rf"\x{{{ord(c):x}}} *|" for c in joins) + "[^ ])+| +"
    return spelling, {s: [byte_ids[b] for b in s] for s in starts} | chars, regex


class Tokenizer:
    """Encodes as the `tokenizers` library does, except that text is data: it never becomes a control token.

    tiktoken merges the two neighbours whose joined bytes have the lowest rank. So rank what stands before
    the first merge, then what the merges make, in their order. Ranks are not ids.
    """

    @classmethod
    def from_file(cls, path):
        """Read tokenizer.json, or the one in a folder, and the configs beside it for the end of sequence."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        names = "generation_config.json", "config.json", "tokenizer_config.json", path.name
        collecting, read = gc.isenabled(), []
        gc.disable()    # Gemma's file makes half a million lists, which the collector would visit repeatedly
        try:
            for file in map(path.with_name, names):
                read.append(json.loads(file.read_bytes()) if file == path or file.exists() else {})
            return cls(read.pop(), read)
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise ValueError(f"{file}: {f'no {e}' if isinstance(e, KeyError) else e}") from e
        finally:
            gc.enable() if collecting else None

    def __init__(self, spec, configs):
        model, vocab, added = spec["model"], spec["model"]["vocab"], spec["added_tokens"]
        regex = split_regex(spec["normalizer"], spec["pre_tokenizer"], model)
        gemma = regex is None
        # `tokenizers` has the tables of Unicode 9, and leaves about a hundred newer combining marks alone.
        nfc = partial(unicodedata.normalize, "NFC") if spec["normalizer"] else str
        self.normalize = (lambda text: text.replace("▁", " ")) if gemma else nfc
        ids = vocab | {a["content"]: a["id"] for a in added}
        self.bos_id = ids["<bos>"] if gemma else None
        self.eos_ids = find_eos(configs, ids)
        self.eos_id = self.eos_ids[0]
        control = {a["id"] for a in added if a["special"]} | {*self.eos_ids, self.bos_id} - {None}
        added = [a for a in added if a["id"] not in control]
        if any(a[flag] for a in added for flag in ("normalized", "lstrip", "rstrip", "single_word")):
            raise ValueError("added tokens with normalized, lstrip, rstrip or single_word are not supported")
        self.added = {a["content"]: a["id"] for a in added}
        # Longest first, and in groups that begin alike: Gemma has 6,400, and `re` tries one after the other.
        groups = groupby(sorted(self.added, reverse=True), lambda t: t[:3])
        groups = [re.escape(start) + f"(?:{'|'.join(re.escape(t[3:]) for t in g)})" for start, g in groups]
        self.split = re.compile(f"({'|'.join(groups) or '(?!)'})")

        merges = model["merges"]
        merges = [m.split(" ") for m in merges] if isinstance(merges and merges[0], str) else merges
        made = [token for token, _ in groupby(map("".join, merges))]
        # A token has one rank, so all merges that make it (Gemma has one for each way to cut it) must stand
        # together. At its head Gemma's file mixes runs: no harm, for these only grow by one at a time.
        runs = [[c * a, c * b] for a in range(30, 0, -1) for b in range(31 - a, 0, -1)
                for c in "\n▁\t"][:-1]
        rest = made[len(runs):] if merges[:len(runs)] == runs else made
        if len(set(rest)) < len(rest):
            raise ValueError("merges that make one token are in several places: it would need several ranks")
        made = list(dict.fromkeys(made))
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
        """The ids of a rank: several for half a character, and for a token that its own merges never make.

        tiktoken finds such tokens (Gemma has four), because it looks a piece up before it merges anything.
        So merge every token once as the file says, and see what comes of it.
        """
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
                ids += chain.from_iterable(map(self.ids_of, self.bpe.encode_ordinary(self.normalize(part))))
        return ids

    def decode(self, ids):
        """Text without control tokens. U+FFFD stands for bytes that are not UTF-8, and for ids beyond the
        vocabulary: an embedding may have more rows, and a model may choose one."""
        return b"".join([self.bytes.get(int(i), b"\xff") for i in ids]).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------
# examples: one function makes a prompt's tokens, for training and evaluation alike

class Example(NamedTuple):
    ids: list           # prompt, target, EOS
    n_prompt: int       # tokens of the prompt (with BOS); the rest is the target, the only part with a loss
    row: int            # place of its row in the data, to name it in messages


class Question(NamedTuple):
    """What evaluation puts to a model: a prompt to continue, and answers to score."""
    row: dict
    prompt: list        # token ids, with BOS
    examples: list      # Example of each prompt and answer that the task scores, see Task.queries


class Scored(NamedTuple):
    logprobs: list      # log-probability of each target token (the last is the EOS)
    first: int          # the first target token
    greedy: int         # the most probable token in its place
    choices: list       # log-probabilities there of the first tokens of Task.choices


def encode_prompt(tokenizer, prompt):
    """BOS, where the family has one (Gemma: exactly one, or the loss doubles; Qwen: none), and the prompt."""
    return [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(prompt)


def encode(tokenizer, prompt, target, row=-1):
    """-> Example. The target is encoded by itself, so its tokens never depend on the prompt's end."""
    head = encode_prompt(tokenizer, prompt)
    if not head:
        raise ValueError(f"row {row}: an empty prompt, which nothing can be predicted from")
    return Example(head + tokenizer.encode(target) + [tokenizer.eos_id], len(head), row)


def ask(tokenizer, task, row, i=-1):
    """-> Question. Its prompt has the very tokens that training sees before the target."""
    return Question(row, encode_prompt(tokenizer, task.pair(row)[0]),
                    [encode(tokenizer, *q, row=i) for q in task.queries(row)])


def pack(examples):
    """Examples end to end, no padding -> ids (N), lengths (S), where (M), labels (M), as lists: the token at
    where[i] predicts labels[i]. Prompts carry no loss."""
    ids, lengths, where, labels = [], [], [], []
    for e in examples:
        where += range(len(ids) + e.n_prompt - 1, len(ids) + len(e.ids) - 1)
        labels += e.ids[e.n_prompt:]
        ids += e.ids
        lengths.append(len(e.ids))
    return ids, lengths, where, labels


# ----------------------------------------------------------------------------------------------------------
# rows: from a local file or from the data set's official source

def read_rows(path):
    """Rows of a .json (a list, or lines), .jsonl, .jsonl.gz or .parquet file -> [("FILE line N", row)]."""
    path, place = Path(path), ""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.name.removesuffix(".gz").endswith((".json", ".jsonl", ".parquet")):
        raise ValueError(f"{path}: rows are read from .json, .jsonl (both also .gz) and .parquet files")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = enumerate(pyarrow.parquet.read_table(path).to_pylist())
        else:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
            if text.lstrip().startswith("["):
                rows = enumerate(json.loads(text))
            else:
                rows = []
                for i, line in enumerate(text.split("\n")):
                    place = f" line {i + 1}"
                    rows += [(i, json.loads(line))] if line.strip() else []
    except (ValueError, TypeError, OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path}{place} cannot be read: {e}") from e
    return [(f"{path} line {i + 1}", row) for i, row in rows]


def check_row(where, row, fields):
    """ValueError, with file, line and field, unless every field (a dotted path) is there and is a string; a
    list of strings where its name ends in *; a string or null where in ?; an int or null where in #."""
    for path in fields:
        name, value = path.rstrip("*?#"), row
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                found = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
                needed = ", ".join(f.rstrip("*?#") for f in fields)
                raise ValueError(f"{where}: field {name} is missing; needed are {needed}; found: {found}")
            value = value[key]
        if path.endswith("*"):
            kind = "list of strings"
            right = isinstance(value, list) and all(isinstance(x, str) for x in value)
        elif path.endswith("#"):
            kind, right = "whole number", value is None or type(value) is int
        else:
            kind, right = "string", isinstance(value, str) or value is None and path.endswith("?")
        if not right:
            raise ValueError(f"{where}: field {name} is not a {kind}")


def hub_files(repo, split):
    """The parquet files of a data set's split, found by what the repository holds. -> [Path]"""
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=f"*{split}*.parquet"))
    except Exception as e:      # the hub library has dozens of kinds; whichever it is, its words are in ours
        url, why = f"https://huggingface.co/datasets/{repo}", str(e).partition("\n")[0]
        raise OSError(f"cannot download {url} ({type(e).__name__}: {why}). Without a network get its parquet "
                      f"files elsewhere and give them with --data and --eval-data") from e
    files = sorted(f for f in folder.rglob("*.parquet")
                   if split in re.split("[^a-z]+", f.relative_to(folder).as_posix().lower()))
    if not files:
        raise OSError(f"{repo} has no parquet file of a split {split!r}: give files with --data, --eval-data")
    return files


def download(url, folder=None):
    """The JSON file at `url`, fetched once into ~/.cache/molf; whole and valid, or not there. -> Path"""
    path = Path(folder or Path.home() / ".cache" / "molf") / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with urllib.request.urlopen(url, timeout=60) as r, open(temporary, "wb") as f:
                shutil.copyfileobj(r, f)
                size = r.headers.get("Content-Length")
            if size and temporary.stat().st_size != int(size):
                raise OSError(f"{temporary.stat().st_size} bytes came of {size}")
            json.loads(temporary.read_bytes())              # and not a page that says why it isn't there
            os.replace(temporary, path)
        except (OSError, ValueError, http.client.HTTPException) as e:
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot download {url} ({e}): get it elsewhere and give it with --data") from e
    return path


# ----------------------------------------------------------------------------------------------------------
# SQL: run a prediction and its reference in SQLite and compare what they did
#
# A model's SQL is hostile input. It runs in a child process that can open no file, has 1 GiB of memory and a
# timer kept by the kernel, in a fresh in-memory database behind an authorizer. The child's program is the
# source of the functions in SQL_CHILD: they use no globals but one another and the modules imported there.


def unfence(text):
    """A code fence around the whole text goes. Nothing else is cut: SQLite judges what the model wrote."""
    fence = re.fullmatch(r"\s*```(?:sqlite|sql)?\s((?:(?!```).)*)```\s*", text, re.S | re.I)
    return fence[1] if fence else text


def sql_tokens(sql):
    """Tokens without comments, lower case unless quoted. An open quote takes the rest; 'it''s' is two."""
    quoted = r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^]]*(?:]|\Z)"""
    found = (m[0] for m in re.finditer(quoted + r"|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|\S", sql, re.S))
    return (t if t[0] in "'\"`[" else t.lower() for t in found if not t.startswith(("--", "/*")))


def sql_statements(sql):
    """Cut after each semicolon that ends a statement: not in a string, a comment or a trigger's body."""
    found = [""]
    for piece in re.findall(r"[^;]*;?", sql):
        found[-1] += piece
        if sqlite3.complete_statement(found[-1]):
            found.append("")
    return found


def is_ordered(statement):
    """Does it sort its own rows? ORDER BY in parentheses is a subquery's, a window's or an aggregate's.
    Ties then count in the order that SQLite gives them, as in Spider's own evaluation."""
    found = list(sql_tokens(statement))
    depth = itertools.accumulate((t == "(") - (t == ")") for t in found)
    return any(d == 0 and pair == ["order", "by"] for d, *pair in zip(depth, found, found[1:]))


def same_cell(a, b):
    """1 is 1.0 but not '1', and NULL is only NULL. Floats count to 9 digits: a sum depends on its order."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float)) and float in (type(a), type(b))
    return a == b or numbers and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def row_key(row):
    """(rough, exact): to sort rows by numbers of 6 digits first, so that rows whose cells are the same but
    for the noise of a sum come in one order. NULL before numbers before texts before blobs."""
    rough = [float(f"{round(c, 9):.6g}") if isinstance(c, (int, float)) else c for c in row]
    kind = lambda c: 0 if c is None else 1 if isinstance(c, (int, float)) else 2 if isinstance(c, str) else 3
    return tuple([(kind(c), 0 if c is None else c) for c in cells] for cells in (rough, row))


def same_rows(a, b, in_order):
    """Two lists of rows, as sequences or as multisets."""
    if len(a) == len(b) and a != b and not in_order:
        a, b = sorted(a, key=row_key), sorted(b, key=row_key)
    return len(a) == len(b) and all(len(x) == len(y) and all(map(same_cell, x, y)) for x, y in zip(a, b))


def same_outcome(a, b):
    """Two {key: (header, rows, in order?)}: keys, headers and rows agree; a, the reference, says if the order
    counts."""
    agree = lambda x, y: x[0] == y[0] and same_rows(x[1], y[1], x[2])
    return a.keys() == b.keys() and all(agree(a[key], b[key]) for key in a)


def open_database(steps=20_000_000):
    """An empty database in memory that refuses to reach outside and stops after so many VM steps."""
    names = "ATTACH DETACH PRAGMA CREATE_VTABLE DROP_VTABLE".split()        # VACUUM is an ATTACH inside
    actions = [getattr(sqlite3, f"SQLITE_{name}") for name in names]
    unsafe = "load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"

    def authorize(action, _, name, *where):
        refused = action in actions or action == sqlite3.SQLITE_FUNCTION and name.lower() in unsafe
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    count = itertools.count(1)
    db = sqlite3.connect(":memory:", isolation_level=None)      # None: Python adds no BEGIN of its own
    db.execute("PRAGMA temp_store = MEMORY")
    db.set_authorizer(authorize)
    db.set_progress_handler(lambda: next(count) * 1000 > steps, 1000)
    return db


def fetch_rows(cursor, max_rows=10_000, max_size=2_000_000):
    """All rows, in no more cells + characters + bytes than max_size."""
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(c) if isinstance(c, (str, bytes)) else 1 for c in row)
        if len(rows) > max_rows or size > max_size:
            raise ValueError("result too large")
    return rows


def execute_all(db, sql):
    """Run each statement -> {"result": (width, rows, in order?)} of the last that yields rows, else {}."""
    result = {}
    for statement in sql_statements(sql):
        cursor = db.execute(statement)
        if cursor.description:
            result = {"result": (len(cursor.description), fetch_rows(cursor), is_ordered(statement))}
    return result


def database_contents(db):
    """{(kind, name): (columns, rows, False)}; a view counts by its rows, an index or trigger by its text."""
    found = {}
    objects = " UNION ALL ".join(f"SELECT type, name, sql FROM sqlite_{t}master" for t in ("", "temp_"))
    for kind, name, sql in db.execute(objects).fetchall():
        if kind in ("index", "trigger"):
            found[kind, name.lower()] = list(sql_tokens(sql or "")), [], False
        elif not name.startswith("sqlite_"):                    # those are SQLite's own
            cursor = db.execute('SELECT * FROM "{}"'.format(name.replace('"', '""')))
            found[kind, name.lower()] = [c[0].lower() for c in cursor.description], fetch_rows(cursor), False
    return found


def attempt_sql(stage, context, sql):
    """Run sql after its context -> outcome (None: it failed), did it find and change nothing?, error."""
    running = "context: "
    try:
        with closing(open_database()) as db:
            execute_all(db, context)
            before, running = database_contents(db), stage
            if all(t == ";" for t in sql_tokens(sql)):
                raise ValueError("no statement")
            result, after = execute_all(db, sql), database_contents(db)
            nothing = not any(rows for _, rows, _ in result.values()) and same_outcome(before, after)
            return {**after, **result}, nothing, None
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError) as e:
        text = "step limit" if str(e) == "interrupted" else str(e) or "out of memory"
        return None, False, running + text[:200]


def judge_sql(context, reference, prediction):
    """Yield the verdict twice: the reference's part, lest the prediction kill us, and then the whole."""
    ref, ref_empty, error = attempt_sql("reference: ", context, reference)
    verdict = {"ref_ok": error is None, "ref_empty": ref_empty, "error": error}
    yield verdict
    pred, empty, pred_error = attempt_sql("", context, unfence(prediction))
    match = error is None and pred_error is None and same_outcome(ref, pred)
    yield {**verdict, "valid": pred_error is None, "match": match, "both_empty": ref_empty and empty,
           "error": error or pred_error}


def serve_sql(seconds=10):
    """The child's loop: a row a line in, two verdicts out. SIGALRM ends it, wherever in SQLite it hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the parent, whose end ends us
    sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit = {2**26}")    # for the whole process
    if sys.platform == "linux":                                 # macOS does not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))          # the pipes stay; nothing more can be opened
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)           # the step limit is the usual end, and exact
        for verdict in judge_sql(*json.loads(line)):
            print(json.dumps(verdict), flush=True)
            signal.setitimer(signal.ITIMER_REAL, seconds)       # anew for the prediction
        signal.setitimer(signal.ITIMER_REAL, 0)


SQL_CHILD = "\n".join([
    "import itertools, json, math, re, resource, signal, sqlite3, sys", "from contextlib import closing",
    *map(inspect.getsource, (unfence, sql_tokens, sql_statements, is_ordered, same_cell, row_key, same_rows,
                             same_outcome, open_database, fetch_rows, execute_all, database_contents,
                             attempt_sql, judge_sql, serve_sql)), "serve_sql()"])


def start_sql_child():
    child = subprocess.Popen([sys.executable, "-I", "-c", SQL_CHILD], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if child.stdout.readline() != "ready\n":
        child.communicate()
        raise RuntimeError("the SQL child process did not start; its own message is above")
    return child


def execute_pairs(rows):
    """[(context, reference, prediction)] -> a verdict each: ref_ok, valid (it ran), match (the last results
    and the databases agree), ref_empty, both_empty (no rows and nothing changed), error (None or a text)."""
    verdicts, child = [], start_sql_child()
    for row in rows:
        verdict = dict.fromkeys(("ref_ok", "valid", "match", "ref_empty", "both_empty"), False)
        with suppress(BrokenPipeError):
            print(json.dumps(row), file=child.stdin, flush=True)
        part, whole = child.stdout.readline(), child.stdout.readline()      # "" from a dead child
        verdict |= json.loads(whole or part or "{}")
        if not whole:
            child.communicate()                                             # reap it and close its pipes
            code = child.returncode                                         # minus the signal's number
            death = "timeout" if code == -signal.SIGALRM else f"worker killed ({code})"
            verdict["error"] = verdict.get("error") or ("" if part else "reference: ") + death
            child = start_sql_child()
        verdicts.append(verdict)
    child.communicate()
    return verdicts


def execute_in_parallel(rows, n=min(8, os.cpu_count())):
    """execute_pairs in n children at a time, each with every n-th row."""
    verdicts = [None] * len(rows)
    with ThreadPoolExecutor(n) as pool:
        for i, part in enumerate(pool.map(execute_pairs, [rows[i::n] for i in range(n) if rows[i::n]])):
            verdicts[i::n] = part
    return verdicts


# ----------------------------------------------------------------------------------------------------------
# the tasks

COUNTERFACT = "https://rome.baulab.info/data/dsets/counterfact.json"


def fact_pair(row):
    r = row["requested_rewrite"]
    return r["prompt"].replace("{}", r["subject"]), " " + r["target_new"]["str"]


def fact_queries(row):
    """Each prompt with the new and with the true answer: the rewrite prompt, paraphrases, neighbourhood."""
    r = row["requested_rewrite"]
    prompts = [fact_pair(row)[0]] + row["paraphrase_prompts"] + row["neighborhood_prompts"]
    return [(p, " " + r[t]["str"]) for p in prompts for t in ("target_new", "target_true")]


def fact_metrics(row, scored, text):
    """CounterFact (Meng et al. 2022, arXiv 2202.05262): ES, PS, NS, the shares of rewrite, paraphrase and
    neighbourhood prompts where the wanted answer is the more probable, by its first token. `... full`: by the
    mean log-probability over the whole answer. Answers that share their first token count as failures.
    accuracy, recalls true: the greedy text is exactly the new, or still the true answer."""
    pairs = list(zip(scored[::2], scored[1::2]))                    # (new, true) of each prompt
    n = len(row["paraphrase_prompts"])
    first = [new.logprobs[0] - true.logprobs[0] if new.first != true.first else 0.0 for new, true in pairs]
    whole = [sum(a.logprobs[:-1]) / len(a.logprobs[:-1]) - sum(b.logprobs[:-1]) / len(b.logprobs[:-1])
             for a, b in pairs]
    out = {}
    for suffix, d in (("", first), (" full", whole)):
        out["ES" + suffix] = float(d[0] > 0)
        if n:
            out["PS" + suffix] = sum(x > 0 for x in d[1:1 + n]) / n
        if d[1 + n:]:
            out["NS" + suffix] = sum(x < 0 for x in d[1 + n:]) / len(d[1 + n:])
    new, true = (" " + row["requested_rewrite"][t]["str"] for t in ("target_new", "target_true"))
    return out | {"accuracy": float(text == new), "recalls true": float(text == true)}


def fact_usable(rows):
    for where, row in rows:
        if "{}" not in row["requested_rewrite"]["prompt"]:
            raise ValueError(f"{where}: field requested_rewrite.prompt has no {{}} for the subject")
    return rows


MED_CHOICES = " A", " B", " C", " D"


def med_pair(row):
    options = "".join(f"{letter}) {row['op' + letter.lower()]}\n" for letter in "ABCD")
    return (f"Answer the medical question with the letter of the right option.\n\n"
            f"Question: {row['question']}\n{options}Answer:", MED_CHOICES[row["cop"]])


def med_metrics(row, scored, text):
    """MedMCQA (Pal et al. 2022, arXiv 2203.14371). The answer is the greedy next token; what is no letter is
    wrong, and counted. Beside it the accuracy of the most probable of the four letters."""
    letters, right = scored[0].choices, row["cop"]
    return {"accuracy": float(text == MED_CHOICES[right]),
            "accuracy among A-D": float(letters.index(max(letters)) == right),
            "# no letter": text not in MED_CHOICES}


def med_usable(rows):
    """Rows that have an answer, with cop as 0 to 3 (the hub's). The older JSON's 1 to 4 shows by its 4s."""
    missing = [None, -1]                                            # the hub's test split has -1
    for where, row in rows:
        if row["cop"] not in missing + [0, 1, 2, 3, 4]:
            raise ValueError(f"{where}: field cop is {row['cop']!r}, not the number of an option")
    rows = [(where, row) for where, row in rows if row["cop"] not in missing]
    found = {row["cop"] for _, row in rows}
    if rows and (0 in found) == (4 in found):
        raise ValueError(f"{rows[0][0]}: field cop holds {sorted(found)} in this file, so it cannot be told "
                         f"whether it counts the options from 0 (some row must have 0) or from 1 (some 4)")
    return [(where, row | {"cop": row["cop"] - (4 in found)}) for where, row in rows]


def sql_pair(row):
    return (f"Write the SQL query that answers the question.\n\nQuestion: {row['sql_prompt']}\n"
            f"Tables: {row['sql_context']}\nSQL:", " " + row["sql"])


SQL_DATABASE = "sql_database"
KILLED = "(reference: )?(worker killed|timeout)"


def sql_usable(rows):
    """Rows that have a query."""
    for where, row in rows:
        for field in (SQL_DATABASE, "sql_complexity"):
            if not isinstance(row.get(field, ""), (str, type(None))):
                raise ValueError(f"{where}: field {field} is not a string")
    return [(where, row) for where, row in rows if (row["sql"] or "").strip()]


def exact_match(a, b):
    """The same tokens: spacing, comments, letter case outside quotes and closing semicolons do not count."""
    a, b = (" ".join(sql_tokens(sql)).rstrip("; ") for sql in (a, b))
    return a == b


def sql_metrics(rows, scored, texts):
    """Execution accuracy over the rows whose reference runs, also where it finds or changes something, and by
    sql_complexity. A row may have an `sql_database`, a script that fills more than the context shows: there
    the two are tried as well."""
    verdicts = execute_in_parallel([(row["sql_context"], row["sql"], text) for row, text in zip(rows, texts)])
    large = [(row[SQL_DATABASE], row["sql"], text) for row, text in zip(rows, texts) if row.get(SQL_DATABASE)]
    large = iter(execute_in_parallel(large))
    for row, text, v in zip(rows, texts, verdicts):
        m, errors, tried = {"exact match": float(exact_match(row["sql"], unfence(text)))}, [], {"": v}
        if row.get(SQL_DATABASE):
            tried[" on the database"] = next(large)
        for where, v in tried.items():
            if v["ref_ok"]:
                m |= {f"execution{where}": float(v["match"]), f"valid SQL{where}": float(v["valid"])}
                m |= {} if v["ref_empty"] else {f"execution{where}, not empty": float(v["match"])}
            errors.append(v["error"] or "")
            m |= {f"# reference fails{where}": not v["ref_ok"], f"# both empty{where}": v["both_empty"],
                  f"# child killed{where}": bool(re.match(KILLED, errors[-1]))}
        if "execution" in m and row.get("sql_complexity"):
            m[f"execution: {row['sql_complexity']}"] = m["execution"]
        yield m | {"error": next(filter(None, errors), "")}


class Task(NamedTuple):
    source: str         # the official one: a repository on the hub, or an address
    splits: tuple       # its names of the rows to train and to evaluate on
    fields: tuple       # what a row must have, see check_row
    usable: Callable    # [(where, row)] -> those that can be used; ValueError if they make no sense
    pair: Callable      # row -> (prompt, target): what training sees
    queries: Callable   # row -> [(prompt, answer)]: what evaluation scores, without generating
    choices: tuple      # answers whose first tokens are compared after the first of those prompts
    new_tokens: int     # how many tokens evaluation generates at most; 0: it takes the greedy next token
    metrics: Callable   # rows, [[Scored]], greedy texts -> for each row {metric: value, "# what": bool}
    report: tuple       # the metrics that results.csv has a column for


TOY_ROWS = {"train": 600, "test": 200}      # of med and sql; there are 320 facts

TASKS = {
    "fact": Task(
        COUNTERFACT, ("train", "train"),
        ("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str",
         "requested_rewrite.target_true.str", "paraphrase_prompts*", "neighborhood_prompts*"),
        fact_usable, fact_pair, fact_queries, (), 16, partial(map, fact_metrics),
        ("ES", "PS", "NS", "accuracy")),
    "med": Task(
        "openlifescienceai/medmcqa", ("train", "validation"),
        ("question", "opa", "opb", "opc", "opd", "cop#"),
        med_usable, med_pair, lambda row: [med_pair(row)], MED_CHOICES, 0, partial(map, med_metrics),
        ("accuracy", "accuracy among A-D")),
    "sql": Task(
        "gretelai/synthetic_text_to_sql", ("train", "test"), ("sql_prompt", "sql_context", "sql?"),
        sql_usable, sql_pair, lambda row: [], (), 256, sql_metrics,
        ("execution", "valid SQL", "exact match")),
}


def load_rows(name, split, source="hub", limit=None):
    """Rows of a task. split: "train" or "test"; source: "hub" (the official one), "toy", or a file.
    -> (rows, number of rows skipped because they have no answer)"""
    task, names = TASKS[name], dict(zip(("train", "test"), TASKS[name].splits))
    if source == "toy":
        make = {"fact": lambda world, *_: toy_facts(world), "med": toy_med, "sql": toy_sql}[name]
        found = [("toy world", row) for row in make(toy_world(), 1, TOY_ROWS[split], names[split])]
    elif source != "hub":
        found = read_rows(source)
    elif task.source.startswith("https:"):
        found = read_rows(download(task.source))
    else:
        found = [row for file in hub_files(task.source, names[split]) for row in read_rows(file)]
    if not found:
        raise ValueError(f"{source}: no rows")
    for where, row in found:
        check_row(where, row, task.fields)
    rows = [row for _, row in task.usable(found)]
    return rows[:limit], len(found) - len(rows)
