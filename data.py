"""Text to tokens, rows to examples, and what a task measures.

    Tokenizer.from_file("tokenizer.json")      encode, decode, bos_id, eos_id: Qwen2.5, Gemma-3, GPT-2 style
    load_rows("fact", path)                    rows of a task, from a file or its official source
    TASKS["fact"].pair(row)                    -> prompt, target: the one function that makes a prompt
    encode(tokenizer, prompt, target)          -> Example: token ids, and where the target begins
    pack(examples)                             -> one row of tokens, no padding

A text is data: it never becomes a control token. Nothing here knows of models.
"""
import gc
import gzip
import json
import os
import re
import shutil
import unicodedata
import urllib.request
import zlib
from functools import cache, partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Callable, NamedTuple

import tiktoken

from toy.world import toy_facts, toy_world

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
        runs = [[c * a, c * b] for a in range(30, 0, -1) for b in range(31 - a, 0, -1) for c in "\n▁\t"][:-1]
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
        """Text without control tokens; bytes that are not UTF-8 become U+FFFD."""
        try:
            return b"".join([self.bytes[int(i)] for i in ids]).decode("utf-8", "replace")
        except KeyError as e:
            raise ValueError(f"token id {e} is not in the vocabulary (0 to {max(self.bytes)})") from None


# ----------------------------------------------------------------------------------------------------------
# examples: one function makes a prompt's tokens, for training and evaluation alike

class Example(NamedTuple):
    ids: list           # prompt, target, EOS
    n_prompt: int       # tokens of the prompt (with BOS); the rest is the target, the only part with a loss
    row: int            # place of its row in the data, to name it in messages


class Scored(NamedTuple):
    logprobs: list      # log-probability of each target token (the last is the EOS)
    greedy: list        # whether it is the most probable token there
    first: int          # the first target token


def encode_prompt(tokenizer, prompt):
    """BOS, where the family has one (Gemma: exactly one, or the loss doubles; Qwen: none), and the prompt."""
    return [tokenizer.bos_id] * (tokenizer.bos_id is not None) + tokenizer.encode(prompt)


def encode(tokenizer, prompt, target, row=-1):
    """-> Example. The target is encoded by itself, so its tokens never depend on the prompt's end."""
    head = encode_prompt(tokenizer, prompt)
    if not head:
        raise ValueError(f"row {row}: an empty prompt, which nothing can be predicted from")
    return Example(head + tokenizer.encode(target) + [tokenizer.eos_id], len(head), row)


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

COUNTERFACT = "https://rome.baulab.info/data/dsets/counterfact.json"


