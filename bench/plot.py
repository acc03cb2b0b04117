"""Pictures of finished runs: which expert moved, and how loss and metrics went. They need matplotlib.

    python bench/plot.py runs/molf --out pictures                       # shares.png, map.png, runs.png
    python bench/plot.py runs/molf runs/molf-e runs/fft --out pictures

Of several runs each has its own shares-RUN.png and map-RUN.png, and runs.png shows all. Runs with one expert
a module (fft, lora) have no routing, so they are in runs.png only.
"""
import argparse
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import fill

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import TASKS  # noqa: E402
from lib.files import read_record, write_safely  # noqa: E402
from lib.read import naming, parse_json, read_json, read_rows  # noqa: E402
from lib.report import NO_SHARES, escape_unprintable, quiet_ends, stop  # noqa: E402
from model import TARGETS  # noqa: E402

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is pale on white;
# then a grey and a dark red
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#661100"
DASHES = "-", "--", "-.", ":"               # 7 and 4 have no common divisor, so 28 lines look different
MARKERS = "o", "s", "^", "D", "v", "P", "X"
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "lines.linewidth": 1.2, "lines.markersize": 4, "legend.fontsize": 7,
         "legend.title_fontsize": 7, "legend.handlelength": 2.8, "legend.columnspacing": 1.0,
         "legend.frameon": False}

@dataclass
class Run:
    name: str
    what: str               # the label of its shares
    shares: torch.Tensor    # (steps, layers, kinds), the gate of the first expert; None if it is the only one
    loss: torch.Tensor      # (n, 2), step and value
    metrics: dict           # {name: (n, 2)}, of --eval-every; without it, of the end
    final: bool             # they are of the end

def curve(points):
    """[(step, value)] -> (n, 2), or ValueError"""
    values = torch.tensor(points, dtype=torch.float64)
    if len(values) == 0 or not values.isfinite().all():
        raise ValueError("no numbers, or one that is not finite")
    return values

