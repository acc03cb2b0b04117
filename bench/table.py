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
from typing import NamedTuple

import torch

from data import TASKS
from lib.files import locked, write_safely
from lib.read import naming
from lib.report import NO_SHARES

# Entries that bench/peers.py runs -> its names for them
PEER_OF = {"transformers-fft": "fft", "peft-lora": "lora", "dora": "dora", "adalora": "adalora"}
METHODS = "fft", "lora", "molf", "molf-e", *PEER_OF, "base"     # base: the model as it is, untrained
SAME_AS = {"transformers-fft": "fft", "peft-lora": "lora"}      # the same thing, so it has the same rates
LOWER_IS_BETTER = {"loss", "recalls true"}
MARGIN = 1.5        # points: how much below the better of fft and lora is near enough
# The quantile of Student's t that 2.5 % exceed, for 1 to 10 degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
EXPLANATION = f"""\
Differences of means, with 95 % intervals. The spread over rows is that of 2,000 resamples (the same rows for
both sides), the spread over seeds that of the seeds' means, each side's own; and the width goes by Student's
t, which knows how few the seeds are. A true difference of 1.4 times half a width is found four times in five.
*within {MARGIN}*: yes if neither interval, against fft and against lora, goes lower than {MARGIN} points
worse; no if one of them lies below that as a whole; else open, and also where both do the same on every row.
A second table, if there is one, has those that freeze embedding and norms, as lora does, beside such an fft.
*one seed*: one of the two has a single seed. The interval does not know how far that side's seeds spread, and
decides nothing. Of many entries the one that looks best does so by luck as well: no interval knows of that
choice. An entry with a run that was not finite is left out."""

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
        """Those of train.py without --method: a peer takes them as well."""
        rates = [f"--{name}={x}" for name, x in (("lr", self.lr), ("lora-lr", self.lora_lr)) if x is not None]
        return [*words_of(self.entry)[1:], *rates, "--seed", str(self.seed)]

def factor_of(entry):
    """"0.5 fft" has half the learning rates of "fft"."""
    first, *_ = entry.split()
    return float(first) if first[0].isdigit() else 1.0

def words_of(entry):
    """The method and flags of train.py"""
    words = shlex.split(entry)
    return words[1:] if words[0][0].isdigit() else words

def method_of(entry):
    return words_of(entry)[0]

def flags_of(entry):
    """-> {"--ranks": ["4", "16"]}"""
    flags = {}
    for word in words_of(entry)[1:]:
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return flags

def trains_rest(entry):
    """Do embedding, norms and head train? As in train.py, for fft and molf unless --rest says otherwise."""
    default = "train" if method_of(entry) in ("fft", "molf") else "freeze"
    return flags_of(entry).get("--rest", [default]) == ["train"]

def in_order(entries):
    return sorted(set(entries), key=lambda e: (METHODS.index(method_of(e)), len(e), e))

def plain(method, entries):
    """The entry whose learning rate is searched, also where it is not among the entries itself. (Over a base
    that trains there would be two rates to search.)"""
    found = [e for e in in_order(entries) if method_of(e) == method and factor_of(e) == 1]
    if method in ("lora", "molf-e"):
        found = [e for e in found if not trains_rest(e)]
    return found[0] if found else method

def sources(entry, entries):
    """-> the plain entries from which it has its lr and its lora_lr; None where it has none"""
    method = SAME_AS.get(method_of(entry), method_of(entry))
    full = method in ("fft", "molf") or trains_rest(entry)
    lora = {"fft": None, "base": None, "molf": "lora"}.get(method, method)
    return plain("fft", entries) if full else None, plain(lora, entries) if lora else None

def rate(run):
    return run.lora_lr if run.lr is None else run.lr

def value_of(row, metric):
    """row: of the table. "ES+PS+NS" is the harmonic mean of the three: none can make up for another."""
    names = metric.split("+")
    for name in names:
        if row.get(name) in (None, ""):
            raise ValueError(f"a run has no {name}, by which rates are chosen: give another --select")
    return statistics.harmonic_mean([float(row[name]) for name in names])

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
        plans = {(r["plan"], r.get("data")) for r in table}
    if len(plans) > 1:
        raise ValueError(f"{path} holds the runs of {len(plans)} plans, models or data: one file is for one")
    return rows

def add_row(path, run, row, outcomes):
    """Both files are replaced as a whole, the table last. Who is killed between the two runs this run again,
    and the later line of the .jsonl counts. -> the new table, as read_table gives it"""
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
    """entries: {name: sums, ns} as sums_of gives them, all of the same rows -> {name: (resamples,)}: the mean
    over rows, then over seeds. Rows are drawn anew, the same ones for all entries."""
    n = next(iter(entries.values()))[0].shape[1]
    rng = torch.Generator().manual_seed(0)
    means = defaultdict(list)
    for begin in range(0, resamples, at_once):
        size = min(at_once, resamples - begin)
        drawn = torch.randint(n, (size, n), generator=rng)
        counts = torch.zeros(size, n, dtype=torch.float64)                  # how often each row was drawn
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        for name, (sums, ns) in entries.items():
            of_seeds = (counts @ sums.T) / (counts @ ns.T)                  # (size, seeds)
            means[name].append(of_seeds.mean(1))
    return {name: torch.cat(parts) for name, parts in means.items()}

