"""The same step, faster. Nothing here changes what molf.py, model.py and train.py compute.

A GPU takes longer to launch the thousands of kernels of a step one by one than to run them. So train.py hands
its step to `FastStep`, and bench/speed.py does the same. Three things make it fast:

    compiled    a block, the loss, fold and the passes of the optimizer become few kernels each
    streams     small kernels run beside large ones, on several CUDA streams
    captured    micro-batches are padded to a few sizes. For each size the whole step is recorded once, as a
                CUDA graph, and then replayed. A short run has fewer sizes, for each must pay for its
                recording

`train.py --eager` does without all of it, and so does a short run (lib/memory.py). On a CPU, for tests,
FastStep compiles and pads only.
"""
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

import model as model_py
import molf
from data import count_targets, count_tokens, micro_batches, to_device
from lib import ranks

STREAMS = 4

def compile_block(forward):
    """Block.forward, compiled. On a frozen base the first block's input needs no gradient. It is made to
    need one, or that block alone would be compiled a second time."""
    compiled = torch.compile(forward, dynamic=True)

    def run(block, x, cos_sin, layout):
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return compiled(block, x, cos_sin, layout)
    return run

def spread_over(streams, items):
    """Yield each item with another CUDA stream as the current one: the current one and `streams`, round
    robin. The code after the loop waits for all of them."""
    here = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(here)
    for item, stream in zip(items, cycle([here, *streams])):
        with torch.cuda.stream(stream):
            yield item
    for stream in streams:
        here.wait_stream(stream)

def configure_compiler():
    torch.fx.experimental._config.use_duck_shape = False    # sizes that are equal today need not stay so
    torch._dynamo.config.specialize_float = True            # or a LoRA scale would be a tensor, on the CPU
    torch._dynamo.config.recompile_limit = 64               # versions of a function: one for each shape
    # RMSNorm's two sums in one kernel, for few tokens too: it is faster, and there is only one version
    torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True

def fast_parts(cuda):
    """-> {(module or class, name): what stands there while a fast step runs}. It is compiled when it is first
    called. Sums are faster where shapes are constants, so what sums is compiled for each shape by itself."""
    shape_by_shape = partial(torch.compile, dynamic=False)
    all_shapes = partial(torch.compile, dynamic=True)
    parts = {
        (model_py.Block, "forward"): compile_block(model_py.Block.forward),
        (model_py, "cross_entropy"): all_shapes(model_py.cross_entropy),
        (model_py, "fold_layer"): all_shapes(model_py.fold_layer),
        (molf, "observe_and_score"): shape_by_shape(molf.observe_and_score),
        (molf, "move"): all_shapes(molf.move),
        (molf, "observe_and_move"): all_shapes(molf.observe_and_move),
    }
    if cuda:
        spread = partial(spread_over, [torch.cuda.Stream() for _ in range(STREAMS - 1)])
        parts[model_py, "spread"] = spread
        parts[molf, "spread"] = spread
        # a graph can't wind random numbers back; without dropout there are none
        parts[model_py, "checkpoint"] = partial(checkpoint, preserve_rng_state=False)
    return parts

@contextmanager
def replaced(parts):
    """Put the parts in their places; afterwards everything is as it was."""
    old = {place: vars(place[0]).get(place[1]) for place in parts}      # None: it is the class's, not its own
    for (owner, name), part in parts.items():
        setattr(owner, name, part)
    try:
        yield
    finally:
        for (owner, name), part in old.items():
            if part is None:
                delattr(owner, name)
            else:
                setattr(owner, name, part)

