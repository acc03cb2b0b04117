"""A model on several GPUs: torchrun --nproc_per_node=N train.py ...

PyTorch's FSDP2 keeps the weights that forward and backward use. Each of the N ranks has 1/N of the rows of
every weight, and a block is gathered just before it runs. Each rank trains on its share of a batch, and FSDP2
adds up the gradients.

A routing rule wants to see whole matrices. So every linear layer has one owner, a rank that holds all of its
experts and their moments, whole. The other ranks hold nothing of them. A step is then

    loss.backward()     # FSDP2: each rank has its rows of every gradient, summed over the ranks
    pull(model)         # the rows of G go to the layer's owner, which joins them
    unfold, norm, optimizer.step, fold      # the code of one process, on the layers that are owned here
    push(model)         # the rows of the owner's new weight go back to all ranks

pull and push are one all-to-all for a group of layers. What is not routed (embedding, norms, head) has no
owner: AdamW works on single numbers, so each rank's optimizer moves its own rows.

No rank ever holds the whole model, unless an evaluation gathers its weights on every GPU, where they fit. In
one process every function here does nothing, or what it would do for a single rank.
"""
import copy
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from data import micro_batches, to_device
from lib.ranks import (balanced, equal_numbers, in_step, largest, n_ranks, of_all, rank, several, shares,
                       together)
from model import Transformer, draw_A, load_weights, molf_layers

GROUP_BYTES = 1 << 27       # of a rank's rows in one all-to-all: the size of its buffers
SMALL_BYTES = 8 << 30       # see `small`
UNIT = 4                    # blocks, see `units`
# a micro-batch without examples, as a size for data.to_device: tokens, sequences, targets, longest sequence
EMPTY = 16, 1, 1, 16

def distribute(model, groups, device, load=None):
    """Share out a model that is on the meta device and has its experts. groups: those of param_groups.
    load(name, rows): gives these rows of a base weight (default: from the files that the model came from).
    -> the groups for the optimizer of this rank. There must be a layer for each rank. ValueError on the first
    rank if the weights cannot be used; the others exit."""
    if not several():
        return groups
    model.owners = Owners(model, groups, torch.device(device), load)
    return model.owners.groups

def micros_here(batch, max_tokens, device):
    """-> the micro-batches of this rank, on the device: in one process all of them."""
    of_ranks = [list(micro_batches(share, max_tokens)) for share in shares(batch)]
    own = equal_numbers(of_ranks)[rank()]
    return [to_device(micro, device, None if micro else EMPTY) for micro in own]

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
    """x (..., modules owned here, experts) -> (..., modules, experts), on every rank"""
    if not several():
        return x
    whole = x.new_zeros(*x.shape[:-2], model.owners.n_modules, x.shape[-1])
    whole[..., model.owners.modules_here.to(x.device), :] = x
    dist.all_reduce(whole)
    return whole

def over_all_modules(route, model):
    """A route for the optimizer of a rank, which has a part of the modules: `route` sees all of them."""
    if not several():
        return route

    def run(scores, gates, step, top_k):
        scores, gates = of_all_modules(model, torch.stack([scores, gates]))
        return route(scores, gates, step, top_k)[model.owners.modules_here]
    return run

@contextmanager
def whole(model):
    """The model as an evaluation wants it, in eval mode: in one process as it is; else a copy on every GPU,
    where a folded layer has its weight alone. Where that does not fit, it is the shared model: each block is
    gathered for each forward pass, also for each token that is generated, and the ranks must do the same."""
    if not in_step(model):
        yield model
    elif fits(model):
        yield model.owners.copy()
    else:
        model.unshard()                         # the root: what is in no block
        yield model
        reshard(model)

def fits(model):
    """Does every GPU have room for a copy of the weights, and half as much for what is computed with them?"""
    if model.owners.device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.owners.device)
    need = sum(p.nbytes for p in model.owners.empty.parameters())
    return not largest(int(1.5 * need > free))

def params_here(model):
    """{name: parameter} of what this rank keeps of a run, and {name: slice} where it keeps some rows"""
    if several():
        return model.owners.here, model.owners.slices
    return dict(model.named_parameters()), {}

