"""The bytes of a training step, as train.py --dry-run prints them, for one GPU and for each of several.

What is kept (weights, gradients, moments, masters) is counted from the model, which may be on the meta
device. The rest are formulas, which tests/test_memory.py holds against what PyTorch does. Memory may be
highest at one of three times, and the peak is the largest of the three:

    backward begins     all activations are there, and logits. Of several GPUs, blocks are gathered whole
    backward ends       FSDP2 adds up the gradients of the root: embedding, head, and what has no unit
    the step            the optimizer's temporaries, and of several GPUs the exchange with the owners

Gradients count at all three. With a single micro-batch they come while activations go, so the real peak is
lower, by up to their size. Not counted: what CUDA, cuBLAS and NCCL take for themselves, an evaluation, and
loading.
"""
import argparse
import math
from collections import Counter

import torch

from data import count_tokens
from lib import parallel, ranks
from lib.fast import STREAMS
from model import LOGIT_ROWS, molf_layers
from molf import param_groups

CARDS = 24, 40, 80, 141     # GB
USABLE = 0.92               # of a card: the rest is CUDA's, cuBLAS's and NCCL's, and what fragments lose
SHORT_RUN = 32              # micro-batches: so few are not worth a compilation, see bench/README.md

def bytes_of(params):
    return sum(p.nbytes for p in params)

