"""Fine-tune Qwen2.5 or Gemma-3 with full fine-tuning, LoRA, MoLF or MoLF-Efficient: one loop for the four.

    python train.py                                                     # MoLF on the embedded toy, on any CPU
    python train.py --task sql --method lora                            # or fact, med; fft, molf, molf-e
    python train.py --model Qwen/Qwen2.5-0.5B --task med                # a hub model on MedMCQA
    python train.py --model DIR --task text --data mine.jsonl           # rows of your own
    python train.py --model DIR --task sql --data train.parquet --eval-data test.parquet --out runs/mine
    python train.py --resume --out runs/mine                            # go on where it was stopped
    python train.py --eval-only runs/mine                               # or any checkpoint: train nothing
    python train.py --model DIR --task sql --dry-run                    # counts, bytes, steps; no weights
    torchrun --nproc_per_node=2 train.py --model DIR --task sql         # on two GPUs, see lib/parallel.py

The method is `train_step`, which is README's six lines. `train` calls it in a loop, and `run` does the rest.
"""
import argparse
import hashlib
import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

# Before torch starts: GPU memory in segments that can grow. Batches of many sizes would fragment fixed ones.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch        # noqa: E402
from safetensors.torch import save_file

import data
import molf
from data import Tokenizer, batch_of, count_targets, count_tokens
from lib import parallel, ranks, track
from lib.checkpoints import Checkpoints, last_checkpoint
from lib.evaluate import batch_loss, evaluate, flat
from lib.fast import FastStep
from lib.files import (clear_run, digest, empty, find_checkpoint, log_until, only_one, refuse_other_inputs,
                       refuse_to_replace, refuse_unwritable, run_inputs, save_record, save_safely, set_eos)
from lib.flags import (MAY_CHANGE, OF_THIS_CALL, flags_of_the_evaluated, flags_of_the_resumed, parse,
                       refuse_nonsense)
from lib.memory import (CARDS, SHORT_RUN, better_eager, eager_peak, estimate_bytes, is_short,
                        largest_micro_batch, largest_share, largest_that_fits)
from lib.report import (begun, count_parameters, discard_stdout, escape_unprintable, first_share, log_line,
                        peak_memory, print_bytes, print_results, print_summary, print_what_fits, provenance,
                        quiet_ends, read_first_result, read_table, sample, save_results, share_changed, stop,
                        stop_if_not_finite, stop_if_not_routed, warn_of_guessing, written)
from lib.rows import TENTH, read_data
from model import TARGETS, Transformer, add_experts, fold, molf_layers, read_config, unfold
from molf import ROUTES, SCORES, MoLFAdamW, param_groups

# ------------------------------------------------------------------------------------------------------------
# flags

# Defaults: the paper's (arXiv 2605.07111), and those of the toy, whose width of 128 needs smaller ranks and
# larger steps. The epochs are the task's.
PAPER = dict(lr=5e-5, lora_lr=5e-5, alpha=32,
             ranks={"fft": [], "lora": [128], "molf": [128], "molf-e": [32, 128]})
