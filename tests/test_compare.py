"""bench/compare.py and bench/table.py: intervals against formulas, and small plans on the toy."""
import csv
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train
from bench import compare, table, tradeoff
from bench.table import (METHODS, Run, add_row, best_of, interval, pack, read_table, report, resample,
                         unpack)
from lib.files import read_record

SMALL = ["--", "--device", "cpu", "--limit", "8", "--epochs", "2"]
PLAN = ["--entries", "fft", "molf", "--lrs", "1e-3", "1e30", "--seeds", "1"]
CHANGES = {"train_seconds", "eval_seconds", "date", "git"}


@pytest.fixture(scope="module", autouse=True)
def other_tests_know_no_candidates():
    before = dict(train.SCORES)
    yield
    train.SCORES.clear()
    train.SCORES.update(before)


def small_plan(folder, *flags, plan=PLAN, cell=SMALL):
    return [*plan, "--csv", str(folder / "small.csv"), "--out", str(folder / "runs"), *flags, *cell]


def folder_of_fft(argv):
    out = compare.read_files(compare.parse_args(argv)).out
    return out / compare.folder_of(Run("test", "fft", 1e-3, None, 1))


def rows_of(folder):
    rows = read_table(folder / "small.csv")
    return {run: {k: v for k, v in row.items() if k not in CHANGES} for run, row in rows.items()}


# ------------------------------------------------------------------------------------------------- statistics

@pytest.mark.parametrize("values", [[1.0], [0.0, 1.0] * 37, [0.0, 0.0], [float(i) for i in range(1000)],
                                    [1 / 3, None, 2 / 3, 0, 1, 1, None] * 5])
def test_outcomes_are_packed_without_loss(values):
    packed = json.loads(json.dumps(pack(values)))
    assert unpack(packed) == values
    if len(set(values)) == 2:
        assert len(packed["bits"]) <= len(values) / 6 + 4


def test_predictions_give_the_value_of_each_row_and_its_weight():
    verdicts = [{"loss": 2.0, "# n of loss": 3, "exact match": 1.0, "# odd": True},
                {"loss": 1.0, "# n of loss": 1, "error": "none"}]
    outcomes = table.outcomes_of([{"verdict": v} for v in verdicts])
    assert unpack(outcomes["loss"]["values"]) == [2.0, 1.0] and unpack(outcomes["loss"]["weights"]) == [3, 1]
    assert unpack(outcomes["exact match"]["values"]) == [1.0, None]
    assert set(outcomes) == {"loss", "exact match"}
    sums, ns = table.sums_of([outcomes["loss"]])
    assert (sums.sum() / ns.sum()).item() == 7 / 4
    sums, ns = table.sums_of([outcomes["exact match"]])
    assert sums.tolist() == [[1.0, 0.0]] and ns.tolist() == [[1.0, 0.0]]


def side(values):
    """[[a row's value for each row] for each seed] -> sums, ns"""
    sums = torch.tensor(values, dtype=torch.float64)
    return sums, torch.ones_like(sums)


def between(one, other, resamples=2000):
    drawn = resample({"one": one, "other": other}, resamples)
    return interval(one, other, drawn["one"], drawn["other"])


