"""What a step costs on several GPUs, and what the same work costs under FSDP2 without experts.

    torchrun --standalone --nproc_per_node=2 bench/gpus.py --methods molf lora --tasks sql med
    python bench/gpus.py --methods molf --tasks sql             # one GPU, the same sequences a GPU
    python bench/gpus.py --methods molf --tasks sql --sequences 64 --curve 20       # one GPU, the whole batch
    torchrun --standalone --nproc_per_node=2 bench/gpus.py --shape toy              # two CPU processes

Weights are random and depend on their name alone, so every method begins with the same ones on any number of
GPUs. The toy has its own. Batches are those of bench/speed.py, with --sequences for each rank. The methods:

    fft, lora, molf, molf-e     through the same step as in train.py
    fsdp adamw                  our model with its blocks compiled, without experts. FSDP2 shards fp32
                                weights, which the fused AdamW moves, and gathers them in bf16
    transformers fsdp           the same with `transformers`: eager, padded, sdpa. Where --sequences are too
                                many for the memory of a GPU, each rank takes half as many at a time, or a
                                quarter...

On one GPU both peers run without FSDP2, with bf16 weights and their fp32 masters. A line for each method and
task has

    ms/step     over --rounds of --steps batches, after one round that is not counted
    tok/s       tokens a second of all GPUs, padding not counted, and the same for each GPU
    GB          the most that torch had allocated and reserved on any GPU, from the first step to the last,
                and what lib/memory.py predicts for our methods
    s           to build the model, and of the first step, which compiles

and --json has them for each rank. The losses of the first --curve steps stand below it.
"""
import argparse
import gc
import json
import math
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")     # as train.py, before torch starts
import torch        # noqa: E402
import torch.distributed as dist        # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import data     # noqa: E402
import speed    # noqa: E402
import train    # noqa: E402
from data import count_targets, count_tokens        # noqa: E402
from lib import fast, parallel, ranks               # noqa: E402
from lib.memory import estimate_bytes               # noqa: E402
from model import Config, Transformer, add_experts  # noqa: E402
import molf     # noqa: E402
from molf import MoLFAdamW, param_groups            # noqa: E402

OURS = ("fft", "lora", "molf", "molf-e")
PEERS = ("fsdp adamw", "transformers fsdp")
PROBE = 0.95                # of a GPU's memory while a size is tried: the real steps find it in other pieces


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="qwen2.5-1.5b", choices=["toy", *speed.SHAPES])
    p.add_argument("--methods", nargs="+", default=OURS + PEERS, choices=OURS + PEERS)
    p.add_argument("--tasks", nargs="+", default=list(speed.FILES), choices=list(speed.FILES))
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=8, help="batches of a round (default: 8)")
    p.add_argument("--sequences", type=int, default=32, help="of a step, for each rank (default: 32)")
    p.add_argument("--max-tokens", type=int, default=16384)
    p.add_argument("--curve", type=int, default=4, metavar="N",
                   help="print the losses of the first N steps (default: 4)")
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    p.add_argument("--profile", action="store_true", help="where the first rank's time goes, on a GPU")
    p.add_argument("--json", metavar="FILE", help="append a line of JSON for each method and task")
    a = p.parse_args()
    if min(a.rounds, a.steps, a.sequences, a.max_tokens, a.curve) < 1:
        p.error("--rounds, --steps, --sequences, --max-tokens and --curve must be at least 1")
    if a.profile and not torch.cuda.is_available():
        p.error("--profile wants a GPU")
    return a


# ------------------------------------------------------------------------------------------------------------
# the work

def flags_of(method, task, a):
    """train.py's flags."""
    model = ["toy", "--data", "toy"] if a.shape == "toy" else [a.shape, "--data", "hub"]
    return train.parse_args(
        ["--model", *model, "--task", task, "--method", method, "--max-tokens", str(a.max_tokens),
         "--batch-size", str(a.sequences * ranks.n_ranks()),
         *["--checkpointing"] * a.checkpointing, *["--eager"] * a.eager])