TOY = dict(lr=1e-3, lora_lr=1e-3, alpha=12,
           ranks={"fft": [], "lora": [16], "molf": [16], "molf-e": [4, 16]})
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="toy", help="toy, a directory in Hugging Face format, or a hub id (default: toy)")
    add("--task", default="fact", choices=list(data.TASKS), help="text: rows of your own, with prompt and "
        "completion, or with messages (default: fact)")
    add("--data", help="training rows: hub (the official ones), toy, or a file, .json .jsonl .jsonl.gz "
        ".parquet (default: hub; for the toy model toy)")
    add("--eval-data", help="rows to evaluate on, likewise (default: as --data; a file for med and sql needs "
        "one of its own; facts are evaluated on the cases that train, text on a tenth that does not)")
    add("--out", help="run directory (default: runs/<model>-<task>-<method>-<hash of the flags>)")
    add("--overwrite", action="store_true", help="replace a finished run in --out")
    add("--method", default="molf", choices=["fft", "lora", "molf", "molf-e"])
    add("--score", default="epd", choices=list(SCORES), help="the routing rule, see molf.py (default: epd)")
    add("--route", default="topk", choices=list(ROUTES),
        help="how scores become gates, see molf.py (default: topk)")
    add("--top-k", type=int, default=1, help="experts of a module that move at each step (default: 1)")
    add("--ranks", type=int, nargs="+",
        help="of LoRA experts (default: 128, molf-e 32 128; on the toy 16, molf-e 4 16)")
    add("--alpha", type=float, help="LoRA scale is alpha / sqrt(rank) (default: 32; toy 12)")
    add("--dropout", type=float, default=0.0, help="of LoRA; layers with it cannot be folded (default: 0)")
    add("--rest", choices=["train", "freeze"],
        help="embedding, norms, head, biases without a full expert (default: train for fft and molf, freeze "
        "for lora and molf-e)")
    add("--lr", type=float, help="learning rate of the full expert and the rest (default: 5e-5; toy 1e-3)")
    add("--lora-lr", type=float, help="learning rate of the LoRA experts (default: 5e-5; toy 1e-3)")
    add("--weight-decay", type=float, default=0.1, help="of the full expert and the rest (default: 0.1)")
    add("--lora-weight-decay", type=float, default=0.01, help="of the LoRA experts (default: 0.01)")
    add("--warmup", type=float, default=0.1, help="share of steps with rising lr, then cosine to 0 (0.1)")
    add("--clip", type=float, default=1.0, help="norm of all gradients together (default: 1.0)")
    add("--epochs", type=int, help="(default: 2; on the toy fact 10, med and sql 4)")
    add("--batch-size", type=int, default=32, help="sequences of an optimizer step (default: 32)")
    add("--max-tokens", type=int, default=16384, help="tokens of a micro-batch, for memory (default: 16384)")
    add("--max-length", type=int, default=1024, help="rows with more tokens are skipped (default: 1024)")
    add("--checkpointing", action="store_true", help="recompute activations in backward: less memory")
    add("--limit", type=int, help="use only the first N training rows")
    add("--eval-limit", type=int, help="evaluate on the first N rows only")
    add("--eval-every", type=int, metavar="N", help="every N steps, evaluate on a tenth of the training rows,"
        " at most 128, that are held out for it (facts: that train as well)")
    add("--no-before", action="store_true", help="do not evaluate the model before it trains")
    add("--eval-only", metavar="DIR", help="evaluate a checkpoint, or a run with its flags; train nothing")
    add("--export-dtype", default="bf16", choices=list(EXPORT_DTYPES), help="of the model (default: bf16)")
    # (device_count knows a GPU from its driver. If CUDA can't use it, that is an error, not a run on the CPU)
    add("--device", default="cuda" if torch.cuda.device_count() else "cpu")
    add("--dtype", choices=["bfloat16", "float32"],
        help="of the weights in the forward pass; master weights and moments are float32 (default: bfloat16 "
             "on a GPU, float32 on a CPU)")
    add("--pure-bf16", action="store_true", help="an experiment: weights and moments in bfloat16 alone, LoRA "
        "as a side branch, as in the code that the paper's authors published")
    add("--eager", action=argparse.BooleanOptionalAction,
        help="on a GPU: no compilation, no CUDA graphs. Slower steps, a faster start (default: in a short "
             f"run on one GPU, of at most {SHORT_RUN} micro-batches, that fits so)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default: 500)")
    add("--keep", type=int, default=1, metavar="N", help="checkpoints to keep while training (default: 1)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    add("--seed", type=int, default=42, help="of experts, order of the data and dropout (default: 42)")
    add("--log-every", type=int, default=10, help="steps between log lines (default: 10)")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard as well, see lib/track.py")
    add("--dry-run", action="store_true", help="print counts, bytes by kind, number of steps; then stop")
    add("--world-size", type=int, metavar="N", help="with --dry-run: count the bytes of one of N GPUs "
        "(default: as torchrun says, or 1)")
    return p

def parse_args(argv=None):
    """-> all flags, with the defaults of the run. Wrong usage exits with code 2."""
    p = make_parser()
    a = parse(p, argv)
    if a.resume and (a.eval_only or a.overwrite):
        p.error("--resume goes on with a run: neither --eval-only nor --overwrite goes with it")
    if a.eval_only:
        a = flags_of_the_evaluated(p, a, argv)
    if a.resume:
        a = flags_of_the_resumed(p, a, argv)
    for key, known in (("task", data.TASKS), ("score", SCORES), ("route", ROUTES)):
        if getattr(a, key) not in known:                # a run may have known what is not here any more
            p.error(f"the run had --{key} {getattr(a, key)}, which is not here any more")
    set_defaults(p, a)
    refuse_nonsense(p, a)
    if not a.out:
        what = [(k, v) for k, v in sorted(vars(a).items()) if k not in OF_THIS_CALL]
        name = Path(a.eval_only or a.model).name, a.task, "eval" if a.eval_only else a.method
        a.out = f"runs/{'-'.join(name)}-{hashlib.sha256(repr(what).encode()).hexdigest()[:8]}"
    return a

def set_defaults(p, a):
    """Fill in what depends on the model, the task and the method."""
    task, toy = data.TASKS[a.task], a.model == "toy"
    full = a.method in ("fft", "molf")
    a.data = a.data or ("toy" if toy else "hub")
    if a.world_size is not None and not a.dry_run:
        p.error("--world-size goes with --dry-run; to train on several GPUs, start torchrun")
    if task.source is None and a.data in ("hub", "toy") and not (a.eval_only and a.eval_data):
        p.error(f"--task {a.task} wants --data FILE, rows of your own: with prompt and completion, or with "
                f"messages")
    if a.eval_data is None and task.source is None:
        a.eval_data = TENTH
    if task.source is None and a.eval_data in ("hub", "toy"):
        p.error(f"--eval-data {a.eval_data}: there are no official rows of {a.task}")
    if a.eval_data is None:
        if a.data not in ("hub", "toy") and not task.tests_training_rows:
            p.error(f"--data {a.data} wants --eval-data FILE: rows of {a.task} to evaluate on")
        a.eval_data = a.data
    defaults = dict(TOY if toy else PAPER)
    defaults["ranks"] = defaults["ranks"][a.method]
    defaults["epochs"] = task.toy_epochs if toy else task.epochs
    defaults["rest"] = "train" if full else "freeze"
    defaults["world_size"] = ranks.n_ranks()
    defaults["dtype"] = "bfloat16" if a.device.startswith("cuda") or a.pure_bf16 else "float32"
    for key, value in defaults.items():
        if getattr(a, key) is None:
            setattr(a, key, value)

# ------------------------------------------------------------------------------------------------------------
# one optimizer step

def grad_norm(optimizer):
    """The norm of all gradients together, 0-d, summed in fp32. In four parts, which lib/fast.py runs side by
    side: it replaces molf.spread."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = []
    for part in molf.spread([grads[i::4] for i in range(min(4, len(grads)))]):
        norms += torch._foreach_norm(part, dtype=torch.float32)
    return torch.stack(norms).norm()

def train_step(model, optimizer, micros, n_targets, max_norm, ok):
    """One step on the micro-batches of a batch with n_targets target tokens. -> its loss and gradient norm,
    0-d on the device. ok, a 0-d bool, becomes False at a loss or norm that is not finite; from then on
    nothing moves. The step never waits for the device. On a GPU, lib/fast.py records it as a CUDA graph."""
    loss = 0
    for micro in micros:
        part = model.loss(*micro) / n_targets
        part.backward()                                 # G = dL/dW_eff of every linear
        loss = loss + part.detach()
    layers = parallel.pull(model)                       # (several GPUs: G to the layer's owner; else: model)
    unfold(layers)                                      # G -> the exact gradient of every expert
    loss, norm = parallel.total(loss, grad_norm(optimizer))
    clip = (max_norm / (norm + 1e-6)).clamp_max(1)      # a factor, which the optimizer's pass applies
    ok.logical_and_((loss + norm).isfinite())
    optimizer.step(clip=clip, ok=ok)                    # score, route, move
    optimizer.zero_grad()
    fold(layers)                                        # the new sum of the experts -> the layer's weight
    parallel.push(model)                                # (several GPUs: the new weights to all; else nothing)
    return loss, norm

# ------------------------------------------------------------------------------------------------------------
# the loop

def lr_factor(step, total, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to 0."""
    n = max(1, round(warmup * total)) if warmup else 0
    if step < n:
        return (step + 1) / n
    return 0.5 * (1 + math.cos(math.pi * (step - n) / max(1, total - n)))

def make_step(model, optimizer, batches, a):
    """-> step(batch), which trains on a list of examples and returns loss and gradient norm."""
    device = next(model.parameters()).device
    ok = torch.ones((), dtype=torch.bool, device=device)
    step_on_micros = partial(train_step, model, optimizer, max_norm=a.clip, ok=ok)
    if device.type == "cuda" and not a.eager:
        return FastStep(step_on_micros, model, optimizer, batches, a.max_tokens)

    def plain(batch):
        return step_on_micros(parallel.micros_here(batch, a.max_tokens, device), count_targets(batch))
    return plain

def train(model, optimizer, examples, a, log=print, held_out=None, checkpoints=None, start=None):
    """Train `model` on `examples` with the flags `a`. Call log(line, record) at the first and the last step
    and every a.log_every, and with what held_out() returns every a.eval_every steps. Save to `checkpoints`
    every a.save_every steps, or when a signal asks for it. start: (step, history) of a checkpoint, to go on
    from.
    -> history: {"gates": (steps, modules, experts), bool where all are 0 or 1, "scores": the same, fp32}"""
    device = next(model.parameters()).device
    total = a.epochs * math.ceil(len(examples) / a.batch_size)
    first, history = start or (0, None)
    parts = [history] if history else []                # of the history, on the CPU
    pending = []                                        # of the steps since the last log, on the device
    names = [name for name, _ in molf_layers(model)]
    group_of = {group["kind"]: i for i, group in enumerate(optimizer.param_groups)}     # one of each kind
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(i, total, a.warmup),
                                                 last_epoch=first - 1)
    sampled = [layer.weight.detach()[::16] for _, layer in molf_layers(parallel.owned(model))
               if layer.weight.requires_grad]
    do_step = make_step(model, optimizer, (batch_of(i, examples, a) for i in range(first, total)), a)
    timed_from = min(first + 3, total - 1)              # the steps before it compile
    tokens, clock = 0, 0.0
    model.train()
    for step in range(first, total):
        if step == timed_from:
            tokens, clock = 0, time.perf_counter()
        batch = batch_of(step, examples, a)
        tokens += count_tokens(batch)
        last = step == total - 1
        looking = held_out and (step + 1) % a.eval_every == 0
        saving = checkpoints and (last or (step + 1) % a.save_every == 0 or checkpoints.wanted())
        logging = last or step == first or (step + 1) % a.log_every == 0 or saving
        rates = {kind: optimizer.param_groups[i]["lr"] for kind, i in group_of.items()}
        before = [rows.clone() for rows in sampled] if logging else []      # (`sampled` are views)
        loss, norm = do_step(batch)
        schedule.step()
        # a replayed graph overwrites its results, so keep copies
        pending.append([t.clone() for t in (loss, norm, optimizer.gates, optimizer.scores)])
        if logging:
            losses, norms, gates, scores = [torch.stack(x).cpu() for x in zip(*pending)]    # the one sync
            pending = []
            gates = parallel.of_all_modules(model, gates)
            scores = parallel.of_all_modules(model, scores)
            stop_if_not_finite(step, losses, norms, examples, a)
            stop_if_not_routed(step, scores, gates, a)
            parts.append({"gates": gates, "scores": scores})
            if step == 0:
                warn_of_guessing(losses[0], model.config.vocab_size)
            seconds = time.perf_counter() - clock if step > timed_from else 0.0
            record = dict(step=step + 1, loss=losses[-1].item(), lr=rates, grad_norm=norms[-1].item(),
                          full_share=gates[..., 0].mean().item() if "full" in group_of else 0.0,
                          share=first_share(gates, names) if gates.shape[-1] > 1 else {},
                          changed=share_changed(before, sampled),
                          tok_per_s=tokens / seconds if seconds else 0.0,
                          eta_s=seconds * (total - 1 - step) / max(1, step - timed_from + 1),
                          peak_gb=peak_memory(device))
            log(log_line(record, total), record)
        if looking:
            pause = time.perf_counter()
            model.eval()
            line, record = held_out()
            log(f"step {step + 1:4d}/{total}  {line}", dict(step=step + 1, **record))
            model.train()
            clock += time.perf_counter() - pause                            # not training time
        if saving:
            checkpoints.save(step + 1, joined(parts))
            checkpoints.leave_if_asked(step + 1)
    model.eval()
    return joined(parts)

