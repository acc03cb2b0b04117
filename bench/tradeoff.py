"""A picture of what is bought with what: two metrics of every entry of a table that bench/compare.py wrote.

    python bench/tradeoff.py bench/results/toy-fact.csv --x PS --y NS --out pictures/tradeoff.png

A point is an entry, its mean over seeds with the standard deviation. The untrained base is left out, because
it is far from all others. The lines lead through fft, and through lora, at all factors of their learning
rates that the table has ("0.5 fft"): what rates alone can do. It needs matplotlib.
"""
import argparse
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.plot import COLOURS, DASHES, MARKERS, new_figure, save, shown  # noqa: E402
from bench.table import METHODS, factor_of, method_of, read_table, test_runs, unit, words_of  # noqa: E402
from lib.report import escape_unprintable, quiet_ends, stop  # noqa: E402

SHAPES = *MARKERS, "<", ">", "p", "*"
FILLS = "full", "none"

def values_of(runs, rows, metric):
    return [unit(metric) * float(rows[run][metric]) for run in runs if rows[run]["ended"] == "finished"]

def draw(rows, x, y):
    """rows: a table, see bench/table.py -> Figure"""
    tested = test_runs(rows, next(iter(rows.values()))["select"])
    runs = {entry: of_entry for entry, of_entry in tested.items() if method_of(entry) != "base"}
    figure, (ax,) = new_figure(3.2 + 0.14 * len(runs))
    drawn = Counter()                           # method -> how many of its entries: each has its own marker
    for entry, of_entry in runs.items():
        i = drawn[method_of(entry)]
        drawn[method_of(entry)] += 1
        xs, ys = values_of(of_entry, rows, x), values_of(of_entry, rows, y)
        if xs:
            spread = [statistics.stdev(values) if len(values) > 1 else None for values in (ys, xs)]
            ax.errorbar(statistics.mean(xs), statistics.mean(ys), *spread,
                        elinewidth=0.5, label=shown(entry), color=COLOURS[METHODS.index(method_of(entry))],
                        marker=SHAPES[i % len(SHAPES)], fillstyle=FILLS[i // len(SHAPES) % len(FILLS)])
    for i, method in enumerate(("fft", "lora")):
        family = sorted((e for e in runs if words_of(e) == [method]), key=factor_of)
        points = [[statistics.mean(values_of(runs[e], rows, metric)) for metric in (x, y)] for e in family]
        if points:
            ax.plot(*zip(*points), DASHES[i], color=COLOURS[i], zorder=0)
    xlabel, ylabel = (f"{metric} (%)" if unit(metric) == 100 else metric for metric in (x, y))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.4, columnspacing=0.6)
    return figure

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", type=Path)
    p.add_argument("--x", required=True, metavar="METRIC")
    p.add_argument("--y", required=True, metavar="METRIC")
    p.add_argument("--out", type=Path, required=True, metavar="PNG")
    a = p.parse_args(argv)
    escape_unprintable()
    try:
        rows = read_table(a.table)
        for metric in (a.x, a.y):
            if not any(row.get(metric) for row in rows.values()):
                raise ValueError(f"{a.table} has no {metric}")
        save(draw(rows, a.x, a.y), a.out)
    except ImportError as e:
        stop(f"{e}: the picture needs it, pip install matplotlib")
    except (ValueError, OSError) as e:
        stop(e)

if __name__ == "__main__":
    with quiet_ends():
        main()