def test_an_interval_over_rows_is_that_of_the_normal_approximation():
    a = [float(i % 4 == 0) for i in range(400)]
    b = [float(i % 2 == 0) for i in range(400)]
    x, low, high = between(side([a]), side([[0.0] * 400]))
    assert x == 0.25 and (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    x, low, high = between(side([a]), side([b]))            # paired: 100 rows of -1, 300 of 0
    assert x == -0.25 and (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert between(side([a]), side([a])) == (0, 0, 0)


@pytest.mark.parametrize("n_one, n_other", [(2, 2), (3, 3), (5, 5), (2, 6)])
def test_an_interval_over_few_seeds_covers_the_truth_as_often_as_it_says(n_one, n_other):
    rng = torch.Generator().manual_seed(0)
    no_rows = torch.zeros(10)
    covered = 0
    for _ in range(2000):
        one, other = (torch.randn(n, 1, generator=rng, dtype=torch.float64) for n in (n_one, n_other))
        sides = (one, torch.ones_like(one)), (3 * other, torch.ones_like(other))
        _, low, high = interval(*sides, no_rows, no_rows)
        covered += low <= 0 <= high
    assert 0.935 < covered / 2000 < 0.996       # with two seeds it is too wide: the freedom is rounded down


def test_students_t():
    known = {1: 12.706, 3: 3.182, 10: 2.228, 12: 2.179, 20: 2.086, 60: 2.000, math.inf: 1.960}
    assert all(table.student(n) == pytest.approx(t, abs=0.02) for n, t in known.items())
    assert table.student(4.9) == table.student(4)           # rather too wide


def test_rows_without_the_metric_and_weights_count_in_a_mean_as_in_an_evaluation():
    sums = torch.tensor([[6.0, 0.0, 1.0]], dtype=torch.float64).repeat(1, 50)
    ns = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64).repeat(1, 50)
    x, low, high = between((sums, ns), side([[0.0] * 150]))
    assert x == 7 / 4 and low < x < high
    rare = torch.zeros(1, 50, dtype=torch.float64)
    rare[0, 7] = 1                              # more than a third of the resamples lack its only row
    x, low, high = between((rare, rare), (0 * rare, rare))
    assert x == low == high == 1


def test_molf_is_compared_with_both():
    fft = [float(i % 2) for i in range(200)]
    lora = [1 - x for x in fft]
    sides = {"fft": side([fft] * 2), "lora": side([lora] * 2), "molf": side([fft] * 2)}
    *_, line, _ = table.margin_table(sides, resample(sides), set(sides), "ES")
    name, x, ends, y, other_ends, verdict = [cell.strip() for cell in line.strip("|").split("|")]
    assert (name, x, ends, y, verdict) == ("`molf`", "+0.0", "+0.0 to +0.0", "+0.0", "open")
    low, high = map(float, other_ends.split(" to "))
    assert high == -low == pytest.approx(100 * 2 * 1.96 * 0.5 / math.sqrt(200), rel=0.1)
    del sides["lora"]       # none of its runs was finite: no other LoRA takes its place
    assert table.margin_table(sides, resample(sides), {"lora", "lora --ranks 4", *sides}, "ES") == []


@pytest.mark.parametrize("metric, of_fft, of_lora, of_molf, verdict", [
    ("ES", 2, 2, 2, "no"), ("ES", 2, 2, 1, "open"), ("ES", 1, 1, 2, "open"), ("ES", 1, 2, 2, "no"),
    ("ES", 2, 1, 2, "no"), ("loss", 2, 2, 1, "")])
def test_what_a_single_seed_cannot_decide(metric, of_fft, of_lora, of_molf, verdict):
    worse, better = [0.0] * 200, [1.0] * 200
    sides = {"fft": side([better] * of_fft), "lora": side([better] * of_lora),
             "molf": side([worse] * of_molf)}
    *_, line, _ = table.margin_table(sides, resample(sides), set(sides), metric)
    *_, ends_fft, _, ends_lora, found, _ = [cell.strip() for cell in line.split("|")]
    assert found == verdict
    assert ends_fft.endswith(", one seed") == (1 in (of_fft, of_molf))
    assert ends_lora.endswith(", one seed") == (1 in (of_lora, of_molf))


@pytest.mark.parametrize("of_molf, of_coin", [(2, 2), (1, 2), (2, 1)])
def test_a_difference_says_that_a_side_has_one_seed(of_molf, of_coin):
    sides = {"molf": side([[0.0] * 200] * of_molf), "molf --score random": side([[1.0] * 200] * of_coin)}
    *_, line, _ = table.difference_table(sides, resample(sides), set(sides), "ES")
    more = ", one seed" if 1 in (of_molf, of_coin) else ""
    assert line == f"| `molf` − `molf --score random` | -100.0 | -100.0 to -100.0{more} | 0.0 |"


@pytest.mark.parametrize("ends, metric, verdict", [
    ([(-0.014, 0.02), (0.01, 0.02)], "ES", "yes"), ([(-0.016, 0.02), (0.01, 0.02)], "ES", "open"),
    ([(0.01, 0.02), (-0.04, -0.016)], "ES", "no"), ([(0, 0), (0.01, 0.02)], "ES", "open"),
    ([(1, 1), (1, 1)], "ES", "yes"), ([(-0.02, 0.014)] * 2, "recalls true", "yes"),
    ([(0.016, 0.02), (-1, 0)], "recalls true", "no"), ([(-0.1, 0.1)] * 2, "loss", "")])
def test_within_the_margin(ends, metric, verdict):
    assert table.within(ends, metric) == verdict


# ------------------------------------------------------------------------------------------------- plans

def test_the_choice_of_a_rate():
    runs = [Run("lr", "fft", lr, None, 0) for lr in (1e-4, 1e-3, 1e-2)]
    rows = {run: {"ended": "finished", "ES": es, "loss": loss}
            for run, es, loss in zip(runs, ("0.5", "0.9", "0.9"), ("3", "2", "1"))}
    assert best_of(runs, rows, "ES") == runs[1]             # equal: the lower rate
    assert best_of(runs, rows, "loss") == runs[2]
    assert table.search_lines(rows, "loss") == ["- fft: 0.0001: 3.000, 0.001: 2.000, **0.01: 1.000**; the "
                                                "choice is at an end of the grid"]
    for run, ns in zip(runs, ("0.9", "0.9", "0.1")):
        rows[run]["NS"] = ns
    assert table.value_of(rows[runs[2]], "ES+NS") == pytest.approx(2 / (1 / 0.9 + 1 / 0.1))
    assert best_of(runs[::2], rows, "ES+NS") == runs[0] and best_of(runs[::2], rows, "ES") == runs[2]
    rows[runs[1]] = rows[runs[2]] = {"ended": "not finite"}
    assert best_of(runs, rows, "ES") == runs[0] and best_of(runs[1:], rows, "ES") is None


def test_two_spellings_are_one_entry():
    a = compare.parse_args(["--entries", "molf --score=pfn", "molf  --score pfn", "0.5  fft", *SMALL])
    assert a.entries == ["0.5 fft", "molf --score pfn"]


def test_where_an_entry_has_its_rates_from():
    entries = compare.ENTRIES
    assert table.sources("molf --score align", entries) == table.sources("lora --rest train", entries) == \
        table.sources("molf", entries) == ("fft", "lora")
    assert table.sources("lora", entries) == (None, "lora") and table.sources("fft", entries) == ("fft", None)
    assert table.sources("molf-e", entries) == (None, "molf-e")
    assert table.sources("transformers-fft", entries) == ("fft", None)
    assert table.sources("peft-lora", entries) == (None, "lora")
    assert table.sources("dora --ranks 4", ["dora", "dora --ranks 4"]) == (None, "dora")
    entries = ["lora --ranks 4", "molf --ranks 4", "lora --ranks 4 --rest train"]
    assert table.sources("molf --ranks 4", entries) == ("fft", "lora --ranks 4")


def test_the_runs_of_a_plan_are_those_of_a_search_and_then_those_of_its_choice():
    argv = ["--lrs", "1e-3", "3e-3", "--lora-lrs", "1e-3", "--entries", "molf", "molf-e", *SMALL]
    a = compare.parse_args(argv)
    search = [Run("lr", "fft", lr, None, 0) for lr in (1e-3, 3e-3)]
    tests = [Run("test", "molf-e", None, 1e-3, seed) for seed in (1, 2, 3)]
    assert compare.known_runs({}, a) == search + tests      # LoRA's grid has one rate
    rows = {run: {"ended": "finished", "ES": es} for run, es in zip(search, ("0.1", "0.2"))}
    assert compare.known_runs(rows, a) == search + [
        Run("test", "molf", 3e-3, 1e-3, seed) for seed in (1, 2, 3)] + tests


def test_a_worker_goes_on_with_its_entry_or_takes_one_that_nobody_has():
    class Busy:
        def __init__(self, entry):
            self.entry = entry
    todo = [Run("test", entry, 1.0, 1.0, 1) for entry in ("molf", "molf --score snr", "molf-e")]
    assert compare.next_run(todo, Busy("molf-e"), [Busy("molf")]) == todo[2]
    assert compare.next_run(todo, Busy(None), [Busy("molf")]) == todo[1]
    assert compare.next_run(todo[:1], Busy(None), [Busy("molf")]) == todo[0]


@pytest.mark.parametrize("task", ["med", "sql", "text"])
def test_toy_rows_are_rows_of_their_task(task, tmp_path, monkeypatch, capsys):
    script = os.path.join(os.path.dirname(compare.__file__), "toy_rows.py")
    for split in ("train", "test"):
        monkeypatch.setattr(sys, "argv", [script, task, "5", split])
        runpy.run_path(script, run_name="__main__")
        (tmp_path / split).with_suffix(".jsonl").write_text(capsys.readouterr().out)
    (train_rows, skipped), (test_rows, _) = [data.load_rows(task, split, str(tmp_path / f"{split}.jsonl"))
                                             for split in ("train", "test")]
    assert len(train_rows) == len(test_rows) == 5 and not skipped
    assert not {json.dumps(row) for row in train_rows} & {json.dumps(row) for row in test_rows}


@pytest.mark.parametrize("task", ["fact", "med", "sql"])
def test_the_rows_that_choose_are_not_those_that_test(task, tmp_path):
    cell = ["--device", "cpu", "--task", task]
    a = compare.parse_args(["--lrs", "1", "2", "--out", str(tmp_path), "--", *cell])
    a.split = compare.split_rows(a)
    files = compare.write_rows(a)
    texts = {}
    for phase, (_, train_file, _, asked) in files.items():
        rows, _ = data.load_rows(task, "train", train_file)
        questions, _ = data.load_rows(task, "test", asked)
        texts[phase] = [{json.dumps(row, sort_keys=True) for row in x} for x in (rows, questions)]
    (lr_train, lr_asked), (test_train, test_asked) = texts["lr"], texts["test"]
    assert not lr_asked & test_asked and not lr_asked & test_train
    assert task == "fact" or not test_train & test_asked
    whole, _ = data.load_rows(task, "train", "toy")
    kept = {json.dumps(row, sort_keys=True) for row in whole}
    if task == "fact":
        assert lr_train == lr_asked and test_train == test_asked and lr_asked | test_asked == kept
        assert len(lr_asked) == len(test_asked) == 160
    else:
        assert lr_train == test_train and lr_train | lr_asked == kept and len(lr_asked) == 60
        assert not lr_train & lr_asked and files["test"][3] == "toy"
    assert compare.write_rows(a) == files


# ------------------------------------------------------------------------------------------------ whole plans

@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """A plan that has ended: of its three runs that choose, one was not finite."""
    folder = tmp_path_factory.mktemp("one")
    compare.main(small_plan(folder))
    return folder


def test_a_plan_leaves_a_table_and_the_outcome_of_each_row(one_worker, capsys):
    rows = rows_of(one_worker)
    ended = {str(run): row["ended"] for run, row in rows.items()}
    assert ended == {"lr, fft, lr 0.001, seed 0": "finished", "lr, fft, lr 1e+30, seed 0": "not finite",
                     "test, fft, lr 0.001, seed 1": "finished",
                     "test, molf, lr 0.001, lora-lr 0.001, seed 1": "finished"}
    outcomes = table.read_outcomes(one_worker / "small.csv")
    for run, row in rows.items():
        if row["ended"] == "finished":
            assert row["rows"] == row["eval_rows"] == "4" and 0 <= float(row["first_share"] or 0) <= 1
            for metric in ("ES", "PS", "NS", "accuracy"):
                values = unpack(outcomes[run][metric]["values"])
                assert len(values) == 4 and sum(values) / 4 == pytest.approx(float(row[metric]))
    assert not list(one_worker.rglob("model.safetensors"))
    compare.main(["--report", str(one_worker / "small.csv"), "--metrics", "ES"])
    text = capsys.readouterr().out
    assert "- fft: **0.001: " in text and "1e+30: not finite" in text
    assert "| `fft` | 0.001 |  | " in text and "| PS |" not in text


def test_peers_run_on_the_same_rows_and_are_compared(tmp_path, capsys):
    plan = ["--entries", "fft", "transformers-fft", "lora", "molf-e", "dora", "--lrs", "1e-3",
            "--lora-lrs", "1e-2", "1e30", "--seeds", "1"]
    compare.main(small_plan(tmp_path, plan=plan))
    rows = {str(run): row for run, row in rows_of(tmp_path).items()}
    assert rows["lr, dora, lora-lr 1e+30, seed 0"]["ended"] == "not finite"
    peers = {read_record(path)["peer"] for path in tmp_path.glob("runs/*/*dora*/config.json")}
    assert peers == {"dora"}
    ours, theirs = rows["test, fft, lr 0.001, seed 1"], rows["test, transformers-fft, lr 0.001, seed 1"]
    same = ["steps", "rows", "eval_rows", "inputs", "ES", "PS", "NS", "accuracy"]
    assert [ours[name] for name in same] == [theirs[name] for name in same]
    assert rows["test, dora, lora-lr 0.01, seed 1"]["first_share"] == ""
    text = capsys.readouterr().out
    assert "| `transformers-fft` − `fft` | +0.0 |" in text and "| `molf-e` − `dora` | " in text
    assert not list(tmp_path.rglob("model.safetensors"))


def test_peers_are_paired_with_the_same_of_ours_and_with_molf_e():
    entries = ["fft", "0.5 fft", "lora", "lora --ranks 4", "molf-e", "molf-e --score snr", "transformers-fft",
               "0.5 transformers-fft", "2 transformers-fft", "peft-lora --ranks 4", "dora", "adalora"]
    assert set(table.pairs_of(entries, entries)) == {
        ("molf-e", "lora"), ("dora", "lora"), ("adalora", "lora"), ("molf-e --score snr", "lora"),
        ("molf-e --score snr", "molf-e"),
        ("transformers-fft", "fft"), ("0.5 transformers-fft", "0.5 fft"),
        ("peft-lora --ranks 4", "lora --ranks 4"), ("molf-e", "dora"), ("molf-e --score snr", "dora"),
        ("molf-e", "adalora"), ("molf-e --score snr", "adalora")}


def test_molf_is_paired_with_what_trains_the_same():
    entries = ["fft", "0.5 fft", "fft --rest freeze", "lora", "lora --rest train", "0.5 lora", "molf",
               "molf --score gain", "molf --rest freeze", "molf --score gain --rest freeze",
               "molf --rest freeze --score random", "molf --score random", "0.5 molf --score random",
               "molf --score gain --route softmax", "molf --score random --route softmax"]
    trained = ["molf", "molf --score gain", "molf --score random", "molf --score gain --route softmax",
               "molf --score random --route softmax"]
    frozen = ["molf --rest freeze", "molf --score gain --rest freeze", "molf --rest freeze --score random"]
    of_fft_and_lora = [(e, other) for e in trained for other in ("0.5 fft", "lora --rest train")]
    of_fft_and_lora += [(e, "0.5 lora") for e in frozen]
    of_the_rest = [("fft", "fft --rest freeze"), ("lora --rest train", "lora"),
                   *zip(trained[:3], frozen)]
    of_the_rule = [("molf --score gain", "molf"), ("molf --score gain --route softmax", "molf"),
                   ("molf --score random --route softmax", "molf"),
                   ("molf --score gain --rest freeze", "molf --rest freeze"),
                   *((e, "molf --score random") for e in trained if e != "molf --score random"),
                   *((e, frozen[-1]) for e in frozen[:-1])]
    assert sorted(table.pairs_of(entries, entries)) == sorted([*of_fft_and_lora, *of_the_rest, *of_the_rule])
    sides = {e: side([[0.0, 1.0]] * 2) for e in entries}
    lines = table.margin_table(sides, resample(sides), set(sides), "ES")
    tables = [[line.split("|")[1:3] for line in lines[a:b] if "---" not in line]
              for a, b in ((0, lines.index("")), (lines.index("") + 1, -1))]
    (first, *of_fft), (second, *of_frozen) = tables
    assert first[1].strip() == "− `fft`" and len(of_fft) == 9
    assert second[1].strip() == "− `fft --rest freeze`"
    assert sorted(name.strip() for name, _ in of_frozen) == sorted(f"`{e}`" for e in frozen)
    del sides["fft"]                                    # then the frozen fft is the plain one
    lines = table.margin_table(sides, resample(sides), set(sides), "ES")
    assert lines.count("") == 1


def test_variants_of_molf_are_paired_with_the_plain_one_and_with_their_coin():
    entries = ["molf", "molf --top-k 2", "molf --top-k 2 --score random", "molf --ranks 4 16 --alpha 8",
               "molf --alpha 8 --score gain --ranks 4 16", "2 molf", "molf-e", "molf-e --rest train", "lora"]
    assert sorted(table.pairs_of(entries, entries)) == sorted([
        ("molf --top-k 2", "molf"), ("molf --top-k 2", "molf --top-k 2 --score random"), ("2 molf", "molf"),
        ("molf --ranks 4 16 --alpha 8", "molf"), ("molf --alpha 8 --score gain --ranks 4 16", "molf"),
        ("molf --alpha 8 --score gain --ranks 4 16", "molf --ranks 4 16 --alpha 8"),
        ("molf-e", "lora"), ("molf-e --rest train", "molf-e")])


def test_base_is_the_model_before_all_training(tmp_path, capsys):
    plan = ["--entries", "base", "fft", "--seeds", "1", "2", "--lrs", "1e-3"]
    shutil.copytree("toy", tmp_path / "run/model")              # of a run, whose flags mean nothing here
    (tmp_path / "run/config.json").write_text('{"flags": {"limit": 3, "seed": 9}}')
    cell = [*SMALL, "--model", str(tmp_path / "run/model"), "--data", "toy"]
    compare.main(small_plan(tmp_path, plan=plan, cell=cell))
    rows = {str(run): row for run, row in rows_of(tmp_path).items()}
    assert set(rows) == {"test, base, seed 1", "test, fft, lr 0.001, seed 1", "test, fft, lr 0.001, seed 2"}
    assert "| `base` |  |  | " in capsys.readouterr().out
    train.main(["--limit", "8", "--eval-only", "toy", "--device", "cpu", "--out", str(tmp_path / "base")])
    after = json.loads((tmp_path / "base/results.json").read_text())["after"]
    for metric in ("ES", "PS", "NS", "accuracy"):
        assert float(rows["test, base, seed 1"][metric]) == after[metric]["value"]


def test_adalora_is_searched_at_ten_times_the_rates():
    a = compare.parse_args(["--entries", "adalora", "--lora-lrs", "1e-3", "3e-3", *SMALL])
    assert [run.lora_lr for run in compare.known_runs({}, a)] == [pytest.approx(1e-2), pytest.approx(3e-2)]


def test_what_has_ended_does_not_run_again(one_worker, monkeypatch, tmp_path, capsys):
    """Only the table and the file beside it have travelled."""
    for file in one_worker.glob("small.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(compare, "Worker", None)
    compare.main(small_plan(tmp_path))
    assert "| `molf` | 0.001 | 0.001 |" in capsys.readouterr().out
    assert rows_of(tmp_path) == rows_of(one_worker)


def test_a_table_goes_on_where_its_files_lie_elsewhere_if_the_same_is_in_them(tmp_path):
    prompts = [{"prompt": f"{i} and", "completion": " so on"} for i in range(9)]
    files = {"rows.jsonl": prompts[:8], "asked.jsonl": prompts[8:]}
    here, there = tmp_path / "here", tmp_path / "there"

    def lay(folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(train.__file__).with_name("toy"), folder / "a model")
        for name, rows in files.items():
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(folder, *more):
        cell = ["--", "--task", "text", "--limit", "8", "--device", "cpu", f"--model={folder / 'a model'}",
                "--data", str(folder / "rows.jsonl"), "--eval-data", str(folder / "asked.jsonl"), *more]
        plan = ["--entries", "fft", "--lrs", "1e-3", "2e-3", "--validation", "1"]
        return compare.read_files(compare.parse_args([*plan, *cell]))
    lay(here)
    ours = read(here)
    assert ours.flags == ("--task text --limit 8 --device cpu --model 'a model' --data rows.jsonl "
                          "--eval-data asked.jsonl")
    run = dict(plan=ours.plan, data=ours.data, flags=ours.flags, select=ours.select, validation="1", rule="")
    runs = {Run("test", "fft", 1e-3, None, 1): run}
    lay(there)
    compare.refuse_another_plan(runs, read(there))
    compare.refuse_another_plan(runs, read(there, "--task", "text"))        # said twice
    weights = (there / "a model" / "model.safetensors").read_bytes()
    middle = len(weights) // 2
    changed = weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1:]
    tokenizer = (there / "a model" / "tokenizer.json").read_bytes()
    for name, content in (("a model/model.safetensors", changed),
                          ("a model/tokenizer.json", tokenizer + b" "),
                          ("rows.jsonl", b"\n".join(json.dumps(row).encode() for row in prompts[1:])),
                          ("asked.jsonl", json.dumps(prompts[0]).encode())):
        lay(there)
        (there / name).write_bytes(content)
        with pytest.raises(ValueError, match="its runs had other rows or another model: give another --csv"):
            compare.refuse_another_plan(runs, read(there))
    for more in (["--limit", "7"], ["--dtype", "bfloat16"]):
        with pytest.raises(ValueError, match="holds the runs of another plan"):
            compare.refuse_another_plan(runs, read(here, *more))
    assert read(here).out != read(there).out            # where train.py would refuse to go on


def test_a_table_is_of_one_model(tmp_path):
    path = tmp_path / "x.csv"
    for seed in (1, 2):
        run = Run("test", "fft", 1e-3, None, seed)
        add_row(path, run, run._asdict() | dict(plan="p", data="one"), {})
    path.write_text(path.read_text().replace("one", "another", 1))
    with pytest.raises(ValueError, match="runs of 2 plans, models or data"):
        read_table(path)


def test_a_run_that_fails_is_named_and_the_others_go_on_with_two_workers_as_with_one(
        one_worker, tmp_path, capsys):
    argv = small_plan(tmp_path, "--workers", "2")
    blocked = folder_of_fft(argv)
    blocked.parent.mkdir(parents=True)
    blocked.write_text("no directory")
    with pytest.raises(SystemExit) as e:
        compare.main(argv)
    assert e.value.code.startswith("error: 1 runs failed")
    said = capsys.readouterr().out
    assert f"test, fft, lr 0.001, seed 1: failed: error: --out {blocked}: {blocked} is not a dir" in said
    want = rows_of(one_worker)
    want.pop(Run("test", "fft", 1e-3, None, 1))
    assert rows_of(tmp_path) == want


def test_each_run_has_a_folder_of_its_own(monkeypatch):
    for name in ("myRule", "my-rule"):
        monkeypatch.setitem(train.SCORES, name, train.SCORES["epd"])
    entries = "molf --score myRule", "molf --score my-rule", "fft", "0.5 fft"
    runs = [Run("test", entry, lr, None, 1) for entry in entries for lr in (1e-3, 1e3)]
    folders = {compare.folder_of(run) for run in runs}
    assert len(folders) == len(runs)
    monkeypatch.setitem(train.SCORES, "myRule", train.SCORES["pfn"])
    assert compare.folder_of(runs[0]) not in folders and compare.folder_of(runs[2]) in folders


def test_results_that_a_folder_has_are_not_taken_for_those_of_a_new_table(tmp_path):
    plan = ["--entries", "fft", "--seeds", "1"]
    compare.main(small_plan(tmp_path, plan=plan))
    want = rows_of(tmp_path)
    (results,) = tmp_path.rglob("results.json")
    results.write_text('{"after": {"ES": 2.0, "seconds": 1}, "train_seconds": 1}')
    (tmp_path / "small.csv").unlink()
    compare.main(small_plan(tmp_path, plan=plan))
    assert rows_of(tmp_path) == want


def test_a_table_of_other_rows_or_of_another_rule_is_refused(one_worker, monkeypatch, tmp_path):
    for file in one_worker.glob("small.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(compare, "Worker", None)
    with monkeypatch.context() as patch:
        patch.setitem(train.SCORES, "epd", train.SCORES["pfn"])
        with pytest.raises(SystemExit, match="molf ran with other code of its rule"):
            compare.main(small_plan(tmp_path))
    rows, why = data.load_rows("fact", "train", "toy", 8)
    rows[0]["requested_rewrite"]["target_new"]["str"] = "x"
    monkeypatch.setattr(compare, "load_rows", lambda *args: (rows, why))
    with pytest.raises(SystemExit, match="its runs had other rows"):
        compare.main(small_plan(tmp_path))


def test_a_worker_that_dies_loses_its_run_alone():
    worker = compare.Worker()
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.begin(Run("test", "fft", 1e-3, None, 1), [], None)
    assert worker.result() == ("failed", "its process ended with code -9", None)
    worker.begin(Run("test", "fft", 1e-3, None, 1), [], None)               # it is gone already
    assert worker.result() == ("failed", "its process ended with code -9", None)


def test_runs_end_when_the_program_that_began_them_is_killed(tmp_path):
    """They are in sessions of their own, so whatever killed it did not reach them."""
    plan = ["--entries", "fft", "lora", "--seeds", "1", "--workers", "2"]
    argv = small_plan(tmp_path, plan=plan, cell=[*SMALL[:-1], "100000"])
    parent = subprocess.Popen([sys.executable, "bench/compare.py", *argv])
    logs = lambda: [path for path in tmp_path.glob("runs/*/*/log.jsonl") if path.read_text()]
    children = []
    try:
        wait_until(lambda: len(logs()) == 2)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
        parent.wait()
        assert len(children) >= 2
        wait_until(lambda: not any(running(pid) for pid in children))
        assert len(list(tmp_path.glob("runs/*/*/checkpoints/step-*.safetensors"))) == 2
    finally:
        for pid in filter(running, [str(parent.pid), *children]):
            os.kill(int(pid), signal.SIGKILL)


def running(pid):
    return Path(f"/proc/{pid}/exe").exists()


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_after_until_nothing_begins_and_what_runs_is_stopped_and_goes_on_later(tmp_path, monkeypatch, capsys):
    plan, cell = ["--entries", "fft", "--seeds", "1"], [*SMALL[:-1], "60"]
    argv = small_plan(tmp_path, plan=plan, cell=cell)
    compare.main(["--until", "0", *argv])
    assert "1 or more runs are missing" in capsys.readouterr().out and not (tmp_path / "small.csv").exists()
    out = folder_of_fft(argv)

    class Clock:        # time is over when the training has begun
        def monotonic():
            return 100 if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text() else 0
    with monkeypatch.context() as patch:
        patch.setattr(compare, "time", Clock)
        compare.main(["--until", "50", *argv])
    assert "1 or more runs are missing" in capsys.readouterr().out and rows_of(tmp_path) == {}
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(checkpoint.stem.rpartition("-")[2])
    assert 0 < step < 60
    compare.main(argv)
    assert len(rows_of(tmp_path)) == 1 and not list(out.glob("checkpoints/*"))
    assert f"going on behind step {step}" in out.with_name(out.name + ".txt").read_text()


# ------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("argv, message", [
    (["--entries", "sgd", *SMALL], "an entry begins with a method"),
    (["--entries", "molf --lr 1", *SMALL], "--lr cannot differ between entries"),
    (["--entries", "fft --method lora", *SMALL], "--method cannot differ between entries"),
    (["--entries", "molf --score best", *SMALL], "invalid choice: 'best'"),
    (["--entries", "fft --ranks 4", *SMALL], "fft has no LoRA expert"),
    (["--entries", "lora --score pfn", *SMALL], "it has one expert, so no rule and no route"),
    (["--entries", "molf --scor pfn", *SMALL], "there is no flag --scor"),
    (["--entries", "molf --score 'pfn", *SMALL], "No closing quotation"),
    (["--entries", "1/2 fft", *SMALL], "--entries '1/2 fft': could not convert string to float"),
    (["--entries", "1e999 fft", *SMALL], "its factor must be above 0"),
    (["--lrs", "nan", *SMALL], "--lrs and --lora-lrs must be above 0"),
    (["--lora-lrs", "inf", *SMALL], "--lrs and --lora-lrs must be above 0"),
    (["--csv", "x.jsonl", *SMALL], "the .jsonl beside the table would be the same file"),
    (["--entries", "dora --rest train", *SMALL], "a peer has one rank, and --rest as it is without the flag"),
    (["--entries", "adalora --score snr", *SMALL], "--score is not for peers"),
    ([*SMALL, "--seed", "1", "--resume"], "--resume, --seed: not for all runs"),
    (["--select", "BLEU", *SMALL], "'BLEU' is no metric of rows of fact: there are ES, PS, NS, accuracy"),
    (["--metrics", "perplexity", "--", "--task", "text", "--data", __file__, "--eval-data", "x"],
     "'perplexity' is no metric of rows of text"),
    (["--", "--task", "text", "--data", __file__], "--task text wants --eval-data here"),
    (["--", "--task", "med", "--data", __file__, "--eval-data", __file__], "those are the rows that train"),
    (["--", "--data", __file__, "--eval-data", "toy"], "fact is measured on the rows that train"),
    (["--workers", "0", *SMALL], "--workers must be at least 1")])
