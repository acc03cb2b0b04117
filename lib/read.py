"""Reads what others have written: the JSON files of a model, and rows. Whatever such a file holds, it is
read, or refused by one line that names it.

A JSON file above MAX_JSON is refused, and a file of rows that is above MAX_ROWS once unpacked. That bounds
the memory: as Python objects long texts take about their own size, and the worst JSON (a list of empty
objects) 25 times its size.
"""
import codecs
import gzip
import json
from contextlib import contextmanager
from pathlib import Path

MAX_JSON = 2 ** 27      # bytes. Gemma-3's tokenizer.json has 33 million
MAX_ROWS = 2 ** 30      # bytes. MedMCQA's training rows have 140 million
MAX_DEPTH = 100         # Python fails to write some 900 nested lists, and fewer deep inside a program

@contextmanager
def naming(where, kind=ValueError):
    """What goes wrong inside becomes an error of one line, which begins with `where`. kind: of ValueError"""
    try:
        yield
    except (FileNotFoundError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:      # parsers raise dozens; tiktoken's PanicException is no Exception
        why = f"no {e}" if isinstance(e, KeyError) else str(e) or type(e).__name__
        raise kind(f"{where}: {one_line(why)}") from e

def one_line(message):
    """A text or an error as one line of at most 1,000 characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= 1000 else text[:1000] + " ..."

def only_once(pairs):
    """The (key, value) pairs of a JSON object -> dict. ValueError if a key stands twice, for it is not clear
    which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in an object")
    return found

def parse_json(text):
    """JSON -> what it says. ValueError if an object has a key twice, or if it nests deeper than MAX_DEPTH. A
    text of more than a million bytes may: a vocabulary takes long to look through, and nothing writes it."""
    value = json.loads(text, object_pairs_hook=only_once)
    level = [value] if len(text) < 10 ** 6 else []
    depth = 0
    while level:
        containers = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [inner for container in containers for inner in container if isinstance(inner, (dict, list))]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value

def read_json(path):
    """A JSON file of a model, which holds an object -> dict"""
    with naming(path):
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON:,} bytes, which no JSON file of a model is")
        value = parse_json(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"no JSON object, but a {type(value).__name__}")
    return value

def tensor_names(path):
    """-> the names in the header of a safetensors file. ValueError if it is no JSON object, or has a name
    twice. (The library looks at all else in the file, but takes the last of two tensors with one name.)"""
    with naming(f"{path} is not a whole safetensors file"):
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            if n > min(MAX_JSON, path.stat().st_size):
                raise ValueError(f"its header would have {n:,} bytes")
            return parse_json(f.read(n)).keys() - {"__metadata__"}

# ----------------------------------------------------------------------------------------------------------
# rows

def read_rows(path):
    """Rows of a .json (a list, or lines), .jsonl, .jsonl.gz or .parquet file -> [(where, row)]. `where` is
    "FILE line N", or "FILE row N" in a parquet and a JSON list, which have no lines."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.name.endswith((".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")):
        raise ValueError(f"{path}: rows are read from .json, .jsonl (both also .gz) and .parquet files")
    failure = f"{path} cannot be read"
    if path.suffix == ".parquet":
        with naming(failure):
            rows = read_parquet(path)
    else:
        with naming(failure):
            text = read_bounded(path)
        if not text.lstrip().startswith(b"["):
            return read_lines(path, text)
        with naming(failure):
            rows = parse_json(text.decode())
    return [(f"{path} row {i}", row) for i, row in enumerate(rows, 1)]

def read_lines(path, text):
    rows = []
    for i, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            with naming(f"{path} line {i} cannot be read"):
                rows.append((f"{path} line {i}", parse_json(line.decode())))
    return rows

def check_unpacked(n):
    if n > MAX_ROWS:
        raise ValueError(f"more than {MAX_ROWS:,} bytes unpacked: split it, or give fewer rows")

def read_bounded(path):
    """-> the bytes of a text file, unpacked if it is a .gz, without a byte order mark"""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        text = f.read(MAX_ROWS + 1)
    check_unpacked(len(text))
    return text.removeprefix(codecs.BOM_UTF8)

def read_parquet(path):
    """-> rows, as dicts. The sizes in the file's footer are checked first. They count a repeated text once,
    so the rows are also read some at a time, and what they unpack to is added up."""
    import pyarrow.parquet          # only those who read parquet need it
    file = pyarrow.parquet.ParquetFile(path)
    about = file.metadata
    columns = [about.row_group(i).column(j) for i in range(about.num_row_groups)
               for j in range(about.num_columns)]
    check_unpacked(8 * about.num_rows + sum(c.total_uncompressed_size + 8 * c.num_values for c in columns))
    longest = max((c.total_uncompressed_size for c in columns), default=1)      # no text is longer
    rows = []
    n = 0
    for batch in file.iter_batches(batch_size=min(1000, 1 + MAX_ROWS // max(1, longest))):
        new = batch.to_pylist()
        n += unpacked_size(new)
        check_unpacked(n)
        rows += new
    return rows

def unpacked_size(value):
    """A rough lower bound for the bytes that a value of a row takes."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 8 * len(value) + sum(map(unpacked_size, value))
    return len(value) if isinstance(value, (str, bytes)) else 0

# ----------------------------------------------------------------------------------------------------------
# what a row must have

MISSING = object()
KINDS = {       # what a field may be, see Task.fields
    "string": lambda x: isinstance(x, str),
    "string or null": lambda x: x is None or isinstance(x, str),
    "string, null or absent": lambda x: x is None or x is MISSING or isinstance(x, str),
    "whole number or null": lambda x: x is None or type(x) is int or type(x) is float and x.is_integer(),
    "list, null or absent": lambda x: x is None or x is MISSING or isinstance(x, list),
    "list of strings": lambda x: isinstance(x, list) and all(isinstance(s, str) for s in x)}

def check_row(where, row, fields):
    """ValueError, with file, line and field, unless each field (a dotted path) is of its kind (see KINDS)."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: fields are missing: this is no JSON object")
    for path, kind in fields.items():
        value = row
        for key in path.split("."):
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        if value is MISSING and not KINDS[kind](MISSING):
            needed = ", ".join(f for f, k in fields.items() if not KINDS[k](MISSING))
            found = ", ".join(row)
            raise ValueError(f"{where}: field {path} is missing; needed are {needed}; found: {found}")
        if not KINDS[kind](value):
            raise ValueError(f"{where}: field {path} is not a {kind}")

def is_chat(row):
    return row.get("messages") is not None

def text_usable(rows):
    """Rows of either form, without the columns of the other one. ValueError for what nothing can be learnt
    from."""
    kept = []
    for where, row in rows:
        is_pair = all(row.get(name) is not None for name in ("prompt", "completion"))
        if is_pair == is_chat(row):
            raise ValueError(f"{where}: a row has either prompt and completion, or messages; this one has "
                             f"{', '.join(row) or 'no field'}")
        if is_chat(row):
            check_messages(where, row["messages"])
            kept.append((where, {k: row[k] for k in ("messages", "tools") if row.get(k) is not None}))
        else:
            if not row["completion"].strip():
                raise ValueError(f"{where}: field completion is empty")
            kept.append((where, {"prompt": row["prompt"], "completion": row["completion"]}))
    return kept

def check_messages(where, messages):
    for i, m in enumerate(messages, 1):
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise ValueError(f"{where}: message {i} has no role and content that are strings")
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"{where}: no message is the assistant's, so there is nothing to learn")
