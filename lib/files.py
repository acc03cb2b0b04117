"""Files of a run and of a model: safe writes, the hub, and a run's lock.

model.py finds and writes models with it, data.py downloads rows, train.py does the rest.
"""
import fcntl
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import tempfile
import urllib.request
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.progress import progress
from lib.ranks import first
from lib.read import naming, parse_json, read_json, tensor_names

# what belongs to a tokenizer or to generation, and travels with an export
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
              "generation_config.json")

def save_safely(path, content):
    """As write_safely; but of several ranks only the first writes."""
    if first():
        write_safely(path, content)

def write_safely(path, content):
    """Write a text, or call content(temporary path), then rename: a good file is never half replaced.
    OSError if it cannot be written."""
    temporary = Path(f"{path}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_text(content, encoding="utf-8")
        # safetensors leaves 0600; what is replaced may be shared with a group
        temporary.chmod(os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o644)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())                # the content is on the disk before the name points to it
        os.replace(temporary, path)
    except SafetensorError as e:
        raise OSError(f"cannot write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)

def snapshot(repo, kind, patterns, failure, advice):
    """kind: "model" or "dataset". -> Path of a folder with the repository's files. OSError in one line."""
    from huggingface_hub import snapshot_download       # only those who download need it
    try:
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=patterns))
    except Exception as e:      # the hub library raises dozens of classes; each one ends here
        why = str(e).partition("\n")[0]
        raise OSError(f"{failure} ({type(e).__name__}: {why}). {advice}") from e

def readable(directory):
    """The model's directory, or OSError if a file that is read or copied from it is none. To open a FIFO
    would wait for ever, and a dangling link would only be noticed when the model is exported."""
    for name in ("config.json", *COMPANIONS):
        path = directory / name
        if path.is_file():
            path.open("rb").close()                 # PermissionError names it
        elif os.path.lexists(path):
            raise OSError(f"{path} is not a file, nor a link to one")
    return directory

def find_checkpoint(path_or_repo):
    """The model's directory: toy/ for "toy", of a run its model/, else the directory itself. A hub id is
    downloaded. -> Path. OSError if there is none, or one with a file that cannot be read."""
    name = str(path_or_repo)
    path = Path(__file__).parents[1] / "toy" if name == "toy" else Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ValueError(f"{path} is an adapter, not a model: give its base, merged with it")
        return readable(path / "model" if (path / "model" / "config.json").is_file() else path)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"no directory {name}: give toy, a directory with config.json and "
                                f"safetensors, or a hub id like Qwen/Qwen2.5-0.5B")
    folder = snapshot(
        name, "model", ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"],
        f"no directory {name}, and cannot download https://huggingface.co/{name}",
        "If the model is gated, accept its licence there and set HF_TOKEN; without a network "
        "give a local directory, or set HF_HUB_OFFLINE=1 if the model is in the cache")
    return readable(folder)

def shards(index):
    """The names of files in model.safetensors.index.json, or ValueError if they are none of its directory."""
    content = read_json(index)
    with naming(index):
        names = set(content["weight_map"].values())
        odd = [name for name in names if name in ("", "..") or Path(name).name != name]
        if odd:
            raise ValueError(f"weight_map names {odd[0]!r}, which is no file beside it")
    return names

def weight_files(directory):
    """directory: Path. -> [Path] of its safetensors files: one, or those that the index names. All exist."""
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        files = sorted(directory / name for name in shards(index))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: only safetensors are read (no .bin, no pickle)")
    names = Counter(name for file in files for name in tensor_names(file))
    if names and max(names.values()) > 1:
        raise ValueError(f"{directory}: the tensor {max(names, key=names.get)} stands in two files")
    return files

