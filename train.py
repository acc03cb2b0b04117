"""Fine-tune Qwen2.5 or Gemma-3 with full fine-tuning, LoRA, MoLF or MoLF-Efficient: one loop for the four.

    python train.py                                                     # MoLF on the embedded toy, on any CPU
    python train.py --task sql --method lora                            # or fact, med; fft, molf, molf-e
    python train.py --model Qwen/Qwen2.5-0.5B --task med                # a hub model on MedMCQA
    python train.py --model DIR --task sql --data train.parquet --eval-data test.parquet --out runs/mine
    python train.py --resume --out runs/mine                            # go on where it was stopped
    python train.py --eval-only runs/mine                               # or any checkpoint: train nothing
    python train.py --model DIR --task sql --dry-run                    # counts, bytes, steps; no weights
"""
import argparse
import csv
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

# before torch starts: GPU memory in segments that can grow; micro-batches of many sizes would cut up others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch        # noqa: E402
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data
from data import Tokenizer
from model import (LOGIT_ROWS, Block, MoLFLinear, Packed, Transformer, add_experts, cross_entropy,
                   find_checkpoint, fold, fold_layer, on_device, read_config, save_safely, unfold,
                   unfold_layer)
from molf import SCORES, MoLFAdamW, param_groups

# What flags mean that are not given: the paper's settings (arXiv 2605.07111), but for the toy, whose width of
# 128 wants smaller ranks and larger steps.
PAPER = dict(epochs={"fact": 2, "med": 2, "sql": 2}, lr=5e-5, lora_lr=5e-5, alpha=32,
             ranks={"fft": [], "lora": [128], "molf": [128], "molf-e": [32, 128]})