def seed_variance(sums, ns):
    """-> the variance of the mean over seeds, and its degrees of freedom; 0 and 1 if there is one seed"""
    of_seeds = sums.sum(1) / ns.sum(1)
    n = len(of_seeds)
    return (of_seeds.var().item() / n, n - 1) if n > 1 else (0.0, 1)

def student(freedom):
    """The quantile of Student's t that 2.5 % exceed; above 10 degrees of freedom it is right to 0.02."""
    return T975[int(freedom) - 1] if freedom < 11 else 1.96 + 2.5 / freedom

def interval(one, other, rows_one, rows_other):
    """one, other: sums, ns of two entries; rows_...: what `resample` gives for them. -> the difference of
    their means, and the ends of its 95 % interval, with Welch's degrees of freedom"""
    difference = [(sums.sum(1) / ns.sum(1)).mean().item() for sums, ns in (one, other)]
    over_rows = rows_one - rows_other
    over_rows = over_rows[over_rows.isfinite()]         # (a resample may lack all rows of a rare kind)
    seeds = [seed_variance(*one), seed_variance(*other)]
    variance = over_rows.var().item() + sum(v for v, _ in seeds)
    uncertain = sum(v ** 2 / freedom for v, freedom in seeds)
    freedom = variance ** 2 / uncertain if uncertain else math.inf
    half = student(max(1, freedom)) * math.sqrt(variance)
    x = difference[0] - difference[1]
    return x, x - half, x + half

def without(entry, *names):
    """What is left of an entry without some flags, to see whether two entries differ in those alone"""
    others = {name: values for name, values in flags_of(entry).items() if name not in names}
    return factor_of(entry), method_of(entry), others

def frozen_fft(entries):
    """[the plain fft whose rest is frozen], or []"""
    return [e for e in entries if without(e, "--rest") == (1, "fft", {}) and not trains_rest(e)]

def pairs_of(entries, planned):
    """-> [(entry, what it is compared with)], of those that there are. planned: all entries of the table,
    also those of which a run was not finite"""
    first = {method: plain(method, planned) for method in METHODS}
    rules = [e for e in entries if method_of(e) in ("molf", "molf-e")]
    coins = [e for e in rules if flags_of(e).get("--score") == ["random"] and "--route" not in flags_of(e)]
    controls = [e for e in entries if method_of(e) in ("fft", "lora")
                and e not in (first["fft"], first["lora"], *frozen_fft(entries))]
    # a peer with the same of ours, adaptive LoRA with LoRA
    pairs = [(e, e.replace(theirs, ours)) for theirs, ours in SAME_AS.items() for e in entries
             if method_of(e) == theirs]
    pairs += [(e, first["lora"]) for e in entries if method_of(e) in ("molf-e", "dora", "adalora")
              and not trains_rest(e)]
    # molf with fft and lora of other flags or rates, if the same trains
    pairs += [(e, other) for other in controls for e in rules if method_of(e) == "molf"
              and factor_of(e) == 1 and trains_rest(e) == trains_rest(other)]
    # a rule with the plain entry if the same trains, and with the paper's rule and the coin at its own flags
    pairs += [(e, other) for e in rules if e not in coins for other in rules if e != other and (
        other == first[method_of(e)] and trains_rest(e) == trains_rest(other)
        or without(other) == without(e, "--score", "--route"))]
    pairs += [(e, coin) for coin in coins for e in rules if e != coin
              and without(e, "--score", "--route") == without(coin, "--score")]
    # the rest trained with the rest frozen
    pairs += [(e, other) for e in entries for other in entries if trains_rest(e) > trains_rest(other)
              and without(e, "--rest") == without(other, "--rest")]
    pairs += [(e, first[rival]) for rival in ("dora", "adalora") for e in rules if method_of(e) == "molf-e"]
    return [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(entries)]

def within(intervals, metric):
    """intervals: (low, high) against fft and against lora. Do they say that it is better than both, or worse
    by no more than MARGIN points?"""
    if metric in NO_SHARES:
        return ""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    points = [sorted(100 * sign * x for x in ends) for ends in intervals]
    if any(low == high == 0 for low, high in points):       # both do the same on every row
        return "open"
    if min(low for low, _ in points) >= -MARGIN:
        return "yes"
    return "no" if min(high for _, high in points) < -MARGIN else "open"

