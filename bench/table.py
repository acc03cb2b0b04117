"""What a comparison leaves, and its report, for bench/compare.py: a table with a row for each run, and beside
it, in a .jsonl of the same name, the outcome of each row that the run was asked.
"""
import base64
import csv
import io
import json
import math
import shlex
import statistics
from collections import defaultdict
from functools import cache
from typing import NamedTuple

import torch

import train
from data import TASKS
from lib.files import locked, write_safely
from lib.read import naming
from lib.report import NO_SHARES

METHODS = "fft", "lora", "molf", "molf-e"
LOWER_IS_BETTER = "loss", "recalls true"
BETTER = "the better of fft and lora"
MARGIN = 1.5        # points: how much below BETTER is near enough
EXPLANATION = f"""\
Differences of means, with 95 % intervals from 2,000 resamples of rows (the same for both sides) and of seeds
(each side's own; few seeds make the interval too narrow, see `resample`). *{BETTER}* is chosen
anew in each resample, so that the interval knows of the choice. Half of an interval's width is the smallest
difference that the cell could have shown. *within {MARGIN}*: yes if no end of the interval is more than
{MARGIN} points worse than the better one, no if all of it is, else open. It is open as well where both do the
same on every row."""

# ------------------------------------------------------------------------------------------------------------
# runs and entries

class Run(NamedTuple):
    phase: str          # "lr" or "test"
    entry: str
    lr: float           # None where nothing has it
    lora_lr: float
    seed: int

    def __str__(self):
        rates = [f"{name} {x:g}" for name, x in (("lr", self.lr), ("lora-lr", self.lora_lr)) if x is not None]
        return ", ".join([self.phase, self.entry, *rates, f"seed {self.seed}"])

    def flags(self):
        rates = [f"--{name}={x}" for name, x in (("lr", self.lr), ("lora-lr", self.lora_lr)) if x is not None]
        return ["--method", *shlex.split(self.entry), *rates, "--seed", str(self.seed), "--no-before"]

def method_of(entry):
    return shlex.split(entry)[0]

@cache
def trains_rest(entry):
    return train.parse_args(["--method", *shlex.split(entry)]).rest == "train"

def in_order(entries):
    return sorted(set(entries), key=lambda e: (METHODS.index(method_of(e)), len(e), e))

def plain(method, entries):
    """The entry whose learning rate is searched, also where it is not among the entries itself. (Over a base
    that trains there would be two rates to search.)"""
    found = [e for e in in_order(entries) if method_of(e) == method]
    if method in ("lora", "molf-e"):
        found = [e for e in found if not trains_rest(e)]
    return found[0] if found else method

def sources(entry, entries):
    """-> the plain entries from which it has its lr and its lora_lr; None where it has none"""
    method = method_of(entry)
    full = method == "fft" or trains_rest(entry)
    lora = {"fft": None, "molf": "lora"}.get(method, method)
    return plain("fft", entries) if full else None, plain(lora, entries) if lora else None

def rate(run):
    return run.lora_lr if run.lr is None else run.lr

def value_of(row, metric):
    """row: of the table. "ES+PS+NS" is the harmonic mean of the three: none can make up for another."""
    return statistics.harmonic_mean([float(row[name]) for name in metric.split("+")])

def best_of(tried, rows, metric):
    """tried: the runs of a search, which have ended -> the one that the metric chooses. One that was not
    finite counts for nothing."""
    values = {run: value_of(rows[run], metric) for run in tried if rows[run]["ended"] == "finished"}
    values = {run: value for run, value in values.items() if math.isfinite(value)}
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(values, key=lambda run: (sign * values[run], -rate(run)), default=None)

def searched(source, rows):
    return sorted((run for run in rows if run.phase == "lr" and run.entry == source), key=rate)

# ------------------------------------------------------------------------------------------------------------
# the two files that are left: a table of runs, and beside it the outcome of each row

