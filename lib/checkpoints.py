"""Checkpoints of a run, from which --resume goes on as if it had never stopped.

OUT/checkpoints/step-N.safetensors is one, a file that is whole or not there. Of several ranks each writes
what it has: the others step-N.rank-I-of-M.safetensors, and then the first rank step-N.safetensors. When that
is there, the checkpoint is whole. Any number of ranks goes on from it. A file holds

    model.NAME                      a parameter, or rows of it
    optimizer.NAME.exp_avg          ... and so on: the optimizer's state of that parameter
    routing.NAME, history.NAME      of the optimizer and of the loop: the first rank's file alone
    rng.cpu, rng.cuda               random states: likewise

Its header has JSON: where rows begin, the optimizer's groups, the number of ranks, a checksum.
"""
import json
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib import parallel
from lib.files import digest, write_safely
from lib.ranks import first, largest, n_ranks, of_all, on_first, rank, together, wait

def checkpoint_files(out):
    """-> [Path] of the whole checkpoints of a run, the newest last: what the first rank writes. (A write that
    was cut is .tmp.)"""
    return sorted(Path(out, "checkpoints").glob("step-?????????.safetensors"))

def files_of(file, n):
    """-> [Path] of the checkpoint of n ranks, in the order of the ranks. file: the first rank's."""
    return [file, *(file.with_suffix(f".rank-{i}-of-{n}.safetensors") for i in range(1, n))]

def last_checkpoint(out):
    """The end of a message."""
    return f"the last whole checkpoint: {(checkpoint_files(out) or ['none'])[-1]}"