def save_weights(directory, sizes, tensors, limit=5_000_000_000):
    """Write model.safetensors, or files of about `limit` bytes each and their index. sizes: {name: bytes}.
    tensors: yields (name, tensor on the CPU), each of which is held until its file is complete."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    files, size = [[]], 0
    for name, n in sizes.items():
        if files[-1] and size + n > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += n
    file_of, missing = {}, {}
    for i, names in enumerate(files, 1):
        file = f"model-{i:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else whole.name
        file_of |= dict.fromkeys(names, file)
        missing[file] = set(names)
    waiting = defaultdict(dict)
    # (of several ranks all take part in gathering a tensor)
    for name, t in progress(tensors, f"writing {directory}", "tensors", len(sizes)):
        if not first():
            continue
        file = file_of[name]
        waiting[file][name] = t
        missing[file].remove(name)
        if not missing[file]:
            save_safely(directory / file, partial(save_file, waiting.pop(file), metadata={"format": "pt"}))
    if len(files) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        save_safely(index, json.dumps(content, indent=2) + "\n")
    if first():
        (whole if len(files) > 1 else index).unlink(missing_ok=True)        # of what stood here

def refuse_quantised(name, dtype):
    """dtype: as safetensors writes it. ValueError unless it is a floating point type to compute in."""
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{name} is stored as {dtype}: quantised weights are not supported")

def refuse_infinite(tensors):
    """{name: tensor}: ValueError if one holds NaN or infinite numbers. One sync for all of them."""
    # A sum is twenty times as fast as isfinite() on a CPU, but it may overflow where no number is infinite.
    sums = torch.stack([t.detach().sum(dtype=torch.float32) for t in tensors.values()])
    for name, total in zip(tensors, sums.tolist()):
        if not math.isfinite(total) and not tensors[name].isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")

def copy_companions(source, directory):
    """Copy what travels with a model beside its weights."""
    for name in COMPANIONS:
        if first() and (source / name).is_file():
            shutil.copyfile(source / name, directory / name)

def set_eos(directory, eos_ids):
    """Let a model's files say where generation stops, also if only its tokenizer's configuration did."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        content["eos_token_id"] = eos_ids if len(eos_ids) > 1 else eos_ids[0]
        save_safely(path, json.dumps(content, indent=2) + "\n")

def hub_files(repo, split):
    """The parquet files of a data set whose names have the word `split`. -> [Path]. OSError if none has."""
    folder = snapshot(
        repo, "dataset", f"*{split}*.parquet", f"cannot download https://huggingface.co/datasets/{repo}",
        "Without a network get its parquet files elsewhere and give them with --data and --eval-data")
    files = sorted(f for f in folder.rglob("*.parquet")         # as a word: "pretraining" is no "train"
                   if split in re.split("[^a-z]+", f.relative_to(folder).as_posix().lower()))
    if not files:
        raise OSError(f"{repo} has no parquet file of a split {split!r}: give it with --data, --eval-data")
    return files

def download(url, folder=None):
    """The JSON file at `url`, fetched once into ~/.cache/molf; whole and valid, or OSError. -> Path"""
    path = Path(folder or Path.home() / ".cache" / "molf") / url.rpartition("/")[2]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")        # two runs may download at once
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()           # raises IncompleteRead if fewer bytes come than announced
        with naming("no JSON"):                 # it may be a page that says why the file is not there
            parse_json(content)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise OSError(f"cannot download {url} ({e}): get it elsewhere and give it with --data") from e
    finally:
        temporary.unlink(missing_ok=True)
    return path

def save_record(path, record):
    """Write a dict as JSON, with a digest of it that read_record compares."""
    text = json.dumps(record | {"digest": digest(json.dumps(record))}, indent=2)
    save_safely(path, text + "\n")