def kept(model, optimizer):
    """-> {"model.NAME": tensor, "optimizer.NAME.exp_avg": tensor, ...} of this rank, and {such a name: first
    row} where it has some rows; the optimizer's groups, and its routing, of all ranks"""
    params, slices = params_here(model)
    tensors, first_rows = {}, {}
    for name, p in params.items():
        of_this = {f"model.{name}": p.detach()}
        of_this |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state.get(p, {}).items()}
        if name in slices:
            first_rows |= dict.fromkeys(of_this, slices[name].start)
        tensors |= of_this
    state = optimizer.state_dict()
    groups, gates = state["param_groups"], state["routing"]["gates"]
    if several():
        by_place = {}
        for part in of_all(dict(zip(model.owners.places, groups))):
            by_place |= part
        groups = [by_place[i] for i in sorted(by_place)]
    return tensors, first_rows, groups, state["routing"] | {"gates": of_all_modules(model, gates)}

@torch.no_grad()
def restore(model, optimizer, saved, groups):
    """Take what `kept` gave on any number of ranks. saved: lib.checkpoints.Saved."""
    params, slices = params_here(model)
    routing = saved.group("routing.")
    for name, p in params.items():
        p.copy_(saved.read(f"model.{name}", slices.get(name)))
    if several():
        for name, p in model.owners.params.items():
            local(p).copy_(saved.read(f"model.{name}", model.owners.held(name)))
        groups = [groups[i] for i in model.owners.places]
        routing["gates"] = routing["gates"][model.owners.modules_here.cpu()]
    keys = {}                                   # {name of a parameter: [name in its state]}
    for full_name in saved.where:
        name, _, key = full_name.rpartition(".")
        keys.setdefault(name, []).append(key)
    names = {p: name for name, p in params.items()}
    trained = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, name in enumerate(trained):
        state[i] = {key: saved.read(f"optimizer.{name}.{key}", slices.get(name))
                    for key in keys.get(f"optimizer.{name}", [])}
    numbers = iter(range(len(trained)))
    numbered = [group | {"params": [next(numbers) for _ in own["params"]]}
                for group, own in zip(groups, optimizer.param_groups)]
    optimizer.load_state_dict({"state": state, "param_groups": numbered, "routing": routing})

def own_randomness(a, step=0):
    """The random numbers of dropout on this rank, from this step on: other ones than on other ranks."""
    if rank():
        torch.manual_seed(a.seed + step * n_ranks() + rank())

def small(params):
    """params: all that forward and backward use. Small ones stay gathered from forward to backward, and those
    that nobody trains are whole on every rank, all the time. It costs memory and saves communication."""
    return sum(p.nbytes for p in params) < SMALL_BYTES

def units(model, params):
    """-> [[block]]: what FSDP2 gathers, and whose gradients it adds up, at a time. What is in no list is the
    root's. A small model has few large units, which cost less than many. Where its base is frozen, only A and
    B travel, and they belong to the root."""
    blocks = list(model.model["layers"])
    if not small(params):
        return [[block] for block in blocks]
    if not blocks[0].self_attn.q_proj.weight.requires_grad:
        return []
    return [blocks[i:i + UNIT] for i in range(0, len(blocks), UNIT)]

def reduce_dtype(n):
    """The dtype in which the gradients of n ranks are added up; None: their own. bf16 would round after each
    addition. The sum of two is rounded once in either way."""
    return torch.float32 if n > 2 else None

def shard(model, device):
    """FSDP2 takes a model on the meta device. -> [(module, [names of parameters])] of its units"""
    mesh = dist.device_mesh.init_device_mesh(device.type, (n_ranks(),))
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype(n_ranks()))
    params = list(model.parameters())
    is_small = small(params)
    frozen = {p for p in params if is_small and not p.requires_grad}
    parts = [*units(model, params), [model]]
    for modules in parts:
        fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=not is_small,
                    ignored_params=frozen)
    for module in model.modules():
        if isinstance(module, FSDPModule):      # a sum, not the mean: the loss is divided by all targets
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=device)
    # FSDP2 decides in its first forward pass where the rows lie
    with torch.no_grad():
        model.loss(*to_device([], device, EMPTY))
    reshard(model)
    found, left = [], {p: name for name, p in model.named_parameters()}
    for modules in parts:
        found.append((modules[0], [left.pop(p) for m in modules for p in m.parameters() if p in left]))
    return found