def read_rows(path):
    """Rows of a .json (a list), .jsonl, .jsonl.gz or .parquet file -> [("FILE line N", row)]."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    place = ""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            rows = enumerate(pyarrow.parquet.read_table(path).to_pylist())
        else:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            if path.name.removesuffix(".gz").endswith(".json"):
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
    """ValueError, with file, line and field, unless every field (a dotted path) is there and is a string, or
    a list of strings where its name ends in *."""
    for path in fields:
        value = row
        for key in path.rstrip("*").split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{where}: field {path.rstrip('*')} is missing")
            value = value[key]
        many = path.endswith("*")
        if not (isinstance(value, list) if many else isinstance(value, str)) \
                or many and not all(isinstance(x, str) for x in value):
            kind = "list of strings" if many else "string"
            raise ValueError(f"{where}: field {path.rstrip('*')} is not a {kind}")


def download(url, folder=None):
    """The file at `url`, fetched once into ~/.cache/molf and whole, or not there at all. -> Path"""
    path = Path(folder or Path.home() / ".cache" / "molf") / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        try:
            with urllib.request.urlopen(url, timeout=60) as r, open(temporary, "wb") as f:
                shutil.copyfileobj(r, f)
                size = r.headers.get("Content-Length")
            if size and temporary.stat().st_size != int(size):
                raise OSError(f"{temporary.stat().st_size} bytes came of {size}")
            os.replace(temporary, path)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot download {url} ({e}): get it elsewhere and give it with --data") from e
    return path


# ----------------------------------------------------------------------------------------------------------
# the tasks

def fact_pair(row):
    r = row["requested_rewrite"]
    return r["prompt"].replace("{}", r["subject"]), " " + r["target_new"]["str"]


def fact_queries(row):
    """Each prompt with the new and with the true answer: the rewrite prompt, paraphrases, neighbourhood."""
    r = row["requested_rewrite"]
    prompts = [fact_pair(row)[0]] + row["paraphrase_prompts"] + row["neighborhood_prompts"]
    return [(p, " " + r[t]["str"]) for p in prompts for t in ("target_new", "target_true")]


def fact_metrics(row, scored):
    """CounterFact (Meng et al. 2022, arXiv 2202.05262): ES, PS, NS, the shares of rewrite, paraphrase and
    neighbourhood prompts where the wanted answer is the more probable, by its first token. `... full`: by the
    mean log-probability over the whole answer. Answers that share their first token count as failures."""
    pairs = list(zip(scored[::2], scored[1::2]))                    # (new, true) of each prompt
    n = len(row["paraphrase_prompts"])
    first = [new.logprobs[0] - true.logprobs[0] if new.first != true.first else 0.0 for new, true in pairs]
    whole = [sum(a.logprobs[:-1]) / len(a.logprobs[:-1]) - sum(b.logprobs[:-1]) / len(b.logprobs[:-1])
             for a, b in pairs]
    # Greedy text: the new answer and EOS, or still the true one.
    out = {"accuracy": float(all(pairs[0][0].greedy)), "recalls true": float(all(pairs[0][1].greedy))}
    for suffix, d in (("", first), (" full", whole)):
        out["ES" + suffix] = float(d[0] > 0)
        if n:
            out["PS" + suffix] = sum(x > 0 for x in d[1:1 + n]) / n
        if d[1 + n:]:
            out["NS" + suffix] = sum(x < 0 for x in d[1 + n:]) / len(d[1 + n:])
    return out


def med_pair(row):
    options = "".join(f"{letter}) {row['op' + letter.lower()]}\n" for letter in "ABCD")
    return (f"Answer the medical question with the letter of the right option.\n\n"
            f"Question: {row['question']}\n{options}Answer:", " " + "ABCD"[row["cop"]])


def sql_pair(row):
    return (f"Write the SQL query that answers the question.\n\nQuestion: {row['sql_prompt']}\n"
            f"Tables: {row['sql_context']}\nSQL:", " " + row["sql"])


class Task(NamedTuple):
    fields: tuple       # what a row must have, see check_row
    pair: Callable      # row -> (prompt, target): what training sees
    queries: Callable   # row -> [(prompt, target)]: what evaluation scores
    metrics: Callable   # row, [Scored] -> {metric: value}


TASKS = {
    "fact": Task(("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str",
                  "requested_rewrite.target_true.str", "paraphrase_prompts*", "neighborhood_prompts*"),
                 fact_pair, fact_queries, fact_metrics),
}


def load_rows(task, path=None, toy=False, limit=None):
    """-> (training rows, evaluation rows). By convention facts are evaluated on the cases that train."""
    if path is None and toy:
        rows = [("toy world", r) for r in toy_facts(toy_world())]
    else:
        rows = read_rows(path or download(COUNTERFACT))
    if not rows:
        raise ValueError(f"{path}: no rows")
    for where, row in rows[:limit]:
        check_row(where, row, TASKS[task].fields)
        if "{}" not in row["requested_rewrite"]["prompt"]:
            raise ValueError(f"{where}: field requested_rewrite.prompt has no {{}} for the subject")
    rows = [row for _, row in rows[:limit]]
    return rows, rows
