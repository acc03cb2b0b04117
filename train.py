"""Fine-tune Qwen2.5 or Gemma-3 with full fine-tuning, LoRA, MoLF or MoLF-Efficient: one loop for the four.

    python train.py                                                     # MoLF on the embedded toy, on any CPU
    python train.py --method lora                                       # or fft, molf, molf-e
    python train.py --model Qwen/Qwen2.5-0.5B --task fact --limit 1000  # a hub model on CounterFact
    python train.py --model DIR --task fact --data counterfact.json --out runs/mine
    python train.py --model DIR --task fact --dry-run                   # counts, bytes and steps; loads no weights
"""
import argparse
import hashlib
import json
import math
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import data
from data import Tokenizer
from model import (MoLFLinear, Packed, Transformer, add_experts, find_checkpoint, fold, read_config, save_safely,
                   unfold)
from molf import SCORES, MoLFAdamW, param_groups

# What a flag that is not given means: the paper's settings (arXiv 2605.07111), but for the toy, whose width of 128
# wants smaller ranks and larger steps.
PAPER = dict(epochs=2, lr=5e-5, lora_lr=5e-5, alpha=32, ranks={"lora": [128], "molf": [128], "molf-e": [32, 128]})
TOY = dict(epochs=10, lr=1e-3, lora_lr=1e-3, alpha=12, ranks={"lora": [16], "molf": [16], "molf-e": [4, 16]})


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="toy", help="toy, a directory in Hugging Face format, or a hub id (default: toy)")
    add("--task", default="fact", choices=list(data.TASKS))
    add("--data", help="training rows, .json .jsonl .jsonl.gz .parquet (default: the task's official source; the "
                       "toy world for the toy)")
    add("--out", help="run directory (default: runs/<model>-<task>-<method>-<hash of the flags>)")
    add("--overwrite", action="store_true", help="replace a finished run in --out")
    add("--method", default="molf", choices=["fft", "lora", "molf", "molf-e"])
    add("--score", default="epd", choices=list(SCORES), help="the routing rule, see molf.py (default: epd)")
    add("--top-k", type=int, default=1, help="experts of a module that move at each step (default: 1)")
    add("--ranks", type=int, nargs="+", help="ranks of the LoRA experts (default: 128; molf-e: 32 128)")
    add("--alpha", type=float, help="LoRA scale is alpha / sqrt(rank) (default: 32)")
    add("--dropout", type=float, default=0.0, help="LoRA dropout; above 0 layers cannot be folded (default: 0)")
    add("--rest", choices=["train", "freeze"], help="embedding, norms, biases and head (default: train for fft and "
                                                    "molf, freeze for lora and molf-e)")
    add("--lr", type=float, help="learning rate of the full expert and the rest (default: 5e-5)")
    add("--lora-lr", type=float, help="learning rate of the LoRA experts (default: 5e-5)")
    add("--weight-decay", type=float, default=0.1, help="of the full expert and the rest (default: 0.1)")
    add("--lora-weight-decay", type=float, default=0.01, help="of the LoRA experts (default: 0.01)")
    add("--warmup", type=float, default=0.1, help="share of the steps with rising lr, then cosine to 0 (default: 0.1)")
    add("--clip", type=float, default=1.0, help="gradient norm over all experts (default: 1.0)")
    add("--epochs", type=int, help="(default: 2)")
    add("--batch-size", type=int, default=32, help="sequences of an optimizer step (default: 32)")
    add("--max-tokens", type=int, default=16384, help="tokens of a micro-batch; changes no result (default: 16384)")
    add("--max-length", type=int, default=1024, help="longer training sequences are skipped (default: 1024)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass, to save memory")
    add("--limit", type=int, help="use only the first N training rows")
    add("--eval-limit", type=int, help="evaluate on the first N rows only")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float32", "float16"], help="of the weights in the forward pass; experts and "
        "moments are float32 always (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--seed", type=int, default=42)
    add("--log-every", type=int, default=10, help="steps between log lines (default: 10)")
    add("--dry-run", action="store_true", help="print counts, bytes by kind and the number of steps, then stop")
    a = p.parse_args(argv)
    full = a.method in ("fft", "molf")
    for key, value in (TOY if a.model == "toy" else PAPER).items():
        if getattr(a, key) is None:
            setattr(a, key, value.get(a.method, []) if key == "ranks" else value)
    a.rest = a.rest or ("train" if full else "freeze")
    a.dtype = a.dtype or ("bfloat16" if a.device.startswith("cuda") else "float32")
    n_experts = full + len(a.ranks)
    if a.method == "fft" and a.ranks:
        p.error("--ranks: fft has no LoRA expert")
    if any(r < 1 for r in a.ranks):
        p.error("--ranks must be at least 1 each")
    if a.method != "fft" and not a.ranks:
        p.error("--ranks: give at least one rank")
    if not 1 <= a.top_k <= n_experts:
        p.error(f"--top-k {a.top_k}: {a.method} with ranks {a.ranks} has {n_experts} experts a module")
    for key in ("epochs", "batch_size", "max_tokens", "max_length", "limit", "eval_limit", "log_every"):
        if getattr(a, key) is not None and getattr(a, key) < 1:
            p.error(f"--{key.replace('_', '-')} must be at least 1")
    if not 0 <= a.dropout < 1 or not 0 <= a.warmup <= 1:
        p.error("--dropout and --warmup are shares, from 0 to 1")
    if not a.out:
        name = hashlib.sha256(repr(sorted(vars(a).items())).encode()).hexdigest()[:8]
        a.out = f"runs/{Path(a.model).name}-{a.task}-{a.method}-{name}"
    return a