def read_gates(path):
    """routing.safetensors -> gates (steps, modules, experts), the modules layer by layer, each as TARGETS"""
    with naming(f"{path} is damaged"):
        with safe_open(path, "pt") as f:
            modules = parse_json((f.metadata() or {})["modules"])
            gates = f.get_tensor("gates")
        found = [re.sub(r".*\blayers\.(\d+)\..*\.", r"\1 ", name) for name in modules]
        if found != [f"{i} {kind}" for i in range(len(modules) // len(TARGETS)) for kind in TARGETS]:
            raise ValueError(f"its modules are not {len(TARGETS)} of each layer")
        if gates.ndim != 3 or gates.shape[1] != len(modules) or 0 in gates.shape:
            raise ValueError(f"gates of shape {tuple(gates.shape)}, but {len(modules)} modules")
        if not ((0 <= gates) & (gates <= 1)).all():         # nor is NaN
            raise ValueError("a gate is not from 0 to 1")
    return gates

def read_run(folder):
    """The directory of a finished run -> Run. OSError or ValueError name what is missing or damaged."""
    for name in ("results.json", "routing.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no run that trained to its end: it has no {name}")
    with naming(folder / "config.json"):
        flags = read_record(folder / "config.json")["flags"]
        names = TASKS[flags["task"]].report
        expert = "full" if flags["method"] in ("fft", "molf") else f"rank-{flags['ranks'][0]}"
    gates = read_gates(folder / "routing.safetensors")
    with naming(folder / "log.jsonl"):
        log = [record for _, record in read_rows(folder / "log.jsonl")]
        loss = curve([(r["step"], r["loss"]) for r in log if "held_out" not in r])
        if loss[-1, 0] != len(gates):
            raise ValueError(f"it ends at step {loss[-1, 0]:.0f}, but routing.safetensors at {len(gates)}")
        looks = [(r["step"], r["held_out"]) for r in log if "held_out" in r]
    with naming(folder / "results.json"):
        end = len(gates), read_json(folder / "results.json")["after"]
        metrics = {name: curve([(step, x[name]["value"]) for step, x in looks or [end]]) for name in names}
    what = ("steps won by" if gates.dtype == torch.bool else "mean gate of") + f" the\n{expert} expert (%)"
    shares = gates[..., 0].double().unflatten(1, (-1, len(TARGETS))) if gates.shape[2] > 1 else None
    return Run(folder.resolve().name, what, shares, loss, metrics, final=not looks)

def running_mean(values, window):
    """values (n, ...) -> (n - window + 1, ...), the means of `window` neighbours"""
    return values.unfold(0, window, 1).mean(-1)

def shares_by_kind(shares, window):
    """shares (steps, layers, kinds) -> per cent (steps - window + 1, kinds): means over layers and steps"""
    return 100 * running_mean(shares.mean(1), window)

def new_figure(height, rows=1):
    """-> a Figure as wide as a paper's column, and its axes, below one another. ImportError: no matplotlib"""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(3.4, height), dpi=180, layout="constrained")
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure, axes

def look(i):
    return dict(color=COLOURS[i % 7], linestyle=DASHES[i % 4], marker=MARKERS[i % 7])

def shown(name):
    """A run's name as lines that fit, where a $ begins no formula"""
    return fill(name, 45).replace("$", r"\$")

def draw_shares(run):
    """How often each kind of layer moved its first expert, over time"""
    steps = len(run.shares)
    window = max(1, steps // 20)
    values = shares_by_kind(run.shares, window)
    gap = 1 + len(values) // 8
    figure, (ax,) = new_figure(2.7)
    for i, kind in enumerate(TARGETS):
        # where lines coincide, the later one is thinner and has its markers elsewhere, so all can be seen
        ax.plot(range(window, steps + 1), values[:, i], label=kind, linewidth=2.6 - 0.3 * i,
                markevery=(gap * i // 7, gap), **look(i))
    ax.set(title=shown(run.name), ylabel=run.what, ylim=(-6, 106),
           xlabel=f"training step (mean of the last {window} steps)" if window > 1 else "training step")
    figure.legend(loc="outside lower center", ncols=4)
    return figure

def draw_map(run):
    """How often each linear moved its first expert, over all steps"""
    values = 100 * run.shares.mean(0)
    figure, (ax,) = new_figure(1.2 + min(0.17 * len(values), 5))
    image = ax.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=100, aspect="auto")
    ax.grid(False)
    ax.set(title=shown(run.name), ylabel="layer", xticks=range(len(TARGETS)))
    ax.set_xticklabels(TARGETS, rotation=40, ha="right", rotation_mode="anchor")
    ax.yaxis.get_major_locator().set_params(integer=True)
    for layer, row in enumerate(values if len(values) <= 28 else []):       # the cells of more are too low
        for i, value in enumerate(row):
            ax.text(i, layer, f"{value:.0f}", ha="center", va="center", fontsize=6.5,
                    color="black" if value > 50 else "white")
    figure.colorbar(image, label=run.what)
    return figure

def draw_runs(runs):
    """Loss and metrics of all runs, a line each"""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    labels = [shown(run.name) for run in runs]
    figure, axes = new_figure(1.7 + 0.9 * len(names) + 0.14 * len(runs), 1 + len(names))
    for i, run in enumerate(runs):
        n = len(run.loss)
        window = max(1, n // 50)
        axes[0].plot(run.loss[window - 1:, 0], running_mean(run.loss[:, 1], window), markevery=1 + n // 12,
                     **look(i))
        for name, points in run.metrics.items():
            axes[1 + names.index(name)].plot(points[:, 0], points[:, 1] * (1 if name in NO_SHARES else 100),
                                             fillstyle="none" if run.final else "full", **look(i))
    for ax, name in zip(axes[1:], names):
        ax.set_ylabel(fill(f"held-out {name}" if name in NO_SHARES else f"{name} (%)", 14))
    values = torch.cat([run.loss[:, 1] for run in runs])
    if 0 < 10 * values.min() < values.max():
        axes[0].set_yscale("log")
        axes[0].minorticks_off()
    smoothed = any(len(run.loss) >= 100 for run in runs)
    axes[0].set_ylabel("training loss,\nmean of 2 %\nof the log" if smoothed else "training loss")
    axes[-1].set_xlabel("training step")
    figure.align_ylabels()
    markers = {False: "full markers: held-out rows", True: "hollow markers: all rows, after training"}
    title = "\n".join(markers[final] for final in sorted({run.final for run in runs}))
    figure.legend(axes[0].lines, labels, loc="outside lower center", title=title,
                  ncols=2 if max(map(len, labels)) < 18 else 1)
    return figure

def pictures(runs):
    """[Run] -> {file name: Figure}. ValueError for one run without routing, or if some could not be told
    apart."""
    names = [run.name for run in runs]
    routed = [run for run in runs if run.shares is not None]
    if not routed and len(runs) == 1:
        raise ValueError(f"{', '.join(names)}: one expert a module, so there is no routing to show")
    if len(set(names)) < len(names) or len(names) > 28:
        raise ValueError("at most 28 runs, with different names, can be told apart: " + ", ".join(names))
    figures = {"runs.png": draw_runs(runs)}
    for run in routed:
        suffix = f"-{run.name}" if len(runs) > 1 else ""
        figures[f"shares{suffix}.png"] = draw_shares(run)
        figures[f"map{suffix}.png"] = draw_map(run)
    return figures

def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, partial(figure.savefig, format="png", pil_kwargs={"optimize": True}))
    print(path)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the directory of a finished run")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the pictures go")
    a = p.parse_args(argv)
    escape_unprintable()
    try:
        figures = pictures([read_run(folder) for folder in a.runs])
        for name, figure in figures.items():
            save(figure, a.out / name)
    except ImportError as e:
        stop(f"{e}: the pictures need it, pip install matplotlib")
    except (ValueError, OSError) as e:
        stop(e)

if __name__ == "__main__":
    with quiet_ends():
        main()