def batches_of(task, a, vocab_size):
    """--steps batches, with --sequences for each rank. The 512 examples repeat themselves."""
    tokenizer = data.Tokenizer.from_file(ROOT / "toy") if a.shape == "toy" else None
    examples = sum(speed.batches_of(task, a, vocab_size, tokenizer), [])
    size = a.sequences * ranks.n_ranks()
    examples *= -(-size * a.steps // len(examples))
    return [examples[i * size:(i + 1) * size] for i in range(a.steps)]


def compiled(step):
    """step(batch), with its blocks and its loss compiled, but not captured as a CUDA graph."""
    fast.configure_compiler()
    parts = fast.fast_parts(cuda=True)

    def run(batch):
        with fast.replaced(parts):
            return step(batch)
    return run


def padded(rows, device):
    """-> the inputs of a model of `transformers`, padded to the longest of the rows"""
    longest = max(len(e.ids) for e in rows)
    pad = [longest - len(e.ids) for e in rows]
    labels = [[-100] * e.n_prompt + e.ids[e.n_prompt:] + [-100] * n for e, n in zip(rows, pad)]
    inputs = dict(input_ids=[e.ids + [0] * n for e, n in zip(rows, pad)], labels=labels,
                  attention_mask=[[1] * len(e.ids) + [0] * n for e, n in zip(rows, pad)])
    return {name: torch.tensor(x).to(device) for name, x in inputs.items()}


# ------------------------------------------------------------------------------------------------------------
# weights

def make_load(config, a, dtype, device):
    """-> load(name, rows), which gives those rows of a weight. It is drawn whole, from its name."""
    if a.shape == "toy":
        stored = Transformer.from_pretrained("toy", dtype, device).state_dict()
        return lambda name, rows: stored[name][rows]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}

    def load(name, rows):
        weight = torch.empty(shapes[name], dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            return weight.fill_(0 if config.gemma else 1)[rows]
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return weight.normal_(std=0.02, generator=generator)[rows]
    return load


@torch.no_grad()
def fill(model, load):
    """Write this rank's rows of every weight. FSDP2 cuts like torch.chunk."""
    for name, p in model.named_parameters():
        if isinstance(p, dist.tensor.DTensor):
            n = -(-len(p) // ranks.n_ranks())
            p.to_local().copy_(load(name, slice(ranks.rank() * n, (ranks.rank() + 1) * n)))
        else:
            p.copy_(load(name, slice(None)))


# ------------------------------------------------------------------------------------------------------------
# our methods

def with_experts(model, method, flags):
    torch.manual_seed(flags.seed)
    add_experts(model, flags.ranks, flags.alpha, method in ("fft", "molf"))
    return param_groups(model, flags.lr, flags.lora_lr, flags.weight_decay, flags.lora_weight_decay)


def shared_out(model, method, flags, device, load):
    """A model on the meta device gets its experts and its weights. -> the groups of this rank's optimizer"""
    if ranks.several():
        groups = with_experts(model, method, flags)
        return parallel.distribute(model, groups, device, load)
    model.to_empty(device=device)
    fill(model, load)
    return with_experts(model, method, flags)


def ours(method, config, load, batches, flags, device):
    """-> step(batch), which gives loss and norm, both 0-d"""
    with torch.device("meta"):
        model = Transformer(config).to(getattr(torch, flags.dtype))
    model.checkpointing = flags.checkpointing
    groups = shared_out(model, method, flags, device, load)
    optimizer = MoLFAdamW(groups, route=parallel.over_all_modules(molf.topk, model))
    return train.make_step(model.train(), optimizer, batches * speed.LONG, flags)


# ------------------------------------------------------------------------------------------------------------
# the peers

def shard(model, blocks, mesh, dtype):
    """FSDP2 takes a model in fp32: forward and backward in dtype, the gradients summed in fp32."""
    from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):      # a sum, not the mean: the loss is divided by all targets
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if isinstance(model, Transformer):
        register_fsdp_forward_method(model, "loss")


def transformers_model(config, flags, dtype):
    """A causal LM of `transformers`. (Its to(dtype) would round the angles of RoPE as well.)"""
    from transformers import AutoConfig, AutoModelForCausalLM
    raw = AutoConfig.for_model(**config.raw)
    model = AutoModelForCausalLM.from_config(raw, dtype=dtype, attn_implementation="sdpa")
    if flags.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@torch.no_grad()
def restore(model, config):
    """What a model of `transformers` loses on its way over the meta device: that its head is the embedding,
    and the buffers, which no checkpoint has."""
    model.tie_weights()
    for module in model.modules():
        if dict(module.named_buffers(recurse=False)):
            for p in module.parameters(recurse=False):      # `fill` writes them; here they would be drawn
                p._is_hf_initialized = True
            model._init_weights(module)
    exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
    for kind, (theta, factor) in config.rope.items():
        rotary = model.model.rotary_emb
        found = getattr(rotary, f"{kind}_inv_freq" if config.gemma else "inv_freq")
        torch.testing.assert_close(found.cpu(), theta ** -exponent / factor)


def peer(method, config, load, flags, device, mesh, sequences):
    """-> step(batch), which gives loss and norm, both 0-d. mesh: that of FSDP2, None in one process.
    sequences: how many `transformers` takes at a time."""
    packed = method == "fsdp adamw"
    dtype = getattr(torch, flags.dtype)
    stored = torch.float32 if mesh else dtype
    with torch.device("meta"):
        model = Transformer(config).to(stored) if packed else transformers_model(config, flags, stored)
    model.checkpointing = flags.checkpointing
    if mesh:
        shard(model, model.model["layers"] if packed else model.model.layers, mesh, dtype)
    model.to_empty(device=device)
    if not packed:
        restore(model, config)
    fill(model, load)
    model.train()
    params = list(model.parameters())
    masters = params if mesh else [p.detach().to(torch.float32, copy=True) for p in params]
    optimizer = torch.optim.AdamW(masters, lr=flags.lr, weight_decay=flags.weight_decay, fused=True)

    def losses(batch):
        """Of this rank's micro-batches, one at a time. Their sum is the rank's part of the loss."""
        n_targets = count_targets(batch)
        if packed:
            for micro in parallel.micros_here(batch, flags.max_tokens, device):
                yield model.loss(*micro) / n_targets
            return
        rows = batch[ranks.rank()::ranks.n_ranks()]
        for i in range(0, len(rows), sequences):
            inputs = padded(rows[i:i + sequences], device)
            yield model(**inputs, use_cache=False, num_items_in_batch=n_targets).loss

    def step(batch):
        total = torch.zeros((), device=device)
        for loss in losses(batch):
            loss.backward()
            total += loss.detach()
        if not mesh:
            for master, p in zip(masters, params):
                master.grad = p.grad.float()
                p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, flags.clip)
        optimizer.step()
        optimizer.zero_grad()
        if mesh:
            dist.all_reduce(total, group=mesh.get_group())
        else:
            with torch.no_grad():
                torch._foreach_copy_(params, masters)
        return total, norm
    return compiled(step) if packed and device.type == "cuda" and not flags.eager else step


