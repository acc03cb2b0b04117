"""Several processes that work together: torchrun --nproc_per_node=N train.py ...

torchrun starts N processes, the ranks, one for each GPU. Here is what they need to act as one: they agree
before they begin, share a batch and the questions of an evaluation, and end together. lib/parallel.py shares
out the model. Only the first rank prints and writes.

In one process every function here does nothing, or what it would do for a single rank, and no process group
exists.
"""
import hashlib
import io
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lib.read import one_line

@contextmanager
def processes():
    """The process group of torchrun, if there is more than one process. Only the first rank prints."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    # In a graph NCCL 2.28.9 registers the buffers of a collective. Two ranks that exchanged parts of unequal
    # sizes then waited for each other for ever.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=3))    # to write or download takes a while
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if first() else nowhere):
            yield
            wait()
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise                               # without an end of the group: that might wait for ever
        sys.exit(f"rank {rank()}: another rank has left")       # which says why
    except SystemExit as e:
        leave(e.code)
    leave(0)

def leave(code):
    """End the process, as sys.exit(code) would. But gloo has threads that outlive its group, and may abort a
    process whose Python shuts down beside them."""
    dist.destroy_process_group()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

def several():
    return dist.is_initialized()

def rank():
    return dist.get_rank() if several() else 0

def n_ranks():
    return dist.get_world_size() if several() else 1

def first():
    """Is this the rank that prints and writes?"""
    return rank() == 0

def largest(number):
    """The largest of all ranks' whole numbers. It is host work: the device is not waited for."""
    if not several():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()

def wait():
    """Go on when all ranks have come here."""
    largest(0)

def of_all(thing):
    """-> [the thing of each rank], on every rank"""
    things = [thing] * n_ranks()
    if several():
        dist.all_gather_object(things, thing)
    return things

def on_first(function):
    """-> what the function returns on the first rank. It is called there alone."""
    box = [function() if first() else None]
    if several():
        dist.broadcast_object_list(box)
    return box[0]

@contextmanager
def together():
    """What ends one rank in here ends all of them. The first rank says why, also if it was another one. An
    end without an error (--help) comes to every rank by itself."""
    if not several():
        yield
        return
    error, muted = None, io.StringIO()
    try:
        with suppress() if first() else redirect_stderr(muted):
            yield
    except (Exception, SystemExit) as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        error = e
    said = muted.getvalue().strip().splitlines() or [one_line(error)]
    reasons = of_all(said[-1].partition("error: ")[2] or said[-1] if error else None)
    if first() and error:
        raise error
    for i, reason in enumerate(reasons):
        if reason:
            sys.exit(f"error: rank {i}: {reason}" if first() else 1)

def refuse_differences(facts):
    """facts: {what: its value}. All ranks exit, if one has other facts than the first."""
    every = of_all(facts)
    for i, other in enumerate(every):
        differing = [what for what in facts if other[what] != every[0][what]]
        if differing:
            sys.exit(f"error: rank {i} is not like rank 0 in {', '.join(differing)}" if first() else 1)

def code():
    """A digest of the program."""
    root = Path(__file__).parents[1]
    files = [root / f"{name}.py" for name in ("data", "model", "molf", "train")]
    files += sorted((root / "lib").glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()

def own_device(device):
    """--device -> that of this rank. ValueError if there are more ranks on this machine than GPUs."""
    if not several() or not device.startswith("cuda"):
        return device
    gpus, ranks = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus < ranks:
        raise ValueError(f"{ranks} ranks on this machine, but {gpus} GPUs")
    return f"cuda:{os.environ['LOCAL_RANK']}"

# ------------------------------------------------------------------------------------------------------------
# shares of a batch and of an evaluation

def balanced(sizes, n):
    """sizes: {thing: its size} -> {thing: one of n ranks}. The largest come first, each to the rank that has
    the least so far. It is the same on every rank."""
    load = [0] * n
    place = {}
    for thing in sorted(sizes, key=sizes.get, reverse=True):
        place[thing] = load.index(min(load))
        load[place[thing]] += sizes[thing]
    return place

def shares(batch):
    """batch: examples -> a list of them for each rank, with about as many tokens each"""
    place = balanced({i: len(e.ids) for i, e in enumerate(batch)}, n_ranks())
    return [[e for i, e in enumerate(batch) if place[i] == r] for r in range(n_ranks())]

def equal_numbers(of_ranks):
    """of_ranks: the micro-batches of each rank -> the same, with empty ones behind them, so that all have as
    many. All ranks gather the weights together."""
    most = max(map(len, of_ranks))
    return [micros + [[]] * (most - len(micros)) for micros in of_ranks]

def part_of(things, model):
    """A rank's part of a list, for `gathered`. Where the model is shared out, each rank has all of it."""
    return things if in_step(model) else things[rank()::n_ranks()]

def gathered(part, model):
    """What was made of part_of(things, model), in the order of the whole list, on every rank."""
    if in_step(model):
        return part
    parts = of_all(part)
    whole = [None] * sum(map(len, parts))
    for i, p in enumerate(parts):
        whole[i::len(parts)] = p
    return whole

# ------------------------------------------------------------------------------------------------------------
# a model that is shared out, see lib/parallel.py

def in_step(model):
    """Must all ranks run the forward passes of this model together?"""
    return hasattr(model, "owners")

def whole_groups(model):
    """Yields lists of the names of parameters. Until the next list, these are whole on this rank."""
    if not in_step(model):
        yield list(model.state_dict())
        return
    for module, names in model.owners.units:
        module.unshard()
        yield names
        module.reshard()