def rows(p, n):
    """The most rows of a parameter that one of n ranks has."""
    return -(-len(p) // n)

def rows_bytes(params, n):
    return sum(p.nbytes // len(p) * rows(p, n) for p in params)

def state_bytes(p):
    """The fp32 moments of a parameter, and its fp32 master."""
    return p.numel() * (8 if p.element_size() == 4 else 12)

def used(module):
    """The parameters that forward and backward use: of a folded layer neither `full` nor A and B."""
    unused = set()
    for _, layer in molf_layers(module):
        if layer.folded:
            unused |= {layer.full, *layer.A, *layer.B}
    return [p for p in module.parameters() if p not in unused]

def trained(params):
    return [p for p in params if p.requires_grad]

def estimate_bytes(model, a, tokens, n_ranks=1):
    """model: with its experts. tokens: of the largest micro-batch of a rank. -> {kind: bytes}, the peak last,
    on that of n_ranks GPUs which has the most"""
    fast = a.device.startswith("cuda") and not a.eager
    kept = kept_bytes(model, n_ranks)
    begin = {"activations (estimate)": activation_bytes(model, tokens, fast),
             "logits (estimate)": logit_bytes(model, tokens, fast)}
    end = {}
    if n_ranks > 1:
        units = [[p for block in unit for p in used(block)] for unit in parallel.units(model, used(model))]
        in_units = {p for unit in units for p in unit}
        root = [p for p in used(model) if p not in in_units]
        # Of the root FSDP2 keeps weight and gradient whole. Of a unit the weights are there three times: at
        # work, as the next unit's, and in a buffer. Its gradients are copied into a buffer.
        at_work = 2 * bytes_of(units[0]) if units else 0
        if parallel.small(used(model)):
            root, units = trained(root), [trained(unit) for unit in units]
            at_work = sum(map(bytes_of, units))
        unit = units[0] if units else []
        begin["gathered (estimate)"] = (bytes_of(root + trained(root)) + at_work + bytes_of(unit)
                                        + bytes_of(trained(unit)) + sum_bytes(unit, n_ranks))
        end["backward's end (estimate)"] = bytes_of(root + trained(root)) + sum_bytes(root, n_ranks)
    step = {"step (estimate)": step_bytes(model, fast, n_ranks)}
    times = [sum(kinds.values()) for kinds in (begin, end, step)]
    return kept | begin | end | step | {"peak (estimate)": sum(kept.values()) + max(times)}

def sum_bytes(params, n):
    """The buffer in which FSDP2 adds up the gradients of `params` on n ranks."""
    size = parallel.reduce_dtype(n)
    return sum(p.numel() * (size or p.dtype).itemsize for p in trained(params))

def kept_bytes(model, n):
    """What is there all the time, on that of n ranks which has the most. One process owns all layers, and
    uses its own. Several (lib/parallel.py) have rows of what forward and backward use as well."""
    layers = dict(molf_layers(model))
    costs = {name: layer_bytes(layer) for name, layer in layers.items()}
    owner = ranks.balanced({name: cost["weights"] for name, cost in costs.items()}, n)
    owned = [Counter() for _ in range(n)]
    for name, cost in costs.items():
        owned[owner[name]] += cost
    most = max(owned, key=Counter.total)
    of_layers = {p for layer in layers.values() for p in layer.parameters()}
    sharded = [p for p in used(model) if n > 1 or p not in of_layers]
    whole = set()
    if n > 1 and parallel.small(used(model)):
        whole = {p for p in sharded if not p.requires_grad}
    sharded = [p for p in sharded if p not in whole]
    owned_params = {p for name, layer in layers.items() if owner[name] == owned.index(most)
                    for p in layer.parameters()}
    rest = [p for group in param_groups(model) if group["kind"] == "rest" for p in group["params"]]
    rest_state = sum(state_bytes(p) // len(p) * rows(p, n) for p in rest)
    twice = bytes_of(owned_params.intersection(whole))                    # which one copy is enough for
    return {"weights": most["weights"] + rows_bytes(sharded, n) + bytes_of(whole) - twice,
            # the rows of a gradient go when its owner gets it whole
            "gradients": max(most["gradients"] + rows_bytes(rest, n), rows_bytes(trained(sharded), n)),
            "moments and masters": most["moments and masters"] + rest_state}

def layer_bytes(layer):
    """A layer with all its experts. The gradient of a folded layer's full expert has the model's dtype."""
    experts = [p for _, _, params in layer.experts() for p in params]
    gradients = [layer.weight if layer.folded and p is layer.full else p for p in experts]
    return Counter({"weights": bytes_of(layer.parameters()), "gradients": bytes_of(gradients),
                    "moments and masters": sum(map(state_bytes, experts))})

def activation_bytes(model, tokens, fast):
    """What autograd saves of all blocks; with checkpointing a block's input each, and one block. Where LoRA
    is a side branch, the stacked A and B are saved as well."""
    c, blocks = model.config, model.model["layers"]
    size = blocks[0].self_attn.q_proj.weight.element_size()
    block = saved_by_block(blocks[0], c, fast)
    inputs = len(blocks) * c.hidden_size * size
    stacked = sum(bytes_of([*layer.A, *layer.B]) for _, layer in molf_layers(model) if not layer.folded)
    return tokens * (inputs + block if model.checkpointing else len(blocks) * block) + stacked

def saved_by_block(block, c, fast):
    """Bytes a token that autograd saves of one block.

    Compiled (fast), these are the inputs of the matrix products and what cannot be recomputed from them by
    element-wise work: the block's input x, both normed inputs and the sum behind attention (each C), q and
    the result of attention (each H D), k and v (each Hkv D), gate, up and their product (each I). Gemma norms
    more often, and adds C, H D and Hkv D. Eager blocks also save what is between: the activation of gate
    (I) and what the norms have in fp32. Attention counts as FlashAttention has it, with a logsumexp a head.

    LoRA as a side branch adds x A^T of each linear, and with dropout the dropped x and its mask."""
    C, inner = c.hidden_size, c.intermediate_size
    q = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    size = block.self_attn.q_proj.weight.element_size()
    norms_train = block.input_layernorm.weight.requires_grad
    fp32 = c.num_attention_heads + 2                        # logsumexp, and 1 / rms of each norm
    if c.gemma:
        fp32 += c.num_attention_heads + c.num_key_value_heads + 2
    if fast and c.gemma:
        numbers = 5 * C + 3 * q + 3 * kv + 3 * inner
    elif fast:
        numbers = 4 * C + 2 * q + 2 * kv + 3 * inner
    else:
        numbers = 2 * C + 2 * q + 2 * kv + 4 * inner
        if c.gemma:
            fp32 += (4 * C + q + kv) * (1 + norms_train)
        else:
            fp32 += 2 * C
            numbers += 2 * C * norms_train
    masks = 0
    branches = [layer for _, layer in molf_layers(block) if layer.ranks and not layer.folded]
    for layer in branches:
        numbers += sum(layer.ranks)
        if layer.dropout:
            numbers += layer.in_features
            masks += layer.in_features
    if masks and not block.self_attn.q_proj.weight.requires_grad:
        numbers -= 2 * C + inner                            # of a frozen W nobody needs x itself
    return numbers * size + 4 * fp32 + masks

def logit_bytes(model, tokens, fast):
    """The loss holds one piece of LOGIT_ROWS targets at most. Compiled it has the logits, over which their
    gradient is written, and eager three fp32 copies. Then the gradient of the head is added to its sum."""
    c = model.config
    size = model.head.element_size() if fast else 12
    gradient = model.head.nbytes if model.head.requires_grad else 0
    return min(tokens, LOGIT_ROWS) * c.vocab_size * size + gradient

def step_bytes(model, fast, n):
    """The optimizer's temporaries. Eager, AdamW of one parameter has seven fp32 copies of it. Compiled it has
    none, but fold has B A of one layer on each stream. Before and after, n ranks exchange two groups of rows
    at a time: what is sent, and what is received."""
    layers = [layer for _, layer in molf_layers(model)]
    exchanged = rows_bytes(trained([p for layer in layers for p in used(layer)]), n)
    exchange = 2 * min(2 * parallel.GROUP_BYTES, exchanged) if n > 1 else 0
    if fast:
        temporary = STREAMS * max(layer.weight.nbytes * layer.folded for layer in layers)
    else:
        numbers = [p.numel() // len(p) * (rows(p, n) if group["kind"] == "rest" else len(p))
                   for group in param_groups(model) for p in group["params"]]
        temporary = 28 * max(numbers)
    return max(exchange, temporary)

def largest_that_fits(model, a, n_ranks, gb, most, unit=64):
    """-> the most tokens of a micro-batch, at most `most` and else a multiple of `unit`, with which a step
    fits into a GPU of so many GB; 0 if none do. By bisection: the estimate grows with the tokens."""
    fits = lambda tokens: estimate_bytes(model, a, tokens, n_ranks)["peak (estimate)"] <= USABLE * gb * 1e9
    if fits(most):
        return most
    low, high = 0, -(-most // unit)             # units: `high` do not fit, and `low` do, unless none does
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return low * unit

def largest_share(batch, n, max_tokens=math.inf):
    """batch: examples, of which each of n ranks takes its share. -> the tokens of the largest micro-batch"""
    sizes = {i: len(e.ids) for i, e in enumerate(batch)}
    load = Counter()
    for i, rank in ranks.balanced(sizes, n).items():
        load[rank] += sizes[i]
    return min(max(load.values()), max_tokens)

def largest_micro_batch(batches, a):
    """-> its tokens, in a run with the flags a on these batches"""
    return max(largest_share(batch, a.world_size, a.max_tokens) for batch in batches)

def is_short(batches, a):
    """A run of these batches, on one GPU, has at most SHORT_RUN micro-batches."""
    if a.world_size > 1 or not a.device.startswith("cuda"):
        return False
    return sum(math.ceil(count_tokens(batch) / a.max_tokens) for batch in batches) <= SHORT_RUN

def eager_peak(model, tokens, a):
    """-> bytes, if nothing is compiled: eager blocks save more activations"""
    eager = argparse.Namespace(**vars(a) | {"eager": True})
    return estimate_bytes(model, eager, tokens)["peak (estimate)"]

def better_eager(model, batches, a):
    """Is the run short, and has its GPU room for eager blocks?"""
    if not is_short(batches, a):
        return False
    room = USABLE * torch.cuda.get_device_properties(a.device).total_memory
    return eager_peak(model, largest_micro_batch(batches, a), a) <= room