def padded(n):
    """n rounded up to a multiple of 16, or of a 128th of the next power of two if that is more. So there are
    few sizes, and from 1,024 on the padding is below 1.6 %."""
    unit = max(16, (1 << (n - 1).bit_length()) // 128)
    return -(-n // unit) * unit

def few_sizes(counts, price):
    """counts: {tokens of a micro-batch: steps that have it}; price: tokens that could be trained on in the
    time that a size costs. -> {tokens: tokens with padding}, where padding and sizes together cost least."""
    sizes = sorted(counts)
    cost, begin = [0.0], [0]            # for the first j sizes: the least cost, where the last group begins
    for j in range(1, len(sizes) + 1):
        padding, options = 0, []
        for i in reversed(range(j)):    # sizes[i:j] are padded to the last of them
            padding += counts[sizes[i]] * (sizes[j - 1] - sizes[i])
            options.append((cost[i] + padding + price, i))
        best, i = min(options)
        cost.append(best)
        begin.append(i)
    padded_to, j = {}, len(sizes)
    while j:
        padded_to |= dict.fromkeys(sizes[begin[j]:j], sizes[j - 1])
        j = begin[j]
    return padded_to

def price_of_a_size(model, tokens):
    """In tokens. A size, of so many tokens, is run once and then recorded. To record it takes about 8 ms a
    block and micro-batch. A token takes six operations for each number of the linear layers, of which a GPU
    does 4e14 a second (an H100, in bf16)."""
    seconds = 0.008 * len(model.model["layers"])
    numbers = sum(layer.weight.numel() for _, layer in model_py.molf_layers(model))
    return tokens + seconds / (6 * numbers / 4e14)

class Recording(NamedTuple):
    """A captured step."""
    graph: torch.cuda.CUDAGraph
    inputs: list            # its input tensors, to be overwritten before each replay
    seen: list              # which groups of the optimizer had a gradient, see MoLFAdamW.rates
    results: tuple

class FastStep:
    """step(batch) does step_on_micros(micros, n_targets), train.py's, on a list of examples. -> loss and
    norm, 0-d tensors on the device, good until the next step.

    batches: those that will come, from which the sizes are planned. A micro-batch of n tokens is padded to
    the most targets that any of its size has."""

    def __init__(self, step_on_micros, model, optimizer, batches, max_tokens):
        self.step_on_micros = step_on_micros
        self.model, self.optimizer = model, optimizer
        self.max_tokens = max_tokens
        self.device = next(model.parameters()).device
        self.cuda = self.device.type == "cuda"
        configure_compiler()
        self.parts = fast_parts(self.cuda)
        # Compiled code copies an input that does not begin at a multiple of 16 bytes. So each row of rates
        # has the place of 8 numbers, and each gate that of 4.
        self.rates = torch.zeros(len(optimizer.param_groups), 8, device=self.device)[:, :6]
        if optimizer.gates.stride(-1) == 1:
            gates = torch.zeros(*optimizer.gates.shape, 4, device=self.device)[..., 0]
            optimizer.gates = gates.copy_(optimizer.gates)
        self.recordings, self.pool, self.warm = {}, None, False
        self.plan(list(batches))

    def plan(self, batches):
        """Choose the sizes: (tokens, sequences, targets, tokens of the longest sequence) of a micro-batch."""
        steps = [(*self.cut(batch), batch) for batch in batches]
        self.largest = max(batches, key=count_tokens, default=[])           # a resumed run may have none left
        self.longest = max((len(e.ids) for batch in batches for e in batch), default=1)
        counts = defaultdict(Counter)   # micro-batches of a step -> {tokens of one: how many steps}
        for n, of_ranks, _ in steps:
            counts[len(of_ranks[0])][n] += 1
        self.tokens = {}                # (micro-batches of a step, tokens of one) -> tokens with padding
        price = price_of_a_size(self.model, max((n for n, _, _ in steps), default=1))
        for m, of_sizes in counts.items():
            self.tokens |= {(m, n): size for n, size in few_sizes(of_sizes, price).items()}
        self.targets = Counter()        # tokens with padding -> the most targets
        self.example = {}               # tokens with padding -> a batch
        self.sequences = 0              # the most in a micro-batch, with those that are padding
        for n, of_ranks, batch in steps:
            size = self.tokens[len(of_ranks[0]), n]
            self.example[size] = batch
            for micro in sum(of_ranks, []):
                self.targets[size] = max(self.targets[size], padded(count_targets(micro)))
                filling = -(-(size - count_tokens(micro)) // self.longest)
                self.sequences = max(self.sequences, len(micro) + filling)

    def cut(self, batch):
        """-> n and the micro-batches of each rank: as few as fit into max_tokens, as even as can be, and all
        to be padded to n"""
        shares = ranks.shares(batch)
        few = max(len(list(micro_batches(share, self.max_tokens))) for share in shares)
        limit = max(map(count_tokens, shares)) // few
        while any(len(list(micro_batches(share, limit))) > few for share in shares):
            limit = min(self.max_tokens, padded(limit + 1))
        of_ranks = [list(micro_batches(share, limit)) for share in shares]
        largest = max(count_tokens(micro) for micros in of_ranks for micro in micros)
        return padded(largest), ranks.equal_numbers(of_ranks)

    def inputs(self, batch):
        """-> micro-batches on the device, padded to one size, and the number of targets of the batch."""
        n, of_ranks = self.cut(batch)
        micros = of_ranks[ranks.rank()]
        tokens = self.tokens[len(micros), n]
        size = tokens, self.sequences, self.targets[tokens], self.longest
        n_targets = torch.tensor(float(count_targets(batch)))
        return [to_device(m, self.device, size) for m in micros], model_py.on_device(n_targets, self.device)

    def __call__(self, batch):
        with replaced(self.parts):
            inputs = self.inputs(batch)
            if not self.warm:
                self.compile_all_sizes()
            if not self.cuda or not self.warm:          # the first step compiles what is left
                self.warm = True
                return self.step_on_micros(*inputs)
            if not self.recordings:                     # the largest first: others then fit into its memory
                self.record(self.inputs(self.largest))
            key = shapes(inputs)
            if key not in self.recordings:
                self.record(inputs)
            return self.replay(self.recordings[key], inputs)

    def compile_all_sizes(self):
        """Run forward and backward once for every size. The compiler may want other code for some of them,
        and whatever compiles in the middle of a capture fails. (More than LOGIT_ROWS targets are one reason.)
        """
        for batch in self.example.values():
            micros, _ = self.inputs(batch)
            self.model.loss(*micros[0]).backward()
            self.model.zero_grad()

    def record(self, inputs):
        """Capture what the device has to do for inputs of these shapes. It is not done yet."""
        graph, seen = torch.cuda.CUDAGraph(), []

        def rates(groups):      # called once, in the capture; replay writes each step's numbers to self.rates
            seen.extend(groups)
            return self.rates
        with replaced({(self.optimizer, "rates"): rates}):
            # (several GPUs: NCCL has a thread that asks the device how far it is, at any time)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                results = self.step_on_micros(*inputs)
        self.pool = graph.pool()                        # all graphs share their memory
        self.recordings[shapes(inputs)] = Recording(graph, tensors(inputs), seen, results)

    def replay(self, recording, inputs):
        for place, tensor in zip(recording.inputs, tensors(inputs)):
            place.copy_(tensor)
        self.rates.copy_(self.optimizer.rates(recording.seen))
        recording.graph.replay()
        return recording.results

def tensors(inputs):
    micros, n_targets = inputs
    found = [n_targets]
    for ids, layout, where, labels in micros:
        found += [ids, layout.cu_seqlens, layout.seq, layout.pos, where, labels]
    return found

def shapes(inputs):
    return tuple(t.shape for t in tensors(inputs))