def reshard(model):
    """Give back all gathered weights. What is still gathered would not see what is written to the rows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

class Owners:
    """Who owns which layer of a model, and the exchange between the owners and FSDP2's rows.

        layers      those owned here, whole, with all their experts
        groups      the optimizer's: the experts in `layers`, and this rank's rows of what has no owner
        params      {name: parameter} of the model under FSDP2, where a folded layer has no experts
        here        {name: parameter} of `layers`, and of the rows of what has no owner
        slices      {name: slice} of the latter: which rows they are
        units       [(module that FSDP2 gathers, [names of parameters])]"""

    def __init__(self, model, groups, device, load):
        self.model = model
        self.device = device
        self.rank = rank()
        self.ranks = range(n_ranks())
        found = dict(molf_layers(model))
        names = {p: name for name, p in model.named_parameters()}
        group_names = [[names[p] for p in group["params"]] for group in groups]
        sizes = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in found.items()}
        owner = balanced(sizes, len(self.ranks))
        self.n_modules = len(found)
        numbers = [i for i, name in enumerate(found) if owner[name] == self.rank]
        self.modules_here = torch.tensor(numbers, device=device)
        self.owner = {}                                             # {name of a parameter: a rank}
        for name, layer in found.items():
            self.owner |= {f"{name}.{leaf}": owner[name] for leaf, _ in layer.named_parameters()}
        mine = take_experts(found, owner, self.rank)
        self.empty = copy.deepcopy(model)                           # for `copy` to fill
        self.units = shard(model, device)
        self.params = dict(model.named_parameters())
        self.fill(found, mine, load)
        self.layers = nn.ModuleList(mine.values())
        self.here = {f"{name}.{leaf}": p
                     for name, layer in mine.items() for leaf, p in layer.named_parameters()}
        self.slices = {name: self.rows(name, self.rank) for name in self.params if name not in self.owner}
        for name in self.slices:
            p = self.params[name]
            rows = local(p) if isinstance(p, DTensor) else p.detach()[self.slices[name]]
            self.here[name] = nn.Parameter(rows, p.requires_grad)
        self.rest = [name for name in self.slices if self.here[name].requires_grad]
        self.exchanged = self.in_groups([name for name, p in self.params.items()
                                         if p.requires_grad and name in self.owner])
        self.places = [i for i, names in enumerate(group_names) if names[0] in self.here]
        self.groups = [groups[i] | {"params": [self.here[name] for name in group_names[i]]}
                       for i in self.places]
        for group in self.groups:
            if group["kind"] != "rest":
                group["weight"] = self.here[f"{group['module']}.weight"].detach()

    @torch.no_grad()
    def fill(self, found, mine, load):
        """The base's rows from `load` to FSDP2, whole matrices to their owners, and all LoRA experts drawn as
        in one process. mine: {name: layer} that is owned here, still without memory."""
        base = [name for name in self.params if ".A." not in name and ".B." not in name]
        with together():
            load = load or from_files(self.model, self.device, {name: self.held(name) for name in base})
        for name in base:
            local(self.params[name]).copy_(load(name, self.held(name)))
        whole = {}
        for name, layer in mine.items():
            layer.to_empty(device=self.device)
            whole |= {f"{name}.{leaf}": p for leaf, p in layer.named_parameters()}
        of_layers = [name for name in base if name in self.owner]
        shared = [name for name in of_layers if isinstance(self.params[name], DTensor)]
        self.to_owners(self.in_groups(shared), lambda name: local(self.params[name]),
                       lambda name, matrix: whole[name].copy_(matrix))
        for name in of_layers:
            if name in whole and name not in shared:                # the model has it whole: once is enough
                whole[name].data = self.params[name].detach()
        for layer in mine.values():
            if layer.folded:
                layer.start_full()
        torch.manual_seed(torch.initial_seed())
        dtype = self.params[base[0]].dtype
        for name, layer in found.items():
            for i, r in enumerate(layer.ranks):
                a = draw_A(r, layer.in_features, self.device, dtype)
                b = a.new_zeros(layer.out_features, r)
                for key, matrix in ((f"{name}.A.{i}", a), (f"{name}.B.{i}", b)):
                    if key in whole:
                        whole[key].copy_(matrix)
                    if key in self.params:
                        local(self.params[key]).copy_(matrix[self.held(key)])

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
        n = self.params[name].shape[0]
        step = -(-n // len(self.ranks))
        return slice(min(r * step, n), min((r + 1) * step, n))

    def held(self, name):
        """The rows that this rank has."""
        p = self.params[name]
        return self.rows(name, self.rank) if isinstance(p, DTensor) else slice(0, len(p))

    def rows_shape(self, name, r):
        rows = self.rows(name, r)
        return torch.Size((rows.stop - rows.start, *self.params[name].shape[1:]))

    def exchange(self, groups, pack, unpack):
        """An all-to-all for each group, while the one before is unpacked. pack(group) gives the tensors for
        each rank, and the shapes of what comes from each; unpack(group, tensors) takes that. A rank may have
        nothing to send, or nothing to receive."""
        under_way = None
        for group in groups:
            send, shapes = pack(group)
            flat = torch.cat([self.new(0), *(t.reshape(-1) for part in send for t in part)])
            received = self.new(sum(shape.numel() for part in shapes for shape in part))
            work = dist.all_to_all_single(
                received, flat, output_split_sizes=[sum(shape.numel() for shape in part) for part in shapes],
                input_split_sizes=[sum(t.numel() for t in part) for part in send], async_op=True)
            if under_way:
                self.finish(unpack, *under_way)
            under_way = group, work, flat, received, shapes
        if under_way:
            self.finish(unpack, *under_way)

    def finish(self, unpack, group, work, flat, received, shapes):
        work.wait()                             # (on a GPU the host does not wait)
        pieces = iter(received.split([shape.numel() for part in shapes for shape in part]))
        unpack(group, [next(pieces).view(shape) for part in shapes for shape in part])

    def new(self, shape):
        return torch.empty(shape, dtype=next(iter(self.params.values())).dtype, device=self.device)

    def to_owners(self, groups, rows_of, take):
        """rows_of(name): this rank's rows. take(name, whole tensor) is called for what is owned here."""
        def pack(group):
            send = [[rows_of(name) for name in names] for names in group]
            return send, [[self.rows_shape(name, r) for name in group[self.rank]] for r in self.ranks]

        def unpack(group, pieces):
            whole = {name: self.new(self.params[name].shape) for name in group[self.rank]}
            copy_all(pieces, [whole[name][self.rows(name, r)] for r in self.ranks for name in whole])
            for name, tensor in whole.items():
                take(name, tensor)
        self.exchange(groups, pack, unpack)

    def take_grad(self, name):
        """The rows of a gradient, which FSDP2 then has no more."""
        rows = self.params[name].grad.to_local()
        self.params[name].grad = None
        return rows

    @torch.no_grad()
    def pull(self):
        def take(name, gradient):
            self.here[name].grad = gradient
        self.to_owners(self.exchanged, self.take_grad, take)
        for name in self.rest:
            self.here[name].grad = self.take_grad(name)

    @torch.no_grad()
    def push(self):
        def pack(group):
            send = [[self.here[name].detach()[self.rows(name, r)] for name in group[self.rank]]
                    for r in self.ranks]
            return send, [[self.rows_shape(name, self.rank) for name in names] for names in group]

        def unpack(group, pieces):
            copy_all(pieces, [local(self.params[name]) for name in sum(group, [])])
        self.exchange(self.exchanged, pack, unpack)

    @torch.no_grad()
    def copy(self):
        """The whole model on this GPU."""
        model = copy.deepcopy(self.empty)
        for name, p in self.params.items():
            whole = p.full_tensor() if isinstance(p, DTensor) else p.detach()
            model.load_state_dict({name: whole}, strict=False, assign=True)
        return model.train(self.model.training)

def local(p):
    """What this rank has of a parameter."""
    return p.to_local().detach() if isinstance(p, DTensor) else p.detach()

def copy_all(tensors, places):
    """Copy each tensor into its place, in few kernels."""
    if tensors:
        torch._foreach_copy_(places, tensors)

def take_experts(found, owner, rank):
    """found: {name: MoLFLinear}, on the meta device. The model loses what FSDP2 does not need of them. ->
    {name: copy} of those of this rank"""
    mine = {}
    for name, layer in found.items():
        if layer.folded:
            del layer.full                      # it starts when the weight is there
        if owner[name] == rank:
            mine[name] = copy.deepcopy(layer)
        if layer.folded:
            layer.A, layer.B = nn.ParameterList(), nn.ParameterList()
    return mine

def from_files(model, device, rows):
    """-> load(name, rows) of what the model's files have, from which no more than these rows are read"""
    dtype = next(model.parameters()).dtype
    with torch.device("meta"):
        plain = Transformer(model.config)
    weights = load_weights(plain, model.source, dtype, device, rows)
    return lambda name, _: weights.pop(name)
