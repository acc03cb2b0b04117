"""Several GPUs: torchrun --nproc_per_node=N train.py ...

torchrun starts N processes, the ranks, one for each GPU. PyTorch's FSDP2 keeps the weights that forward and
backward use: each rank has 1/N of the rows of every weight, and a block is gathered just before it runs. Each
rank trains on its share of a batch, and FSDP2 adds up the gradients.

A routing rule wants to see whole matrices. So every linear layer has one owner, a rank that holds all of its
experts and their moments, whole. The other ranks hold nothing of them. A step is then

    loss.backward()     # FSDP2: each rank has its rows of every gradient, summed over the ranks
    pull(model)         # the rows of G go to the layer's owner, which joins them
    unfold, norm, optimizer.step, fold      # the code of one process, on the layers that are owned here
    push(model)         # the rows of the owner's new weight go back to all ranks

pull and push are one all-to-all for a group of layers. What is not routed (embedding, norms, head) has no
owner: AdamW works on single numbers, so each rank's optimizer moves its own rows.

An evaluation gathers the whole model on each rank, and each rank asks its share of the questions. Checkpoints
are gathered, tensor by tensor, on the CPU of the first rank, which writes the very file of one process. So a
run may go on with any number of ranks. Only the first rank prints and writes.

In one process every function here does nothing, or what it would do for a single rank, and no process group
exists. A rule or a dropout that draws random numbers draws others on each rank than in one process.
"""
import copy
import hashlib
import io
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lib.read import one_line

GROUP_BYTES = 1 << 28       # of a rank's rows in one all-to-all: the size of its buffers
EMPTY = 16, 1, 1, 16        # a micro-batch without examples, as a size for data.to_device

# ------------------------------------------------------------------------------------------------------------
# the ranks

@contextmanager
def processes():
    """The process group of torchrun, if there is more than one process. Only the first rank prints."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if first() else nowhere):
            yield
            wait()
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        sys.exit(f"rank {rank()}: another rank has left")       # which says why
    finally:
        dist.destroy_process_group()

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
def first_goes_first():
    """The other ranks come in when the first has left."""
    if not first():
        wait()
    yield
    if first():
        wait()

@contextmanager
def together():
    """What ends one rank in here ends all of them. The first rank says why, also if it was another one."""
    if not several():
        yield
        return
    error, muted = None, io.StringIO()
    try:
        with suppress() if first() else redirect_stderr(muted):
            yield
    except (Exception, SystemExit) as e:
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

def share(batch, cut):
    """batch: examples. cut: a function that cuts examples into micro-batches. -> those of this rank. All
    ranks have as many, because each takes part in every gathering of weights: some may be empty."""
    place = balanced({i: len(e.ids) for i, e in enumerate(batch)}, n_ranks())
    shares = [list(cut([e for i, e in enumerate(batch) if place[i] == r])) for r in range(n_ranks())]
    most = max(map(len, shares))
    return shares[rank()] + [[]] * (most - len(shares[rank()]))

def part_of(things):
    """A rank's part of a list, for `gathered`."""
    return things[rank()::n_ranks()]

def gathered(part):
    """What was made of part_of(things), in the order of the whole list, on every rank."""
    parts = of_all(part)
    whole = [None] * sum(map(len, parts))
    for i, p in enumerate(parts):
        whole[i::len(parts)] = p
    return whole

# ------------------------------------------------------------------------------------------------------------
# the model

def distribute(model, groups):
    """Share out `model`, which is whole on every rank and has its experts. groups: those of param_groups.
    -> the groups for the optimizer of this rank. There must be a layer for each rank."""
    if not several():
        return groups
    model.owners = Owners(model, groups)
    return model.owners.groups

def owned(model):
    """A module of the layers whose experts are here: in one process the model."""
    return model.owners.layers if several() else model

def pull(model):
    """The gradients go to the owners of the layers. -> owned(model)"""
    if several():
        model.owners.pull()
    return owned(model)

def push(model):
    """The new weights go from the owners to all ranks."""
    if several():
        model.owners.push()

def total(loss, norm):
    """The ranks' parts of loss and gradient norm, both 0-d -> the whole ones, from one all-reduce."""
    if not several():
        return loss, norm
    sums = torch.stack([loss.double(), norm.double().square()])
    dist.all_reduce(sums)
    return sums[0].float(), sums[1].sqrt().float()

def of_all_modules(model, x):
    """x (..., modules owned here, experts) -> (..., modules, experts), on the CPU of every rank"""
    if not several():
        return x
    whole = x.new_zeros(*x.shape[:-2], model.owners.n_modules, x.shape[-1], device="cpu")
    whole[..., model.owners.modules_here, :] = x.cpu()
    dist.all_reduce(whole)
    return whole