def joined(parts):
    history = {name: torch.cat([part[name] for part in parts]) for name in ("gates", "scores")}
    gates = history["gates"]
    if ((gates == 0) | (gates == 1)).all():
        history["gates"] = gates.bool()
    return history

# ------------------------------------------------------------------------------------------------------------
# the run

def main(argv=None):
    with quiet_ends(), ranks.processes():
        with ranks.together():
            a = parse_args(argv)
        ranks.refuse_differences({"--" + k.replace("_", "-"): v for k, v in vars(a).items()}
                                 | {"the code": ranks.code(), "torch": torch.__version__})
        a.device = ranks.own_device(a.device)
        escape_unprintable()
        torch.set_flush_denormal(True)      # second moments reach 1e-40, where a CPU is several times slower
        if a.device.startswith("cuda") and not a.dry_run:
            # a CUDA graph captures the current device
            torch.cuda.set_device(torch.device(a.device).index or 0)
        load_and_run(a, Path(a.out))

def load_and_run(a, out):
    """All that can be refused is refused before the model is loaded. An error ends in one line."""
    try:
        with ranks.together():
            refuse_to_replace(out, a)
            if not a.dry_run:
                refuse_unwritable(out)
            read_table(out.parent / "results.csv")
            source = find_checkpoint(a.model)
            config, tokenizer = read_config(source), Tokenizer.from_file(source)
            if len(TARGETS) * config.num_hidden_layers < a.world_size:
                raise ValueError(f"{a.world_size} ranks, but the model has fewer linear layers to own")
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the "
                                 f"embedding has {config.vocab_size} rows: do they belong together?")
            rows = read_data(a, tokenizer)
            if a.dry_run:
                return dry_run(config, rows, a)
            inputs = run_inputs(rows, source)
            if a.resume:
                refuse_other_inputs(out, inputs)
            # several ranks that train: each will read its part, when the layers have their experts
            device = "meta" if ranks.several() and not a.eval_only else a.device
            model = Transformer.from_pretrained(source, getattr(torch, a.dtype), device)
            out.mkdir(parents=True, exist_ok=True)
        ranks.refuse_differences(inputs)
    except (ValueError, OSError) as e:
        stop(e)
    try:
        with only_one(out):
            refuse_to_replace(out, a)       # again: another process may have finished while this one loaded
            run(model, tokenizer, rows, inputs, a, out)
    except FileExistsError as e:
        stop(e)
    except OSError as e:
        stop(e, f"; {last_checkpoint(out)}")