def read_record(path):
    """-> the dict that save_record wrote. OSError if it is not there or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with naming(f"{path} is damaged"):
            record = parse_json(path.read_bytes())
            noted = record.pop("digest", None)          # a model's config.json has none
    except ValueError as e:
        raise OSError(e) from e
    if noted and noted != digest(json.dumps(record)):
        raise OSError(f"{path} is damaged: it is not what was written")
    return record

def run_flags(folder):
    """The flags of the run in `folder`; {} if it is none or damaged. (A model's config.json has none.)"""
    try:
        flags = read_record(Path(folder, "config.json")).get("flags")
    except OSError:
        return {}
    return flags if isinstance(flags, dict) else {}

def log_until(step, path):
    """The text of a run's log up to a step. A last line that a kill has torn is left out; another one that
    cannot be read is named as well."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = ""
    for i, line in enumerate(lines, 1):
        try:
            with naming(path):
                if parse_json(line)["step"] <= step:
                    kept += line + "\n"
        except ValueError:
            if i < len(lines):
                print(f"{path} line {i} cannot be read and is left out")
    return kept

def empty(folder):
    """Delete a directory with all that is in it. A link to a directory, as on a scratch disk, stays."""
    if not folder.is_symlink():
        if folder.exists():
            shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

def clear_run(out):
    """Delete what a run has left in its directory, so that nothing of it is taken for the next one's."""
    for name in ("adapter", "last-good", "checkpoints", "model", "tensorboard"):
        empty(out / name)
    for name in ("results.json", "before.json", "predictions.jsonl", "routing.safetensors", "log.jsonl"):
        (out / name).unlink(missing_ok=True)

def digest(*parts):
    """A short name of texts, bytes or lists of numbers: other parts have another."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else repr(part).encode())
    return h.hexdigest()[:16]

def weights_header(directory):
    """The headers of a checkpoint's safetensors files, as bytes: names, types, shapes."""
    headers = b""
    for file in weight_files(directory):
        with open(file, "rb") as f:
            headers += f.read(int.from_bytes(f.read(8), "little"))
    return headers

def refuse_unwritable(out):
    """OSError if `out`, or the directory in which it and results.csv will be, cannot be written to."""
    for folder in (out, out.parent):
        while not os.path.lexists(folder):
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()

def refuse_to_replace(out, a):
    for folder in (out, out / "checkpoints", out / "model"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise FileExistsError(f"--out {out}: {folder} is not a directory")
    if (out / "results.json").exists() and a.resume:
        raise FileExistsError(f"{out} holds a finished run: there is nothing to go on with")
    if (out / "results.json").exists() and not (a.overwrite or a.dry_run):
        raise FileExistsError(f"{out} holds a finished run: give another --out, or --overwrite")
    if any((out / "checkpoints").glob("*")) and not (a.overwrite or a.resume or a.dry_run):
        raise FileExistsError(f"{out} holds an unfinished run: --resume goes on, --overwrite starts anew")
    of_no_run = (out / "config.json").exists() and not run_flags(out)
    if of_no_run or a.eval_only and (out / "model").exists():
        raise FileExistsError(f"--out {out} holds a model: give another")

def run_inputs(rows, source):
    """{what a run is made from: its digest}. rows: lib.rows.Rows; source: the directory of the base model."""
    return {"training rows": digest(*(tuple(e) for e in rows.examples)),
            "evaluation rows": digest(*((q.prompt, [tuple(e) for e in q.examples]) for q in rows.questions)),
            **model_inputs(source)}

def model_inputs(source):
    """{what belongs to a checkpoint: its digest}; of the weights it covers names, types and shapes alone."""
    return {"base model": digest(weights_header(source), (source / "config.json").read_bytes()),
            "tokenizer": digest((source / "tokenizer.json").read_bytes())}

def refuse_other_inputs(out, inputs):
    """ValueError if the run in `out` began with others."""
    old = read_record(out / "config.json").get("inputs", {})
    changed = [what for what, value in inputs.items() if old.get(what) != value]
    if changed:
        raise ValueError(f"--resume: not what the run in {out} began with: {', '.join(changed)}")

@contextmanager
def only_one(folder):
    """Hold a lock on the directory, or FileExistsError. It ends with the process, however that ends. Of
    several ranks the first holds it."""
    if not first():
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is at work in {folder}: give another --out") from None
        yield
    finally:
        os.close(lock)

@contextmanager
def locked(path):
    """Hold a lock on a file, which is made if there is none, and which other holders replace."""
    while True:
        with open(path, "a") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):       # not replaced while we waited
                yield
                return
