"""What a run says about itself: its size, where it ran, its log lines, tables and results. For train.py."""
import csv
import io
import json
import math
import os
import platform
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data import TASKS, batch_of
from lib.evaluate import flat
from lib.files import locked, read_record, save_safely
from lib.memory import USABLE
from lib.ranks import first, of_all
from lib.read import one_line
from molf import param_groups

CSV_COLUMNS = ("date run task model data eval_data method rest score route top_k ranks alpha lr lora_lr "
               "epochs batch_size seed rows train_seconds eval_rows eval_seconds").split()

NO_SHARES = "loss", "perplexity"        # the other metrics are from 0 to 1

def csv_columns():
    metrics = dict.fromkeys(name for task in TASKS.values() for name in task.report)
    return CSV_COLUMNS + list(metrics)

def read_table(path):
    """results.csv -> [line], each a list of texts, the names of columns first; [] if there is none. OSError
    if it is not a table of runs. A torn last line is left out: its run will add it, for it did not finish."""
    if not path.exists():
        return []
    try:
        with open(path, "r+", encoding="utf-8", newline="") as f:       # PermissionError before the training
            text = f.read()
        if ",".join(csv_columns()).startswith(text.strip()):            # it is empty, or was torn up there
            return []
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (ValueError, csv.Error) as e:
        raise FileExistsError(f"{path} cannot be read ({e}): move it away") from e
    if "run" not in lines[0]:
        raise FileExistsError(f"{path} has other columns than a table of runs: move it away")
    if not text.endswith("\n") and len(lines[-1]) < len(lines[0]):
        print(f"{path}: its last line was cut off and is left out")
        lines.pop()
    return lines

def begun(out, a):
    """When the run in `out` began, which is one with its line in results.csv. Who goes on with it, or with an
    evaluation that did not finish, keeps that."""
    path = out / "config.json"
    goes_on = a.resume or a.eval_only and not (out / "results.json").exists()
    old = read_record(path) if path.exists() and goes_on else {}
    return old.get("date") or time.strftime("%Y-%m-%d %H:%M:%S")