def dry_run(config, rows, a):
    with torch.device("meta"):
        model = Transformer(config).to(getattr(torch, a.dtype))
    steps = prepare(model, rows, a)["steps"]
    batches = [batch_of(i, rows.examples, a) for i in range(steps)]
    tokens = largest_micro_batch(batches, a)
    print(f"world size {a.world_size}, {a.device}, {a.dtype}, up to {tokens:,} tokens in a micro-batch:")
    print_bytes(estimate_bytes(model, a, tokens, a.world_size))
    if a.eager is None and is_short(batches, a):
        gb = eager_peak(model, tokens, a) / 1e9
        print(f"the run is short, so it is not compiled if {gb:.3f} GB fit (--no-eager compiles)")
    if not a.device.startswith("cuda"):
        print("what fits a GPU: --device cuda says it, also where there is none")
        return
    most = max(largest_share(batch, a.world_size) for batch in batches)
    print_what_fits({gb: largest_that_fits(model, a, a.world_size, gb, most) for gb in CARDS},
                    max(len(e.ids) for e in rows.examples), most)

def prepare(model, rows, a):
    """Put the experts in, and say what there is to do."""
    model.checkpointing = a.checkpointing
    torch.manual_seed(a.seed)                               # of A and of dropout
    add_experts(model, a.ranks, a.alpha, a.method in ("fft", "molf"), a.dropout, train_rest=a.rest == "train",
                fold=not a.pure_bf16)
    model.eval()
    counts = count_parameters(model)
    steps = a.epochs * math.ceil(len(rows.examples) / a.batch_size)
    print(f"{a.method} on {a.model}, task {a.task}: {len(rows.examples)} rows, {steps} steps, seed {a.seed}\n"
          "parameters: " + ", ".join(f"{kind}: {n:,}" for kind, n in counts.items()))
    return dict(parameters=counts, steps=steps, rows=len(rows.examples))