def test_a_wrong_plan_is_refused_before_it_begins(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        compare.main(argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_refused_before_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "Worker", None)
    with pytest.raises(SystemExit, match="error: .*/proc"):             # where nobody writes a file
        compare.main([*PLAN, "--csv", "/proc/small.csv", "--out", str(tmp_path), *SMALL])


def test_peers_without_what_they_need_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "bench.peers", raising=False)
    monkeypatch.delattr("bench.peers", raising=False)
    with pytest.raises(SystemExit, match="pip install transformers peft"):
        compare.parse_args(["--entries", "dora", *SMALL])


def test_the_table_of_another_plan_is_refused(one_worker, tmp_path):
    path = tmp_path / "small.csv"
    for change in (["--limit", "6"], ["--batch-size", "4"]):
        with pytest.raises(SystemExit) as e:
            compare.main([*small_plan(one_worker), *change])
        theirs = " ".join(SMALL)
        assert f"another plan, {theirs} (--select ES, --validation default). This one is" in e.value.code
        assert f"{theirs} {' '.join(change)} (--select ES, --validation default): give" in e.value.code
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="is no table of such runs: no 'phase'"):
        compare.main(small_plan(tmp_path))
    with pytest.raises(SystemExit, match="error: .*none.csv has no runs yet"):
        compare.main(["--report", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="of 8 rows 8 are for validation"):
        compare.main([*small_plan(tmp_path / "new", "--validation", "8")])


def test_a_report_refuses_what_cannot_be_compared(one_worker, tmp_path):
    with pytest.raises(SystemExit, match="no outcomes of 'BLEU' of test, fft, .*; there are ES, PS, NS"):
        compare.main(["--report", str(one_worker / "small.csv"), "--metrics", "BLEU"])
    for file in one_worker.glob("small.*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / "small.csv"
    rows = list(csv.reader(path.open(newline="")))
    place = rows[0].index("inputs")
    rows[-1][place] = "other"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    with pytest.raises(ValueError, match="other rows or another model"):
        report(path)


def test_a_factor_of_the_rates():
    entries = ["0.5 fft", "2 molf --score pfn"]
    assert table.sources("0.5 fft", entries) == ("fft", None)
    assert [table.factor_of(e) for e in ["fft", *entries]] == [1, 0.5, 2]
    a = compare.parse_args(["--entries", *entries, "--lrs", "1e-3", "--lora-lrs", "2e-3", "--seeds", "1",
                            *SMALL])
    runs = compare.known_runs({}, a)
    assert runs == [Run("test", "0.5 fft", 5e-4, None, 1), Run("test", "2 molf --score pfn", 2e-3, 4e-3, 1)]
    assert runs[1].flags()[:4] == ["--score", "pfn", "--lr=0.002", "--lora-lr=0.004"]
    table_of = {run: {"ended": "finished"} for run in runs}
    assert table.test_runs(table_of, "ES") == {run.entry: [run] for run in runs}


def test_a_picture_of_two_metrics(tmp_path, monkeypatch):
    """What is drawn for each entry: its mean, and a line through the factors of fft in their order."""
    path = tmp_path / "hand.csv"
    values = {"fft": 0.6, "0.5 fft": 0.2, "2 fft": 0.4} | dict.fromkeys(METHODS[1:], 0.8)
    for entry, es in values.items():
        for seed in (1, 2):
            run = Run("test", entry, table.factor_of(entry), None if "fft" in entry else 1.0, seed)
            value = es + (0.1 if seed == 1 else -0.1)
            row = run._asdict() | dict(ended="finished", plan="p", select="ES", ES=value, NS=0.5)
            add_row(path, run, row, {})
    figure = tradeoff.draw(read_table(path), "ES", "NS")
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[20, 50], [60, 50], [40, 50]] in [[[round(x) for x in point] for point in line] for line in lines]
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == set(values) - {"base"}              # which is far away, and not trained
    tradeoff.main([str(path), "--x", "ES", "--y", "NS", "--out", str(tmp_path / "sub/x.png")])
    assert (tmp_path / "sub/x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        tradeoff.main([str(path), "--x", "BLEU", "--y", "NS", "--out", str(tmp_path / "y.png")])


def test_a_report_by_hand(tmp_path):
    """ES of four rows: fft 3 and 1 of them, lora 2 twice, molf 4 and 3. Half of the steps went to its full
    expert with the first seed and all with the second."""
    path = tmp_path / "hand.csv"
    right = {"fft": (3, 1), "lora": (2, 2), "molf": (4, 3)}
    for entry, hits in right.items():
        for seed, n in enumerate(hits, 1):
            lr, lora_lr = [1e-3 if x else None for x in table.sources(entry, right)]
            run = Run("test", entry, lr, lora_lr, seed)
            row = run._asdict() | dict(
                ended="finished", plan="p", select="ES", task="fact", flags="--limit 4", inputs="i", rows=4,
                eval_rows=4, torch="2", gpu="", git="", ES=n / 4,
                first_share=seed / 2 if entry == "molf" else None)
            values = {"ES": {"values": pack([float(i < n) for i in range(4)])}}
            add_row(path, run, row, values)
    text = report(path, ["ES"])
    assert "| `fft` | 0.001 |  | 50.0 ± 35.4 |  | 2 |" in text
    assert "| `lora` |  | 0.001 | 50.0 ± 0.0 |  | 2 |" in text
    assert "| `molf` | 0.001 | 0.001 | 87.5 ± 17.7 | 75% | 2 |" in text
    assert "| `molf` | +37.5 | " in text and "`molf-e`" not in text
    lost = Run("test", "lora", None, 1e-3, 3)
    add_row(path, lost, lost._asdict() | dict(ended="not finite", plan="p", select="ES", task="fact"), {})
    text = report(path, ["ES"])
    assert "50.0 ± 0.0 |  | 2, 1 not finite |" in text and "within" not in text
    for entry in ("fft", "molf"):
        lost = Run("test", entry, 1e-3, None if entry == "fft" else 1e-3, 3)
        add_row(path, lost, lost._asdict() | dict(ended="not finite", plan="p", select="ES", task="fact"), {})
    assert report(path, ["ES"]).count("1 not finite") == 3              # and nothing is left to compare
