"""Is MoLF better than the better of full fine-tuning and LoRA, or within 1.5 points of it? One cell of the
answer: a model, a task and its rows, on which the methods and their controls run, side by side.

    python bench/compare.py -- --device cpu                         # the toy's facts, its learning rates
    python bench/compare.py --csv bench/results/sql.csv --lrs 1e-5 3e-5 1e-4 --lora-lrs 1e-4 3e-4 1e-3 \\
        --workers 8 --until 1500 -- --model DIR --task sql --data FILE --eval-data FILE
    python bench/compare.py --entries fft lora "molf --score align" --seeds 1 -- --task med
    python bench/compare.py --report bench/results/*.csv            # tables, without a run

What stands behind -- goes to train.py for every run. An entry is what the others do not have: a method, and
perhaps flags. "0.5 fft" has half the learning rates of "fft". Of the entries of a method the shortest is its
plain one, the others are variants of it. transformers-fft, peft-lora, dora and adalora are methods as well:
bench/peers.py runs them, on the same rows. base is the model before all training.

Rows. The training rows are split once, by a fixed seed: --validation of them are kept, to choose learning
rates. Of med, sql and text the others train in both phases, and the choice is by the metric --select on the
validation rows. Facts are measured on the cases that train. So their validation rows are cases of their own
(by default half of all, so that both phases take as many steps), which train and are measured in the first
phase, and never in the second. The test rows choose nothing.

Learning rates. In the phase "lr" the plain fft runs with each of --lrs, plain lora, molf-e and dora with each
of --lora-lrs, and adalora with ten times those, all with one seed. In the phase "test" a variant has its
method's choice. molf has no grid of its own: its full expert has the choice of fft, its LoRA expert that of
lora. So has lora with --rest train, whose rest has the choice of fft. transformers-fft and peft-lora have
those of fft and lora. Equal values: the lower rate. A grid of one rate needs no runs, and if all are so, no
row is kept for validation.

What is left. When a run ends, its row is written to --csv, and the outcome of each row that it was asked to
the .jsonl beside it. Those two files say what is finished: the same command goes on from there, also without
--out. It goes on with an unfinished run where the same --out has its checkpoint, if model and rows have not
moved. Entries, seeds and rates may be added later, but the first grid of several rates is another plan,
because it keeps rows for validation. A run that fails is named, and runs again the next time. A loss or score
that is not finite is a result. A peer has no checkpoints: one that was stopped begins anew. A table is
refused if its model, its rows, or the code of one of its rules have changed since: give another --csv, or the
rule another name. Model and rows are known by what is in them, wherever they lie.
"""
import argparse
import contextlib
import gc
import hashlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train  # noqa: E402
from bench.candidates import CANDIDATES  # noqa: E402
from bench.table import (LOWER_IS_BETTER, METHODS, PEER_OF, Run, add_row, best_of, factor_of,  # noqa: E402
                         in_order, method_of, metrics_of, outcomes_of, rate, read_table, report, searched,
                         shown, sources, words_of)
from data import TASKS, load_rows  # noqa: E402
from lib.files import (digest, empty, find_checkpoint, model_inputs, read_record, weight_files,  # noqa: E402
                       write_safely)
from lib.report import escape_unprintable, quiet_ends, stop  # noqa: E402
from lib.rows import TENTH, split_off  # noqa: E402
from molf import ROUTES  # noqa: E402

ENTRIES = ["fft", "0.5 fft", "lora", "0.5 lora", "lora --rest train", "molf", "molf --score pfn",
           "molf --score snr", "molf --score align", "molf --route softmax", "molf --route sticky",
           "molf --score random", "molf --score always_full", "molf --score always_lora",
           "molf --score even --route softmax", "molf-e"]
OF_ENTRIES = set("score route top_k ranks alpha dropout rest weight_decay lora_weight_decay warmup "
                 "clip".split())
OF_THIS_PROGRAM = set("method rest lr lora_lr seed out overwrite resume eval_only no_before dry_run "
                      "world_size".split())
OF_FILES = {"model", "data", "eval_data"}                       # what is in them counts, not where they are
LARGE = "model", "adapter", "last-good", "checkpoints"          # of a run that has ended

# ------------------------------------------------------------------------------------------------------------
# the plan: which runs there are