def provenance():
    git = None
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        git = result.stdout.strip() or None
    return dict(argv=sys.argv, git=git, python=platform.python_version(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                torch=torch.__version__, sqlite=sqlite3.sqlite_version, threads=torch.get_num_threads())

def peak_memory(device):
    """GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

def count_parameters(model):
    """{"full": n, "lora 128": n, "rest": n, "frozen": n}: a folded weight is counted as its full expert."""
    counts = Counter()
    for group in param_groups(model):
        name = f"lora {len(group['params'][0])}" if group["kind"] == "lora" else group["kind"]
        counts[name] += sum(p.numel() for p in group["params"])
    counts["frozen"] = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return dict(+counts)

def print_bytes(sizes):
    for kind, n in sizes.items():
        print(f"  {kind:26s}{n / 1e9:9.3f} GB")

def print_what_fits(tokens, longest, most):
    """tokens: {GB of a card: the largest micro-batch that fits it}. longest: tokens of the longest row; most:
    of the largest batch."""
    print(f"the largest --max-tokens that fits, with {1 - USABLE:.0%} of a card left to CUDA:")
    for gb, n in tokens.items():
        said = f"{n:,}"
        if n < longest:
            said = f"none: {f'the longest row has {longest:,} tokens' if n else 'not even one token'}"
        elif n == most:
            said = f"any: no batch has more than {most:,} tokens on a GPU"
        print(f"  {gb:3d} GB  {said}")

def escape_unprintable():
    """A terminal may not know the characters that a model writes: print them as escapes, do not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

def discard_stdout():
    """Nobody reads it any more: let neither a print fail nor what the interpreter still writes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

@contextmanager
def quiet_ends():
    """A reader that has left (`| head`) and Ctrl-C end a program in one line, with the shell's exit code."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code, why = 130, "stopped by Ctrl-C"
    except BrokenPipeError:
        discard_stdout()
        code, why = 141, "stopped, because nobody reads the output"
    else:
        return
    with suppress(BrokenPipeError):
        print(why, file=sys.stderr)
    sys.exit(code)

def stop(error, more=""):
    """End with exit code 1 and one line. A broken pipe is left to quiet_ends. Of several ranks the first
    speaks."""
    if isinstance(error, BrokenPipeError):
        raise error
    sys.exit(f"error: {one_line(error)}{more}" if first() else 1)

def log_line(r, total):
    """The record of a step as a line to read."""
    lrs = "/".join(f"{lr:.1e}" for lr in r["lr"].values())
    moved = "" if r["changed"] is None else f"changed {r['changed']:4.0%}  "
    speed = f"{r['tok_per_s']:,.0f}" if r["tok_per_s"] else "-"
    eta = int(r["eta_s"])
    return (f"step {r['step']:4d}/{total}  loss {r['loss']:.4f}  lr {lrs}  norm {r['grad_norm']:.2f}  "
            f"full {r['full_share']:4.0%}  {moved}{speed} tok/s  eta {eta // 60}:{eta % 60:02d}  "
            f"{r['peak_gb']:.1f} GB")

def first_share(gates, module_names):
    """gates (steps, modules, experts) -> {"q_proj": mean gate of the first expert, ...}"""
    kinds = {}
    for i, name in enumerate(module_names):
        kinds.setdefault(name.rpartition(".")[2], []).append(i)
    return {kind: gates[:, i, 0].float().mean().item() for kind, i in kinds.items()}

def sample(p):
    """A prediction to read: on one line each, and quoted, for a model may write anything."""
    return "\n".join([f"  prompt     ...{p['prompt'][-200:]!r}", f"  reference  {p['reference'][:200]!r}",
                      f"  prediction {p['prediction'][:200]!r}"])

def save_results(out, a, date, results, predictions, n_rows):
    """predictions.jsonl, a line in results.csv beside the run, and results.json last: with that the run is
    finished. date: when it began. results: "after" and perhaps "before" are results of lib.evaluate."""
    flattened = results | {k: flat(results[k]) for k in ("before", "after") if k in results}
    save_safely(out / "predictions.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
    add_to_table(out, a, date, results, len(predictions), n_rows)
    save_safely(out / "results.json", json.dumps(flattened, indent=2) + "\n")

def print_results(results, predictions):
    """A table, and samples to read."""
    after = results["after"]
    step = len(predictions) // 3 or 1
    print()
    for p in predictions[::step][:3]:
        print(sample(p))
    print_metrics(results.get("before"), after)
    failing = [p["verdict"] for p in predictions
               if any(value for name, value in p["verdict"].items() if name.startswith("# reference fails"))]
    if failing:
        print(f"{len(failing)} references did not run, and are not compared; the first: "
              f"{failing[0]['error']}")

def add_to_table(out, a, date, results, eval_rows, n_rows):
    """A line for results.csv, in the place of one that the run added before it was killed."""
    after = results["after"]
    row = vars(a) | dict(date=date, run=out.name, rows=n_rows, ranks=" ".join(map(str, a.ranks)),
                         eval_rows=eval_rows, train_seconds=round(results.get("train_seconds", 0)),
                         eval_seconds=round(after["seconds"], 1))
    if a.eval_only:
        row = {k: row[k] for k in ("date", "run", "task", "eval_data", "eval_rows", "eval_seconds")}
        row |= {"method": "evaluation", "model": a.eval_only}
    row |= {name: x["value"] for name, x in after["metrics"].items()}
    table = (out.parent / "results.csv").resolve()
    with locked(table):                             # other runs write to it as well
        old, *lines = read_table(table) or [[]]
        columns = list(dict.fromkeys([*old, *csv_columns()]))           # a task may have added some
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(columns)
        for line in lines:
            named = dict(zip(old, line))
            if (named.get("date"), named.get("run"), named.get("task")) != (date, out.name, a.task):
                writer.writerow(line + [""] * (len(columns) - len(line)))
        writer.writerow([row.get(name, "") for name in columns])
        save_safely(table, text.getvalue())

def written(name, value):
    """A metric as people read it: a share in per cent."""
    if name in NO_SHARES:
        return f"{value:.3f}" if value < 1000 else f"{value:.1e}"
    return f"{value:.1%}"

def print_metrics(before, after):
    before = before or {"metrics": {}, "counts": {}}
    print(f"\n{'':38s}{'before' if before['metrics'] else '':8s}   after   95 % interval        n")
    for name, x in after["metrics"].items():
        was = before["metrics"].get(name)
        was = written(name, was["value"]) if was else ""
        value, low, high = (written(name, x[key]) for key in ("value", "low", "high"))
        print(f"{name:36s}{was:>8s}{value:>8s}   {low:>6s} to {high:>6s}{x['n']:7d}")
    for name, n in after["counts"].items():
        was = before["counts"].get(name, "")
        if n or was:
            print(f"# {name:34s}{was:8}{n:8d}")
    print(f"evaluated in {after['seconds']:.1f} s")

def share_changed(before, after):
    """Lists of tensors -> the share of their entries that differ. None of empty lists: on a frozen base."""
    if not before:
        return None
    changed = sum((new != old).sum() for new, old in zip(after, before)).item()
    counts = of_all((changed, sum(t.numel() for t in before)))
    return sum(changed for changed, _ in counts) / sum(n for _, n in counts)

def read_first_result(path):
    """before.json -> the result of lib.evaluate that it holds. OSError if it is damaged."""
    try:
        result = read_record(path)
        flat(result)
        return result
    except (OSError, KeyError, TypeError, AttributeError) as e:
        raise OSError(f"{path} is damaged: without it, the model is evaluated again") from e

def warn_of_guessing(loss, vocab_size):
    if abs(loss / math.log(vocab_size) - 1) < 0.05:
        print(f"warning: the first loss is near ln({vocab_size}), as if by guessing: do the weights, the "
              f"tokenizer and the config belong together?")

def stop_if_not_finite(last, losses, norms, examples, a):
    """losses and norms (n,) of the n steps up to `last`: raise if one is not finite, and name its rows. From
    that step on nothing has moved."""
    bad = (~(losses + norms).isfinite()).nonzero()
    if len(bad) == 0:
        return
    i = bad[0].item()
    step = last + 1 - len(losses) + i
    rows = ", ".join(str(e.row) for e in batch_of(step, examples, a))
    raise FloatingPointError(f"stopped at step {step + 1}: loss {losses[i].item()}, gradient norm "
                             f"{norms[i].item()}; nothing has moved since. Lower --lr and --lora-lr, or look "
                             f"at rows {rows}")

def stop_if_not_routed(last, scores, gates, a):
    """scores and gates (n, modules, experts) of the n steps up to `last`: raise if rule or route failed."""
    if not scores.isfinite().all():
        raise FloatingPointError(f"rule {a.score} gave a score that is not finite by step {last + 1}")
    if not ((0 <= gates) & (gates <= 1)).all():
        raise FloatingPointError(f"route {a.route} gave a gate that is not from 0 to 1 by step {last + 1}")

def print_summary(gates, module_names, losses, a, out):
    """The last lines of a run: who moved, where the model is, and whether its export lost something."""
    if gates.shape[-1] > 1:
        first = "full" if a.method == "molf" else f"rank-{a.ranks[0]}"
        what = "steps won by" if gates.dtype == torch.bool else "mean gate of"
        shares = first_share(gates, module_names)
        print(f"\n{what} the {first} expert:  "
              + "  ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    trained, exported = losses["trained"], losses["exported"]
    compared = "not compared" if exported is None else f"{exported:.6f}"
    print(f"\nmodel: {out / 'model'}   loss of a batch, trained {trained:.6f}, exported {compared}")
    if a.export_dtype == "bf16" and exported and exported > 1.05 * trained:
        print("bf16 has rounded away a part of what was learnt: --export-dtype fp32 keeps it")