def one_seed(*sides):
    """Has one of them a single seed? Then its spread over seeds is unknown."""
    return any(len(sums) == 1 for sums, _ in sides)

def ends_of(low, high, metric, single=False):
    return f"{shown(low, metric, '+')} to {shown(high, metric, '+')}" + ", one seed" * single

def margin_table(entries, drawn, planned, metric):
    """entries: {entry: sums, ns}; drawn: what `resample` gives for them. -> lines: molf against fft and lora,
    and where molf and fft freeze the rest, as lora does, that molf against that fft"""
    fft, lora = [plain(method, planned) for method in ("fft", "lora")]
    rules = [e for e in entries if method_of(e) == "molf"]
    lines = []
    frozen = [r for r in rules if not trains_rest(r)]
    for base, of_base in [(fft, rules)] + [(e, frozen) for e in frozen_fft(entries) if e != fft]:
        if of_base and {base, lora} <= set(entries):
            lines += [f"| {metric} | − `{base}` | 95 % interval | − `{lora}` | 95 % interval "
                      f"| within {MARGIN} |", "| --- | --- | --- | --- | --- | --- |",
                      *[margin_line(e, (base, lora), entries, drawn, metric) for e in of_base], ""]
    return lines

def margin_line(entry, bases, entries, drawn, metric):
    cells, known = [], []
    for base in bases:
        x, low, high = interval(entries[entry], entries[base], drawn[entry], drawn[base])
        single = one_seed(entries[entry], entries[base])
        cells.append(f"{shown(x, metric, '+')} | {ends_of(low, high, metric, single)}")
        known.append((-math.inf, math.inf) if single else (low, high))      # a single seed says nothing
    return f"| `{entry}` | {' | '.join(cells)} | {within(known, metric)} |"

def difference_table(entries, drawn, planned, metric):
    """The same for all other pairs."""
    pairs = pairs_of(entries, planned)
    if not pairs:
        return []
    lines = [f"| {metric} | difference | 95 % interval | half of its width |", "| --- | --- | --- | --- |"]
    for one, other in pairs:
        x, low, high = interval(entries[one], entries[other], drawn[one], drawn[other])
        ends = ends_of(low, high, metric, one_seed(entries[one], entries[other]))
        lines.append(f"| `{one}` − `{other}` | {shown(x, metric, '+')} | {ends} | "
                     f"{shown((high - low) / 2, metric)} |")
    return [*lines, ""]

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
            chosen.append(factor_of(entry) * rate(best) if best else None)
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
    return f"| `{runs[0].entry}` | {rates} | {' | '.join(cells)} | {share} | {len(finished)}{lost} |"

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
    if len({rows[run]["inputs"] for run in tested if method_of(run.entry) != "base"}) > 1:
        raise ValueError(f"{path}: its runs had other rows or another model, though their flags are the same")
    for metric in metrics:
        for run in tested:
            if metric not in outcomes.get(run, {}):
                raise ValueError(f"{path}: no outcomes of {metric!r} of {run}; there are "
                                 f"{', '.join(outcomes.get(run, {})) or 'none'}")
    made = sorted({f"{r['torch']}, {r['gpu'] or 'CPU'}, {r['git']}" for r in map(rows.get, tested)})
    lines = [f"`{example['flags']}`" if example["flags"] else "The toy's facts, flags as they are by default",
             ""]
    if made:
        lines += [f"Runs: torch {'; '.join(made)}.", ""]
    searched_lines = search_lines(rows, select)
    if searched_lines:
        chose = next(run for run in rows if run.phase == "lr")
        n = rows[chose]["eval_rows"] or "the"
        lines += [f"Learning rates, chosen by {select} on {n} rows that the tested runs never see, seed "
                  f"{chose.seed}:", "", *searched_lines, ""]
    if not tested:
        return "\n".join(lines + ["No run on the test rows has ended yet."])
    rows_said = rows[tested[0]]
    lines += [f"Trained on {rows_said['rows']} rows, measured on {rows_said['eval_rows']}, mean ± standard "
              f"deviation over seeds:", "",
              f"| entry | lr | LoRA lr | {' | '.join(metrics)} | steps won by the first expert (mean gate) | "
              f"seeds |",
              "| --- |" + " --- |" * (len(metrics) + 4)]
    lines += [entry_line(of_entry, rows, metrics) for of_entry in runs.values()]
    tables, planned = [], {run.entry for run in rows}
    for metric in metrics:
        sides = {entry: sums_of([outcomes[run][metric] for run in of_entry])
                 for entry, of_entry in runs.items() if set(of_entry) <= set(tested)}
        if not sides:
            break
        drawn = resample(sides)
        tables += margin_table(sides, drawn, planned, metric)
        tables += difference_table(sides, drawn, planned, metric)
    return "\n".join([*lines, "", EXPLANATION, "", *tables] if tables else lines)