def grid(source, a):
    """The runs that search the learning rate of a plain entry, the lowest first."""
    if method_of(source) == "fft":
        return [Run("lr", source, lr, None, a.lr_seed) for lr in a.lrs]
    factor = 10 if method_of(source) == "adalora" else 1                # see bench/peers.py
    return [Run("lr", source, None, factor * lr, a.lr_seed) for lr in a.lora_lrs]

def choice(source, rows, a):
    """-> the learning rate of a plain entry. None before its search has ended, or if no run was finite"""
    tried = searched(source, rows)
    planned = grid(source, a)
    if len(planned) == 1 and not tried:
        return rate(planned[0])
    if not set(planned) <= set(tried):
        return None
    best = best_of(tried, rows, a.select)
    return best and rate(best)

def known_runs(rows, a):
    """rows: {Run: row of the table} -> [Run], with those that have ended. The runs of an entry in the phase
    "test" are known when its learning rates are."""
    wanted = {entry: sources(entry, a.entries) for entry in a.entries}
    needed = in_order(source for pair in wanted.values() for source in pair if source)
    grids = [grid(source, a) for source in needed]
    runs = []
    for planned in grids:
        if len(planned) > 1 or searched(planned[0].entry, rows):
            runs += planned
    rates = {source: choice(source, rows, a) for source in needed}
    for entry, (full, lora) in wanted.items():
        if all(rates[source] is not None for source in (full, lora) if source):
            lr, lora_lr = (source and factor_of(entry) * rates[source] for source in (full, lora))
            seeds = a.seeds[:1] if method_of(entry) == "base" else a.seeds
            runs += [Run("test", entry, lr, lora_lr, seed) for seed in seeds]
    return runs

def searches(a):
    return max(len(a.lrs), len(a.lora_lrs)) > 1

def split_rows(a):
    """-> the rows that train and those of the validation, which is a part of --data"""
    rows, _ = load_rows(a.cell.task, "train", a.cell.data, a.cell.limit)
    few = len(rows) // (2 if TASKS[a.cell.task].tests_training_rows else 10)
    n = (a.validation or few) if searches(a) else 0
    if not n < len(rows) or searches(a) and not n:
        raise ValueError(f"{a.cell.data}: of {len(rows)} rows {n} are for validation: give more, or another "
                         f"--validation")
    numbered = dict(enumerate(rows))
    picked = split_off(numbered, n, "validation")
    return [row for i, row in numbered.items() if i not in picked], [picked[i] for i in sorted(picked)]

def digest_of_files(a):
    """Of the model its weights, config and tokenizer; and the rows that train, choose rates and are asked"""
    asked = ()
    if not TASKS[a.cell.task].tests_training_rows:
        asked, _ = load_rows(a.cell.task, "test", a.cell.eval_data, a.cell.eval_limit)
    source = find_checkpoint(a.cell.model)
    weights = hashlib.sha256()
    for path in weight_files(source):
        with open(path, "rb") as file:
            while block := file.read(2 ** 20):
                weights.update(block)
    rows = json.dumps([*a.split, list(asked)], sort_keys=True, default=str)
    return digest(rows, weights.hexdigest(), model_inputs(source))

def read_files(a):
    """Add to the flags what follows from files: split (the rows of both kinds), data (a digest of model and
    rows), out (the place of such runs: train.py goes on only if model and rows lie as before). -> flags"""
    a.split = split_rows(a)
    a.data = digest_of_files(a)
    a.out = a.out / digest(a.plan, a.data, a.cell.model, a.cell.eval_data)
    return a

def digest_of_rule(entry):
    """The code of its rule and its route, as far as it stands in those two functions; "" if it has none"""
    if method_of(entry) not in ("molf", "molf-e"):
        return ""
    flags = train.make_parser().parse_args(["--method", *words_of(entry)])
    return digest(*(inspect.getsource(f) for f in (train.SCORES[flags.score], ROUTES[flags.route])))

def refuse_another_plan(rows, a):
    for run, row in rows.items():
        if row["plan"] != a.plan:
            theirs = f"-- {row['flags']} (--select {row['select']}, --validation {row['validation']})"
            ours = f"-- {a.flags} (--select {a.select}, --validation {a.validation_rows})"
            raise ValueError(f"{a.csv} holds the runs of another plan, {theirs}. This one is {ours}: give "
                             f"another --csv")
        if row["data"] != a.data:
            raise ValueError(f"{a.csv}: its runs had other rows or another model: give another --csv")
        if row.get("rule") and run.entry in a.entries and row["rule"] != digest_of_rule(run.entry):
            raise ValueError(f"{a.csv}: {run.entry} ran with other code of its rule or route: give the rule "
                             f"another name, or another --csv")

