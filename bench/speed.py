"""How long a step takes, where its time goes, and what the same work costs in `transformers`, alone and with
Liger-Kernel, and in `peft`.

    python bench/speed.py                                  # a GPU: Qwen2.5-1.5B shapes, all methods and tasks
    python bench/speed.py --shape gemma-3-1b --methods fft molf
    python bench/speed.py --methods molf --tasks med --profile      # which kernels take the time
    python bench/speed.py --shape toy                        # a CPU: the embedded model

Weights are random, in checkpoints of the real shapes; sequences are as long as the tasks' real rows under the
family's tokenizer (lengths.json: prompt and target tokens of 512 rows a task), 32 of them a step. Each method
runs in a process of its own, through the same step as in train.py, and prints for each task:

    ms/step   over all rounds of 16 batches, everything captured before
    optim.    what forward and backward alone do not take of it: packing, unfold, norm, optimizer, fold
    tok/s     tokens a second, padding not counted
    MFU       model FLOPs utilisation: of what the bf16 product of two 8192 x 8192 matrices reaches here
    GB        peak of the memory that was allocated, and of that held by torch
    s         to load, to compile (the very first step), to capture

    python bench/speed.py --measure-lengths qwen TOKENIZER_DIR DATA_DIR         # made lengths.json
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data     # noqa: E402
import train    # noqa: E402
from data import count_targets, count_tokens        # noqa: E402
from lib.fast import FastStep, replaced             # noqa: E402
from lib.report import peak_memory                  # noqa: E402
from model import TARGETS, Config, Transformer, add_experts     # noqa: E402
from molf import MoLFAdamW, param_groups            # noqa: E402

QWEN = dict(model_type="qwen2", vocab_size=151936, num_key_value_heads=2, rms_norm_eps=1e-6,
            rope_theta=1e6, tie_word_embeddings=True, max_position_embeddings=32768, hidden_act="silu",
            torch_dtype="bfloat16", bos_token_id=151643, eos_token_id=151643)
SHAPES = {
    "qwen2.5-1.5b": QWEN | dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                num_attention_heads=12),
    "qwen2.5-3b": QWEN | dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                              num_attention_heads=16),
    "qwen2.5-7b": QWEN | dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                              num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                              tie_word_embeddings=False),
    "qwen2.5-14b": QWEN | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
                               num_attention_heads=40, num_key_value_heads=8, vocab_size=152064,
                               tie_word_embeddings=False),
    "gemma-3-1b": dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
                       num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256,
                       sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256,
                       rms_norm_eps=1e-6, rope_theta=1e6, rope_local_base_freq=1e4,
                       max_position_embeddings=32768, hidden_activation="gelu_pytorch_tanh",
                       torch_dtype="bfloat16", tie_word_embeddings=True, bos_token_id=2, eos_token_id=1,
                       pad_token_id=0)}
METHODS = ("fft", "lora", "molf", "molf-e", "transformers fft", "liger fft", "peft lora")
LENGTHS = Path(__file__).with_name("lengths.json")
LONG = 400              # the sizes of a run in which each batch comes so often
FILES = {"fact": "counterfact.jsonl.gz", "med": "medmcqa_train.jsonl.gz", "sql": "sql_train.jsonl.gz"}


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="qwen2.5-1.5b", choices=["toy", *SHAPES])
    p.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    p.add_argument("--tasks", nargs="+", default=list(FILES), choices=list(FILES))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--max-tokens", type=int, default=16384)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--eager", action="store_true", help="no compilation, no graphs")
    p.add_argument("--profile", action="store_true")
    p.add_argument("--measure-lengths", nargs=3, metavar=("FAMILY", "TOKENIZER", "DATA"))
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p.parse_args()


def measure_lengths(family, tokenizer, folder):
    """512 rows of each task, drawn with seed 0 -> numbers of prompt and target tokens, in lengths.json."""
    known = json.loads(LENGTHS.read_text()) if LENGTHS.exists() else {}
    tokenizer, known[family] = data.Tokenizer.from_file(tokenizer), {}
    for task, file in FILES.items():
        rows, _ = data.load_rows(task, "train", str(Path(folder) / file))
        rows = random.Random(0).sample(rows, 512)
        examples = [data.encode(tokenizer, *data.TASKS[task].pair(row)) for row in rows]
        known[family][task] = [[e.n_prompt, len(e.ids) - e.n_prompt] for e in examples]
    LENGTHS.write_text(json.dumps(known).replace("]], ", "]],\n") + "\n")


def batches_of(task, a, vocab_size, tokenizer=None):
    """16 batches of 32 examples with random tokens and the task's lengths; the toy's are its own rows."""
    if a.shape == "toy":
        rows, _ = data.load_rows(task, "train", "toy")
        examples = [data.encode(tokenizer, *data.TASKS[task].pair(r)) for r in (rows * 5)[:512]]
    else:
        lengths = json.loads(LENGTHS.read_text())["gemma" if "gemma" in a.shape else "qwen"][task]
        rng = random.Random(1)
        examples = [data.Example([rng.randrange(1000, vocab_size) for _ in range(n + m)], n, i)
                    for i, (n, m) in enumerate(lengths)]
    return [examples[i:i + 32] for i in range(0, len(examples), 32)]


def matmul_flops(device):
    """What this device reaches in a large matrix product: FLOP/s, the best of ten."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    x, y = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: x @ y, device) for _ in range(10))