def most_sequences(make, batches, a, device):
    """make(mesh, sequences) -> step. -> how many sequences at a time fit into the memory of every rank.
    They are tried under FSDP2 on a group whose collectives do nothing, because a rank that runs out of memory
    amid real ones would leave the others waiting."""
    mesh = None
    if ranks.several():
        import torch.testing._internal.distributed.fake_pg  # noqa: F401
        mesh = dist.device_mesh.DeviceMesh.from_group(dist.new_group(backend="fake"), device.type)
    largest = max(batches, key=lambda batch: max(len(e.ids) for e in batch[ranks.rank()::ranks.n_ranks()]))
    sequences = a.sequences
    while ranks.largest(int(runs_out(lambda: make(mesh, sequences), largest, device))):
        if sequences == 1:
            sys.exit("transformers fsdp: out of memory with one sequence at a time")
        sequences = -(-sequences // 2)
        print(f"transformers fsdp: out of memory, so {sequences} sequences at a time", flush=True)
        clean_up(device)
    clean_up(device)
    return sequences


def runs_out(make, batch, device):
    """Is the memory of this rank too small for steps on the batch? The second one has moments as well."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(PROBE)
    try:
        step = make()
        step(batch)
        step(batch)
    except torch.OutOfMemoryError:
        return True
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return False


# ------------------------------------------------------------------------------------------------------------
# the measurement

def clean_up(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def predicted_gb(method, config, step, flags):
    """What train.py --dry-run would say for the largest micro-batch of these batches."""
    with torch.device("meta"):
        model = Transformer(config).to(getattr(torch, flags.dtype))
    model.checkpointing = flags.checkpointing
    with_experts(model, method, flags)
    return estimate_bytes(model, flags, max(step.targets), ranks.n_ranks())["peak (estimate)"] / 1e9


def make_step(method, task, config, batches, a, device):
    """-> a function that builds model and optimizer and gives step(batch), which gives loss and norm; and how
    many sequences each of its micro-batches has, where that had to be found out"""
    flags = flags_of(method if method in OURS else "fft", task, a)
    load = make_load(config, a, getattr(torch, flags.dtype), device)
    if method in OURS:
        return lambda: ours(method, config, load, batches, flags, device), None
    build = lambda mesh, sequences: peer(method, config, load, flags, device, mesh, sequences)
    sequences = None
    if method == "transformers fsdp":
        sequences = most_sequences(build, batches, a, device)
    several = ranks.several()
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks.n_ranks(),)) if several else None
    return lambda: build(mesh, sequences), sequences


def measure(method, task, config, a, device):
    """-> what --json has of one method and task"""
    batches = batches_of(task, a, config.vocab_size)
    make, sequences = make_step(method, task, config, batches, a, device)
    made = []
    ready = speed.timed(lambda: made.append(make()), device)
    step = made.pop()
    clean_up(device)
    losses = []
    first = speed.timed(lambda: losses.append(step(batches[0])[0].item()), device)
    for i in range(1, a.curve):
        losses.append(step(batches[i % a.steps])[0].item())
    if a.shape != "toy" and not losses[0] < math.log(config.vocab_size) + 2:
        sys.exit(f"{method}: random weights have a loss of {losses[0]:.3f}, but guessing gives "
                 f"{math.log(config.vocab_size):.3f}")
    for batch in batches:
        step(batch)
    ranks.wait()
    seconds = speed.timed(lambda: [step(b) for _ in range(a.rounds) for b in batches], device)
    seconds = max(ranks.of_all(seconds)) / a.rounds / a.steps
    tokens, n = sum(map(count_tokens, batches)) / a.steps, ranks.n_ranks()
    allocated = speed.peak_memory(device)
    reserved = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    result = dict(method=method, task=task, shape=a.shape, ranks=n, ms=1e3 * seconds, tokens=tokens,
                  tok_per_s=tokens / seconds, tok_per_s_per_gpu=tokens / seconds / n,
                  allocated_gb=ranks.of_all(allocated), reserved_gb=ranks.of_all(reserved), ready_s=ready,
                  first_step_s=first, losses=losses, sequences_at_a_time=sequences, predicted_gb=0.0)
    if isinstance(step, fast.FastStep):
        result["predicted_gb"] = predicted_gb(method, config, step, flags_of(method, task, a))
    if a.profile:
        result["profile"] = profile(step, batches[:2])
    return result


def profile(step, batches):
    """The first rank's time on the device, in ms a step, and the kernels that take most of it. The other
    ranks run the same steps.

        span            from the first kernel to the last
        compute, nccl   while at least one such kernel runs
        exposed         while NCCL runs alone
        gaps            while nothing runs"""
    def run():
        ranks.wait()
        for batch in batches:
            step(batch)
        torch.cuda.synchronize()
    if not ranks.first():
        return run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summary(events, len(batches))


def summary(events, steps):
    """events: those of a chrome trace. Annotations, which span kernels, are no kernels. -> see `profile`"""
    kernels, times = {}, {"nccl": [], "compute": []}
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ms, n = kernels.get(e["name"], (0.0, 0))
            kernels[e["name"]] = ms + e["dur"] / 1e3 / steps, n + 1
            kind = "nccl" if "nccl" in e["name"].lower() else "compute"
            times[kind].append((e["ts"], e["ts"] + e["dur"]))
    both = times["nccl"] + times["compute"]
    span = max(end for _, end in both) - min(start for start, _ in both)
    compute, nccl, busy = covered(times["compute"]), covered(times["nccl"]), covered(both)
    result = dict(span=span, compute=compute, nccl=nccl, exposed=busy - compute, gaps=span - busy)
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:12]
    return ({name: us / 1e3 / steps for name, us in result.items()}
            | {"kernels": [dict(ms=ms, launches=n / steps, name=name) for name, (ms, n) in top]})


def covered(intervals):
    """The length of the union of (start, end)"""
    length, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


# ------------------------------------------------------------------------------------------------------------
# the table

def show(r):
    print(f"{r['method']:18s}{r['task']:6s}{r['ms']:9.1f}{r['tokens']:9.0f}{r['tok_per_s']:10,.0f}"
          f"{r['tok_per_s_per_gpu']:10,.0f}{max(r['allocated_gb']):7.1f}{max(r['reserved_gb']):9.1f}"
          f"{r['predicted_gb']:10.1f}"
          f"{r['ready_s']:7.1f}{r['first_step_s']:7.1f}\n    losses "
          + " ".join(f"{loss:.4f}" for loss in r["losses"]), flush=True)
    if r.get("profile"):
        p = dict(r["profile"])
        kernels = p.pop("kernels")
        print("    profile, ms a step: " + ", ".join(f"{name} {ms:.1f}" for name, ms in p.items()))
        for k in kernels:
            print(f"    {k['ms']:8.3f} ms  {k['launches']:7.1f} x  {k['name'][:110]}", flush=True)


def run(a, device):
    raw = json.loads((ROOT / "toy/config.json").read_text()) if a.shape == "toy" else speed.SHAPES[a.shape]
    config = Config.from_dict(raw)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{a.shape}, {ranks.n_ranks()} x {where}, torch {torch.__version__}, {a.sequences} sequences each\n"
          f"{'':18s}{'task':6s}{'ms/step':>9s}{'tokens':>9s}{'tok/s':>10s}{'per GPU':>10s}{'GB':>7s}"
          f"{'reserved':>9s}{'predicted':>10s}{'ready':>7s}{'first':>7s} s", flush=True)
    if ranks.several():
        dist.all_reduce(torch.zeros(1, device=device))      # NCCL takes its memory before any is measured
    for method in a.methods:
        torch._dynamo.reset()
        for task in a.tasks:
            clean_up(device)
            result = measure(method, task, config, a, device)
            show(result)
            if a.json and ranks.first():
                with open(a.json, "a") as file:
                    print(json.dumps(result), file=file)


def main():
    with ranks.processes():
        with ranks.together():
            a = parse_args()
            try:
                device = ranks.own_device("cuda" if torch.cuda.is_available() else "cpu")
            except ValueError as e:
                sys.exit(f"error: {e}")
        device = torch.device(device)
        torch.set_flush_denormal(True)          # as train.py
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        try:
            run(a, device)
        except torch.OutOfMemoryError as e:
            sys.exit(f"rank {ranks.rank()}: out of memory ({str(e).partition('. ')[0]})")


if __name__ == "__main__":
    main()