def write_rows(a):
    """Write the rows of both phases. -> {phase: the flags of train.py that name them}"""
    folder = a.out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in zip(("training", "validation"), a.split):
        path = folder / f"{name}.jsonl"
        write_safely(path, "".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    training, validation = paths
    if TASKS[a.cell.task].tests_training_rows:
        files = {"lr": (validation, validation), "test": (training, training)}
    else:
        files = {"lr": (training, validation), "test": (training, a.cell.eval_data)}
    return {phase: ["--data", data, "--eval-data", asked] for phase, (data, asked) in files.items()}

# ------------------------------------------------------------------------------------------------------------
# the runs

def evaluation_of(run, out):
    """The directory with a run's results. bench/peers.py evaluates in one of its own."""
    return out / "evaluation" if method_of(run.entry) in PEER_OF else out

def what_ended(run, out):
    """The directory of a finished run -> its row, and the outcomes of the rows that it was asked"""
    evaluation = evaluation_of(run, out)
    config = read_record(out / "config.json")
    results = json.loads((evaluation / "results.json").read_text())
    predictions = [json.loads(line) for line in (evaluation / "predictions.jsonl").read_text().splitlines()]
    first_share = None
    if (out / "routing.safetensors").exists():
        gates = load_file(out / "routing.safetensors")["gates"]         # (steps, modules, experts)
        if gates.shape[-1] > 1:
            first_share = gates[..., 0].float().mean().item()
    after = results["after"]
    row = run._asdict() | dict(
        ended="finished",
        first_share=first_share,
        steps=config.get("steps", 0),
        rows=config.get("rows", 0),
        eval_rows=len(predictions),
        train_seconds=round((config | results).get("train_seconds", 0), 1),     # (a peer's: in its config)
        eval_seconds=round(after.pop("seconds"), 1),
        inputs=digest(sorted(config["inputs"].items())),
        **{key: config[key] for key in ("date", "git", "torch", "gpu")},
    )
    row |= {name: x["value"] if isinstance(x, dict) else x for name, x in after.items()}
    return row, outcomes_of(predictions)

def folder_of(run):
    """The name of a run's directory: readable, and another one for each run and each code of its rule."""
    return f"{re.sub('[^a-z0-9.+]+', '-', str(run))}-{digest(str(run), digest_of_rule(run.entry))[:6]}"

def log_of(out):
    return out.with_name(f"{out.name}.txt")

def last_line(path):
    return path.read_text().strip().rpartition("\n")[2]

def train_and_evaluate(run, argv, out):
    """Leave the results in `out`. Results that are there already may be of other rows: they are replaced."""
    method = method_of(run.entry)
    if method in PEER_OF:
        from bench import peers     # it needs transformers and peft
        exact = ["--export-dtype", "fp32"]          # ours are evaluated before they are rounded
        peers.main(["--peer", PEER_OF[method], "--", *argv, *exact, "--out", str(out), "--overwrite"])
        return
    if method == "base":
        # Under another name: the flags of a run would come along with its model. And the last --model
        # counts: --eval-only wants none beside it, for which "toy" stands.
        base = out.with_name("base")
        base.unlink(missing_ok=True)
        base.symlink_to(find_checkpoint(train.make_parser().parse_args(argv).model).resolve())
        train.main([*argv, "--model", "toy", "--eval-only", str(base), "--out", str(out), "--overwrite"])
        return
    # Compiled, though it may be short: the entry's next run finds it compiled, and all runs are alike
    argv = ["--method", method, "--no-eager", *argv, "--no-before", "--out", str(out)]
    train.main([*argv, "--resume" if any((out / "checkpoints").glob("*")) else "--overwrite"])

def run_one(run, argv, out):
    """Train and evaluate in this process. -> "finished" or "not finite", row, outcomes.
    -> "stopped" or "failed", why, None"""
    log_of(out).parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(out), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            train_and_evaluate(run, argv, out)
            found = "finished", *what_ended(run, out)
        except SystemExit as e:
            if isinstance(e.__context__, FloatingPointError):           # as `stop` leaves it
                found = "not finite", run._asdict() | {"ended": "not finite"}, {}
            elif e.code == 128 + signal.SIGTERM:
                return "stopped", "", None
            else:
                return "failed", e.code if isinstance(e.code, str) else last_line(log_of(out)), None
        except Exception as e:      # of any kind, such as a full GPU: it must only end this run
            traceback.print_exc()
            return "failed", f"{type(e).__name__}: {e}", None
    for name in LARGE:
        empty(out / name)
    return found

def end_with(parent):
    """If it is killed, nobody waits for this process's results: leave the GPU to others. A run that trains
    saves a checkpoint first, for which it has a minute."""
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    os._exit(1)

def work(pipe):
    """A process that runs what it is sent. What was compiled for an entry serves its next run as well. After
    a failure it ends, for there may be something left of it, on the GPU for one."""
    os.setsid()         # Ctrl-C is for the parent, which asks this process to stop
    threading.Thread(target=end_with, args=(parent_process(),), daemon=True).start()
    train.SCORES.update(CANDIDATES)
    entry = None
    with contextlib.suppress(EOFError, BrokenPipeError):        # the parent has closed the pipe, or is gone
        while True:
            run, argv, out = pipe.recv()
            if run.entry != entry:
                torch.compiler.reset()
            entry = run.entry
            found = run_one(run, argv, out)
            pipe.send(found)
            if found[0] in ("stopped", "failed"):
                return
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

class Worker:
    def __init__(self):
        context = get_context("spawn")              # CUDA does not survive a fork
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)      # inherited, before `work` can say so
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        other.close()                               # so that its end shows, in whatever way it ends
        self.run = self.entry = None

    def begin(self, run, argv, out):
        self.run, self.entry = run, run.entry
        with contextlib.suppress(OSError):          # it has died: `result` will say so
            self.pipe.send((run, argv, out))

    def result(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return "failed", f"its process ended with code {self.process.exitcode}", None

def next_run(todo, worker, busy):
    """The first of those that need the least compilation: of the entry that the worker had, or else of one
    that no other worker has."""
    taken = {other.entry for other in busy}
    return min(todo, key=lambda run: (run.entry != worker.entry, run.entry in taken))

def said(run, row, a):
    if row["ended"] != "finished":
        return f"{run}: {row['ended']}"
    metrics = "  ".join(f"{name} {shown(row[name], name)}" for name in metrics_of(a.cell.task) if name in row)
    return f"{run}: {metrics}  ({row['train_seconds'] + row['eval_seconds']:.0f} s)"

def run_all(a, deadline):
    """Run what is missing, on a.workers processes, until time.monotonic() is `deadline` or a signal comes.
    -> {Run: why it failed}, and the signal, or None"""
    files = write_rows(a)
    rows = read_table(a.csv)
    of_plan = dict(plan=a.plan, select=a.select, task=a.cell.task, flags=a.flags,
                   validation=a.validation_rows, data=a.data)
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)       # a second one ends this process at once
    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    failed, idle, busy, stopped = {}, [], [], False
    try:
        while True:
            late = bool(asked) or time.monotonic() >= deadline
            runs = known_runs(rows, a)
            todo = [r for r in runs if r not in rows and r not in failed and r not in {w.run for w in busy}]
            idle = [worker for worker in idle if worker.process.is_alive()]
            while todo and len(busy) < a.workers and not late:
                worker = idle.pop() if idle else Worker()
                run = next_run(todo, worker, busy)
                todo.remove(run)
                out = a.out / folder_of(run)
                worker.begin(run, [*a.shared, *files[run.phase], *run.flags()], out)
                busy.append(worker)
            if late and not stopped:
                if busy:
                    print(f"stopping {len(busy)} runs, at a checkpoint", flush=True)
                for worker in busy:
                    worker.process.terminate()      # train.py saves a checkpoint
                stopped = True
            if not busy:
                return failed, asked[0] if asked else None
            ready = connection.wait([w.pipe for w in busy], timeout=0.2)
            for worker in [w for w in busy if w.pipe in ready]:
                busy.remove(worker)
                how, row, outcomes = worker.result()
                if how in ("finished", "not finite"):
                    idle.append(worker)
                    row |= of_plan | {"rule": digest_of_rule(worker.run.entry)}
                    rows = add_row(a.csv, worker.run, row, outcomes)
                    print(f"{len(rows):4d}  {said(worker.run, row, a)}", flush=True)
                elif how == "failed" and not stopped:
                    failed[worker.run] = row
                    print(f"      {worker.run}: failed: {row}", flush=True)
                worker.run = None
    finally:
        for worker in busy:                         # there are some after an error only
            worker.process.terminate()
        for worker in idle + busy:
            worker.pipe.close()                     # that ends it
            worker.process.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)