def timed(f, device):
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def model_flops(config, batch, frozen, rank):
    """The products of a step that no implementation can leave out: weights at every token (on a frozen base
    without their gradients), the head at every target, attention."""
    c, n = config, count_tokens(batch)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(c.hidden_size, q), (c.hidden_size, kv), (c.hidden_size, kv), (q, c.hidden_size)]
    shapes += 3 * [(c.hidden_size, c.intermediate_size)]
    weights = c.num_hidden_layers * sum(i * o for i, o in shapes)
    lora = c.num_hidden_layers * sum((i + o) * rank for i, o in shapes) if frozen else 0
    targets = count_targets(batch)
    pairs = sum(len(e.ids) ** 2 / 2 for e in batch)
    return ((4 if frozen else 6) * (weights * n + c.vocab_size * c.hidden_size * targets) + 6 * lora * n
            + 12 * c.num_hidden_layers * q * pairs)


def ours(method, folder, a, device):
    """-> a function of a task's batches, which gives step(batch) and forward_backward(batch), the part of it
    without the optimizer, as something to call; and the model's config, LoRA ranks, and whether only they
    train."""
    flags = train.parse_args(
        ["--model", str(folder), "--data", "hub", "--method", method, "--max-tokens", str(a.max_tokens),
         *["--checkpointing"] * a.checkpointing, *["--eager"] * a.eager])
    model = Transformer.from_pretrained(folder, getattr(torch, flags.dtype), device).train()
    model.checkpointing = flags.checkpointing
    add_experts(model, flags.ranks, flags.alpha, method in ("fft", "molf"))
    optimizer = MoLFAdamW(param_groups(model, flags.lr, flags.lora_lr))

    def prepare(batches):
        step = train.make_step(model, optimizer, batches * LONG, flags)
        fast = isinstance(step, FastStep)

        def forward_backward(batch):
            micros = step.inputs(batch)[0] if fast else [
                data.to_device(m, device) for m in data.micro_batches(batch, flags.max_tokens)]

            def run():
                for micro in micros:            # (they are the graph's inputs: alive as long as `run`)
                    model.loss(*micro).backward()
                for p in model.parameters():
                    p.grad = None
            if not fast or device.type != "cuda":
                return run
            graph = torch.cuda.CUDAGraph()
            with replaced(step.parts), torch.cuda.graph(graph, pool=step.pool):
                run()
            return lambda: (graph.replay(), run)
        return step, forward_backward
    return prepare, model.config, sum(flags.ranks), method in ("lora", "molf-e")


def theirs(method, folder, a, device):
    """The same work in transformers: padded, sdpa, fused AdamW, no checkpointing, one micro-batch; where the
    GPU's memory is too small for that, two, four..., each padded to its own longest sequence. "liger fft" has
    Liger-Kernel's RMSNorm, RoPE, SwiGLU or GeGLU, and the loss in which the logits are never whole."""
    if method == "liger fft":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as AutoModel
    else:
        from transformers import AutoModelForCausalLM as AutoModel
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    lora, rank = method == "peft lora", 16 if a.shape == "toy" else 128
    if lora:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=rank, use_rslora=True, target_modules=list(TARGETS),
                                                 task_type="CAUSAL_LM"))
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, size = torch.optim.AdamW(params, lr=5e-5, fused=True), [32]

    def forward_backward(batch):
        pad = [max(len(e.ids) for e in batch) - len(e.ids) for e in batch]
        ids = torch.tensor([e.ids + [0] * n for e, n in zip(batch, pad)]).to(device)
        mask = torch.tensor([[1] * len(e.ids) + [0] * n for e, n in zip(batch, pad)]).to(device)
        labels = torch.tensor([[-100] * e.n_prompt + e.ids[e.n_prompt:] + [-100] * n
                               for e, n in zip(batch, pad)]).to(device)
        with torch.autocast(device.type, dtype, enabled=lora and device.type == "cuda"):
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    def step(batch):
        fits = False
        while not fits:
            try:
                for i in range(0, len(batch), size[0]):
                    forward_backward(batch[i:i + size[0]])
                fits = True
            except torch.OutOfMemoryError:
                size[0] //= 2
                print(f"{method}: out of memory, so {size[0]} sequences at a time from here on", flush=True)
            if not fits:                        # (here the error, and what it holds, is gone)
                optimizer.zero_grad()
                torch.cuda.empty_cache()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    return lambda batches: (step, None), config, rank, lora