TOY = dict(epochs={"fact": 10, "med": 4, "sql": 4}, lr=1e-3, lora_lr=1e-3, alpha=12,
           ranks={"fft": [], "lora": [16], "molf": [16], "molf-e": [4, 16]})
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OF_THIS_CALL = "out", "overwrite", "resume", "dry_run"                      # say nothing about the run
# when a run goes on, these may be others than before
MAY_CHANGE = OF_THIS_CALL + ("log_every", "save_every", "keep", "device", "eager", "max_tokens")
EVALUATION_FLAGS = "task", "data", "eval_data", "limit", "eval_limit", "dtype", "max_tokens"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="toy", help="toy, a directory in Hugging Face format, or a hub id (default: toy)")
    add("--task", default="fact", choices=list(data.TASKS))
    add("--data", help="training rows: hub (the official ones), toy, or a file, .json .jsonl .jsonl.gz "
        ".parquet (default: hub; for the toy model toy)")
    add("--eval-data", help="rows to evaluate on, likewise (default: as --data; a file for med and sql needs "
        "one of its own; facts are evaluated on the cases that train)")
    add("--out", help="run directory (default: runs/<model>-<task>-<method>-<hash of the flags>)")
    add("--overwrite", action="store_true", help="replace a finished run in --out")
    add("--method", default="molf", choices=["fft", "lora", "molf", "molf-e"])
    add("--score", default="epd", choices=list(SCORES), help="the routing rule, see molf.py (default: epd)")
    add("--top-k", type=int, default=1, help="experts of a module that move at each step (default: 1)")
    add("--ranks", type=int, nargs="+", help="of LoRA experts (default: 128; molf-e 32 128; toy 16; 4 16)")
    add("--alpha", type=float, help="LoRA scale is alpha / sqrt(rank) (default: 32; toy 12)")
    add("--dropout", type=float, default=0.0, help="of LoRA; layers with it cannot be folded (default: 0)")
    add("--rest", choices=["train", "freeze"],
        help="embedding, norms, biases, head (default: train for fft and molf, freeze for lora and molf-e)")
    add("--lr", type=float, help="learning rate of the full expert and the rest (default: 5e-5; toy 1e-3)")
    add("--lora-lr", type=float, help="learning rate of the LoRA experts (default: 5e-5; toy 1e-3)")
    add("--weight-decay", type=float, default=0.1, help="of the full expert and the rest (default: 0.1)")
    add("--lora-weight-decay", type=float, default=0.01, help="of the LoRA experts (default: 0.01)")
    add("--warmup", type=float, default=0.1, help="share of steps with rising lr, then cosine to 0 (0.1)")
    add("--clip", type=float, default=1.0, help="gradient norm over all experts (default: 1.0)")
    add("--epochs", type=int, help="(default: 2; toy 10, med and sql 4)")
    add("--batch-size", type=int, default=32, help="sequences of an optimizer step (default: 32)")
    add("--max-tokens", type=int, default=16384, help="tokens of a micro-batch, for memory (default: 16384)")
    add("--max-length", type=int, default=1024, help="longer training sequences are skipped (default: 1024)")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory")
    add("--limit", type=int, help="use only the first N training rows")
    add("--eval-limit", type=int, help="evaluate on the first N rows only")
    add("--eval-every", type=int, metavar="N", help="every N steps, evaluate on a tenth of the training rows,"
        " at most 128, that are held out for it (facts: that train as well)")
    add("--eval-only", metavar="DIR", help="evaluate a checkpoint, or a run as it was before; train nothing")
    add("--export-dtype", default="bf16", choices=list(EXPORT_DTYPES), help="of the model (default: bf16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float32"],
        help="of the weights in the forward pass; master weights and moments are always float32 (default: "
             "bfloat16 on a GPU, float32 on a CPU)")
    add("--eager", action="store_true",
        help="on a GPU: no compilation, no CUDA graphs. Slower steps, a faster start")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default: 500)")
    add("--keep", type=int, default=1, metavar="N", help="checkpoints to keep while training (default: 1)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    add("--seed", type=int, default=42, help="of experts, order of the data and dropout (default: 42)")
    add("--log-every", type=int, default=10, help="steps between log lines (default: 10)")
    add("--dry-run", action="store_true", help="print counts, bytes by kind, number of steps; then stop")

    def parsed():
        a = p.parse_args(argv)
        if Path(a.model).resolve() == Path(__file__).resolve().parent / "toy":
            a.model = "toy"
        return a

    a = parsed()
    if a.resume and (a.eval_only or a.overwrite):
        p.error("--resume goes on with a run: neither --eval-only nor --overwrite goes with it")
    if a.eval_only:
        folder = Path(a.eval_only)
        flags = run_flags(folder) or run_flags(folder.parent) if folder.name == "model" else run_flags(folder)
        if a.model != "toy" or a.dry_run or run_flags(folder) and not (folder / "model").is_dir():
            p.error("--eval-only names the model, so --model must not" if a.model != "toy" else
                    "--eval-only trains nothing that --dry-run could count" if a.dry_run else
                    f"--eval-only {a.eval_only}: a run that did not finish, it has no model/")
        p.set_defaults(**{k: flags[k] for k in EVALUATION_FLAGS if k in flags})
        a = parsed()
        a.model = a.eval_only
    if a.resume:
        flags = run_flags(a.out or p.error("--resume wants --out DIR, the run to go on with"))
        p.set_defaults(**{k: v for k, v in flags.items() if k not in OF_THIS_CALL})
        a = parsed()
        changed = [k for k in flags if k not in MAY_CHANGE and getattr(a, k) != flags[k]]
        if changed:
            names = ", ".join(f"--{k.replace('_', '-')}" for k in changed)
            p.error(f"--resume goes on with the flags of {a.out}, so {names} must stay as they were")
    a.data = a.data or ("toy" if a.model == "toy" else "hub")
    if a.eval_data is None:
        if a.task != "fact" and a.data not in ("hub", "toy"):
            p.error(f"--data {a.data} wants --eval-data FILE: rows of {a.task} to evaluate on")
        a.eval_data = a.data
    for key, value in (TOY if a.model == "toy" else PAPER).items():
        if getattr(a, key) is None:
            which = {"ranks": a.method, "epochs": a.task}.get(key)
            setattr(a, key, value[which] if which else value)
    full = a.method in ("fft", "molf")
    a.rest = a.rest or ("train" if full else "freeze")
    a.dtype = a.dtype or ("bfloat16" if a.device.startswith("cuda") else "float32")
    if a.method == "fft" and a.ranks:
        p.error("--ranks: fft has no LoRA expert")
    if any(r < 1 for r in a.ranks):
        p.error("--ranks must be at least 1 each")
    if not 1 <= a.top_k <= full + len(a.ranks):
        p.error(
            f"--top-k {a.top_k}: {a.method} with ranks {a.ranks} has {full + len(a.ranks)} experts a module")
    for key in ("epochs", "batch_size", "max_tokens", "max_length", "limit", "eval_limit", "eval_every",
                "log_every", "save_every", "keep"):
        if getattr(a, key) is not None and getattr(a, key) < 1:
            p.error(f"--{key.replace('_', '-')} must be at least 1")
    if a.dropout and a.checkpointing and not a.eager and a.device.startswith("cuda"):
        p.error("--checkpointing with --dropout wants --eager: a CUDA graph can't repeat the random numbers")
    if min(a.lr, a.lora_lr, a.weight_decay, a.lora_weight_decay) < 0 or min(a.alpha, a.clip) <= 0:
        p.error("learning rates and weight decays can't be negative; --alpha and --clip must be above 0")
    if not 0 <= a.dropout < 1 or not 0 <= a.warmup <= 1:
        p.error("--dropout and --warmup are shares, from 0 to 1")
    try:
        torch.empty(0, device=a.device)
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {a.device}: {str(e).splitlines()[0]}")
    if not a.out:
        what = [(k, v) for k, v in sorted(vars(a).items()) if k not in OF_THIS_CALL]
        name = Path(a.eval_only or a.model).name, a.task, "eval" if a.eval_only else a.method
        a.out = f"runs/{'-'.join(name)}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"
    return a


def run_flags(folder):
    """The flags of the run in `folder`; {} if it is none. (A checkpoint's config.json has no flags.)"""
    try:
        return json.loads(Path(folder, "config.json").read_text()).get("flags", {})
    except (OSError, ValueError, AttributeError):
        return {}


# ----------------------------------------------------------------------------------------------------------
# from examples to micro-batches on the device

def micro_batches(examples, max_tokens):
    """Cut a list of examples, in order, into lists of at most max_tokens tokens (or one longer example)."""
    batch, n = [], 0
    for e in examples:
        if batch and n + len(e.ids) > max_tokens:
            yield batch
            batch, n = [], 0
        batch.append(e)
        n += len(e.ids)
    if batch:
        yield batch


def to_device(examples, device, size=None):
    """-> ids (N,), layout, where (M,), labels (M,): the arguments of Transformer.loss. size: pad them to so
    many tokens, sequences and targets, in a layout for sequences of that length: what is added counts for
    nothing in the loss."""
    ids, lengths, where, labels = data.pack(examples)
    longest = None
    if size:
        n, sequences, m, longest = size
        lengths += [n - len(ids)] + [0] * (sequences - len(lengths) - 1)
        ids += [0] * (n - len(ids))
        where += [0] * (m - len(where))
        labels += [-100] * (m - len(labels))
    ids, where, labels = (on_device(torch.tensor(x), device) for x in (ids, where, labels))
    return ids, Packed(lengths, device, longest), where, labels


@lru_cache(maxsize=2)
def order_of(n, seed, epoch):
    """The order of n examples in an epoch depends on the seed and the epoch alone."""
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def batch_of(step, examples, a):
    """The examples of an optimizer step; the last batch of an epoch may be smaller."""
    epoch, i = divmod(step, math.ceil(len(examples) / a.batch_size))
    order = order_of(len(examples), a.seed, epoch)
    return [examples[j] for j in order[i * a.batch_size:(i + 1) * a.batch_size]]


# ----------------------------------------------------------------------------------------------------------
# one optimizer step

def count_tokens(examples):
    return sum(len(e.ids) for e in examples)


def count_targets(examples):
    return sum(len(e.ids) - e.n_prompt for e in examples)


def padded(n):
    """n rounded up to a 128th of the next power of two, or to 16: few sizes, below 1.6 % more from 1,024."""
    unit = max(16, (1 << (n - 1).bit_length()) // 128)
    return -(-n // unit) * unit


STREAMS = 4             # on a GPU, for the passes of the optimizer


def in_turn(streams, f, items):
    """[f(x) for x in items], in turn on the current CUDA stream and on these: so the small kernels of one item
    run beside the large ones of another. What comes behind it waits for all."""
    here, results = torch.cuda.current_stream(), []
    for stream in streams:
        stream.wait_stream(here)
    for x, stream in zip(items, cycle([here, *streams])):
        with torch.cuda.stream(stream):
            results.append(f(x))
    for stream in streams:
        here.wait_stream(stream)
    return results


class Step:
    """step(batch, count) does one optimizer step on a list of examples. -> loss, gradient norm and, if it is
    to count, the share of the linears' weights that changed (None on a frozen base; of every 16th row): 0-d
    tensors on the device, good until the next step.

    fast: its parts are compiled, and micro-batches padded to a few sizes. On a GPU all that the device does
    is recorded, for each size once, as a CUDA graph, and then replayed: launched one by one, the thousands of
    kernels of a step take longer to launch than to run. The graphs share their memory."""

    def __init__(self, model, optimizer, a, batches=(), fast=False):
        self.model, self.optimizer, self.a, self.fast = model, optimizer, a, fast
        self.params = [p for g in optimizer.param_groups for p in g["params"]]
        self.device = self.params[0].device
        self.rows = [m.weight.detach()[::16] for m in model.modules()       # a sample, to see what changes
                     if isinstance(m, MoLFLinear) and m.weight.requires_grad]
        self.ok = torch.ones((), dtype=torch.bool, device=self.device)      # so far all was finite
        self.unfold, self.fold = partial(unfold, model), partial(fold, model)
        self.graphs, self.pool, self.warm = {}, None, False
        # what will come: of each size the most targets, and a batch; the longest sequence; the largest batch
        self.targets, self.examples, self.longest, self.largest = {}, {}, 0, []
        if not fast:
            return
        torch.fx.experimental._config.use_duck_shape = False    # sizes that are equal need not stay so
        torch._dynamo.config.specialize_float = True    # else a LoRA scale is a tensor, and on the CPU
        if self.device.type == "cuda":
            optimizer.each = partial(in_turn, [torch.cuda.Stream() for _ in range(STREAMS - 1)])
        model.train_block, model.train_loss = (
            torch.compile(f, dynamic=True) for f in (Block.forward, cross_entropy))
        self.unfold = partial(unfold, model, torch.compile(unfold_layer, dynamic=False), optimizer.each)
        self.fold = partial(fold, model, torch.compile(fold_layer, dynamic=False), optimizer.each)
        optimizer.compile()
        for batch in batches:
            self.largest = max(self.largest, batch, key=count_tokens)
            n, micros = self.cut(batch)
            self.examples[n] = batch
            self.targets[n] = max(self.targets.get(n, 0), *(padded(count_targets(m)) for m in micros))
            for micro in micros:
                self.longest = max(self.longest, n - count_tokens(micro), *(len(e.ids) for e in micro))

    def cut(self, batch):
        """-> n, micro-batches: as few as fit into --max-tokens, as even as can be, all to be padded to n."""
        limit = self.a.max_tokens
        few = len(list(micro_batches(batch, limit)))
        limit = count_tokens(batch) // few
        while len(micros := list(micro_batches(batch, limit))) > few:
            limit = padded(limit + 1)
        return padded(max(map(count_tokens, micros))), micros

    def inputs(self, batch):
        """-> sizes, micro-batches padded to them, the number of targets of the whole batch."""
        n, micros = self.cut(batch)
        size = (n, self.a.batch_size + 1, self.targets[n], self.longest) if self.fast else None
        micros = [to_device(m, self.device, size) for m in micros]
        return (n, len(micros)), micros, on_device(torch.tensor(float(count_targets(batch))), self.device)

    def gradients(self, micros, n_targets):
        """-> loss, norm; every expert's gradient is in place."""
        loss = 0
        for micro in micros:
            part = self.model.loss(*micro) / n_targets
            part.backward()                     # G = dL/dW_eff of every linear; autograd for the rest
            loss = loss + part.detach()
        self.unfold()                           # one G -> the exact gradient of every expert
        grads = [p.grad for p in self.params if p.grad is not None]
        norms = self.optimizer.each(lambda part: torch.stack(torch._foreach_norm(part, dtype=torch.float32)),
                                    [grads[i::STREAMS] for i in range(STREAMS)])
        return loss, torch.cat(list(norms)).norm()

    def finish(self, loss, norm, count):
        self.ok.logical_and_((loss + norm).isfinite())
        clip = (self.a.clip / (norm + 1e-6)).clamp_max(1)
        before = [w.clone() for w in self.rows] if count else []
        self.optimizer.update(self.ok, clip)                    # moments, scores, winners
        self.optimizer.zero_grad()
        self.fold()                                             # the winners' new weights -> the one weight
        changed = sum((new != old).sum() for new, old in zip(self.rows, before))
        return loss, norm, changed / sum(w.numel() for w in before) if before else None

    def record(self, sizes, micros, n_targets, count):
        """Capture what the device has to do for a batch of these sizes; it is not done yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss, norm = self.gradients(micros, n_targets)
            present = self.optimizer.present()
            results = self.finish(loss, norm, count)
        self.pool = graph.pool()
        self.graphs[sizes, count] = graph, tensors(micros) + [n_targets], present, results

    def __call__(self, batch, count=False):
        sizes, micros, n_targets = self.inputs(batch)
        if not self.fast or not self.warm or self.device.type != "cuda":
            if self.fast and not self.warm:     # the first step is not captured: it compiles what will come
                for n in {f(self.targets, key=self.targets.get) for f in (min, max)}:
                    self.gradients(*self.inputs(self.examples[n])[1:])
                    self.optimizer.zero_grad()
                self.warm = True
            loss, norm = self.gradients(micros, n_targets)
            self.optimizer.refresh(self.optimizer.present())
            return self.finish(loss, norm, count)
        if not self.graphs:                     # the largest first: most others then fit into its memory
            self.record(*self.inputs(self.largest), False)
        if (sizes, count) not in self.graphs:
            self.record(sizes, micros, n_targets, count)
        graph, inputs, present, results = self.graphs[sizes, count]
        for old, new in zip(inputs, tensors(micros) + [n_targets]):
            old.copy_(new)
        self.optimizer.refresh(present)
        graph.replay()
        return results


def tensors(micros):
    return [t for ids, layout, *targets in micros
            for t in (ids, layout.cu_seqlens, layout.seq, layout.pos, *targets)]


# ----------------------------------------------------------------------------------------------------------
# the loop

def lr_factor(step, total, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to 0."""
    n = max(1, round(warmup * total)) if warmup else 0
    if step < n:
        return (step + 1) / n
    return 0.5 * (1 + math.cos(math.pi * (step - n) / max(1, total - n)))


def train(model, optimizer, examples, a, log=print, held_out=None, save=None, start=None):
    """Train `model` on `examples` with the flags `a`; log(line, record) every a.log_every steps, and what
    held_out() returns every a.eval_every. save(step, routing) every a.save_every, or when it was asked to
    leave; start: (step, routing) of such a call, to go on from.
    -> routing: {"winners": (steps, modules, experts) bool, "scores": fp32}"""
    device = next(model.parameters()).device
    kinds = {g["kind"]: i for i, g in enumerate(optimizer.param_groups)}    # one group of each, for the log
    total = a.epochs * math.ceil(len(examples) / a.batch_size)
    first, routing = start or (0, {})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i, total, a.warmup),
                                                 last_epoch=first - 1)
    pending, history = [], [routing] if routing else []     # pending: on the device, since the last log
    tokens, clock, untimed = 0, 0.0, min(first + 3, total - 1)              # the first steps are not timed
    batches = (batch_of(i, examples, a) for i in range(first, total))
    do_step = Step(model, optimizer, a, batches, fast=device.type == "cuda" and not a.eager)
    model.train()
    for step in range(first, total):
        if step == untimed:
            tokens, clock = 0, time.perf_counter()
        batch = batch_of(step, examples, a)
        rates = {kind: optimizer.param_groups[i]["lr"] for kind, i in kinds.items()}
        saving = save and ((step + 1) % a.save_every == 0 or step == total - 1 or save.asked)
        logging = (step + 1) % a.log_every == 0 or step in (first, total - 1) or saving
        loss, norm, changed = do_step(batch, count=logging)
        schedule.step()
        tokens += count_tokens(batch)
        pending.append([t.clone() for t in (loss, norm, optimizer.winners, optimizer.scores)])
        if logging:
            loss, norm, w, s = (torch.stack(x).cpu() for x in zip(*pending))            # the one sync
            stop_if_not_finite(step, loss, norm, examples, a)
            if not s.isfinite().all():
                raise FloatingPointError(f"rule {a.score} gave a score that is not finite by step {step + 1}")
            history.append({"winners": w, "scores": s}), pending.clear()
            if step == 0 and abs(loss[0] / math.log(model.config.vocab_size) - 1) < 0.05:
                print(f"warning: the first loss is near ln({model.config.vocab_size}), as if by guessing: do "
                      f"the weights, the tokenizer and the config belong together?")
            seconds = time.perf_counter() - clock if step > untimed else 0.0
            speed = tokens / seconds if seconds else 0.0
            left = seconds * (total - 1 - step) / max(1, step - untimed + 1)
            changed = None if changed is None else changed.item()
            share = w[..., 0].float().mean().item() if "full" in kinds else 0.0         # since the last log
            record = dict(step=step + 1, loss=loss[-1].item(), lr=rates, grad_norm=norm[-1].item(),
                          full_share=share, changed=changed, tok_per_s=speed, eta_s=left,
                          peak_gb=peak_memory(device))
            lrs = "/".join(f"{lr:.1e}" for lr in rates.values())
            moved = "" if changed is None else f"changed {changed:4.0%}  "
            log(f"step {step + 1:4d}/{total}  loss {loss[-1]:.4f}  lr {lrs}  norm {norm[-1]:.2f}  "
                f"full {share:4.0%}  {moved}{f'{speed:,.0f}' if speed else '-'} tok/s  "
                f"eta {int(left) // 60}:{int(left) % 60:02d}  {record['peak_gb']:.1f} GB", record)
        if held_out and (step + 1) % a.eval_every == 0:
            pause = time.perf_counter()
            model.eval()
            line, record = held_out()
            log(f"step {step + 1:4d}/{total}  {line}", dict(step=step + 1, **record))
            model.train()
            clock += time.perf_counter() - pause                            # not training time
        if saving:
            save(step + 1, joined(history))
    model.eval()
    return joined(history)


def joined(history):
    return {name: torch.cat([part[name] for part in history]) for name in ("winners", "scores")}


def first_share(winners, module_names):
    """winners (steps, modules, experts) -> {"q_proj": share of steps that the first expert won, ...}"""
    kinds = {}
    for i, name in enumerate(module_names):
        kinds.setdefault(name.rpartition(".")[2], []).append(i)
    return {kind: winners[:, i, 0].float().mean().item() for kind, i in kinds.items()}


def stop_if_not_finite(last, loss, norm, examples, a):
    """loss and norm (n,) of the n steps up to `last`: raise if one is not finite, and name its rows. From
    that step on nothing has moved."""
    bad = (~(loss + norm).isfinite()).nonzero()
    if len(bad):
        i, step = bad[0].item(), last + 1 - len(loss) + bad[0].item()
        rows = ", ".join(str(e.row) for e in batch_of(step, examples, a))
        raise FloatingPointError(f"stopped at step {step + 1}: loss {loss[i].item()}, gradient norm "
                                 f"{norm[i].item()}; lower --lr and --lora-lr, or look at rows {rows}")


def peak_memory(device):
    """GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


# ----------------------------------------------------------------------------------------------------------
# checkpoints: what a run needs to go on as if nothing had happened

class Checkpoints:
    """DIR/checkpoints/step-N.safetensors: weights, experts, moments, random states, routing so far; the rest
    is JSON in its header. One file, written under another name and renamed: it is whole or not there.

    As a context it makes SIGTERM and Ctrl-C ask the loop to save and leave; a second one leaves at once."""

    def __init__(self, out, model, optimizer, a):
        self.folder, self.model, self.optimizer, self.a = out / "checkpoints", model, optimizer, a
        self.asked = None                                       # the signal that asked to leave
        self.begin = time.perf_counter()                        # of the run; `load` adds what came before

    def files(self):
        return sorted(self.folder.glob("step-*.safetensors"))

    def __call__(self, step, routing):
        state = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()} | routing
        tensors |= {f"optimizer.{i}.{key}": t for i, s in state["state"].items() for key, t in s.items()}
        tensors["rng"] = torch.get_rng_state()
        if self.a.device.startswith("cuda"):
            tensors["rng cuda"] = torch.cuda.get_rng_state(self.a.device)
        header = {"step": str(step), "seconds": str(time.perf_counter() - self.begin),
                  "param_groups": json.dumps(state["param_groups"])}
        self.folder.mkdir(exist_ok=True)
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        try:
            save_safely(self.folder / f"step-{step:09d}.safetensors",
                        lambda path: save_file(tensors, path, header))
        except OSError as e:
            whole = self.files()
            raise OSError(f"{e}; the last whole checkpoint: {whole[-1] if whole else 'none'}") from e
        for old in self.files()[:-self.a.keep]:
            old.unlink()
        if self.asked:
            print(f"stopped after step {step}: --resume --out {self.folder.parent} goes on from here")
            sys.exit(128 + self.asked)

    def load(self):
        """Put the newest checkpoint into model, optimizer and random states. -> (step, routing), or None"""
        for file in reversed(self.files()):
            try:
                with safe_open(file, "pt") as f:
                    header, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
                break
            except SafetensorError as e:
                print(f"{file} is not whole ({e}): trying the one before it")
                file.rename(file.with_suffix(".torn"))
        else:
            return None
        part = lambda start: {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        self.begin = time.perf_counter() - float(header["seconds"])
        self.model.load_state_dict(part("model."))
        state = {}
        for name, t in part("optimizer.").items():
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = t
        self.optimizer.load_state_dict({"state": state, "param_groups": json.loads(header["param_groups"])})
        torch.set_rng_state(tensors["rng"])
        if self.a.device.startswith("cuda") and "rng cuda" in tensors:     # (it may have begun on a CPU)
            torch.cuda.set_rng_state(tensors["rng cuda"], self.a.device)
        return int(header["step"]), {key: tensors[key] for key in ("winners", "scores")}

    def __enter__(self):
        def ask(number, frame):
            self.asked = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.handlers = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


@contextmanager
def only_one(folder):
    """Holds a lock on the directory, which ends with the process however that ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise FileExistsError(f"another process is at work in {folder}: give another --out") from None
    try:
        yield
    finally:
        os.close(lock)


# ----------------------------------------------------------------------------------------------------------
# evaluation

@torch.no_grad()
def score_targets(model, examples, max_tokens=16384, choices=()):
    """Packed forward passes, no generation -> a data.Scored for each example. Softmax in fp32. choices: token
    ids to compare in the place of a target's first token."""
    device = next(model.parameters()).device
    tagged = sorted((e._replace(row=i) for i, e in enumerate(examples)), key=lambda e: len(e.ids))
    results = [None] * len(examples)
    for batch in micro_batches(tagged, max_tokens):
        ids, layout, where, labels = to_device(batch, device)
        hidden, logprobs, greedy, others = model.hidden(ids, layout, where), [], [], []
        for x, y in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS)):
            logits = model.logits(x).float()
            norm = logits.logsumexp(1)
            # The logits that are compared are summed in fp32: in bf16, 20.0 and 20.05 would tie.
            logprobs.append((x.float() * model.head[y].float()).sum(1) - norm)
            others.append(x.float() @ model.head[list(choices)].float().T - norm[:, None])
            greedy.append(logits.argmax(1))
        logprobs, greedy, others = (torch.cat(t).tolist() for t in (logprobs, greedy, others))
        i = 0
        for e in batch:
            n, best = len(e.ids) - e.n_prompt, greedy[i]
            if best in choices:                 # in bf16 it may tie with another choice, and be the first
                best = choices[others[i].index(max(others[i]))]
            results[e.row] = data.Scored(logprobs[i:i + n], e.ids[e.n_prompt], best, others[i])
            i += n
    return results


