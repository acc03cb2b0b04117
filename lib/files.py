"""Files of a run and of a model: safe writes, the hub, and a run's lock and checkpoints.

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
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib import parallel
from lib.read import naming, parse_json, read_json, tensor_names

# what belongs to a tokenizer or to generation, and travels with an export
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
              "generation_config.json")

def save_safely(path, content):
    """Write a text, or call content(temporary path), then rename: a good file is never half replaced.
    OSError if it cannot be written. Of several ranks only the first writes."""
    if not parallel.first():
        return
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
        if (source / name).is_file():
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
    for name in ("adapter", "last-good", "checkpoints", "model"):
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
    """{what a run is made from: its digest}. rows: data.Rows; source: the directory of the base model."""
    return {"training rows": digest(*(e.ids for e in rows.examples)),
            "evaluation rows": digest(*(q.prompt for q in rows.questions)),
            "base model": digest(weights_header(source), (source / "config.json").read_bytes()),
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
    if not parallel.first():
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

def checkpoint_files(out):
    """-> [Path] of the whole checkpoints of a run, the newest last. (A write that was cut is .tmp.)"""
    return sorted(Path(out, "checkpoints").glob("step-*.safetensors"))

def last_checkpoint(out):
    """The end of a message."""
    return f"the last whole checkpoint: {(checkpoint_files(out) or ['none'])[-1]}"

def checksum(header, tensors):
    """A digest of a checkpoint: of its header's texts, and of each tensor's name, type, shape and sum. The
    sum is that of its bits as whole numbers, which a flipped bit changes, and is computed where it lies."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = sorted(header.items())
    for name, t in sorted(tensors.items()):
        size = t.element_size()
        total = t.view(integer[size]).sum(dtype=integer[max(size, 4)])      # it may wrap around
        parts.append((name, str(t.dtype), list(t.shape), total.item()))
    return digest(parts)

class Checkpoints:
    """OUT/checkpoints/step-N.safetensors, from which a run goes on as if it had never stopped. A file is
    whole or not there. It holds model.NAME, optimizer.I.NAME (the state of parameter I), routing.NAME (of
    the optimizer), history.NAME (of the loop), rng.cpu and rng.cuda; its header has the rest.

    As a context it notes in `asked` that SIGTERM, SIGHUP or Ctrl-C wants the run to end. The loop then saves
    and calls leave_if_asked. A second signal ends the process at once. SIGPIPE is what train.py notes when
    nobody reads stdout any more: as a signal it would also come from the pipe to a dead SQL child."""

    def __init__(self, out, model, optimizer, a, run=""):
        self.out = Path(out)
        self.folder = self.out / "checkpoints"
        self.run = run                          # names the run that the files belong to
        self.model, self.optimizer = model, optimizer
        self.a = a
        self.asked = None                       # the number of the signal that asked to leave
        self.saved = 0                          # the step of the newest checkpoint
        self.begin = time.perf_counter()        # of the run; load() counts what came before a resume

    def files(self):
        return checkpoint_files(self.out)

    def save(self, step, history):
        """history: a dict of tensors. OSError if it cannot be written; the older checkpoints then stay."""
        model, state = parallel.state(self.model, self.optimizer)
        if parallel.first():
            self.write(step, history, model, state)
        self.saved = step
        parallel.wait()                         # a rank that left now would take the others with it

    def write(self, step, history, model, state):
        """model, state: state_dict() of model and optimizer."""
        random = {"cpu": torch.get_rng_state()}
        if self.a.device.startswith("cuda"):
            random["cuda"] = torch.cuda.get_rng_state(self.a.device)
        tensors = flat({"model": model, "optimizer": flat(state["state"]),
                        "routing": state["routing"], "history": history, "rng": random})
        header = {"step": str(step), "run": self.run, "seconds": str(time.perf_counter() - self.begin),
                  "param_groups": json.dumps(state["param_groups"])}
        header["checksum"] = checksum(header, tensors)
        self.folder.mkdir(exist_ok=True)
        save_safely(self.folder / f"step-{step:09d}.safetensors",
                    lambda path: save_file(tensors, path, header))
        for old in self.files()[:-self.a.keep]:
            old.unlink()

    def wanted(self):
        """The number of the signal that asked to leave, on any rank; 0 if none did."""
        return parallel.largest(self.asked or 0)

    def leave_if_asked(self, step):
        """Exit, if a signal asked for it, with the code that shells give to that signal."""
        number = self.wanted()
        if number:
            self.asked = None                   # it has its answer
            if parallel.first():
                print(f"stopped after step {step}: --resume --out {self.out} goes on from here",
                      file=sys.stderr if number == signal.SIGPIPE else sys.stdout, flush=True)
            parallel.wait()
            raise SystemExit(128 + number)

    def load(self):
        """Put the newest checkpoint into model, optimizer and random states. -> (step, history), or None"""
        with parallel.first_goes_first():       # it may set a file aside
            header, tensors = self.read_newest()
        if not tensors:
            return None
        if header["run"] != self.run:
            raise OSError(f"{self.folder} holds checkpoints of another run: --overwrite starts anew")
        parts = grouped(tensors)
        state = {int(i): part for i, part in grouped(parts["optimizer"]).items()}
        self.begin = time.perf_counter() - float(header["seconds"])
        groups = json.loads(header["param_groups"])
        saved = {"state": state, "routing": parts["routing"], "param_groups": groups}
        parallel.load_state(self.model, self.optimizer, parts["model"], saved)
        torch.set_rng_state(parts["rng"]["cpu"])
        if self.a.device.startswith("cuda") and "cuda" in parts["rng"]:     # the run may have begun on a CPU
            torch.cuda.set_rng_state(parts["rng"]["cuda"], self.a.device)
        self.saved = int(header["step"])
        if not parallel.first():                # the file has the state of the first rank
            torch.manual_seed(self.a.seed + self.saved * parallel.n_ranks() + parallel.rank())
        return self.saved, parts["history"]

    def read_newest(self):
        """-> header, {name: tensor} of the newest whole file; both empty if there is none."""
        for file in reversed(self.files()):
            try:
                with safe_open(file, "pt") as f:
                    header = f.metadata() or {}
                    tensors = {name: f.get_tensor(name) for name in f.keys()}
                if header.pop("checksum", None) != checksum(header, tensors):
                    raise SafetensorError("its checksum is wrong")
                return header, tensors
            except SafetensorError as e:
                print(f"{file} is not whole ({e}) and is set aside")
                file.rename(file.with_suffix(".torn"))
        return {}, {}

    def __enter__(self):
        def ask(number, frame):
            self.asked = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:       # nohup has it ignored
            self.handlers[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        for number in self.handlers:
            signal.signal(number, ask)
        return self

    def __exit__(self, error, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if error is None:
            self.leave_if_asked(self.saved)         # asked behind the last save, or where none was due

def flat(groups):
    """{group: {name: tensor}} -> {"group.name": tensor}, and safetensors wants them contiguous."""
    return {f"{group}.{name}": t.contiguous() for group, part in groups.items() for name, t in part.items()}

def grouped(tensors):
    """{"group.name": tensor} -> {group: {name: tensor}}"""
    groups = defaultdict(dict)
    for full_name, t in tensors.items():
        group, _, name = full_name.partition(".")
        groups[group][name] = t
    return groups