def prepare_to_train(model, rows, a):
    """-> what `prepare` says, the names of the modules, and the groups for the optimizer of this rank"""
    said = prepare(model, rows, a)
    if a.eager is None:
        batches = [batch_of(i, rows.examples, a) for i in range(said["steps"])]
        a.eager = better_eager(model, batches, a)
        if a.eager:
            print("not compiled, because the run is short (--no-eager compiles)")
    said["eager"] = a.eager
    module_names = [name for name, _ in molf_layers(model)]
    groups = param_groups(model, a.lr, a.lora_lr, a.weight_decay, a.lora_weight_decay)
    try:
        return said, module_names, parallel.distribute(model, groups, a.device)
    except ValueError as e:             # several ranks have read the weights only now
        stop(e)

def run(model, tokenizer, rows, inputs, a, out):
    """Evaluate, train, evaluate, export: all that a run leaves is written here, into its directory `out`."""
    task, first_result = data.TASKS[a.task], out / "before.json"
    print(f"{a.model}, task {a.task}, to be evaluated on {a.eval_data} ({len(rows.questions)}); eos "
          f"{tokenizer.eos_ids}, bos {tokenizer.bos_id}")
    asked = dict(vars(a))                                       # --eager may be decided later, and anew
    record = dict(flags=asked, inputs=inputs, date=begun(out, a))
    ready = None
    if ranks.several() and not a.eval_only:
        ready = prepare_to_train(model, rows, a)                # reads the weights
    if not a.resume and ranks.first():
        clear_run(out)
        save_record(out / "config.json", record)                # for --resume
    ranks.wait()
    ranks.refuse_differences({f"{path}, which all must see": path.read_bytes() if path.exists() else None
                              for path in (out / "config.json", first_result)})
    before = None
    if first_result.exists():                                   # --resume
        before = read_first_result(first_result)
    elif not a.no_before:
        with parallel.whole(model) as whole:
            before, predictions = evaluate(whole, tokenizer, task, rows.questions, a.max_tokens)
    if not a.eval_only:                                         # (without experts an evaluation is faster)
        said, module_names, groups = ready or prepare_to_train(model, rows, a)
        record |= said
    save_record(out / "config.json", record | provenance())
    if a.eval_only:
        if not ranks.first():
            return
        results = dict(after=before, skipped=rows.skipped)
        save_results(out, a, record["date"], results, predictions, 0)
        print_results(results, predictions)
        return
    if before:
        save_record(first_result, before)
    optimizer = MoLFAdamW(groups, score=SCORES[a.score],
                          route=parallel.over_all_modules(ROUTES[a.route], model), top_k=a.top_k,
                          pure_bf16=a.pure_bf16)
    parallel.own_randomness(a)
    identity = digest(sorted((k, v) for k, v in vars(a).items() if k not in MAY_CHANGE), inputs)
    checkpoints = Checkpoints(out, model, optimizer, a, identity)
    history, seconds = train_with_checkpoints(checkpoints, tokenizer, rows, a, out)
    del optimizer, checkpoints                                  # frees the moments before the export
    metadata = {"modules": json.dumps(module_names)}
    save_safely(out / "routing.safetensors", lambda path: save_file(history, path, metadata))
    with parallel.whole(model) as whole:
        after, predictions = evaluate(whole, tokenizer, task, rows.questions, a.max_tokens)
        losses = export(whole, tokenizer.eos_ids, rows, a, out)
    if not ranks.first():
        return
    results = dict(after=after, loss=losses, skipped=rows.skipped, train_seconds=seconds)
    if before:
        results = dict(before=before) | results
    save_results(out, a, record["date"], results, predictions, len(rows.examples))
    empty(out / "checkpoints")                                  # finished: results.json says so
    first_result.unlink(missing_ok=True)                        # there is none after --no-before
    print_results(results, predictions)
    print_summary(history["gates"], module_names, losses, a, out)