def whole(model):
    """The model as one process has it, gathered on the device of every rank. It is a copy, where a folded
    layer has its weight alone."""
    return model.owners.whole() if several() else model

def state(model, optimizer):
    """-> state_dict() of model and optimizer, as of one process, on the first rank; there on the CPU"""
    if several():
        return model.owners.state(optimizer)
    return model.state_dict(), optimizer.state_dict()

def load_state(model, optimizer, model_state, optimizer_state):
    """Take what `state` gave, of this or another number of ranks."""
    if several():
        model.owners.load_state(optimizer, model_state, optimizer_state)
    else:
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)

def owned_copy(layer):
    """A copy of an owned layer. deepcopy would lose the grad_dtype of `full`, which moves over instead."""
    return copy.deepcopy(layer, {id(layer.full): layer.full} if layer.folded else {})

def shard(model, device):
    """FSDP2 takes the model: each block, then the rest of it, which is the root."""
    from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    mesh = dist.device_mesh.init_device_mesh(device.type, (n_ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)       # bf16 gradients are added up in fp32
    for module in [*model.model["layers"], model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):      # a sum, not the mean: the loss is divided by all targets
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")

class Owners:
    """Who owns which layer of a model, and the exchange between the owners and FSDP2's rows.

        layers      those owned here, whole, with all their experts
        groups      the optimizer's: the experts in `layers`, and this rank's rows of what has no owner
        params      {name: parameter} of the model under FSDP2, where a folded layer has no experts
        here        {name: parameter} of `layers`, and of the rows in `groups`"""

    def __init__(self, model, groups):
        self.model = model
        self.rank = rank()
        self.ranks = range(n_ranks())
        self.device = next(model.parameters()).device
        found = {name: m for name, m in model.named_modules() if hasattr(m, "folded")}
        names = {p: name for name, p in model.named_parameters()}
        self.specs = {name: (p.shape, p.dtype) for p, name in names.items()}
        self.names = [[names[p] for p in group["params"]] for group in groups]
        self.rest = [self.names[i][0] for i, group in enumerate(groups) if group["kind"] == "rest"]
        self.own(found)
        on_meta = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        self.empty = copy.deepcopy(model, on_meta)                          # to be filled by `whole`
        shard(model, self.device)
        self.params = dict(model.named_parameters())
        self.here |= {name: nn.Parameter(self.params[name].to_local().detach()) for name in self.rest}
        trained = [name for name, p in self.params.items() if p.requires_grad and name not in self.rest]
        self.exchanged = self.in_groups(trained)
        self.places = [i for i, names in enumerate(self.names) if names[0] in self.here]
        self.groups = [groups[i] | {"params": [self.here[name] for name in self.names[i]]}
                       for i in self.places]
        for group in self.groups:
            if group["kind"] != "rest":
                group["weight"] = self.here[f"{group['module']}.weight"].detach()
        if self.rank:
            torch.manual_seed(torch.initial_seed() + self.rank)             # for dropout, and for coins

    def own(self, found):
        """found: {name: MoLFLinear}. Copy those of this rank. The model loses what FSDP2 does not need."""
        sizes = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in found.items()}
        owner = balanced(sizes, len(self.ranks))
        self.n_modules = len(found)
        self.modules_here = [i for i, name in enumerate(found) if owner[name] == self.rank]
        self.layers, self.here, self.owner = nn.ModuleList(), {}, {}
        for name, layer in found.items():
            self.owner |= {f"{name}.{leaf}": owner[name] for leaf, _ in layer.named_parameters()}
            if owner[name] == self.rank:
                self.layers.append(owned_copy(layer))
                self.here |= {f"{name}.{leaf}": p for leaf, p in self.layers[-1].named_parameters()}
            if layer.folded:
                del layer.full
                layer.A, layer.B = nn.ParameterList(), nn.ParameterList()

    def in_groups(self, names):
        """-> [[[name] of each owner]], each for one all-to-all"""
        groups, size = [], GROUP_BYTES
        for name in names:
            size += self.params[name].nbytes // len(self.ranks)
            if size > GROUP_BYTES:
                groups.append([[] for _ in self.ranks])
                size = 0
            groups[-1][self.owner[name]].append(name)
        return groups

    def rows(self, name, r):
        """The rows of a parameter that rank r has under FSDP2, which cuts like torch.chunk."""
        n = self.specs[name][0][0]
        step = -(-n // len(self.ranks))
        return slice(min(r * step, n), min((r + 1) * step, n))

    def rows_shape(self, name, r):
        rows = self.rows(name, r)
        return torch.Size((rows.stop - rows.start, *self.specs[name][0][1:]))

    def exchange(self, send, shapes):
        """send[r]: tensors for rank r. shapes[r]: those of what comes from it. -> [[tensor]]. A rank may
        have nothing to send, or nothing to receive."""
        dtype = next(iter(self.params.values())).dtype
        flat = [t.reshape(-1) for part in send for t in part]
        flat = torch.cat([torch.empty(0, dtype=dtype, device=self.device), *flat])
        numels = [[shape.numel() for shape in part] for part in shapes]
        received = flat.new_empty(sum(map(sum, numels)))
        sent = [sum(t.numel() for t in part) for part in send]
        dist.all_to_all_single(received, flat, list(map(sum, numels)), sent)
        pieces = iter(received.split([n for part in numels for n in part]))
        return [[next(pieces).view(shape) for shape in part] for part in shapes]

    @torch.no_grad()
    def pull(self):
        for group in self.exchanged:
            mine = group[self.rank]
            send = [[self.params[name].grad.to_local() for name in names] for names in group]
            parts = self.exchange(send, [[self.rows_shape(name, r) for name in mine] for r in self.ranks])
            for name, *rows in zip(mine, *parts):
                self.here[name].grad = torch.cat(rows)
            for name in sum(group, []):
                self.params[name].grad = None
        for name in self.rest:
            self.here[name].grad = self.params[name].grad.to_local()
            self.params[name].grad = None

    @torch.no_grad()
    def push(self):
        for group in self.exchanged:
            send = [[self.here[name].detach()[self.rows(name, r)] for name in group[self.rank]]
                    for r in self.ranks]
            parts = self.exchange(send, [[self.rows_shape(name, self.rank) for name in names]
                                         for names in group])
            for name, rows in zip(sum(group, []), sum(parts, [])):
                self.params[name].to_local().copy_(rows)

    @torch.no_grad()
    def whole(self):
        model = copy.deepcopy(self.empty)
        for name, p in self.params.items():
            model.load_state_dict({name: p.full_tensor()}, strict=False, assign=True)
        return model.train(self.model.training)

    def from_rows(self, name, rows):
        """This rank's rows of a tensor in the shape of a parameter -> the whole on the first rank's CPU"""
        p = self.params[name]
        t = dist.tensor.DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False,
                                           shape=p.shape, stride=p.stride()).full_tensor()
        return t.cpu() if first() else None

    def from_owner(self, name, tensor, dtype):
        """A tensor in the shape of a parameter, which its owner has -> on the first rank's CPU"""
        owner = self.owner[name]
        if owner == 0:
            return tensor.cpu() if first() else None
        if owner == self.rank:
            dist.send(tensor.contiguous(), 0)
        if not first():
            return None
        box = torch.empty(self.specs[name][0], dtype=dtype, device=self.device)
        dist.recv(box, owner)
        return box.cpu()

    @torch.no_grad()
    def state(self, optimizer):
        model = {}
        for name, (_, dtype) in self.specs.items():
            if name in self.params:
                model[name] = self.from_rows(name, self.params[name].to_local())
            else:
                model[name] = self.from_owner(name, self.here.get(name), dtype)
        states = {}
        for i, name in enumerate(sum(self.names, [])):
            here = optimizer.state[self.here[name]] if name in self.here else {}
            states[i] = {}
            for key in ("exp_avg", "exp_avg_sq", *["master"] * (self.specs[name][1] != torch.float32)):
                if name in self.rest:
                    states[i][key] = self.from_rows(name, here[key])
                else:
                    states[i][key] = self.from_owner(name, here.get(key), torch.float32)
        local = optimizer.state_dict()
        groups = {}
        for part in of_all(dict(zip(self.places, local["param_groups"]))):
            groups |= part
        numbers = iter(range(len(states)))
        groups = [groups[i] | {"params": [next(numbers) for _ in names]}
                  for i, names in enumerate(self.names)]
        gates = of_all_modules(self.model, local["routing"]["gates"])
        routing = {"gates": gates, "step": local["routing"]["step"].cpu()}
        return model, {"state": states, "param_groups": groups, "routing": routing}

    @torch.no_grad()
    def load_state(self, optimizer, model_state, optimizer_state):
        for name, p in self.params.items():
            p.to_local().copy_(model_state[name][self.rows(name, self.rank)])
        for name, p in self.here.items():
            if name not in self.rest:
                p.copy_(model_state[name])
        saved = {name: optimizer_state["state"][i] for i, name in enumerate(sum(self.names, []))}
        states, groups = {}, []
        for i in self.places:
            numbers = []
            for name in self.names[i]:
                rows = self.rows(name, self.rank) if name in self.rest else slice(None)
                numbers.append(len(states))
                states[len(states)] = {key: t[rows] for key, t in saved[name].items()}
            groups.append(optimizer_state["param_groups"][i] | {"params": numbers})
        routing = optimizer_state["routing"]
        routing = routing | {"gates": routing["gates"][self.modules_here]}
        optimizer.load_state_dict({"state": states, "param_groups": groups, "routing": routing})