# ---------------------------------------------------------------------------------------------------------------
# from examples to micro-batches on the device

def micro_batches(examples, max_tokens):
    """Cut a list of examples, in order, into lists of at most max_tokens tokens (or of one longer example)."""
    batch, n = [], 0
    for e in examples:
        if batch and n + len(e.ids) > max_tokens:
            yield batch
            batch, n = [], 0
        batch.append(e)
        n += len(e.ids)
    if batch:
        yield batch


def to_device(examples, device):
    """-> ids (N,), layout, where (M,), labels (M,): the arguments of Transformer.loss."""
    ids, lengths, where, labels = data.pack(examples)
    ids, where, labels = (torch.tensor(x).to(device, non_blocking=True) for x in (ids, where, labels))
    return ids, Packed(lengths, device), where, labels


def batch_of(step, examples, batch_size, seed):
    """The examples of an optimizer step: epochs of a shuffled order that only the seed and the epoch decide."""
    per_epoch = math.ceil(len(examples) / batch_size)
    epoch, i = divmod(step, per_epoch)
    order = list(range(len(examples)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [examples[j] for j in order[i * batch_size:(i + 1) * batch_size]]


# ---------------------------------------------------------------------------------------------------------------
# the loop

def lr_factor(step, total, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to 0."""
    n = max(1, round(warmup * total)) if warmup else 0
    if step < n:
        return (step + 1) / n
    return 0.5 * (1 + math.cos(math.pi * (step - n) / max(1, total - n)))


def train(model, optimizer, examples, a, log=print):
    """Train `model` on `examples` with the flags `a`. log(line, record) is called every a.log_every steps.
    -> {"winners": (steps, modules, experts) bool, "scores": the same in fp32}"""
    device = next(model.parameters()).device
    params = [p for g in optimizer.param_groups for p in g["params"]]
    total = a.epochs * math.ceil(len(examples) / a.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i, total, a.warmup))
    lrs = {g["kind"]: i for i, g in enumerate(optimizer.param_groups)}      # one group of each kind, for the log
    full_first = any(g["kind"] == "full" for g in optimizer.param_groups)
    pending, winners, scores = [], [], []                                   # pending: device tensors since the last log
    tokens, clock, skip = 0, None, min(3, total - 1)                        # the first steps are not timed
    model.train()
    for step in range(total):
        if step == skip:
            tokens, clock = 0, time.perf_counter()
        batch = batch_of(step, examples, a.batch_size, a.seed)
        n_targets = sum(len(e.ids) - e.n_prompt for e in batch)             # of the whole optimizer batch
        loss = 0
        for micro in micro_batches(batch, a.max_tokens):
            part = model.loss(*to_device(micro, device)) / n_targets
            part.backward()                     # G = dL/dW_eff of every linear, and autograd for the rest
            loss = loss + part.detach()
        unfold(model)                           # one G -> the exact gradient of every expert
        norm = torch.nn.utils.clip_grad_norm_(params, a.clip)
        if device.type == "cpu" and not (loss + norm).isfinite():           # on a GPU: at the log, one sync each
            stop_not_finite(step, loss, norm, batch)
        rates = [optimizer.param_groups[i]["lr"] for i in lrs.values()]
        optimizer.step()                        # moments, scores, winners
        fold(model)                             # the winners' new weights -> the one weight that the forward uses
        optimizer.zero_grad()
        schedule.step()
        tokens += sum(len(e.ids) for e in batch)
        pending.append((loss, norm, optimizer.winners.clone(), optimizer.scores.clone()))
        if step % a.log_every == a.log_every - 1 or step in (0, total - 1):
            loss, norm, w, s = (torch.stack(x).cpu() for x in zip(*pending))            # the sync point
            bad = (~(loss + norm).isfinite()).nonzero()
            if len(bad):
                first = step + 1 - len(loss) + bad[0].item()
                stop_not_finite(first, loss[bad[0]], norm[bad[0]], batch_of(first, examples, a.batch_size, a.seed))
            winners.append(w), scores.append(s), pending.clear()
            speed = tokens / (time.perf_counter() - clock) if clock and step > skip else float("nan")
            eta = (total - 1 - step) * tokens / (step - skip + 1) / speed if speed == speed else 0
            share = w[..., 0].float().mean().item() if full_first and w.numel() else 0.0    # since the last log
            record = dict(step=step + 1, loss=loss[-1].item(), lr=dict(zip(lrs, rates)), grad_norm=norm[-1].item(),
                          full_share=share, tok_per_s=speed, peak_gb=peak_memory(device))
            log(f"step {step + 1:4d}/{total}  loss {record['loss']:.4f}  lr {'/'.join(f'{x:.1e}' for x in rates)}  "
                f"norm {record['grad_norm']:.2f}  full {share:4.0%}  {speed:,.0f} tok/s  "
                f"eta {int(eta) // 60}:{int(eta) % 60:02d}  {record['peak_gb']:.1f} GB", record)
    model.eval()
    return {"winners": torch.cat(winners), "scores": torch.cat(scores)}


def full_share(winners, module_names):
    """winners (steps, modules, experts) -> {"q_proj": share of steps that the full expert won, ...}"""
    kinds = {}
    for i, name in enumerate(module_names):
        kinds.setdefault(name.rpartition(".")[2], []).append(i)
    return {kind: winners[:, i, 0].float().mean().item() for kind, i in kinds.items()}


def stop_not_finite(step, loss, norm, batch):
    rows = ", ".join(str(e.row) for e in batch)
    sys.exit(f"stopped at step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}. The batch's rows: {rows}. "
             f"Nothing was written after the last good state; lower --lr and --lora-lr, or look at these rows.")


def peak_memory(device):
    """GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ---------------------------------------------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def score_targets(model, examples, max_tokens=16384):
    """Packed forward passes, no generation -> for each example a data.Scored: the log-probability of each target
    token, and whether it is what greedy decoding would have chosen there. Softmax in fp32."""
    device = next(model.parameters()).device
    tagged = sorted((e._replace(row=i) for i, e in enumerate(examples)), key=lambda e: len(e.ids))
    results = [None] * len(examples)
    for batch in micro_batches(tagged, max_tokens):
        ids, layout, where, labels = to_device(batch, device)
        hidden, logprobs, greedy = model.hidden(ids, layout)[where], [], []
        for x, y in zip(hidden.split(2048), labels.split(2048)):
            logits = model.logits(x).float()
            logprobs.append((logits.gather(1, y[:, None]) - logits.logsumexp(1, keepdim=True))[:, 0])
            greedy.append(logits.argmax(1) == y)
        logprobs, greedy, n = torch.cat(logprobs).tolist(), torch.cat(greedy).tolist(), 0
        for e in batch:
            m = len(e.ids) - e.n_prompt
            results[e.row] = data.Scored(logprobs[n:n + m], greedy[n:n + m], e.ids[e.n_prompt])
            n += m
    return results


def evaluate(model, tokenizer, task, rows, max_tokens):
    """-> {metric: {"value", "n", "low", "high"}}: the mean over rows with a 95 % bootstrap interval."""
    queries = [[data.encode(tokenizer, *q) for q in task.queries(row)] for row in rows]
    scored = iter(score_targets(model, [e for q in queries for e in q], max_tokens))
    per_row = [task.metrics(row, [next(scored) for _ in q]) for row, q in zip(rows, queries)]
    return {name: bootstrap([m[name] for m in per_row if name in m]) for name in per_row[0]}


def bootstrap(values, resamples=1000):
    x = torch.tensor(values, dtype=torch.float64)
    pick = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[pick].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": x.mean().item(), "n": len(x), "low": low, "high": high}


# ---------------------------------------------------------------------------------------------------------------
# the run

def provenance():
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    return dict(argv=sys.argv, git=git.stdout.strip() or None, torch=torch.__version__, python=platform.python_version(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, cpu_threads=torch.get_num_threads(),
                date=time.strftime("%Y-%m-%d %H:%M:%S"))


def count_parameters(model):
    """Parameters of each expert (those of a folded weight are its full expert's), of the rest, and the frozen."""
    counts, seen = {}, set()
    for m in model.modules():
        if isinstance(m, MoLFLinear):
            seen.add(m.weight)
            for kind, _, params in m.experts():
                key = kind if kind == "full" else f"lora {params[0].shape[0]}"
                counts[key] = counts.get(key, 0) + sum(p.numel() for p in params)
                seen.update(params)
            if not m.weight.requires_grad:
                counts["frozen"] = counts.get("frozen", 0) + m.weight.numel()
    for p in model.parameters():
        if p not in seen:
            key = "rest" if p.requires_grad else "frozen"
            counts[key] = counts.get(key, 0) + p.numel()
    return counts


def estimate_bytes(model, a, longest_batch):
    """What training keeps on the device, by kind. Activations are counted, not measured: what eager autograd saves
    of each block for the largest micro-batch, and one chunk of logits in the forward and backward pass."""
    size = {"bfloat16": 2, "float32": 4}[a.dtype]
    trained = {p for g in param_groups(model) for p in g["params"]}
    c, tokens = model.config, min(longest_batch, a.max_tokens)
    heads = c.head_dim * (2 * c.num_attention_heads + 4 * c.num_key_value_heads)
    per_token = c.num_hidden_layers * (12 * c.hidden_size + 3 * heads + 5 * c.intermediate_size)
    if a.checkpointing:
        per_token = c.num_hidden_layers * c.hidden_size + per_token // c.num_hidden_layers
    weights = [p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("weight", "bias")]
    experts = [p for n, p in model.named_parameters() if n.rpartition(".")[2] not in ("weight", "bias")]
    return {"weights": size * sum(p.numel() for p in weights),
            "experts (fp32)": 4 * sum(p.numel() for p in experts),
            "gradients": sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
            + sum(4 * p.numel() for p in experts if p.dim() == 2 and p in trained and min(p.shape) in a.ranks),
            "moments and masters (fp32)": sum(p.numel() * (8 + 4 * (p.element_size() < 4)) for p in trained),
            "activations (estimate)": size * tokens * per_token + 3 * 4 * min(tokens, 2048) * c.vocab_size}


def read_data(a, tokenizer):
    """-> (training examples, evaluation rows); says how many rows were left out and why."""
    task = data.TASKS[a.task]
    train_rows, eval_rows = data.load_rows(a.task, a.data, toy=a.model == "toy", limit=a.limit)
    examples = [data.encode(tokenizer, *task.pair(row), row=i) for i, row in enumerate(train_rows)]
    kept = [e for e in examples if len(e.ids) <= a.max_length]
    if len(kept) < len(examples):
        print(f"skipped {len(examples) - len(kept)} of {len(examples)} training rows: longer than --max-length "
              f"{a.max_length} tokens (none was cut)")
    if not kept:
        raise ValueError("no training row is left")
    return kept, eval_rows[:a.eval_limit]


def main(argv=None):
    a = parse_args(argv)
    torch.set_flush_denormal(True)      # second moments reach 1e-40, where a CPU is several times slower
    out = Path(a.out)
    try:
        if (out / "results.json").exists() and not (a.overwrite or a.dry_run):
            raise FileExistsError(f"{out} holds a finished run: give another --out, or --overwrite")
        source = find_checkpoint(a.model)
        config = read_config(source)
        tokenizer = Tokenizer.from_file(source / "tokenizer.json")
        examples, eval_rows = read_data(a, tokenizer)
        if a.dry_run:
            with torch.device("meta"):
                model = Transformer(config).to(getattr(torch, a.dtype))
        else:
            model = Transformer.from_pretrained(source, getattr(torch, a.dtype), a.device)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    full = a.method in ("fft", "molf")
    add = dict(ranks=a.ranks, alpha=a.alpha, full=full, dropout=a.dropout, train_rest=a.rest == "train")
    model.checkpointing = a.checkpointing
    torch.manual_seed(a.seed)                               # of the experts' A and of dropout
    before = None
    if not a.dry_run:
        model.eval()
        before = evaluate(model, tokenizer, data.TASKS[a.task], eval_rows, a.max_tokens)
    add_experts(model, **add)
    counts = count_parameters(model)
    steps = a.epochs * math.ceil(len(examples) / a.batch_size)
    print(f"{a.method} on {a.model}, task {a.task}: {len(examples)} rows, {steps} steps; parameters: "
          + ", ".join(f"{k} {v:,}" for k, v in counts.items())
          + f"; eos {tokenizer.eos_ids}, bos {tokenizer.bos_id}")
    if a.dry_run:
        sizes = estimate_bytes(model, a, max(sum(len(e.ids) for e in batch_of(i, examples, a.batch_size, a.seed))
                                             for i in range(math.ceil(len(examples) / a.batch_size))))
        for kind, n in {**sizes, "peak (estimate)": sum(sizes.values())}.items():
            print(f"  {kind:28s}{n / 1e9:9.3f} GB")
        return None
    out.mkdir(parents=True, exist_ok=True)
    record = dict(flags=vars(a), parameters=counts, steps=steps, rows=len(examples), **provenance())
    save_safely(out / "config.json", json.dumps(record, indent=2) + "\n")
    optimizer = MoLFAdamW(param_groups(model, a.lr, a.lora_lr, a.weight_decay, a.lora_weight_decay),
                          score=SCORES[a.score], top_k=a.top_k)
    with open(out / "log.jsonl", "w") as log_file:
        def log(line, record):
            print(line, flush=True)
            log_file.write(json.dumps(record) + "\n")
            log_file.flush()
        routing = train(model, optimizer, examples, a, log)
    names = {"modules": json.dumps(optimizer.module_names)}
    save_safely(out / "routing.safetensors", lambda path: save_file(routing, path, names))
    model.save_pretrained(out / "model")
    after = evaluate(model, tokenizer, data.TASKS[a.task], eval_rows, a.max_tokens)
    save_safely(out / "results.json", json.dumps({"before": before, "after": after}, indent=2) + "\n")
    print(f"\n{'':28s}before    after   (95 % interval)   n")
    for name, x in after.items():
        print(f"{name:24s}{before[name]['value']:10.1%}{x['value']:9.1%}   ({x['low']:.1%} to {x['high']:.1%})  {x['n']}")
    if a.method == "molf":
        print("\nsteps won by the full expert: " + "  ".join(f"{k} {v:.0%}" for k, v in full_share(
            routing["winners"], optimizer.module_names).items()))
    print(f"\nmodel: {out / 'model'}   log: {out / 'log.jsonl'}")
    return after


if __name__ == "__main__":
    main()
