"""bench/plot.py: what its lines and cells show against values by hand, its PNG files, and bad input."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from bench import plot
from data import TASKS
from lib.files import save_record
from model import TARGETS

ROOT = Path(__file__).parents[1]


def module_names(layers):
    return [f"model.layers.{i}.{'mlp' if kind in TARGETS[4:] else 'self_attn'}.{kind}"
            for i in range(layers) for kind in TARGETS]


def save_routing(folder, gates, modules):
    save_file({"gates": gates.contiguous()}, folder / "routing.safetensors", {"modules": json.dumps(modules)})


def make_run(folder, gates, method="molf", ranks=(16,), log=None, held_out=(), final=0.5):
    """What a run leaves, as far as pictures need it. log: losses of all steps; held_out: [(step, value)]"""
    folder.mkdir()
    save_record(folder / "config.json", {"flags": {"task": "fact", "method": method, "ranks": list(ranks)}})
    save_routing(folder, gates, module_names(gates.shape[1] // 7))
    records = [{"step": i, "loss": loss} for i, loss in enumerate(log or [1.0] * len(gates), 1)]
    records += [{"step": step, "loss": 9.0, "held_out": metrics(value)} for step, value in held_out]
    records.sort(key=lambda r: r["step"])
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "results.json").write_text(json.dumps({"after": metrics(final)}))
    return folder


def metrics(value):
    return {name: {"value": value} for name in TASKS["fact"].report} | {"seconds": 1.0}


def winners(steps=40, layers=2):
    """Gates (steps, modules, 2): in layer 0 the full expert of the kind i wins the first 5 i steps, in all
    other layers every step."""
    first = torch.ones(steps, layers, 7, dtype=torch.bool)
    for i in range(7):
        first[5 * i:, 0, i] = False
    first = first.flatten(1)
    return torch.stack([first, ~first], 2)


def texts(items):
    return [item.get_text() for item in items]


# ------------------------------------------------------------------------------------------------ mathematics

def test_a_running_mean_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert plot.running_mean(x, 1).tolist() == [1, 2, 3, 6]
    assert plot.running_mean(x, 2).tolist() == [1.5, 2.5, 4.5]
    assert plot.running_mean(x, 4).tolist() == [3]
    columns = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 0.0]])
    assert plot.running_mean(columns, 2).tolist() == [[2, 20], [4, 15]]


def test_shares_by_kind_by_hand():
    """(steps, layers, kinds): two steps, two layers, three kinds."""
    shares = torch.tensor([[[1.0, 0.0, 0.5], [1.0, 1.0, 0.5]], [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])
    assert plot.shares_by_kind(shares, 1).tolist() == [[100, 50, 50], [50, 50, 0]]
    assert plot.shares_by_kind(shares, 2).tolist() == [[75, 50, 25]]


# ---------------------------------------------------------------------------------------------------- drawing

def test_shares_over_time_are_those_of_the_gates(tmp_path):
    """40 steps, so a window of two: a kind has 100 per cent while both layers choose the full expert, and 50
    when only one does."""
    figure = plot.draw_shares(plot.read_run(make_run(tmp_path / "mine", winners())))
    ax, = figure.axes
    assert texts(figure.legends[0].get_texts()) == [line.get_label() for line in ax.lines] == list(TARGETS)
    for i, line in enumerate(ax.lines):
        assert list(line.get_xdata()) == list(range(2, 41))
        n = 5 * i               # steps that both layers win
        by_hand = [100 if step <= n else 75 if n and step == n + 1 else 50 for step in range(2, 41)]
        assert list(line.get_ydata()) == by_hand
    assert ax.get_title() == "mine" and ax.get_xlabel() == "training step (mean of the last 2 steps)"
    assert ax.get_ylabel() == "steps won by the\nfull expert (%)"
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 7


def test_soft_gates_are_averaged_and_named(tmp_path):
    gates = torch.full((3, 7, 2), 0.25)
    gates[1] = 0.75
    run = plot.read_run(make_run(tmp_path / "soft", gates, method="molf-e", ranks=(4, 16)))
    ax, = plot.draw_shares(run).axes
    assert all(list(line.get_ydata()) == [25, 75, 25] for line in ax.lines)
    assert ax.get_xlabel() == "training step" and ax.get_ylabel() == "mean gate of the\nrank-4 expert (%)"
    image = plot.draw_map(run).axes[0].images[0]
    assert image.get_array().flatten().tolist() == pytest.approx([125 / 3] * 7)
    assert image.get_clim() == (0, 100)


def test_the_map_has_a_cell_for_each_linear(tmp_path):
    figure = plot.draw_map(plot.read_run(make_run(tmp_path / "mine", winners())))
    ax, bar = figure.axes
    shares = [0, 12.5, 25, 37.5, 50, 62.5, 75], [100] * 7               # 5 i of 40 steps
    assert ax.images[0].get_array().tolist() == [list(row) for row in shares]
    assert ax.images[0].get_clim() == (0, 100)
    assert texts(ax.texts) == "0 12 25 38 50 62 75 100 100 100 100 100 100 100".split()
    assert ax.texts[3].get_position() == (3, 0) and ax.texts[7].get_position() == (0, 1)
    assert texts(ax.get_xticklabels()) == list(TARGETS) and ax.get_ylabel() == "layer"
    assert bar.get_ylabel() == "steps won by the\nfull expert (%)"


@pytest.mark.parametrize("layers, numbers", [(28, 196), (29, 0), (80, 0)])
def test_only_cells_with_room_have_numbers(tmp_path, layers, numbers):
    figure = plot.draw_map(plot.read_run(make_run(tmp_path / "mine", winners(layers=layers))))
    assert len(figure.axes[0].texts) == numbers
    assert figure.axes[0].images[0].get_array().shape == (layers, 7)


def test_all_runs_are_in_one_figure(tmp_path):
    """Metrics on the way are a line of full markers, those of the end a hollow point at the last step. Names
    are shown as they are, also where they would be hidden, or a formula, to matplotlib."""
    one = make_run(tmp_path / "_a$b$", winners(4), log=[4.0, 3.0, 2.0, 1.0], held_out=[(2, 0.25), (4, 0.75)])
    two = make_run(tmp_path / "fft", winners(2)[..., :1], method="fft", ranks=(), log=[2.0, 0.125],
                   final=0.875)
    figure = plot.draw_runs([plot.read_run(one), plot.read_run(two)])
    loss, *others = figure.axes
    points = [(list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines]
    assert points == [([1, 2, 3, 4], [4, 3, 2, 1]), ([1, 2], [2, 0.125])]
    assert loss.get_ylabel() == "training loss" and loss.get_yscale() == "log"
    assert [ax.get_ylabel() for ax in others] == ["ES (%)", "PS (%)", "NS (%)", "accuracy (%)"]
    for ax in others:
        points = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
        assert points == [([2, 4], [25, 75]), ([2], [87.5])]
        assert [line.get_fillstyle() for line in ax.lines] == ["full", "none"]
    legend = figure.legends[0]
    assert texts(legend.get_texts()) == [r"_a\$b\$", "fft"] and others[-1].get_xlabel() == "training step"
    title = "full markers: held-out rows\nhollow markers: all rows, after training"
    assert legend.get_title().get_text() == title
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in loss.lines]


def test_loss_and_perplexity_are_no_shares(tmp_path):
    run = plot.read_run(make_run(tmp_path / "mine", winners(3), held_out=[(2, 0.5)]))
    run.metrics = {name: torch.tensor([[2.0, 0.5]]) for name in ("loss", "perplexity", "token accuracy")}
    _, *others = plot.draw_runs([run]).axes
    assert [ax.get_ylabel() for ax in others] == ["held-out loss", "held-out\nperplexity", "token accuracy\n(%)"]
    assert [ax.lines[0].get_ydata().tolist() for ax in others] == [[0.5], [0.5], [50.0]]


def test_several_runs_without_routing_are_in_one_figure_alone(tmp_path):
    runs = [plot.read_run(make_run(tmp_path / name, winners()[..., :1], method="lora")) for name in ("a", "b")]
    assert plot.pictures(runs).keys() == {"runs.png"}


def test_the_loss_of_a_long_log_is_smoothed_and_says_so(tmp_path):
    """150 lines, so a window of three."""
    losses = [2.0 + (i % 3 == 0) for i in range(150)]
    run = plot.read_run(make_run(tmp_path / "long", winners(150), log=losses))
    loss = plot.draw_runs([run]).axes[0]
    assert list(loss.lines[0].get_xdata()) == list(range(3, 151))
    assert list(loss.lines[0].get_ydata()) == pytest.approx([7 / 3] * 148)
    assert "mean of 2 %" in loss.get_ylabel() and loss.get_yscale() == "linear"


def test_28_runs_look_different():
    assert len({tuple(plot.look(i).values()) for i in range(28)}) == 28


def test_nothing_is_clipped(tmp_path):
    """All that is drawn lies inside the picture, also with a long name and a large model."""
    names = "Qwen2.5-1.5B-sql-molf-0123abcd", "a-run-with-a-long-name-" * 4
    runs = [plot.read_run(make_run(tmp_path / name, winners(1200, 80), held_out=held_out))
            for name, held_out in zip(names, ([(600, 0.5)], []))]
    for name, figure in plot.pictures(runs).items():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()            # inches
        assert box.x0 >= 0 and box.y0 >= 0, name
        assert (box.x1, box.y1) <= tuple(figure.get_size_inches()), name


# ------------------------------------------------------------------------------------------------ the command

def refused(capsys, *args):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as e:
        plot.main([*map(str, args)])
    assert "\n" not in e.value.code and capsys.readouterr().out == ""
    return e.value.code


def test_pictures_of_toy_runs(tmp_path):
    """Real runs of train.py through the command, to PNG files that another library opens."""
    flags = "--device", "cpu", "--limit", "40", "--epochs", "2"
    train.main([*flags, "--eval-every", "2", "--out", str(tmp_path / "molf")])
    train.main([*flags, "--method", "fft", "--out", str(tmp_path / "fft")])
    plot.main([str(tmp_path / "molf"), "--out", str(tmp_path / "one")])
    plot.main([str(tmp_path / "molf"), str(tmp_path / "fft"), "--out", str(tmp_path / "two")])
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"shares.png", "map.png", "runs.png"}
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"shares-molf.png", "map-molf.png", "runs.png"}
    for path in [*(tmp_path / "one").iterdir(), *(tmp_path / "two").iterdir()]:
        assert 10_000 < path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width == 612 and 300 < image.height < 1500
            assert len(image.getcolors(2 ** 20)) > 20               # it decodes, and it is not blank


def test_what_is_no_finished_run_with_routing_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    unfinished = make_run(tmp_path / "unfinished", winners())
    (unfinished / "results.json").unlink()
    evaluated = make_run(tmp_path / "evaluated", winners())
    (evaluated / "routing.safetensors").unlink()
    lora = make_run(tmp_path / "lora", winners()[..., :1], method="lora")
    good = make_run(tmp_path / "good", winners())
    (tmp_path / "other").mkdir()
    same = make_run(tmp_path / "other" / "good", winners())
    end = "is no run that trained to its end: it has no"
    for runs, why in {(tmp_path / "nowhere",): f"{tmp_path / 'nowhere'} {end} results.json",
                      (tmp_path,): f"{tmp_path} {end} results.json",
                      (good / "log.jsonl",): f"log.jsonl {end} results.json",
                      (good, unfinished): f"unfinished {end} results.json",
                      (good, evaluated): f"evaluated {end} routing.safetensors",
                      (lora,): "lora: one expert a module, so there is no routing to show",
                      (good, same): "with different names, can be told apart: good, good"}.items():
        assert why in refused(capsys, *runs, "--out", out)
    assert not out.exists()
    out.write_text("a file")
    assert "File exists" in refused(capsys, good, "--out", out)


def test_a_damaged_file_of_a_run_is_refused_by_name(tmp_path, capsys):
    def change(name, old, new):
        def damage(run):
            path = run / name
            content = path.read_bytes()
            assert old in content
            path.write_bytes(content.replace(old, new, 1))
        return damage

    def cut(name, size):
        return lambda run: os.truncate(run / name, size)

    def routing(gates, layers=2):
        return lambda run: save_routing(run, gates, module_names(layers))

    gates = winners().float()
    damages = {"config.json is damaged: it is not what was written": change("config.json", b"molf", b"lora"),
               "config.json: no 'flags'": lambda run: save_record(run / "config.json", {}),
               "config.json is damaged": cut("config.json", 30),
               "log.jsonl line 2 cannot be read": cut("log.jsonl", 40),
               "log.jsonl: no numbers": cut("log.jsonl", 0),
               "log.jsonl: no 'loss'": change("log.jsonl", b'"loss"', b'"lose"'),
               "log.jsonl: no numbers, or one that": change("log.jsonl", b"1.0", b"NaN"),
               "log.jsonl: must be real number, not NoneType": change("log.jsonl", b"1.0", b"null"),
               "log.jsonl: it ends at step 40, but routing.safetensors at 39": routing(gates[:39]),
               "results.json: no 'after'": change("results.json", b"after", b"later"),
               "results.json: no 'PS'": change("results.json", b"PS", b"XS"),
               "routing.safetensors is damaged: Error while": cut("routing.safetensors", 200),
               "routing.safetensors is damaged: no 'modules'":
                   lambda run: save_file({"gates": gates}, run / "routing.safetensors"),
               "its modules are not 7 of each layer":
                   lambda run: save_routing(run, gates, module_names(2)[::-1]),
               "gates of shape (40, 14, 2), but 7 modules": routing(gates, layers=1),
               "gates of shape (40, 14), but 14": routing(gates[..., 0]),
               "gates of shape (0, 14, 2)": routing(gates[:0]),
               "a gate is not from 0 to 1": routing(gates * 1.5),
               "damaged: a gate is not": routing(gates * float("nan"))}
    for i, (why, damage) in enumerate(damages.items()):
        run = make_run(tmp_path / str(i), winners())
        damage(run)
        message = refused(capsys, run, "--out", tmp_path / "out")
        assert message.startswith(f"error: {run}") and why in message
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    """Another directory's matplotlib stands for none. Wrong usage has argparse's exit code."""
    run = make_run(tmp_path / "mine", winners())
    (tmp_path / "path").mkdir()
    hidden = tmp_path / "path" / "matplotlib.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'matplotlib'\")")
    command = [sys.executable, ROOT / "bench" / "plot.py", run]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "path"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout) == (1, "")
    why = "error: No module named 'matplotlib': the pictures need it, pip install matplotlib\n"
    assert result.stderr == why and not (tmp_path / "out").exists()
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 2 and "the following arguments are required: --out" in result.stderr