def train_with_checkpoints(checkpoints, tokenizer, rows, a, out):
    """train(), from the newest checkpoint where the run is resumed, with its log. -> history, seconds"""
    task = data.TASKS[a.task]

    def held_out():
        examples, questions = zip(*rows.held_out)
        with parallel.whole(checkpoints.model) as model:
            result, predictions = evaluate(model, tokenizer, task, questions, a.max_tokens)
            loss = batch_loss(model, examples, a.max_tokens)
        values = {k: x["value"] for k, x in result["metrics"].items() if k in task.report}
        values.pop("loss", None)                                            # it is said anyway
        shown = "  ".join(f"{k} {written(k, value)}" for k, value in values.items())
        line = f"held out: loss {loss:.4f}  {shown}\n{sample(predictions[0])}"
        return line, dict(held_out=flat(result), loss=loss)

    with checkpoints:
        start = checkpoints.load() if a.resume else None
        if a.resume:
            print(f"going on behind step {start[0]}" if start else "no whole checkpoint: starting anew")
        save_safely(out / "log.jsonl", log_until(start[0], out / "log.jsonl") if start else "")
        tracker = None
        if a.tensorboard and ranks.first():
            tracker = track.writer(out / "tensorboard", start[0] if start else 0)
        with open(out / "log.jsonl" if ranks.first() else os.devnull, "a") as log_file:
            def log(line, record):
                try:
                    print(line, flush=True)
                except BrokenPipeError:         # `| head` has left: save and leave as well
                    checkpoints.asked = checkpoints.asked or signal.SIGPIPE
                    discard_stdout()
                print(json.dumps(record), file=log_file, flush=True)
                if tracker:
                    track.add_record(tracker, record)
            try:
                history = train(checkpoints.model, checkpoints.optimizer, rows.examples, a, log,
                                held_out if rows.held_out else None, checkpoints, start)
            except FloatingPointError as e:
                checkpoints.model.save_pretrained(out / "last-good")
                stop(e, f". The model is in {out / 'last-good'}; {last_checkpoint(out)}")
        return history, time.perf_counter() - checkpoints.begin