# ------------------------------------------------------------------------------------------------------------
# the command

def make_parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--entries", nargs="+", default=ENTRIES, metavar="FLAGS", help="a method, perhaps with flags of it, "
        "each in quotes (default: the four, the rules, the routes and the controls)")
    add("--lrs", type=float, nargs="+", help="rates of the full expert to choose from (default: train.py's)")
    add("--lora-lrs", type=float, nargs="+", help="rates of LoRA experts, likewise (default: train.py's)")
    add("--lr-seed", type=int, default=0, help="of the runs that choose (default: 0)")
    add("--select", metavar="METRIC", help="that chooses; ES+PS+NS is the harmonic mean of the three "
        "(default: the first that the task reports)")
    add("--validation", type=int, metavar="N", help="training rows that choose rates (default: "
        "a tenth; facts: half)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the tested runs (default: 1 2 3)")
    add("--workers", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    add("--until", type=float, default=math.inf, metavar="SECONDS", help="then begin no run, and stop those "
        "that there are, at a checkpoint (default: never)")
    add("--csv", type=Path, default=Path("runs/compare.csv"), help="the table (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/compare"), help="for the runs (default: %(default)s)")
    add("--metrics", nargs="+", help="of the report (default: those that the task reports)")
    add("--report", nargs="+", type=Path, metavar="CSV", help="write the report of these tables; run nothing")
    return p