def measure(a):
    """In a process of its own: one method, on each task. Prints a line of JSON for each."""
    method, folder = json.loads(a.child)
    device, folder = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(folder)
    peak, start = matmul_flops(device), time.perf_counter()
    make = ours if method in ("fft", "lora", "molf", "molf-e") else theirs
    prepare, config, rank, frozen = make(method, folder, a, device)
    synchronize(device)
    load_s, compile_s = time.perf_counter() - start, None
    tokenizer = data.Tokenizer.from_file(folder) if a.shape == "toy" else None
    for task in a.tasks:
        batches = batches_of(task, a, config.vocab_size, tokenizer)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, forward_backward = prepare(batches)
        first = timed(lambda: step(batches[0]), device)
        compile_s = first if compile_s is None else compile_s       # later tasks have no more to compile
        everything = timed(lambda: [step(b) for b in batches], device)
        seconds = timed(lambda: [step(b) for _ in range(a.rounds) for b in batches], device)
        seconds /= a.rounds * len(batches)
        tokens = sum(map(count_tokens, batches)) / len(batches)
        flops = sum(model_flops(config, b, frozen, rank) for b in batches) / len(batches)
        result = dict(method=method, task=task, ms=1e3 * seconds, tokens=tokens, tok_per_s=tokens / seconds,
                      mfu=flops / peak / seconds, matmul_tflops=peak / 1e12, load_s=load_s,
                      compile_s=compile_s, capture_s=max(0.0, everything - seconds * len(batches)),
                      peak_gb=peak_memory(device))
        if device.type == "cuda":
            result["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        if forward_backward:
            some, parts = batches[:4], [forward_backward(b) for b in batches[:4]]
            whole = timed(lambda: [step(b) for _ in range(a.rounds) for b in some], device)
            part = timed(lambda: [f() for _ in range(a.rounds) for f in parts], device)
            result["optimizer_ms"] = 1e3 * (whole - part) / a.rounds / len(some)
            del parts
        print("RESULT", json.dumps(result), flush=True)
        if a.profile:
            profile(lambda: [step(b) for b in batches[:4]], 4)
        del step, forward_backward


def profile(f, steps):
    """Time by kernel: ms a step, and the number of launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        f()
        torch.cuda.synchronize()
    kernels = {}
    for e in p.events():
        if e.device_type == torch.profiler.DeviceType.CUDA:
            ms, n = kernels.get(e.name, (0, 0))
            kernels[e.name] = ms + e.device_time / 1e3 / steps, n + 1
    print(f"kernels: {sum(ms for ms, _ in kernels.values()):.1f} ms a step")
    for name, (ms, n) in sorted(kernels.items(), key=lambda x: -x[1][0])[:45]:
        print(f"  {ms:8.3f} ms  {n / steps:7.1f} x  {name[:140]}")


def main():
    a = parse_args()
    if a.measure_lengths:
        return measure_lengths(*a.measure_lengths)
    if a.child:
        return measure(a)
    with tempfile.TemporaryDirectory() as folder:
        if a.shape == "toy":
            folder = ROOT / "toy"
        else:
            torch.manual_seed(0)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                model = Transformer(Config.from_dict(SHAPES[a.shape])).to(torch.bfloat16)
            model.save_pretrained(folder)
            del model
            torch.cuda.empty_cache()
        results, tokens = {}, {}
        print(f"{'':18s}{'task':6s}{'ms/step':>9s}{'optim.':>8s}{'tok/s':>10s}{'MFU':>6s}{'GB':>7s}"
              f"{'reserved':>9s}{'load':>6s}{'compile':>8s}{'capture':>8s} s")
        for method in a.methods:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", json.dumps([method, str(folder)])]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                for line in child.stdout:
                    if line.startswith("RESULT "):
                        r = results[method] = json.loads(line.removeprefix("RESULT "))
                        tokens[r["task"]] = r["tokens"]
                        line = (f"{method:18s}{r['task']:6s}{r['ms']:9.1f}{r.get('optimizer_ms', 0):8.1f}"
                                f"{r['tok_per_s']:10,.0f}{r['mfu']:6.0%}{r['peak_gb']:7.1f}"
                                f"{r.get('reserved_gb', 0):9.1f}{r['load_s']:6.1f}{r['compile_s']:8.1f}"
                                f"{r['capture_s']:8.1f}\n")
                    print(line, end="", flush=True)
            if child.returncode:
                print(f"{method}: failed with code {child.returncode}")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = max((r["matmul_tflops"] for r in results.values()), default=0)
    print(f"{a.shape}, {where}, torch {torch.__version__}, matrix product {peak:.1f} TFLOP/s; tokens a step: "
          + ", ".join(f"{task} {n:.0f}" for task, n in tokens.items()))
    sys.exit(len(results) < len(a.methods))


if __name__ == "__main__":
    main()