def checksum(header, tensors):
    """A digest of a checkpoint's file: of its header's texts, and of each tensor's name, type, shape and sum.
    tensors: yields (name, tensor). The sum is that of its bits as whole numbers, which a flipped bit changes,
    and is computed where it lies."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = []
    for name, t in tensors:
        size = t.element_size()
        total = t.view(integer[size]).sum(dtype=integer[max(size, 4)])      # it may wrap around
        parts.append((name, str(t.dtype), list(t.shape), total.item()))
    return digest(sorted(header.items()), sorted(parts))

def write(file, header, tensors):
    """OSError if it cannot be written."""
    tensors = {name: t.contiguous() for name, t in tensors.items()}         # safetensors wants them so
    header = header | {"checksum": checksum(header, tensors.items())}
    write_safely(file, lambda path: save_file(tensors, path, header))

def damage(file):
    """-> what is wrong with a file that `write` wrote, as a text; None if nothing is. OSError if an older
    version of this program wrote it: that is not to be lost."""
    try:
        with safe_open(file, "pt") as f:
            header = dict(f.metadata() or {})
            if "checksum" in header and not header.keys() & {"ranks", "rows"}:
                raise OSError(f"{file} was written by an older version: go on with that, or --overwrite")
            noted = header.pop("checksum", None)
            if noted != checksum(header, ((name, f.get_tensor(name)) for name in f.keys())):
                return "its checksum is wrong"
    except SafetensorError as e:
        return str(e)

class Saved:
    """A whole checkpoint, of one or several ranks, to read from."""

    def __init__(self, files):
        self.files = [safe_open(file, "pt") for file in files]
        headers = [f.metadata() for f in self.files]
        self.header = headers[0]
        self.where = {}                         # {name: [(its first row there, file)]}
        for f, header in zip(self.files, headers):
            first_rows = json.loads(header["rows"])
            for name in f.keys():
                self.where.setdefault(name, []).append((first_rows.get(name, 0), f))

    def read(self, name, rows=None):
        """A tensor, or the slice `rows` of it, from whichever files have them."""
        found = sorted(self.where[name], key=lambda place: place[0])
        if len(found) == 1 and rows is None:
            return found[0][1].get_tensor(name)
        pieces = []
        for start, f in found:
            part = f.get_slice(name)
            stop = start + part.get_shape()[0]
            begin, end = (start, stop) if rows is None else (max(rows.start, start), min(rows.stop, stop))
            if begin < end or not pieces:       # the first may be empty: it gives the shape
                pieces.append(part[max(begin, start) - start:max(begin, end) - start])
        return torch.cat(pieces)

    def group(self, prefix):
        """-> {name: tensor} of the names that begin so"""
        return {name.removeprefix(prefix): self.read(name) for name in self.where if name.startswith(prefix)}

class Checkpoints:
    """As a context it notes in `asked` that SIGTERM, SIGHUP or Ctrl-C wants the run to end. The loop then
    saves and calls leave_if_asked. A second signal ends the process at once. SIGPIPE is what train.py notes
    when nobody reads stdout any more: as a signal it would also come from the pipe to a dead SQL child."""

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
        tensors, first_rows, groups, routing = parallel.kept(self.model, self.optimizer)
        header = {"step": str(step), "run": self.run, "ranks": str(n_ranks()), "rows": json.dumps(first_rows)}
        file = self.folder / f"step-{step:09d}.safetensors"
        with together():
            self.folder.mkdir(exist_ok=True)
            if not first():
                write(files_of(file, n_ranks())[rank()], header, tensors)
        with together():                        # the others have written
            if first():
                tensors |= {f"routing.{name}": t for name, t in routing.items()}
                tensors |= {f"history.{name}": t for name, t in history.items()}
                tensors["rng.cpu"] = torch.get_rng_state()
                if self.a.device.startswith("cuda"):
                    tensors["rng.cuda"] = torch.cuda.get_rng_state(self.a.device)
                header["seconds"] = str(time.perf_counter() - self.begin)
                header["param_groups"] = json.dumps(groups)
                write(file, header, tensors)
                self.delete_old(file)
        self.saved = step

    def delete_old(self, newest):
        for old in self.files()[:-self.a.keep]:
            old.unlink()                        # first, because without it the others count for nothing
            for part in self.folder.glob(f"{old.stem}.rank-*"):
                part.unlink()
        for part in set(self.folder.glob(f"{newest.stem}.rank-*")).difference(files_of(newest, n_ranks())):
            part.unlink()                       # another number of ranks has saved this step before

    def wanted(self):
        """The number of the signal that asked to leave, on any rank; 0 if none did."""
        return largest(self.asked or 0)

    def leave_if_asked(self, step):
        """Exit, if a signal asked for it, with the code that shells give to that signal."""
        number = self.wanted()
        if number:
            self.asked = None                   # it has its answer
            if first():
                print(f"stopped after step {step}: --resume --out {self.out} goes on from here",
                      file=sys.stderr if number == signal.SIGPIPE else sys.stdout, flush=True)
            wait()
            raise SystemExit(128 + number)

    def load(self):
        """Put the newest checkpoint into model, optimizer and random states. -> (step, history), or None.
        OSError if it belongs to another run, or if the file of a rank is missing."""
        for file in reversed(self.files()):
            files = self.good_files(file)
            if files:
                return self.take(Saved(files))

    def good_files(self, file):
        """-> [Path] of a checkpoint's files. None if one is damaged, and then all are set aside."""
        files = [file]
        damaged = {file: on_first(lambda: damage(file))}
        if not damaged[file]:
            with safe_open(file, "pt") as f:
                files = files_of(file, int(f.metadata()["ranks"]))
            missing = [part for part in files if not part.exists()]
            if missing:
                raise OSError(f"{missing[0]} is missing, one of the {len(files)} files of a checkpoint")
            for of_rank in of_all({part: damage(part) for part in files[1 + rank()::n_ranks()]}):
                damaged |= of_rank
        wrong = {part: why for part, why in damaged.items() if why}
        if not wrong:
            return files
        for part, why in wrong.items():
            print(f"{part} is not whole ({why}) and is set aside")
        if first():
            for part in files:
                part.rename(part.with_suffix(".torn"))
        wait()

    def take(self, saved):
        header = saved.header
        if header["run"] != self.run:
            raise OSError(f"{self.folder} holds checkpoints of another run: --overwrite starts anew")
        parallel.restore(self.model, self.optimizer, saved, json.loads(header["param_groups"]))
        self.begin = time.perf_counter() - float(header["seconds"])
        self.saved = int(header["step"])
        random = saved.group("rng.")
        torch.set_rng_state(random["cpu"])
        if self.a.device.startswith("cuda") and "cuda" in random:           # the run may have begun on a CPU
            torch.cuda.set_rng_state(random["cuda"], self.a.device)
        parallel.own_randomness(self.a, self.saved)
        return self.saved, saved.group("history.")

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