def split_flag(word):
    """ "--flag=x" -> "--flag", "x" """
    return word.split("=", 1) if word.startswith("--") else [word]

def canonical(entry):
    """The entry as a table names it: "--flag=x" is "--flag x". ValueError if it is none."""
    words = [part for word in shlex.split(entry) for part in split_flag(word)]
    known = train.make_parser()._option_string_actions
    unknown = [word for word in words if word.startswith("--") and word not in known]
    if unknown:
        raise ValueError(f"there is no flag {unknown[0]}")
    entry = shlex.join(words)
    if not words or not words_of(entry) or method_of(entry) not in METHODS:
        raise ValueError(f"an entry begins with a method, one of {' '.join(METHODS)}, or with a factor of "
                         f"its rates before that")
    if not 0 < factor_of(entry) < math.inf:
        raise ValueError("its factor must be above 0")
    wrong = flags_given(words_of(entry)[1:]) - OF_ENTRIES
    if wrong:
        raise ValueError(f"{as_flags(wrong)} cannot differ between entries")
    if method_of(entry) in ("fft", "lora") and {"score", "route"} & flags_given(words_of(entry)[1:]):
        raise ValueError("it has one expert, so no rule and no route")
    return entry

def flags_given(argv):
    """-> the names of the flags of train.py in argv"""
    p = train.make_parser()
    p.set_defaults(**dict.fromkeys(vars(p.parse_args([]))))
    return {name for name, value in vars(p.parse_args(argv)).items() if value is not None}

def as_flags(names):
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

def refuse_nonsense(words, shared):
    """Exit if the program that will run the entry does not take its flags: with 2, or with 1 if it is a peer
    and its packages are missing."""
    method, *flags = words
    if method not in PEER_OF:
        train.parse_args([*shared, *flags] if method == "base" else [*shared, "--method", *words])
        return
    try:
        from bench import peers
    except ImportError as e:
        stop(f"{e}: {method} needs it, pip install transformers peft")
    peers.parse_args(["--peer", PEER_OF[method], "--", *shared, *flags, "--out", "-", "--overwrite"])