def pack(values):
    """A list of numbers or None, most often of few different ones -> what JSON can hold, a few bits each."""
    levels = sorted(set(values), key=lambda x: (x is None, x or 0))
    width = max(1, (len(levels) - 1).bit_length())
    code = {x: format(i, f"0{width}b") for i, x in enumerate(levels)}
    bits = "".join(code[x] for x in values)
    n_bytes = math.ceil(len(bits) / 8)
    packed = int(bits.ljust(8 * n_bytes, "0"), 2).to_bytes(n_bytes, "big")
    return {"n": len(values), "levels": levels, "bits": base64.b64encode(packed).decode()}

def unpack(packed):
    levels, data = packed["levels"], base64.b64decode(packed["bits"])
    width = max(1, (len(levels) - 1).bit_length())
    bits = format(int.from_bytes(data, "big"), f"0{8 * len(data)}b")
    return [levels[int(bits[i * width:(i + 1) * width], 2)] for i in range(packed["n"])]

def outcomes_of(predictions):
    """The lines of predictions.jsonl -> {metric: {"values", and "weights" if its rows have some}}, packed"""
    verdicts = [p["verdict"] for p in predictions]
    names = dict.fromkeys(name for v in verdicts for name in v if name != "error" and name[0] != "#")
    outcomes = {}
    for name in names:
        outcomes[name] = {"values": pack([v.get(name) for v in verdicts])}
        weights = [v.get(f"# n of {name}") for v in verdicts]
        if any(weights):
            outcomes[name]["weights"] = pack(weights)
    return outcomes

def beside(path):
    return path.with_suffix(".jsonl")

def number(text):
    return float(text) if text else None

def read_table(path):
    """The table of runs -> {Run: {column: text}}; {} if there is none. ValueError if it is another table, or
    one of several plans."""
    if not path.exists():
        return {}
    with naming(f"{path} is no table of such runs"):
        table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        rows = {Run(r["phase"], r["entry"], number(r["lr"]), number(r["lora_lr"]), int(r["seed"])): r
                for r in table}
        plans = {r["plan"] for r in table}
    if len(plans) > 1:
        raise ValueError(f"{path} holds the runs of {len(plans)} plans: one file is for one")
    return rows

def add_row(path, run, row, outcomes):
    """Both files are replaced as a whole, the table last. A run that was killed between the two runs again,
    and then the later of its two lines counts. -> the new table, as read_table gives it"""
    with locked(path):
        table = (read_table(path) | {run: row}).values()
        columns = list(dict.fromkeys(name for r in table for name in r))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(table)
        old = beside(path).read_text() if beside(path).exists() else ""
        line = json.dumps(run._asdict() | {"metrics": outcomes})
        write_safely(beside(path), old + line + "\n")
        write_safely(path, text.getvalue())
        return read_table(path)

def read_outcomes(path):
    """-> {Run: {metric: packed}}"""
    found = {}
    with naming(f"{beside(path)} does not fit {path}"):
        for line in beside(path).read_text().splitlines():
            record = json.loads(line)
            found[Run(*(record[key] for key in Run._fields))] = record["metrics"]
    return found

# ------------------------------------------------------------------------------------------------------------
# the report

def metrics_of(task):
    """Those that are a mean over rows."""
    return [name for name in TASKS[task].report if name != "perplexity"]

def unit(metric):
    return 1 if metric in NO_SHARES else 100

def shown(value, metric, sign=""):
    return f"{unit(metric) * float(value):{sign}.{3 if metric in NO_SHARES else 1}f}"

def sums_of(outcomes):
    """[outcomes of a metric, of a seed each] -> sums, ns: (seeds, rows), a row's value times its weight, and
    its weight, which is 0 where a row does not have the metric"""
    sums, ns = [], []
    for packed in outcomes:
        values = unpack(packed["values"])
        weights = unpack(packed["weights"]) if "weights" in packed else [1] * len(values)
        ns.append([0 if x is None else w for x, w in zip(values, weights)])
        sums.append([0 if x is None else x * w for x, w in zip(values, weights)])
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(ns, dtype=torch.float64)