def continue_all(model, prompts, max_new_tokens, eos_ids, places):
    """Greedy continuations of any number of prompts (lists of ids): those of like length together, longest
    first, in batches whose KV cache has at most `places` places. -> the new tokens of each, with the EOS"""
    order, new = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), [None] * len(prompts)
    while order:
        n = max(1, places // (len(prompts[order[0]]) + max_new_tokens))
        batch, order = order[:n], order[n:]
        for i, ids in zip(batch, model.generate([prompts[i] for i in batch], max_new_tokens, eos_ids)):
            new[i] = ids
    return new


def evaluate(model, tokenizer, task, questions, max_tokens):
    """questions: [data.Question] -> ({metric: {"value", "n", "low", "high"}, "# what": count}, predictions).
    A metric is the mean over the rows that have it, with a 95 % bootstrap interval."""
    start, rows = time.perf_counter(), [q.row for q in questions]
    choices = [tokenizer.encode(c)[0] for c in task.choices]
    flat = iter(score_targets(model, [e for q in questions for e in q.examples], max_tokens, choices))
    scored = [[next(flat) for _ in q.examples] for q in questions]
    if task.new_tokens:
        # A place holds a key and a value of each layer: 18 KB in Gemma-3-270M, 28 KB in Qwen2.5-1.5B (bf16).
        places = max_tokens * (8 if next(model.parameters()).is_cuda else 1)
        new = continue_all(model, [q.prompt for q in questions], task.new_tokens, tokenizer.eos_ids, places)
    else:
        new = [[s[0].greedy] for s in scored]
    texts = [tokenizer.decode(ids) for ids in new]
    verdicts, predictions = list(task.metrics(rows, scored, texts)), []
    for q, ids, text, v in zip(questions, new, texts, verdicts):
        if task.new_tokens:
            v["# not stopped"] = ids[-1] not in tokenizer.eos_ids
        v["# not UTF-8"] = "\ufffd" in text
        v["# too long"] = len(q.prompt) + task.new_tokens > model.config.max_position_embeddings
        prompt, reference = task.pair(q.row)
        predictions.append(dict(prompt=prompt, reference=reference, prediction=text, verdict=v))
    metrics = {}
    names = dict.fromkeys(name for v in verdicts for name in v if name != "error")
    for name in sorted(names, key=lambda name: ":" in name):                # a table of kinds comes last
        values = [v[name] for v in verdicts if name in v]
        metrics[name] = sum(values) if name.startswith("#") else bootstrap(values)
    return metrics | {"seconds": time.perf_counter() - start}, predictions


def bootstrap(values, resamples=1000):
    x = torch.tensor(values, dtype=torch.float64)
    pick = torch.randint(len(x), (resamples, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[pick].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": x.mean().item(), "n": len(x), "low": low, "high": high}


# ----------------------------------------------------------------------------------------------------------
# the run

def provenance():
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() \
        if shutil.which("git") else None
    return dict(argv=sys.argv, git=git, python=platform.python_version(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                torch=torch.__version__, threads=torch.get_num_threads(),
                date=time.strftime("%Y-%m-%d %H:%M:%S"))


def count_parameters(model):
    """{"full": n, "lora 128": n, "rest": n, "frozen": n}: a folded weight is counted as its full expert."""
    counts, seen = Counter(), set()
    for layer in model.modules():
        if isinstance(layer, MoLFLinear):
            for kind, _, params in layer.experts():
                counts[kind if kind == "full" else f"lora {len(params[0])}"] += sum(p.numel() for p in params)
                seen.update(params)
            seen |= {layer.weight} if layer.folded else set()
    for p in model.parameters():
        if p not in seen:
            counts["rest" if p.requires_grad else "frozen"] += p.numel()
    return dict(counts)


def estimate_bytes(model, a, tokens):
    """What training keeps on the device, by kind, with micro-batches of `tokens` tokens. Activations are
    reckoned from what autograd saves of a block; the loss holds three fp32 copies of a piece of logits."""
    c, trained = model.config, {p for g in param_groups(model) for p in g["params"]}
    folded = {m.weight for m in model.modules() if isinstance(m, MoLFLinear) and m.folded}
    heads = c.head_dim * (2 * c.num_attention_heads + 4 * c.num_key_value_heads)
    block = 12 * c.hidden_size + 3 * heads + 5 * c.intermediate_size
    saved = c.num_hidden_layers * c.hidden_size + block if a.checkpointing else c.num_hidden_layers * block
    # A folded layer's gradient is its full expert's: one full-size gradient, in the model's dtype.
    full = {p for g in param_groups(model) if g["kind"] == "full" for p in g["params"]} if folded else set()
    return {"weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "gradients": sum(p.numel() * p.element_size() for p in (trained | folded) - full),
            "moments and masters": sum(p.numel() * (8 + 4 * (p.element_size() < 4)) for p in trained),
            "activations (estimate)": tokens * saved * getattr(torch, a.dtype).itemsize,
            "logits (estimate)": 12 * min(tokens, LOGIT_ROWS) * c.vocab_size}


class Rows(NamedTuple):
    examples: list          # to train on
    held_out: list          # [(Example, Question)] to evaluate on during training
    questions: list         # [Question] to evaluate on before and after
    skipped: Counter        # {which: how many rows}


def read_data(a, tokenizer):
    """-> Rows. Says how many rows were left out, and why; none is cut."""
    task, skipped = data.TASKS[a.task], Counter()

    def encoded(what, numbered, make):
        for i, row in numbered.items():
            try:
                yield make(i, row)
            except ValueError as e:         # SmolLM2's vocabulary, for one, lacks some bytes
                why = f"{what} rows that the tokenizer cannot encode"
                print(f"{what} row {i} is skipped: {e}") if why not in skipped else None
                skipped[why] += 1

    def example(i, row):
        return data.encode(tokenizer, *task.pair(row), row=i)

    def question(i, row):
        return data.ask(tokenizer, task, row, i)

    examples, held_out = [], []
    if not a.eval_only:
        rows, skipped["training rows without an answer"] = data.load_rows(a.task, "train", a.data, a.limit)
        if not rows:
            raise ValueError(f"{a.data}: no row has an answer")
        numbered = dict(enumerate(rows))
        if a.eval_every:
            n = max(1, min(128, len(rows) // 10))
            picked = {i: rows[i] for i in random.Random(f"held out {a.seed}").sample(range(len(rows)), n)}
            held_out = list(encoded("held-out", picked, lambda *x: (example(*x), question(*x))))
            numbered = {i: row for i, row in numbered.items() if a.task == "fact" or i not in picked}
        every = list(encoded("training", numbered, example))
        examples = [e for e in every if len(e.ids) <= a.max_length]
        skipped[f"training rows longer than --max-length {a.max_length} tokens"] = len(every) - len(examples)
        if not examples:
            raise ValueError(f"no training row is left of {len(rows)}: {len(held_out)} are held out, "
                             f"{len(every)} longer than --max-length {a.max_length}")
    same = a.task == "fact" and a.eval_data == a.data
    rows, skipped["evaluation rows without an answer"] = data.load_rows(a.task, "test", a.eval_data,
                                                                        a.limit if same else None)
    questions = list(encoded("evaluation", dict(enumerate(rows[:a.eval_limit])), question))
    if not questions:
        raise ValueError(f"{a.eval_data}: no row is left to evaluate on")
    for what, n in skipped.items():
        print(f"skipped {n} {what}") if n else None
    return Rows(examples, held_out, questions, +skipped)


def main(argv=None):
    a = parse_args(argv)
    torch.set_flush_denormal(True)      # second moments reach 1e-40, where a CPU is several times slower
    if a.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(a.device).index or 0)    # a CUDA graph captures the current one
    try:
        out, source = Path(a.out), find_checkpoint(a.model)
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out} is a file")
        refuse_to_replace(out, a)
        if (out / "config.json").exists() and not run_flags(out) or a.eval_only and (out / "model").exists():
            raise FileExistsError(f"--out {out} holds a model: give another")
        table = out.parent / "results.csv"
        if table.exists() and table.open().readline().strip() != ",".join(CSV_COLUMNS):
            raise FileExistsError(f"{table} has other columns than this version writes: move it away")
        config, tokenizer = read_config(source), Tokenizer.from_file(source)
        rows = read_data(a, tokenizer)
        if a.dry_run:
            with torch.device("meta"):
                model = Transformer(config).to(getattr(torch, a.dtype))
        else:
            model = Transformer.from_pretrained(source, getattr(torch, a.dtype), a.device)
            out.mkdir(parents=True, exist_ok=True)          # if it can't be written to, know it now
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    if a.dry_run:
        steps = prepare(model, rows, a)["steps"]
        longest = max(count_tokens(batch_of(i, rows.examples, a)) for i in range(steps // a.epochs))
        sizes = estimate_bytes(model, a, min(longest, a.max_tokens))
        for kind, n in {**sizes, "peak (estimate)": sum(sizes.values())}.items():
            print(f"  {kind:24s}{n / 1e9:9.3f} GB")
        return
    try:
        with only_one(out):
            refuse_to_replace(out, a)       # again: another process may have finished while this one loaded
            run(model, tokenizer, rows, a, out)
    except FloatingPointError as e:
        model.save_pretrained(out / "last-good")
        saved = sorted((out / "checkpoints").glob("*"))
        sys.exit(f"error: {e}. The model as it was before that step is in {out / 'last-good'}; the last "
                 f"checkpoint: {saved[-1] if saved else 'none'}")
    except OSError as e:
        sys.exit(f"error: {e}")


def refuse_to_replace(out, a):
    if (out / "results.json").exists() and not (a.overwrite or a.dry_run):
        raise FileExistsError(f"{out} holds a finished run: give another --out, or --overwrite")
    if any((out / "checkpoints").glob("*")) and not (a.overwrite or a.resume or a.dry_run):
        raise FileExistsError(f"{out} holds an unfinished run: --resume goes on, --overwrite starts anew")


def prepare(model, rows, a):
    """Put the experts in, and say what there is to do."""
    model.checkpointing = a.checkpointing
    torch.manual_seed(a.seed)                               # of A and of dropout
    add_experts(model, a.ranks, a.alpha, a.method in ("fft", "molf"), a.dropout, train_rest=a.rest == "train")
    counts, steps = count_parameters(model), a.epochs * math.ceil(len(rows.examples) / a.batch_size)
    print(f"{a.method} on {a.model}, task {a.task}: {len(rows.examples)} rows, {steps} steps, seed {a.seed}\n"
          "parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in counts.items()))
    return dict(parameters=counts, steps=steps, rows=len(rows.examples))


def run(model, tokenizer, rows, a, out):
    """Evaluate, train, evaluate, export: all that a run leaves is written here, into its directory `out`."""
    task, first_metrics = data.TASKS[a.task], out / "before.json"
    print(f"{a.model}, task {a.task}: {len(rows.questions)} rows of {a.eval_data} to evaluate on; eos "
          f"{tokenizer.eos_ids}, bos {tokenizer.bos_id}")
    if not a.resume:
        for old in ("adapter", "last-good", "checkpoints"):     # of a run that is to be overwritten
            shutil.rmtree(out / old, ignore_errors=True)
        for old in (out / "results.json", first_metrics):
            old.unlink(missing_ok=True)
        save_safely(out / "config.json", json.dumps(dict(flags=vars(a))) + "\n")     # for --resume
    if first_metrics.exists():                                  # --resume
        before = json.loads(first_metrics.read_text())
    else:
        before, predictions = evaluate(model, tokenizer, task, rows.questions, a.max_tokens)
    record = dict(flags=vars(a), **({} if a.eval_only else prepare(model, rows, a)), **provenance())
    save_safely(out / "config.json", json.dumps(record, indent=2) + "\n")
    if a.eval_only:
        report(out, a, dict(after=before, skipped=rows.skipped), predictions, 0)
        return
    save_safely(first_metrics, json.dumps(before) + "\n")
    optimizer = MoLFAdamW(param_groups(model, a.lr, a.lora_lr, a.weight_decay, a.lora_weight_decay),
                          score=SCORES[a.score], top_k=a.top_k)

    def held_out():
        examples, questions = zip(*rows.held_out)
        metrics, predictions = evaluate(model, tokenizer, task, questions, a.max_tokens)
        loss = batch_loss(model, examples, a.max_tokens)
        shown = "  ".join(f"{k} {metrics[k]['value']:.1%}" for k in task.report if k in metrics)
        return (f"held out: loss {loss:.4f}  {shown}\n{sample(predictions[0])}",
                dict(held_out=metrics, loss=loss))

    with Checkpoints(out, model, optimizer, a) as checkpoints:
        start = checkpoints.load() if a.resume else None
        if a.resume:
            print(f"going on behind step {start[0]}" if start else "no checkpoint: starting anew")
        lines = (out / "log.jsonl").read_text().splitlines(True) if start else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start[0]]
        save_safely(out / "log.jsonl", "".join(lines))
        with open(out / "log.jsonl", "a") as log_file:
            def log(line, record):
                print(line, flush=True)
                print(json.dumps(record), file=log_file, flush=True)
            routing = train(model, optimizer, rows.examples, a, log, rows.held_out and held_out, checkpoints,
                            start)
            seconds = time.perf_counter() - checkpoints.begin
    names = optimizer.module_names
    del optimizer, checkpoints                              # its moments make room for the export
    metadata = {"modules": json.dumps(names)}
    save_safely(out / "routing.safetensors", lambda path: save_file(routing, path, metadata))
    after, predictions = evaluate(model, tokenizer, task, rows.questions, a.max_tokens)
    model.save_pretrained(out / "model", EXPORT_DTYPES[a.export_dtype])
    if a.method in ("lora", "molf-e") and a.rest == "freeze":
        local = a.model == "toy" or Path(a.model).exists()
        model.save_adapter(out / "adapter", model.source.resolve() if local else a.model)
    elif a.method in ("lora", "molf-e"):
        print("no adapter/: with --rest train the base has changed as well")
    # the exported weights, in arithmetic that is no coarser than they are
    wider = a.dtype == "float32" or a.export_dtype == "fp32"
    exported = Transformer.from_pretrained(out / "model", getattr(torch, "float32" if wider else "bfloat16"),
                                           a.device)
    losses = [batch_loss(m, rows.examples[:a.batch_size], a.max_tokens) for m in (model, exported)]
    results = dict(before=before, after=after, loss=dict(zip(("trained", "exported"), losses)),
                   skipped=rows.skipped, train_seconds=seconds)
    report(out, a, results, predictions, len(rows.examples))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)      # finished: results.json says so
    first_metrics.unlink()
    if routing["winners"].shape[-1] > 1:
        first = "full" if a.method == "molf" else f"rank-{a.ranks[0]}"
        print(f"\nsteps won by the {first} expert:  " + "  ".join(
            f"{kind} {share:.0%}" for kind, share in first_share(routing["winners"], names).items()))
    print(f"\nmodel: {out / 'model'}   loss of a batch, trained {losses[0]:.6f}, exported {losses[1]:.6f}")
    if losses[1] > 1.05 * losses[0]:
        print("bf16 has rounded away a part of what was learnt: --export-dtype fp32 keeps it")


CSV_COLUMNS = ("date run task model data eval_data method rest score top_k ranks alpha lr lora_lr epochs "
               "batch_size seed rows train_seconds eval_rows eval_seconds").split()
CSV_COLUMNS += dict.fromkeys(chain(*(task.report for task in data.TASKS.values())))


def report(out, a, results, predictions, n_rows):
    """predictions.jsonl, results.json, a line in results.csv beside the run; a table and samples to read."""
    before, after = results.get("before", {}), results["after"]
    save_safely(out / "predictions.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
    save_safely(out / "results.json", json.dumps(results, indent=2) + "\n")
    row = vars(a) | dict(date=time.strftime("%Y-%m-%d %H:%M:%S"), run=out.name, rows=n_rows,
                         ranks=" ".join(map(str, a.ranks)), eval_rows=len(predictions),
                         train_seconds=round(results.get("train_seconds", 0)),
                         eval_seconds=round(after["seconds"], 1))
    if a.eval_only:
        row = {k: row[k] for k in ("date", "run", "task", "eval_data", "eval_rows", "eval_seconds")}
        row |= {"method": "evaluation", "model": a.eval_only}
    row |= {name: x["value"] for name, x in after.items() if isinstance(x, dict)}
    with open(out.parent / "results.csv", "a", newline="") as f:
        writer = csv.DictWriter(f, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader() if f.tell() == 0 else None
        writer.writerow(row)
    print("\n" + "\n".join(map(sample, predictions[::len(predictions) // 3 or 1][:3])))
    print(f"\n{'':30s}{'before' if before else '':8s}   after   95 % interval        n")
    for name, x in after.items():
        if isinstance(x, dict):
            was = f"{before[name]['value']:8.1%}" if name in before else " " * 8
            print(f"{name:28s}{was}{x['value']:8.1%}   {x['low']:6.1%} to {x['high']:6.1%}{x['n']:7d}")
        elif name.startswith("#") and (x or before.get(name)):
            print(f"{name:28s}{before.get(name, ''):8}{x:8d}")
    print(f"evaluated in {after['seconds']:.1f} s")
    if after.get("# reference fails") == len(predictions):
        first = predictions[0]["verdict"]["error"]
        print(f"no reference ran, so nothing could be compared; the first: {first}")


def sample(p):
    """A prediction to read: on one line each, and quoted, for a model may write anything."""
    return "\n".join([f"  prompt     ...{p['prompt'][-200:]!r}", f"  reference  {p['reference'][:200]!r}",
                      f"  prediction {p['prediction'][:200]!r}"])


@torch.no_grad()
def batch_loss(model, examples, max_tokens):
    """Mean loss of a target token. Before and after an export it should be the same."""
    device = next(model.parameters()).device
    total = sum(model.loss(*to_device(m, device)) for m in micro_batches(examples, max_tokens))
    return total.item() / count_targets(examples)


if __name__ == "__main__":
    main()