def parse_args(argv):
    """-> the flags, with what follows from them: shared (what stands behind --), cell (all flags of train.py
    that it means), flags (shared, of files the name alone), plan (a digest of what the runs of a table have
    in common, but for files). Wrong usage exits with 2."""
    p = make_parser()
    cut = argv.index("--") if "--" in argv else len(argv)
    a, shared = p.parse_args(argv[:cut]), [part for word in argv[cut + 1:] for part in split_flag(word)]
    if a.report:
        return a
    wrong = flags_given(shared) & OF_THIS_PROGRAM
    if wrong:
        p.error(f"{as_flags(wrong)}: not for all runs, this program gives it to each")
    for i, entry in enumerate(a.entries):
        try:
            a.entries[i] = canonical(entry)
        except ValueError as e:
            p.error(f"--entries {entry!r}: {e}")
        refuse_nonsense(words_of(a.entries[i]), shared)
    if a.csv.suffix == ".jsonl":
        p.error(f"--csv {a.csv}: the .jsonl beside the table would be the same file")
    a.shared, a.cell = shared, train.parse_args(shared)
    task = TASKS[a.cell.task]
    a.entries = in_order(a.entries)
    a.lrs = sorted(set(a.lrs or [a.cell.lr]))
    a.lora_lrs = sorted(set(a.lora_lrs or [a.cell.lora_lr]))
    if not all(0 < lr < math.inf for lr in a.lrs + a.lora_lrs):
        p.error("--lrs and --lora-lrs must be above 0")
    a.select = a.select or task.report[0]
    for metric in [*a.select.split("+"), *(a.metrics or [])]:
        if metric not in metrics_of(a.cell.task):
            p.error(f"{metric!r} is no metric of rows of {a.cell.task}: there are "
                    f"{', '.join(metrics_of(a.cell.task))}")
    if "+" in a.select and LOWER_IS_BETTER & set(a.select.split("+")):
        p.error(f"--select {a.select}: of some of them less is better")
    for name in ("workers", "validation"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            p.error(f"--{name} must be at least 1")
    if a.cell.eval_data == TENTH:
        p.error(f"--task {a.cell.task} wants --eval-data here: which tenth is kept goes by the seed")
    same = a.cell.eval_data == a.cell.data
    if task.tests_training_rows and not same:
        p.error(f"--eval-data {a.cell.eval_data}: {a.cell.task} is measured on the rows that train")
    if same and not task.tests_training_rows and a.cell.data not in ("toy", "hub"):
        p.error(f"--eval-data {a.cell.eval_data}: those are the rows that train")
    a.validation_rows = (a.validation or "default") if searches(a) else 0
    files = {getattr(a.cell, name) for name in OF_FILES}
    paths = {w: os.path.abspath(w) for w in shared}
    a.flags = shlex.join(Path(paths[w]).name if paths[w] in files else w for w in shared)
    given = {name: getattr(a.cell, name) for name in flags_given(shared) - OF_FILES}
    given |= dict(toy=a.cell.model == "toy",                        # it has other defaults
                  device=a.cell.device.partition(":")[0], dtype=a.cell.dtype)
    a.plan = digest(sorted(given.items()), a.select, a.validation_rows, a.lr_seed)
    return a

def main(argv=None):
    train.SCORES.update(CANDIDATES)
    a = parse_args(sys.argv[1:] if argv is None else argv)
    escape_unprintable()
    try:
        if a.report:
            for path in a.report:
                print(f"## {path.stem}\n\n{report(path, a.metrics)}")
            return
        deadline = time.monotonic() + a.until
        rows = read_table(a.csv)
        read_files(a)
        refuse_another_plan(rows, a)
        a.csv.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=a.csv.parent).close()        # else it would be known after the first run
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):   # of a worker, which inherits them
            os.environ.setdefault(name, str(max(1, os.cpu_count() // a.workers)))
        failed, signal_number = run_all(a, deadline)
        rows = read_table(a.csv)
        known = known_runs(rows, a)
        missing = [run for run in known if run not in rows]
        without_rate = [e for e in a.entries if e not in {run.entry for run in known if run.phase == "test"}]
        if failed:
            stop(f"{len(failed)} runs failed, their logs are in {a.out}; the same command tries them again")
        if missing:
            print(f"stopped: {len(missing)} or more runs are missing; the same command goes on")
            if signal_number:
                sys.exit(128 + signal_number)
            return
        if without_rate:
            print("not tested, because no run that searches their rates was finite: "
                  + ", ".join(without_rate))
        print(f"\n{report(a.csv, a.metrics)}")
    except (ValueError, OSError) as e:
        stop(e)

if __name__ == "__main__":
    with quiet_ends():
        main()