def resample(entries, resamples=2000, at_once=100):
    """entries: {name: sums, ns} as sums_of gives them, all of the same rows -> {name: (1 + resamples,)}: the
    mean over rows, then seeds, as they are, and then of rows and seeds drawn anew. The rows are the same for
    all entries, the seeds are each entry's own. With few seeds their share in the spread is too small, by a
    factor of sqrt(1 - 1 / seeds) in the standard deviation."""
    n = next(iter(entries.values()))[0].shape[1]
    rng = torch.Generator().manual_seed(0)
    means = {name: [(sums.sum(1) / ns.sum(1)).mean()[None]] for name, (sums, ns) in entries.items()}
    for begin in range(0, resamples, at_once):
        size = min(at_once, resamples - begin)
        drawn = torch.randint(n, (size, n), generator=rng)
        counts = torch.zeros(size, n, dtype=torch.float64)                  # how often each row was drawn
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        for name, (sums, ns) in entries.items():
            of_seeds = (counts @ sums.T) / (counts @ ns.T)                  # (size, seeds)
            seeds = torch.randint(len(sums), of_seeds.shape, generator=rng)
            means[name].append(of_seeds.gather(1, seeds).mean(1))
    return {name: torch.cat(parts) for name, parts in means.items()}

def interval(differences):
    """(1 + resamples,) -> the difference as it is, and the ends of its 95 % interval"""
    low, high = differences[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return differences[0].item(), low, high

def pairs_of(entries):
    """-> [(entry, what it is compared with)], of those that there are"""
    first = {method: plain(method, entries) for method in METHODS}
    rules = [e for e in entries if method_of(e) == "molf"]
    coins = [e for e in rules if "--score random" in e]
    pairs = [(e, BETTER) for e in rules]
    pairs += [(first["molf-e"], first["lora"])]
    pairs += [(first["molf"], e) for e in entries if method_of(e) == "lora" and e != first["lora"]]
    pairs += [(e, first["molf"]) for e in rules if e not in [first["molf"], *coins]]
    pairs += [(e, coin) for coin in coins for e in rules if e != coin]
    there = {*entries, *([BETTER] if {first["fft"], first["lora"]} <= set(entries) else [])}
    return [pair for pair in pairs if there.issuperset(pair)]

def within(low, high, metric):
    """Does the interval say that it is better, or worse by no more than MARGIN points?"""
    if metric in NO_SHARES:
        return ""
    low, high = sorted(-100 * x if metric in LOWER_IS_BETTER else 100 * x for x in (low, high))
    if low >= -MARGIN and low < high:
        return "yes"
    return "no" if high < -MARGIN else "open"

def name_of(side):
    return side if side == BETTER else f"`{side}`"

def difference_table(entries, metric):
    """entries: {entry: sums, ns}"""
    means = resample(entries)
    first = [plain(method, entries) for method in ("fft", "lora")]
    if set(first) <= set(means):
        better = torch.minimum if metric in LOWER_IS_BETTER else torch.maximum
        means[BETTER] = better(means[first[0]], means[first[1]])            # in each resample
    lines = [f"| {metric} | difference | 95 % interval | half of its width | within {MARGIN} |",
             "| --- | --- | --- | --- | --- |"]
    for one, other in pairs_of(entries):
        x, low, high = interval(means[one] - means[other])
        verdict = within(low, high, metric) if other == BETTER else ""
        ends = f"{shown(low, metric, '+')} to {shown(high, metric, '+')}"
        lines.append(f"| {name_of(one)} − {name_of(other)} | {shown(x, metric, '+')} | {ends} | "
                     f"{shown((high - low) / 2, metric)} | {verdict} |")
    return lines

def test_runs(rows, select):
    """{entry: its runs in the phase "test"}. Where a search went on after them, those with the rates that it
    chose."""
    found = defaultdict(list)
    for run in rows:
        if run.phase == "test":
            found[run.entry].append(run)
    for entry, runs in found.items():
        chosen = []
        for source in sources(entry, found):
            tried = searched(source, rows)
            best = best_of(tried, rows, select) if tried else None
            chosen.append(rate(best) if best else None)
        fits = [run for run in runs if all(x in (None, y) for x, y in zip(chosen, (run.lr, run.lora_lr)))]
        if len({(run.lr, run.lora_lr) for run in fits}) > 1:
            raise ValueError(f"{entry} ran with several learning rates, and no search says which one counts")
        found[entry] = sorted(fits)
    return {entry: found[entry] for entry in in_order(found) if found[entry]}

def search_lines(rows, select):
    lines = []
    for source in in_order(run.entry for run in rows if run.phase == "lr"):
        tried = searched(source, rows)
        best = best_of(tried, rows, select)
        values = []
        for run in tried:
            ended = rows[run]["ended"]
            value = shown(value_of(rows[run], select), select) if ended == "finished" else ended
            values.append(f"**{rate(run):g}: {value}**" if run == best else f"{rate(run):g}: {value}")
        end = "; the choice is at an end of the grid" if best in (tried[0], tried[-1]) else ""
        lines.append(f"- {source}: {', '.join(values)}{end}")
    return lines

def entry_line(runs, rows, metrics):
    """The line of an entry. runs: its own in the phase "test" """
    finished = [run for run in runs if rows[run]["ended"] == "finished"]
    cells = []
    for metric in metrics:
        values = [float(rows[run][metric]) for run in finished]
        spread = f" ± {shown(statistics.stdev(values), metric)}" if len(values) > 1 else ""
        cells.append(shown(statistics.mean(values), metric) + spread if values else "")
    shares = [float(rows[run]["first_share"]) for run in finished if rows[run]["first_share"]]
    share = f"{statistics.mean(shares):.0%}" if shares else ""
    rates = " | ".join("" if x is None else f"{x:g}" for x in (runs[0].lr, runs[0].lora_lr))
    lost = f", {len(runs) - len(finished)} not finite" if len(finished) < len(runs) else ""
    return f"| {name_of(runs[0].entry)} | {rates} | {' | '.join(cells)} | {share} | {len(finished)}{lost} |"

def report(path, metrics=None):
    """The table of a cell -> Markdown. ValueError if its runs cannot be compared."""
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path} has no runs yet")
    outcomes = read_outcomes(path)
    example = next(iter(rows.values()))
    select, task = example["select"], example["task"]
    metrics = metrics or metrics_of(task)
    runs = test_runs(rows, select)
    tested = [run for of_entry in runs.values() for run in of_entry if rows[run]["ended"] == "finished"]
    if len({rows[run]["inputs"] for run in tested}) > 1:
        raise ValueError(f"{path}: its runs had other rows or another model, though their flags are the same")
    for metric in metrics:
        for run in tested:
            if metric not in outcomes.get(run, {}):
                raise ValueError(f"{path}: no outcomes of {metric!r} of {run}; there are "
                                 f"{', '.join(outcomes.get(run, {})) or 'none'}")
    made = sorted({f"{r['torch']}, {r['gpu'] or 'CPU'}, {r['git']}" for r in map(rows.get, tested)})
    lines = [f"`{example['flags']}`" if example["flags"] else "The toy's facts, flags as they are by default",
             "", f"Runs: torch {'; '.join(made)}.", ""]
    searched_lines = search_lines(rows, select)
    if searched_lines:
        lines += [f"Learning rates, chosen by {select} on rows that neither train nor test, seed "
                  f"{next(run.seed for run in rows if run.phase == 'lr')}:", "", *searched_lines, ""]
    if not tested:
        return "\n".join(lines + ["No run on the test rows has ended yet."])
    rows_said = rows[tested[0]]
    lines += [f"Trained on {rows_said['rows']} rows, measured on {rows_said['eval_rows']}, mean ± standard "
              f"deviation over seeds:", "",
              f"| entry | lr | LoRA lr | {' | '.join(metrics)} | steps won by the first expert (mean gate) | "
              f"seeds |",
              "| --- |" + " --- |" * (len(metrics) + 4)]
    lines += [entry_line(of_entry, rows, metrics) for of_entry in runs.values()]
    if not pairs_of(list(dict.fromkeys(run.entry for run in tested))):
        return "\n".join(lines)
    lines += ["", EXPLANATION, ""]
    for metric in metrics:
        found = defaultdict(list)
        for run in tested:
            found[run.entry].append(outcomes[run][metric])
        sides = {entry: sums_of(of_seeds) for entry, of_seeds in found.items()}
        lines += [*difference_table(sides, metric), ""]
    return "\n".join(lines)