def export(model, eos_ids, rows, a, out):
    """Write model/, and adapter/ if the base is frozen. -> the loss of a batch with the trained weights, and
    with the exported ones in the finer of both dtypes; None where the model is on no GPU as a whole"""
    if not (ranks.first() or ranks.in_step(model)):
        return None                                             # the first rank exports its own copy
    batch = rows.examples[:a.batch_size]
    losses = {"trained": batch_loss(model, batch, a.max_tokens), "exported": None}
    model.save_pretrained(out / "model", EXPORT_DTYPES[a.export_dtype])
    set_eos(out / "model", eos_ids)
    if a.method in ("lora", "molf-e") and a.rest == "freeze":
        local = a.model == "toy" or Path(a.model).exists()
        model.save_adapter(out / "adapter", model.source.resolve() if local else a.model)
    elif a.method in ("lora", "molf-e"):
        print("no adapter/: with --rest train the base has changed as well")
    if not ranks.in_step(model):
        wider = a.dtype == "float32" or a.export_dtype == "fp32"
        exported = Transformer.from_pretrained(
            out / "model", getattr(torch, "float32" if wider else "bfloat16"), a.device)
        losses["exported"] = batch_loss(exported, batch, a.max_tokens)
    return losses

if __name__ == "__main__":
    main()
