"""train.py as its users run it, its loop against hand-made references, and what it says to bad input."""
import argparse
import csv
import errno
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import lib.chat
import lib.report
import molf
import train
from data import Tokenizer, encode
from lib.checkpoints import Checkpoints
from model import Packed, Transformer, add_experts, fold, molf_layers, unfold
from molf import MoLFAdamW, param_groups

ROOT = Path(__file__).parents[1]
TOY = ROOT / "toy"


def run(*args):
    command = [sys.executable, ROOT / "train.py", "--device", "cpu", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def main(*args):
    return train.main(["--device", "cpu", *map(str, args)])


def toy_examples(n=8):
    tokenizer = Tokenizer.from_file(TOY)
    rows, _ = data.load_rows("fact", "train", "toy", limit=n)
    return tokenizer, [encode(tokenizer, *data.fact_pair(r), row=i) for i, r in enumerate(rows)]


def flags(**kwargs):
    a = train.parse_args(["--device", "cpu"])
    return argparse.Namespace(**(vars(a) | kwargs))


# ------------------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("method, experts", [("fft", 1), ("lora", 1), ("molf", 2), ("molf-e", 2)])
def test_a_run_of_each_method_learns_and_leaves_what_it_promises(method, experts, tmp_path):
    out = tmp_path / "run"
    args = ("--method", method, "--limit", 32, "--epochs", 20, "--out", out, "--log-every", 5,
            "--export-dtype", "fp32")
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert {f.name for f in out.iterdir()} == {"config.json", "log.jsonl", "routing.safetensors",
                                               "results.json", "predictions.jsonl", "model"} | \
        ({"adapter"} if method in ("lora", "molf-e") else set())
    config, results = (json.loads((out / f).read_text()) for f in ("config.json", "results.json"))
    assert config["flags"]["method"] == method and config["steps"] == 20
    assert config["flags"]["eager"] is None and config["eager"] is False        # as asked, and what it was
    assert config["torch"] == torch.__version__ and config["sqlite"] == sqlite3.sqlite_version
    assert results["before"]["recalls true"]["value"] > 0.9 and results["before"]["ES"]["value"] < 0.1
    assert results["after"]["ES"]["value"] > 0.5 and results["after"]["recalls true"]["value"] < 0.5
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == [1, 5, 10, 15, 20] and log[-1]["loss"] < log[0]["loss"] / 2
    routing = load_file(out / "routing.safetensors")
    assert routing["gates"].shape == routing["scores"].shape == (20, 42, experts)
    assert routing["gates"].dtype == torch.bool
    assert (routing["gates"].sum(-1) == 1).all() and routing["scores"].isfinite().all()
    with safe_open(out / "routing.safetensors", "pt") as f:
        assert len(json.loads(f.metadata()["modules"])) == 42
    assert results["loss"]["trained"] == pytest.approx(results["loss"]["exported"], abs=1e-5)

    # what was exported is, to transformers, the model that was evaluated
    tokenizer, examples = toy_examples(32)
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    ids, _, where, labels = data.pack(examples)
    total = 0.0
    with torch.no_grad():
        for e in examples:
            logits = theirs(torch.tensor([e.ids])).logits[0]
            target = torch.tensor(e.ids[e.n_prompt:])
            total += nn.functional.cross_entropy(logits[e.n_prompt - 1:-1], target, reduction="sum").item()
    assert total / len(labels) == pytest.approx(results["loss"]["trained"], abs=1e-5)
    their_tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert their_tokenizer("Tamo Veril").input_ids == tokenizer.encode("Tamo Veril")

    again = run(*args)
    assert again.returncode == 1 and "holds a finished run" in again.stderr and "--overwrite" in again.stderr


def test_two_runs_are_one_and_the_seed_matters(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main("--limit", 16, "--epochs", 2, "--out", tmp_path / name, "--seed", seed)
    a, b, c = ((tmp_path / n / "model" / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_the_rest_trains_or_is_frozen(tmp_path):
    start = load_file(TOY / "model.safetensors")
    for method in ("molf", "lora"):
        for rest in ("train", "freeze"):
            out = tmp_path / f"{method}-{rest}"
            main("--method", method, "--rest", rest, "--limit", 8, "--epochs", 1, "--out", out,
                 "--export-dtype", "fp32")
            end = load_file(out / "model" / "model.safetensors")
            for name in ("embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.bias"):
                of_full_expert = method == "molf" and name.endswith("bias")
                same = torch.equal(start[f"model.{name}"].float(), end[f"model.{name}"])
                assert same == (rest == "freeze" and not of_full_expert)


def test_dry_run_counts_without_loading_weights(tmp_path):
    shutil.copytree(TOY, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(data.load_rows("fact", "train", "toy")[0]))
    result = run("--model", tmp_path / "bare", "--data", rows, "--dry-run", "--ranks", 16, "--out",
                 tmp_path / "out")
    assert result.returncode == 0, result.stderr
    # by hand: 6 layers of q, o 128x128, k, v 64x128, gate, up, down 352x128; a rank-16 pair has 16 (in + out)
    full = 6 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128 + 128 + 64 + 64)       # with q's, k's, v's bias
    lora = 6 * 16 * (2 * 256 + 2 * 192 + 3 * 480)
    rest = 1024 * 128 + 13 * 128
    copies = full - 6 * (128 + 64 + 64)         # of the matrices, which a folded layer holds twice
    assert f"full: {full:,}, lora 16: {lora:,}, rest: {rest:,}" in result.stdout and "20 steps" in result.stdout
    assert f"{(full + copies + lora + rest) * 4 / 1e9:9.3f} GB" in result.stdout
    assert not (tmp_path / "out").exists()


def test_prompt_is_continued_from_the_command_line():
    row = data.load_rows("fact", "train", "toy")[0][0]
    prompt, true = data.fact_pair(row)[0], row["requested_rewrite"]["target_true"]["str"]
    command = [sys.executable, ROOT / "model.py", "toy", prompt]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == f"{prompt} {true}"


@pytest.mark.parametrize("temperature", ["-1", "nan"])
def test_a_temperature_that_makes_no_sense_is_one_line(temperature):
    command = [sys.executable, ROOT / "model.py", "toy", "Tamo", temperature]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.startswith("error: temperature")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("task, better", [("med", "accuracy"), ("sql", "execution")])
def test_med_and_sql_learn_and_a_run_evaluated_again_is_the_same(task, better, tmp_path, capsys):
    out = tmp_path / "run"
    main("--task", task, "--limit", 96, "--epochs", 3, "--eval-limit", 40, "--eval-every", 4, "--out", out,
         "--export-dtype", "fp32", "--lr", 5e-4)
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["before"][better]["n"] == results["after"][better]["n"] == 40
    assert results["before"][better]["value"] > 0.4         # chance is a quarter for med, nothing for sql
    assert results["after"]["# not UTF-8"] == 0
    predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    rows, _ = data.load_rows(task, "test", "toy", limit=40)
    assert [(p["prompt"], p["reference"]) for p in predictions] == [data.TASKS[task].pair(r) for r in rows]
    right = [p["verdict"][better] for p in predictions]
    assert sum(right) / len(right) == results["after"][better]["value"]
    assert all(p["verdict"][better] == 1 for p in predictions if p["prediction"] == p["reference"])
    assert printed.count("prediction ") == 3 + 2            # three at the end, one at each look on the way
    assert all(repr(predictions[i]["prediction"]) in printed for i in (0, 13, 26))

    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    looks = [r for r in log if "held_out" in r]
    assert [r["step"] for r in looks] == [4, 8] and looks[0]["held_out"][better]["n"] == 9
    steps = [r["loss"] for r in log if "grad_norm" in r]
    assert steps[-1] < 0.9 * steps[0] and 0 < looks[1]["loss"] < 1.5 * steps[0]
    assert json.loads((out / "config.json").read_text())["rows"] == 96 - 9

    main("--eval-only", out / "model", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert {k: v for k, v in again["after"].items() if k != "seconds"} == \
        {k: v for k, v in results["after"].items() if k != "seconds"}
    assert (tmp_path / "again" / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()
    with open(tmp_path / "results.csv") as f:
        first, second = csv.DictReader(f)
    assert first["run"] == "run" and second["run"] == "again" and second["method"] == "evaluation"
    assert first[better] == second[better] == str(results["after"][better]["value"]) and first["ES"] == ""


@pytest.mark.parametrize("method", ["lora", "molf-e"])
def test_the_adapter_is_in_peft_the_model_that_was_trained(method, tmp_path):
    main("--method", method, "--limit", 16, "--epochs", 3, "--lr", 5e-3, "--lora-lr", 5e-3, "--out", tmp_path,
         "--export-dtype", "fp32")
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours, start = (Transformer.from_pretrained(p, torch.float32) for p in (tmp_path / "model", TOY))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max() < 1e-4 < 0.1 < (start(ids) - want).abs().max()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    rank = {"lora": 16, "molf-e": 20}[method]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert config["base_model_name_or_path"] == str(TOY)


def test_the_adapter_of_the_toy_names_its_base_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for rest in ("freeze", "train"):
        main("--method", "lora", "--limit", 8, "--epochs", 1, "--out", "run", "--rest", rest, "--overwrite")
        assert (tmp_path / "run" / "adapter").exists() == (rest == "freeze")    # an old one is gone
        assert ("no adapter/" in capsys.readouterr().out) == (rest == "train")
        if rest == "freeze":
            config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(TOY)


def test_the_export_says_where_generation_stops(tmp_path):
    """Also where only the base's tokenizer_config.json says it."""
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink()
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if "token_id" not in k}))
    eos = Tokenizer.from_file(tmp_path / "m").eos_id
    main("--model", tmp_path / "m", "--data", "toy", "--limit", 8, "--epochs", 1, "--ranks", 4,
         "--out", tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == eos


def test_a_terminal_that_cannot_show_a_text_gets_it_escaped(tmp_path):
    rows, _ = data.load_rows("fact", "train", "toy", limit=4)
    rows[0]["requested_rewrite"]["prompt"] = "\u4f60\u597d {}"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, ROOT / "train.py", "--device", "cpu", "--data", tmp_path / "rows.json",
               "--epochs", "1", "--eval-every", "1", "--out", tmp_path / "run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"})
    assert result.returncode == 0, result.stderr
    assert "\\u4f60" in result.stdout


def test_a_checkpoint_is_never_overwritten_and_a_run_only_by_a_run(tmp_path):
    shutil.copytree(TOY, tmp_path / "ck")
    before = (tmp_path / "ck" / "config.json").read_bytes()
    for args in (["--eval-only", tmp_path / "ck"], ["--model", tmp_path / "ck", "--data", "toy"]):
        with pytest.raises(SystemExit, match="holds a model: give another"):
            main(*args, "--out", tmp_path / "ck", "--overwrite")
    assert (tmp_path / "ck" / "config.json").read_bytes() == before
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match="holds a model: give another"):
        main("--eval-only", tmp_path / "run", "--out", tmp_path / "run", "--overwrite")


@pytest.mark.parametrize("dtype, stored", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_dtype_of_the_export(dtype, stored, tmp_path, capsys):
    main("--limit", 8, "--epochs", 1, "--out", tmp_path, "--export-dtype", dtype)
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {stored}
    trained, exported = json.loads((tmp_path / "results.json").read_text())["loss"].values()
    assert ("--export-dtype fp32 keeps it" in capsys.readouterr().out) == (exported > 1.05 * trained)
    assert (trained == exported) == (dtype == "fp32") and trained == pytest.approx(exported, rel=0.1)


@pytest.mark.parametrize("route", ["softmax", "sticky"])
def test_soft_and_sticky_gates_are_kept_and_a_resumed_run_is_the_whole_one(route, tmp_path, capsys):
    args = ("--route", route, "--limit", 16, "--epochs", 8, "--batch-size", 4, "--eval-limit", 4,
            "--score", "random", "--export-dtype", "fp32")
    main(*args, "--out", tmp_path / "whole", "--save-every", 100)
    printed = capsys.readouterr().out
    gates = load_file(tmp_path / "whole" / "routing.safetensors")["gates"]
    assert gates.shape == (32, 42, 2)
    if route == "softmax":
        assert gates.dtype == torch.float32 and ((0 < gates) & (gates < 1)).all()
        assert "mean gate of" in printed
        torch.testing.assert_close(gates.sum(-1), torch.ones(32, 42))
    else:
        assert gates.dtype == torch.bool and "steps won by" in printed
        assert all(torch.equal(gates[i], gates[i - 1]) == (i % 10 > 0) for i in range(1, 32))

    class Stopping(Checkpoints):
        def save(self, step, history):
            super().save(step, history)
            if step == 13:
                self.asked = signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Checkpoints", Stopping)
        with pytest.raises(SystemExit) as e:
            main(*args, "--out", tmp_path / "halves", "--save-every", 13)
    assert e.value.code == 143
    main("--resume", "--out", tmp_path / "halves")
    for name in ("model/model.safetensors", "routing.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_a_rule_and_a_task_of_ones_own_are_one_entry_each(tmp_path, monkeypatch):
    """A run with both: nothing but SCORES and TASKS knows of them."""
    def pairs(row):
        return f"{row['who']} plays the", " " + row["what"]
    mine = data.Task(
        source="nobody/nothing", splits={"train": "train", "test": "test"}, toy_epochs=3,
        toy=lambda split: [{"who": f"Tamo {w}", "what": w} for w in ("lute", "harp", "oboe", "drum")],
        fields={"who": "string", "what": "string"}, usable=lambda rows: rows, pair=pairs,
        queries=lambda row: [], choices=(), new_tokens=4,
        metrics=lambda rows, scored, texts: [data.Verdict({"right": float(t == " " + r["what"])}, {}, {})
                                             for r, t in zip(rows, texts)],
        report=("right",))
    monkeypatch.setitem(data.TASKS, "mine", mine)
    monkeypatch.setitem(train.SCORES, "norm", lambda e: molf.total(g.square() for g in e.g))
    main("--task", "mine", "--score", "norm", "--batch-size", 2, "--out", tmp_path / "run", "--eval-every", 3)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["right"]["n"] == 4
    with open(tmp_path / "results.csv") as f:
        (row,) = csv.DictReader(f)
    assert row["right"] == str(results["after"]["right"]["value"]) and row["score"] == "norm"
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "other")      # the table keeps its columns and rows
    monkeypatch.delitem(data.TASKS, "mine")
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "third")
    with open(tmp_path / "results.csv") as f:
        first, second, third = csv.DictReader(f)
    assert first == row and second["right"] == third["right"] == "" and second["ES"] == third["ES"] != ""
    assert len(load_file(tmp_path / "run" / "routing.safetensors")["gates"]) == 3 * 2   # a row is held out


# ------------------------------------------------------------------------------------------------- evaluation

def test_what_a_model_may_write_and_a_row_may_hold_does_not_end_a_run(tmp_path):
    """Ids beyond the vocabulary (an embedding may have more rows), lone surrogates, prompts beyond the
    positions that the model knows."""
    shutil.copytree(TOY, tmp_path / "m")
    config = json.loads((TOY / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": 1032,
                                                                     "max_position_embeddings": 90}))
    weights = load_file(TOY / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    letter = Tokenizer.from_file(TOY).encode(" A")[0]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, 3 * embedding[letter].expand(8, -1)])
    save_file(weights, tmp_path / "m" / "model.safetensors")
    rows, _ = data.load_rows("med", "test", "toy", limit=40)
    rows[0]["question"] += " \ud83d" + " very long" * 100
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    main("--eval-only", tmp_path / "m", "--task", "med", "--eval-data", path, "--out", tmp_path / "out")
    after = json.loads((tmp_path / "out" / "results.json").read_text())["after"]
    assert after["# too long"] == 1 and 0 < after["# not UTF-8"] <= after["# no letter"] < 40


def test_evaluations_in_one_directory_have_a_line_each(tmp_path):
    for task in ("med", "sql"):
        main("--eval-only", "toy", "--task", task, "--data", "toy", "--eval-data", "toy", "--eval-limit", "3",
             "--out", tmp_path / "out", "--overwrite")
    table = tmp_path / "results.csv"
    assert [row["task"] for row in csv.DictReader(table.read_text().splitlines())] == ["med", "sql"]
    table.chmod(0o664)                                          # of a group that shares it
    main("--eval-only", "toy", "--task", "med", "--eval-data", "toy", "--eval-limit", "3",
         "--out", tmp_path / "b")
    assert table.stat().st_mode & 0o777 == 0o664 and len(table.read_text().splitlines()) == 4


def test_references_that_do_not_run_are_said_to(tmp_path, capsys):
    rows, _ = data.load_rows("sql", "test", "toy", limit=4)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r | {"sql_context": "CREATE TABEL"}) for r in rows))
    main("--eval-only", "toy", "--task", "sql", "--eval-data", path, "--out", tmp_path / "out")
    assert "4 references did not run, and are not compared; the first: context: " in capsys.readouterr().out
    after = json.loads((tmp_path / "out" / "results.json").read_text())["after"]
    assert after["# reference fails"] == 4 and "execution" not in after



def test_rows_of_ones_own_train_and_are_evaluated_by_what_they_ended_with(tmp_path):
    """Text with a template: the tenth that is kept, again by --eval-only; an end that the export names."""
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    rows = [{"messages": [{"role": "user", "content": f"{i} and one?"},
                          {"role": "assistant", "content": f"It is {i + 1}."}]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main("--model", tmp_path / "m", "--task", "text", "--data", tmp_path / "rows.jsonl", "--epochs", 8,
         "--batch-size", 9, "--lr", "1e-3", "--lora-lr", "1e-3", "--ranks", 8, "--eval-every", 12,
         "--export-dtype", "fp32", "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"]["n"] == 3
    assert results["after"]["loss"]["value"] < 0.7 * results["before"]["loss"]["value"]
    assert results["after"]["token accuracy"]["value"] > results["before"]["token accuracy"]["value"]
    main("--eval-only", tmp_path / "run", "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "results.json").read_text())["after"]
    for name in ("loss", "perplexity", "token accuracy", "exact match"):
        assert again[name]["value"] == pytest.approx(results["after"][name]["value"], rel=1e-4)
    with open(tmp_path / "results.csv", newline="") as f:
        first, second = csv.DictReader(f)
    assert float(first["perplexity"]) == pytest.approx(results["after"]["perplexity"]["value"])
    main("--eval-only", tmp_path / "run" / "model", "--task", "text", "--eval-data", tmp_path / "rows.jsonl",
         "--out", tmp_path / "all")
    assert json.loads((tmp_path / "all" / "results.json").read_text())["after"]["loss"]["n"] == 30
    log = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert {"loss", "perplexity"} <= next(r for r in log if "held_out" in r)["held_out"].keys()


def test_another_template_or_other_answers_are_noticed_when_a_run_goes_on(tmp_path, capsys, monkeypatch):
    """The same tokens, but other ones have a loss; the same prompts, but other answers."""
    shutil.copytree(TOY, tmp_path / "m")
    template = tmp_path / "m" / "chat_template.jinja"
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    template.write_text(text)
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    rows = [{"messages": [{"role": "user", "content": f"{i} and one?"},
                          {"role": "assistant", "content": f"It is {i + 1}."}]} for i in range(12)]
    tested = [{"prompt": "a", "completion": "b"}]
    for name, table in (("rows", rows), ("tested", tested)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    stopped = train.Checkpoints.leave_if_asked
    monkeypatch.setattr(train.Checkpoints, "leave_if_asked", lambda self, step: sys.exit(130))
    with pytest.raises(SystemExit):
        main("--model", tmp_path / "m", "--task", "text", "--data", tmp_path / "rows.jsonl", "--eval-data",
             tmp_path / "tested.jsonl", "--batch-size", 4, "--save-every", 1, "--ranks", 4, "--out", tmp_path / "o")
    monkeypatch.setattr(train.Checkpoints, "leave_if_asked", stopped)
    template.write_text(text.replace("{% generation %}{{ m.content }}{% endgeneration %}",
                                     "{{ m.content }}").replace("{{ eos_token }}",
                                                                "{% generation %}{{ eos_token }}{% endgeneration %}"))
    lib.chat.template_of.cache_clear()
    with pytest.raises(SystemExit) as e:
        main("--resume", "--out", tmp_path / "o")
    assert "not what the run in" in str(e.value) and str(e.value).endswith("began with: training rows")
    template.write_text(text)
    lib.chat.template_of.cache_clear()
    (tmp_path / "tested.jsonl").write_text(json.dumps(tested[0] | {"completion": "c"}) + "\n")
    with pytest.raises(SystemExit) as e:
        main("--resume", "--out", tmp_path / "o")
    assert str(e.value).endswith("began with: evaluation rows")


def test_a_row_that_the_template_refuses_ends_the_run_in_one_line(tmp_path):
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    r = run("--model", tmp_path / "m", "--task", "text", "--data", tmp_path / "rows.jsonl", "--out",
            tmp_path / "run")
    assert r.returncode == 1
    assert r.stderr == "error: training row 0 (the first is 0): the chat template fails: roles must alternate\n"
    assert not (tmp_path / "run").exists()

def test_rows_that_cannot_be_encoded_or_answered_are_counted(tmp_path, capsys):
    shutil.copytree(TOY, tmp_path / "m")
    spec = json.loads((TOY / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["\u0103"]                       # byte 3, as in SmolLM2's vocabulary
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(spec))
    rows, _ = data.load_rows("med", "train", "toy", limit=8)
    rows[1]["question"] += "\x03"
    rows[2]["cop"] = None
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    main("--model", tmp_path / "m", "--task", "med", "--data", path, "--eval-data", path, "--epochs", 1,
         "--ranks", 4, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["skipped"] == {
        "training rows that the tokenizer cannot encode": 1, "training rows without an answer": 1,
        "evaluation rows that the tokenizer cannot encode": 1, "evaluation rows without an answer": 1}
    assert "training row 1 is skipped: " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the loop

def test_one_batch_of_8_is_8_batches_of_1_accumulated():
    """Targets of 2 to 6 tokens: a mean of means would be another loss."""
    tokenizer, _ = toy_examples()
    texts = ["a", "one two", "x y z", "Arbu", "Belto Cardo", "SELECT name FROM", "it", "q"]
    examples = [encode(tokenizer, "Say", " " + t, row=i) for i, t in enumerate(texts)]
    assert len({len(e.ids) - e.n_prompt for e in examples}) > 3
    losses, moments = [], []
    for max_tokens in (10 ** 6, 1):
        model = Transformer.from_pretrained("toy", torch.float32)
        torch.manual_seed(0)
        add_experts(model, ranks=(4,))
        optimizer = MoLFAdamW(param_groups(model, lr=1e-3))
        train.train(model, optimizer, examples, flags(epochs=1, batch_size=8, max_tokens=max_tokens),
                    lambda line, record: losses.append(record["loss"]))
        moments.append([s["exp_avg"] for s in optimizer.state.values()])    # after one step: 0.1 gradient
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(list(data.micro_batches(examples, 1))) == 8
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-4, atol=1e-8)

    # the loss by hand: every sequence by itself, summed over target tokens, divided by all of them
    model, total, n = Transformer.from_pretrained("toy", torch.float32), 0.0, 0
    for e in examples:
        logp = model(torch.tensor([e.ids]))[0].log_softmax(-1)
        for i in range(e.n_prompt, len(e.ids)):
            total, n = total - logp[i - 1, e.ids[i]].item(), n + 1
    assert losses[0] == pytest.approx(total / n, abs=1e-5)


def test_the_norm_is_that_of_all_gradients_and_clips_them():
    """Against torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW, over one step whose norm is clipped."""
    _, examples = toy_examples()
    model, plain = (Transformer.from_pretrained("toy", torch.float32) for _ in range(2))
    add_experts(model, ranks=())
    optimizer = MoLFAdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    micro, n = data.to_device(examples, "cpu"), data.count_targets(examples)
    ok = torch.ones((), dtype=torch.bool)
    for max_norm in (0.3, 100.0):
        loss, norm = train.train_step(model, optimizer, [micro], n, max_norm, ok)
        want = plain.loss(*micro) / n
        want.backward()
        want_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        assert (want_norm > 1) and norm.item() == pytest.approx(want_norm.item(), rel=1e-5)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        reference.step()
        reference.zero_grad()
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():        # moments, because Adam's step hardly knows the clipping
        torch.testing.assert_close(moments[name], reference.state[p]["exp_avg_sq"], rtol=1e-3, atol=1e-9)


def test_warm_up_then_cosine_to_zero():
    f = [train.lr_factor(i, 100, 0.1) for i in range(100)]
    assert f[0] == pytest.approx(0.1) and f[9] == f[10] == 1 and f[55] == pytest.approx(0.5)
    assert 0 < f[99] < 1e-3
    assert train.lr_factor(0, 1, 0.1) == 1 and train.lr_factor(0, 5, 0.0) == 1


# ------------------------------------------------------------------------------- killed, stopped and resumed

def test_a_run_with_dropout_that_ended_behind_its_first_evaluation_begins_as_ever(tmp_path, monkeypatch):
    """The first evaluation takes no random numbers, which the resumed run would not take again."""
    args = ["--dropout", 0.3, "--limit", 16, "--epochs", 2, "--eval-limit", 4]
    main(*args, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train", lambda *args: sys.exit(1))
        main(*args, "--out", tmp_path / "cut")
    main("--resume", "--out", tmp_path / "cut")
    for name in ("model/model.safetensors", "routing.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_a_run_resumed_on_a_gpu_has_the_same_losses(method, tmp_path):
    _, examples = toy_examples(14)

    def go(seed, out, start_from=None):
        torch.manual_seed(seed)
        a = flags(method=method, epochs=3, batch_size=4, save_every=5, keep=2, log_every=1, device="cuda")
        model = Transformer.from_pretrained("toy", torch.bfloat16, "cuda")
        add_experts(model, () if method == "fft" else (2, 4), 12, method in ("fft", "molf"))
        optimizer = MoLFAdamW(param_groups(model, 1e-3, 1e-3))
        checkpoints, losses = Checkpoints(out, model, optimizer, a), []
        start = checkpoints.load() if start_from else None
        train.train(model, optimizer, examples, a, lambda _, r: losses.append(r["loss"]),
                    checkpoints=None if start_from else checkpoints, start=start)
        return losses, checkpoints
    losses, checkpoints = go(0, tmp_path)
    checkpoints.files()[-1].unlink()                    # that of the last step: go on from the one before
    again, _ = go(1, tmp_path, True)
    assert len(losses) == 12 and again == pytest.approx(losses[10:], rel=0.02)


CHILD = """import os, signal, sys
sys.path.insert(0, {root!r})
import lib.checkpoints, train
write, count = lib.checkpoints.write_safely, [0]
def dying(path, content):
    count[0] += 1
    if count[0] == {n}:
        def content(temporary):
            open(temporary, "wb").write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
lib.checkpoints.write_safely = dying
train.main(sys.argv[1:])
"""
RUN = ["--limit", "16", "--epochs", "8", "--batch-size", "4", "--eval-limit", "4", "--score", "random",
       "--device", "cpu", "--save-every", "1", "--log-every", "100"]


def test_twenty_kills_lose_at_most_the_step_they_fall_into(tmp_path):
    """kill -9 at random moments, and in the middle of a write. Every restart goes on; the end is the same."""
    main(*RUN, "--out", tmp_path / "whole")
    rng, done, steps = random.Random(1), tmp_path / "killed" / "results.json", []
    start = [sys.executable, "-c"]
    for i in range(20):
        n = rng.randint(1, 3) if i % 2 else 10 ** 6                         # odd: in the n-th write
        command = [*start, CHILD.format(root=str(ROOT), n=n), *RUN, "--out", tmp_path / "killed"]
        command += ["--resume"] if i else []
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        before = [f.name for f in (tmp_path / "killed" / "checkpoints").glob("step-*.safetensors")]
        if not i % 2:
            for line in child.stdout:                                       # it has begun to train
                if line.startswith(("going on", "no checkpoint", "molf on toy")):
                    break
            time.sleep(rng.random() * 0.3)
            child.kill()
        out = child.communicate(timeout=120)[0]
        assert child.returncode in (-signal.SIGKILL, 0), out
        after = [f.name for f in (tmp_path / "killed" / "checkpoints").glob("step-*.safetensors")]
        assert done.exists() or max(after, default="") >= max(before, default="")
        steps.append(max(after, default="finished" if done.exists() else "none"))
        if done.exists():
            break
    else:
        main("--resume", "--out", tmp_path / "killed")
    assert len(set(steps)) > 4, steps
    for name in ("model/model.safetensors", "routing.safetensors", "predictions.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    assert not (tmp_path / "killed" / "checkpoints").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_leaves(number, code, tmp_path):
    command = [sys.executable, ROOT / "train.py", *RUN, "--epochs", "400", "--save-every", "1000"]
    child = subprocess.Popen([*command, "--out", tmp_path], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"},
                             preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # nohup: ignored
    for line in child.stdout:
        if line.startswith("step"):
            child.send_signal(number)
            break
    out = child.communicate(timeout=120)[0]
    assert child.returncode == code and "--resume --out" in out
    (file,) = (tmp_path / "checkpoints").iterdir()
    step = int(file.stem.removeprefix("step-"))
    with safe_open(file, "pt") as f:
        assert f.metadata()["step"] == str(step) and len(f.get_tensor("history.gates")) == step


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    limited = f"""import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import train
class Late(train.Checkpoints):
    def save(self, step, history):
        if step == 3:       # no file may grow beyond 1 MB
            resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
        super().save(step, history)
train.Checkpoints = Late; train.main(sys.argv[1:])"""
    command = [sys.executable, "-c", limited, *RUN, "--out", tmp_path / "b"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    whole = tmp_path / "b" / "checkpoints" / "step-000000002.safetensors"
    assert result.returncode == 1 and result.stderr.startswith("error: ") and str(whole) in result.stderr
    assert "File too large" in result.stderr and list(whole.parent.iterdir()) == [whole]
    main("--resume", "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "results.json").read_text())["after"]["ES"]["n"] == 4


def test_an_unfinished_run_is_not_begun_anew_by_mistake(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000001.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="an unfinished run: --resume goes on, --overwrite starts anew"):
        main("--limit", 8, "--out", tmp_path)


def test_to_resume_what_is_not_a_run_is_refused(tmp_path, capsys):
    for folder in ("nowhere", "empty", "broken"):
        if folder != "nowhere":
            (tmp_path / folder).mkdir()
        if folder == "broken":
            (tmp_path / folder / "config.json").write_text("{")
        with pytest.raises(SystemExit) as e:
            main("--resume", "--out", tmp_path / folder)
        assert e.value.code == 2 and "has no config.json of a run" in capsys.readouterr().err


def stopped_run(tmp_path, *args):
    """A run in tmp_path/run that was stopped after its fifth step."""
    class Stopping(Checkpoints):
        def save(self, step, history):
            super().save(step, history)
            self.asked = signal.SIGTERM if step == 5 else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Checkpoints", Stopping)
        with pytest.raises(SystemExit) as e:
            main(*args, "--epochs", 3, "--batch-size", 4, "--save-every", 5, "--out", tmp_path / "run")
    assert e.value.code == 143


@pytest.mark.parametrize("change, named", [
    (lambda rows: rows[::-1], "training rows, evaluation rows"), (lambda rows: rows[:-1], "training rows"),
    (lambda rows: rows + rows[:1], "training rows"), (None, "base model, tokenizer")])
def test_to_resume_with_other_rows_or_another_model_is_refused_by_name(change, named, tmp_path):
    rows, _ = data.load_rows("fact", "train", "toy", limit=16)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    shutil.copytree(TOY, tmp_path / "m")
    stopped_run(tmp_path, "--model", tmp_path / "m", "--ranks", 4, "--data", path)
    if change:
        path.write_text(json.dumps(change(rows)))
    else:
        tokenizer = tmp_path / "m" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
        state = {name: t.float() for name, t in load_file(TOY / "model.safetensors").items()}
        save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(SystemExit, match=f"not what the run in .* began with: {named}"):
        main("--resume", "--out", tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_nothing_of_an_overwritten_run_is_left_and_a_linked_folder_is_emptied(tmp_path):
    """A run killed while it trains has no model/: it cannot be scored, or speak, with the old one."""
    out, disk = tmp_path / "run", tmp_path / "disk"
    main("--limit", 8, "--epochs", 1, "--out", out)
    disk.mkdir()
    (out / "checkpoints").symlink_to(disk)
    (disk / "step-000000999.safetensors").write_bytes(b"of the old run")
    stopped_run(tmp_path, "--overwrite", "--limit", 16)
    assert {f.name for f in out.iterdir()} == {"config.json", "before.json", "log.jsonl", "checkpoints"}
    assert [f.name for f in disk.iterdir()] == ["step-000000005.safetensors"]
    with pytest.raises(SystemExit) as e:
        main("--eval-only", out)
    assert e.value.code == 2
    main("--resume", "--out", out)
    assert (out / "checkpoints").is_symlink() and list(disk.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    stopped_run(tmp_path, "--limit", 16)
    other = tmp_path / "other"
    main("--limit", 16, "--epochs", 1, "--lr", 5e-4, "--out", other)
    (other / "results.json").unlink()
    shutil.copytree(tmp_path / "run" / "checkpoints", other / "checkpoints")
    with pytest.raises(SystemExit, match="holds checkpoints of another run"):
        main("--resume", "--out", other)


def test_to_resume_with_other_flags_is_refused(tmp_path, capsys):
    main("--limit", 8, "--epochs", 1, "--out", tmp_path)
    with pytest.raises(SystemExit) as e:
        main("--resume", "--out", tmp_path, "--lr", 3e-3, "--log-every", 7)
    assert e.value.code == 2 and "so --lr must stay as they were" in capsys.readouterr().err
    for extra in (["--overwrite"], ["--eval-only", tmp_path]):
        with pytest.raises(SystemExit) as e:
            main("--resume", "--out", tmp_path, *extra)
        assert e.value.code == 2 and "neither --eval-only nor --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="a finished run"):             # the same flags, said again
        main("--resume", "--out", tmp_path, "--model", TOY, "--limit", 8)
    with pytest.raises(SystemExit) as e:
        main("--resume")
    assert e.value.code == 2 and "--resume wants --out DIR" in capsys.readouterr().err


def test_a_first_loss_like_that_of_guessing_is_a_warning(capsys):
    _, examples = toy_examples()
    for std, warned in ((0.01, True), (None, False)):
        model = Transformer.from_pretrained("toy", torch.float32)
        if std:
            for p in model.parameters():
                torch.nn.init.normal_(p, std=std) if p.dim() > 1 else None
        add_experts(model, ranks=())
        train.train(model, MoLFAdamW(param_groups(model)), examples, flags(epochs=1))
        assert ("warning: the first loss is near ln(1024)" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("ranks", [(), (4,)])
def test_the_log_says_which_share_of_the_weights_changed(ranks):
    """In bf16 a step of 1e-9 rounds to nothing, one of 1e-2 to something nearly everywhere."""
    _, examples = toy_examples()
    for lr, low, high in ((1e-9, 0.0, 0.01), (1e-2, 0.9, 1.0)):
        model, seen = Transformer.from_pretrained("toy", torch.bfloat16), []
        start = {n: p.clone() for n, p in model.named_parameters() if "_proj.weight" in n}
        add_experts(model, ranks)
        optimizer = MoLFAdamW(param_groups(model, lr=lr, lora_lr=lr))
        train.train(model, optimizer, examples, flags(epochs=1), lambda _, r: seen.append(r["changed"]))
        now = dict(model.named_parameters())
        want = torch.cat([(now[n] != p)[::16].flatten() for n, p in start.items()]).float().mean()
        assert seen == [pytest.approx(want.item())] and low <= want <= high


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("args, message", [
    (["--ranks", "0"], "--ranks must be at least 1"), (["--top-k", "3"], "has 2 experts"),
    (["--method", "fft", "--top-k", "2"], "has 1 experts"),
    (["--method", "fft", "--ranks", "4"], "no LoRA expert"),
    (["--score", "best"], "invalid choice: 'best'"), (["--learning-rate", "1"], "unrecognized arguments"),
    (["--epochs", "0"], "--epochs must be at least 1"), (["--device", "gpu"], "--device gpu: "),
    (["--alpha", "-1"], "--alpha and --clip must be above 0"), (["--lr", "-1"], "can't be negative"),
    (["--dtype", "float16"], "invalid choice: 'float16'"), (["--device", "meta"], "--device meta: "),
    (["--task", "med", "--data", "rows.jsonl"], "--data rows.jsonl wants --eval-data FILE"),
    (["--task", "text"], "--task text wants --data FILE, rows of your own"),
    (["--task", "text", "--data", "f", "--eval-data", "hub"], "there are no official rows of text"),
    (["--eval-only", "m", "--model", "n"], "names the model"),
    (["--eval-only", "m", "--dry-run"], "dry-run")])
def test_wrong_usage_is_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(args)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_a_gpu_that_cuda_cannot_use_is_an_error_and_no_run_on_the_cpu(monkeypatch, capsys):
    def fails(*sizes, device):
        raise RuntimeError(f"{device}: unknown error")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)          # as the driver says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(SystemExit) as e:
        train.parse_args([])
    assert e.value.code == 2
    message = "error: --device cuda: cuda: unknown error (--device cpu needs no GPU)\n"
    assert message in capsys.readouterr().err


def broken(tmp_path, file, change):
    shutil.copytree(TOY, tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return tmp_path / "m"


@pytest.mark.parametrize("make, message", [
    (lambda t: ["--model", t / "nowhere"], "no directory"),
    (lambda t: ["--model", broken(t, "config.json", {"model_type": "llama"})], "'llama' is not supported"),
    (lambda t: ["--model", broken(t, "tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}})],
     "Metaspace is not supported"),
    (lambda t: ["--model", broken(t, "config.json", {"vocab_size": 1000})],
     "the tokenizer has ids up to 1023, but the embedding has 1000 rows"),
    (lambda t: ["--model", "nobody/nothing"], "HF_TOKEN"),
    (lambda t: (t / "adapter_config.json").write_text("{}") and ["--model", t], "is an adapter, not a model"),
    (lambda t: ["--data", t / "none.jsonl"], "no file"),
    (lambda t: ["--eval-only", t / "nowhere"], "no directory"),
    (lambda t: (t / "file").write_text("") and [] or ["--out", t / "file" / "x"], "Not a directory"),
    (lambda t: ["--eval-only", "runs/none"], "no directory runs/none, and cannot download"),
    (lambda t: (t / "r.csv").write_text("") and [] or ["--data", t / "r.csv"], "read from .json, .jsonl"),
    (lambda t: (t / "results.csv").write_text("a,b\n") and [], "results.csv has other columns"),
    (lambda t: ["--task", "med", "--limit", "1", "--eval-every", "1"], "is left of 1: 1 are held out"),
    (lambda t: ["--max-length", "3"], "no training row is left of 320: 0 are held out, 320 longer than")])
def test_bad_input_is_one_clear_line_and_exit_code_1(make, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as e:        # sys.exit of a text prints it and leaves with exit code 1
        main("--out", tmp_path / "out", *make(tmp_path))
    assert message in e.value.code and e.value.code.startswith("error: ") and "\n" not in e.value.code
    assert not (tmp_path / "out").exists()


def test_long_sequences_are_skipped_and_counted(capsys):
    main("--max-length", 8, "--dry-run")
    tokenizer, examples = toy_examples(320)
    n = sum(len(e.ids) > 8 for e in examples)
    assert 0 < n < 320 and f"skipped {n} training rows longer than --max-length 8" in capsys.readouterr().out


def test_after_a_loss_that_is_not_finite_nothing_moves(monkeypatch):
    """Whenever it is noticed: here six steps later, at the log."""
    _, examples = toy_examples()
    model = Transformer.from_pretrained("toy", torch.float32)
    add_experts(model, ranks=(4,))
    optimizer = MoLFAdamW(param_groups(model))
    loss, calls, good = model.loss, [], []

    def poisoned(*args):
        calls.append(1)
        if len(calls) == 4:
            tensors = [*model.parameters(), *optimizer.state[model.head].values()]
            good.extend(t.detach().clone() for t in tensors)
        return loss(*args) * (math.nan if len(calls) == 4 else 1.0)
    monkeypatch.setattr(model, "loss", poisoned)
    a = flags(epochs=9, batch_size=4)
    with pytest.raises(FloatingPointError, match=r"stopped at step 4: loss nan.*rows \d") as e:
        train.train(model, optimizer, examples, a)
    assert len(calls) == 10
    now = [*model.parameters(), *optimizer.state[model.head].values()]
    assert all(torch.equal(p, q) for p, q in zip(now, good, strict=True))
    assert str(e.value).endswith(", ".join(str(x.row) for x in data.batch_of(3, examples, a)))


def test_a_run_that_diverges_leaves_its_last_good_model(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: stopped at step .*last-good"):
        main("--lr", 1e30, "--limit", 64, "--epochs", 2, "--out", tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "before.json", "log.jsonl", "last-good"}
    assert all(t.isfinite().all() for t in load_file(tmp_path / "last-good" / "model.safetensors").values())
    monkeypatch.setitem(train.SCORES, "epd", lambda e: e.lr * math.nan)
    with pytest.raises(SystemExit, match="rule epd gave a score that is not finite"):
        main("--limit", 8, "--epochs", 1, "--out", tmp_path)
    monkeypatch.setitem(train.SCORES, "epd", molf.epd)
    monkeypatch.setitem(train.ROUTES, "topk", lambda scores, *_: scores * math.nan)
    with pytest.raises(SystemExit, match="route topk gave a gate that is not from 0 to 1 by step 1"):
        main("--limit", 8, "--epochs", 1, "--out", tmp_path)


def test_bf16_trains_and_exports_the_trained_weights_bit_for_bit(tmp_path):
    """The default on a GPU: bf16 weights and gradients of W, fp32 masters, experts and moments."""
    for method in ("molf", "fft", "lora"):
        out = tmp_path / method
        main("--dtype", "bfloat16", "--method", method, "--limit", 32, "--epochs", 20, "--out", out)
        results = json.loads((out / "results.json").read_text())
        assert results["before"]["ES"]["value"] < 0.1 and results["after"]["ES"]["value"] > 0.5
        trained, exported = results["loss"].values()
        assert trained == exported if method != "lora" else trained == pytest.approx(exported, rel=0.2)


def test_packed_layout_on_a_device_is_that_of_its_lengths():
    layout = Packed([2, 3, 1])
    assert layout.seq.tolist() == [0, 0, 1, 1, 1, 2] and layout.pos.tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.cu_seqlens.tolist() == [0, 2, 5, 6] and layout.max_len == 3


# ------------------------------------------------------------------------------- what may go wrong on a disk

def no_space(monkeypatch, name):
    """From now on a file whose path ends so cannot be written."""
    replace = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)
    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("name", [
    "step-000000010.safetensors", "routing.safetensors", "model/model.safetensors", "model/config.json",
    "model/tokenizer.json", "predictions.jsonl", "results.csv", "results.json"])
def test_every_error_of_a_run_names_the_last_whole_checkpoint_and_resume_goes_on(name, tmp_path, monkeypatch):
    args = ["--limit", 16, "--epochs", 3, "--batch-size", 4, "--save-every", 5, "--out", tmp_path / "run"]
    main(*args[:-1], tmp_path / "whole")
    copyfile = shutil.copyfile

    def full_copy(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        copyfile(source, target)
    with monkeypatch.context() as patch:
        no_space(patch, name)
        patch.setattr(shutil, "copyfile", full_copy)
        with pytest.raises(SystemExit) as e:
            main(*args)
    step = 5 if name.startswith("step") else 12
    whole = tmp_path / "run" / "checkpoints" / f"step-{step:09d}.safetensors"
    assert e.value.code.startswith("error: ") and "No space left on device" in e.value.code
    assert e.value.code.endswith(f"; the last whole checkpoint: {whole}") and "\n" not in e.value.code
    main("--resume", "--out", tmp_path / "run")
    for file in ("model/model.safetensors", "routing.safetensors", "predictions.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    with open(tmp_path / "results.csv") as f:
        assert [row["run"] for row in csv.DictReader(f)] == ["whole", "run"]


def test_a_log_that_cannot_be_written_names_the_last_whole_checkpoint(tmp_path, monkeypatch):
    def full(*args, file=None, flush=False):
        if file and json.loads(args[0])["step"] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        print(*args, file=file, flush=flush)
    monkeypatch.setattr(train, "print", full, raising=False)
    with pytest.raises(SystemExit, match=r"No space left on device; the last whole .*step-000000005.safe"):
        main("--limit", 16, "--epochs", 3, "--batch-size", 4, "--save-every", 5, "--out", tmp_path)


def test_without_before_the_model_is_evaluated_once_also_by_a_resumed_run(tmp_path, monkeypatch, capsys):
    asked = []
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: asked.append(1) or evaluate(*args))
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "whole")
    assert len(asked) == 2 and "before     after" in capsys.readouterr().out
    main("--limit", 8, "--epochs", 1, "--no-before", "--out", tmp_path / "after")
    assert len(asked) == 3 and "  before  " not in capsys.readouterr().out
    whole, after = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "after"))
    assert list(whole) == ["before", *after] and whole["after"]["ES"] == after["after"]["ES"]
    stopped_run(tmp_path, "--limit", 16, "--no-before")
    assert not (tmp_path / "run" / "before.json").exists()
    main("--resume", "--out", tmp_path / "run")
    assert len(asked) == 4
    with pytest.raises(SystemExit) as e:
        main("--eval-only", tmp_path / "run", "--no-before")
    assert e.value.code == 2 and "evaluates what there is" in capsys.readouterr().err


def test_a_diverged_run_names_no_half_file_as_its_checkpoint(tmp_path):
    class Cut(Checkpoints):
        def save(self, step, history):
            super().save(step, history)
            (self.folder / "step-000000099.safetensors.tmp").write_bytes(b"half")
            self.optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Checkpoints", Cut)
        with pytest.raises(SystemExit) as e:
            main("--method", "fft", "--limit", 16, "--epochs", 3, "--batch-size", 4, "--save-every", 5,
                 "--out", tmp_path)
    whole = tmp_path / "checkpoints" / "step-000000005.safetensors"
    assert e.value.code.endswith(f"{tmp_path / 'last-good'}; the last whole checkpoint: {whole}")


@pytest.mark.parametrize("damage, file", [
    (lambda path: path.write_text("{"), "before.json"), (lambda path: path.write_text("{}"), "before.json"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b'"n": 16', b'"n": 17')), "before.json"),
    (lambda path: path.write_bytes(b"\xff\x00" * 50), "before.json"),
    (lambda path: path.unlink() or path.mkdir(), "log.jsonl")])
def test_a_damaged_file_of_a_stopped_run_is_named(damage, file, tmp_path):
    stopped_run(tmp_path, "--limit", 16)
    damage(tmp_path / "run" / file)
    with pytest.raises(SystemExit) as e:
        main("--resume", "--out", tmp_path / "run")
    assert e.value.code.startswith("error: ") and str(tmp_path / "run" / file) in e.value.code
    assert "\n" not in e.value.code
    if file == "before.json":
        assert "is damaged: without it, the model is evaluated again" in e.value.code
        (tmp_path / "run" / file).unlink()
        main("--resume", "--out", tmp_path / "run")


def test_a_log_with_a_line_of_garbage_does_not_stop_a_run(tmp_path, capsys):
    stopped_run(tmp_path, "--limit", 16)
    path = tmp_path / "run" / "log.jsonl"
    path.write_bytes(b"\0\xff\n" + path.read_bytes() + b'{"step": 6, "lo')
    main("--resume", "--out", tmp_path / "run")
    assert f"{path} line 1 cannot be read and is left out" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5, 6, 10, 12]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_text("{"), lambda path: path.unlink() or path.mkdir(),
    lambda path: path.write_text('{"flags": [1]}'),
    lambda path: path.write_text(path.read_text().replace('"fact"', '"fict"')),
    lambda path: path.write_text(path.read_text().replace('"seed": 42', '"seed": 43'))])
def test_a_run_whose_config_is_damaged_is_neither_resumed_nor_evaluated(damage, tmp_path, capsys):
    stopped_run(tmp_path, "--limit", 16)
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "done")
    for folder, args, message in (("run", ["--resume", "--out"], "no config.json of a run, or a damaged one"),
                                  ("done", ["--eval-only"], "config.json is damaged or missing")):
        damage(tmp_path / folder / "config.json")
        with pytest.raises(SystemExit) as e:
            main(*args, tmp_path / folder)
        assert e.value.code == 2 and message in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_run_of_a_task_that_is_gone_is_not_evaluated(tmp_path, monkeypatch, capsys):
    main("--limit", 8, "--epochs", 1, "--out", tmp_path / "run")
    tasks = {k: v for k, v in data.TASKS.items() if k != "fact"}
    monkeypatch.setattr(data, "TASKS", tasks)
    with pytest.raises(SystemExit) as e:
        main("--eval-only", tmp_path / "run")
    assert e.value.code == 2 and "--task fact, which is not here any more" in capsys.readouterr().err


def test_where_the_only_checkpoint_is_damaged_the_run_starts_anew_and_says_so(tmp_path, capsys):
    stopped_run(tmp_path, "--limit", 16)
    (file,) = (tmp_path / "run" / "checkpoints").iterdir()
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    main("--resume", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"{file} is not whole" in said and "no whole checkpoint: starting anew" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 5, 10, 12]


@pytest.mark.parametrize("args", [["--limit", 8, "--epochs", 1], ["--eval-only", "toy", "--eval-limit", 8]])
def test_a_kill_before_the_results_neither_loses_nor_doubles_a_line(args, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    def lines():
        with open(tmp_path / "results.csv") as f:
            return [row["run"] for row in csv.DictReader(f)]
    save = lib.report.save_safely
    again = ["--resume"] if "--limit" in args else args
    for name, left in (("results.csv", []), ("results.json", ["run"])):
        monkeypatch.setattr(lib.report, "save_safely",
                            lambda path, content: (killed if path.name == name else save)(path, content))
        with pytest.raises(Killed):
            main(*(args if name == "results.csv" else again), "--out", tmp_path / "run")
        assert not (tmp_path / "run" / "results.json").exists()
        if left:
            assert lines() == left
    monkeypatch.undo()
    time.sleep(1.1)                                     # another second is another date
    main(*again, "--out", tmp_path / "run")
    assert lines() == ["run"]
    main(*args, "--out", tmp_path / "other")
    assert lines() == ["run", "other"]
    if "--limit" in args:                               # a run of its own, with a line of its own
        main(*args, "--out", tmp_path / "run", "--overwrite")
        assert lines() == ["run", "other", "run"]


def test_a_torn_table_of_results_stops_no_run_and_shifts_no_line(tmp_path, capsys):
    main("--eval-only", "toy", "--eval-limit", 4, "--out", tmp_path / "a")
    table = tmp_path / "results.csv"
    whole = table.read_bytes()
    header = whole.splitlines(True)[0]
    torn = {b"": ["b"], header[:30]: ["b"], header[:-2]: ["b"], header: ["b"], whole[:-2]: ["a", "b"],
            whole + b"2026-11-25 10:00:00,x,fa": ["a", "b"], whole + b'2026-11-25 10:00:00,"x': ["a", "b"]}
    for content, runs in torn.items():
        table.write_bytes(content)
        main("--eval-only", "toy", "--eval-limit", 4, "--out", tmp_path / "b", "--overwrite")
        with open(table, newline="") as f:
            rows = list(csv.DictReader(f))
        assert [row["run"] for row in rows] == runs
        assert all(None not in row and None not in row.values() and row["ES"] for row in rows)
        said = "was cut off and is left out" in capsys.readouterr().out
        assert said == content.endswith((b",fa", b',"x'))
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match="results.csv cannot be read .*: move it away"):
        main("--limit", 8, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


ADD = """import sys; sys.path.insert(0, {root!r})
import pathlib, train
from lib.report import add_to_table
a = train.parse_args(["--device", "cpu"])
after = {{"metrics": {{"ES": {{"value": 0.5}}}}, "seconds": 1.0}}
for i in range(30):
    add_to_table(pathlib.Path(sys.argv[1]) / f"{{sys.argv[2]}}-{{i}}", a, "today", {{"after": after}}, 1, 1)
    print(i, flush=True)
"""


def test_runs_that_end_at_once_lose_no_line_and_a_kill_no_table(tmp_path):
    """Three processes add 30 lines each; a fourth is killed on the way."""
    children = [subprocess.Popen([sys.executable, "-c", ADD.format(root=str(ROOT)), tmp_path, name],
                                 stdout=subprocess.PIPE, text=True) for name in "abcd"]
    for _ in range(10):
        said = children[3].stdout.readline()
    children[3].kill()
    for child in children:
        child.communicate(timeout=120)
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    runs = {row["run"] for row in rows}
    assert len(runs) == len(rows) and {row["ES"] for row in rows} == {"0.5"}
    assert {f"{name}-{i}" for name in "abc" for i in range(30)} <= runs
    assert {f"d-{i}" for i in range(int(said) + 1)} <= runs


def test_a_place_that_cannot_be_written_to_is_noticed_before_anything_is_loaded(monkeypatch):
    """As another user where root runs the tests, since root may write anywhere."""
    monkeypatch.setattr(train, "find_checkpoint", lambda *_: pytest.fail("loaded"))
    folder = Path(tempfile.mkdtemp())
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)
    (folder / "results.csv").write_text("date,run\r\n")
    (folder / "mine").mkdir()
    folder.chmod(0o555)
    (folder / "mine").chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        for out in ("new", "a/b/new", "mine", "run"):       # for the last, results.csv
            with pytest.raises(SystemExit, match="^error: .*Permission denied"):
                main("--limit", 8, "--out", folder / out)
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        (folder / "mine").chmod(0o755)
        shutil.rmtree(folder)


def test_a_file_or_a_dangling_link_in_the_place_of_a_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_checkpoint", lambda *_: pytest.fail("loaded"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name in ("checkpoints", "model"):
        (tmp_path / f"of-{name}").mkdir()
        (tmp_path / f"of-{name}" / name).write_text("")
    for out in ("link", "file", "of-checkpoints", "of-model"):
        with pytest.raises(SystemExit, match=f"^error: --out .*{out}.* is not a directory$"):
            main("--limit", 8, "--out", tmp_path / out)


def test_a_fifo_in_a_models_directory_ends_a_run_before_it_trains(tmp_path):
    shutil.copytree(TOY, tmp_path / "m")
    os.mkfifo(tmp_path / "m" / "vocab.json")
    result = run("--model", tmp_path / "m", "--data", "toy", "--out", tmp_path / "run")
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert f"{tmp_path / 'm' / 'vocab.json'} is not a file" in result.stderr


def test_a_run_with_relative_paths_is_resumed_and_evaluated_from_elsewhere(tmp_path, monkeypatch):
    shutil.copytree(TOY, tmp_path / "m")
    rows, _ = data.load_rows("fact", "train", "toy", limit=16)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    stopped_run(Path("."), "--model", "m", "--ranks", 4, "--data", "rows.json", "--eval-data", "rows.json",
                "--method", "lora")
    given = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert given["model"] == str(tmp_path / "m") and given["eval_data"] == str(tmp_path / "rows.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(SystemExit) as e:
        main("--resume", "--out", "../run", "--data", "toy")
    assert e.value.code == 2
    main("--resume", "--out", "../run", "--data", "../rows.json")
    main("--eval-only", "../run", "--out", "again")
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "m")
    first, again = (json.loads(Path(p, "results.json").read_text())["after"] for p in ("../run", "again"))
    assert first["ES"] == again["ES"] and first["ES"]["n"] == 16


@pytest.mark.parametrize("missing", ["fcntl", "resource"])
@pytest.mark.parametrize("program", ["train.py", "model.py", "data.py"])
def test_a_system_without_posix_modules_is_told_in_one_line(program, missing):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['x', '--help']; " \
           f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / program)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.startswith("error: this needs Linux or macOS")
    assert result.stderr.count("\n") == 1 and missing in result.stderr


# ------------------------------------------------------------ signals and broken pipes, at any time of a run

STOPPED = """import os, signal, sys; sys.path.insert(0, {root!r})
import train
def at(name, n, act):
    real, count = getattr(train, name), [0]
    def acting(*args, **kwargs):
        count[0] += 1
        if count[0] == n:
            act()
        return real(*args, **kwargs)
    setattr(train, name, acting)
at({name!r}, {n}, lambda: os.kill(os.getpid(), signal.{signal}))
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name, n", [("read_data", 1), ("evaluate", 1), ("evaluate", 2), ("export", 1),
                                     ("save_results", 1)])
@pytest.mark.parametrize("number, code", [("SIGTERM", -signal.SIGTERM), ("SIGINT", 130)])
def test_a_signal_outside_the_training_is_not_swallowed(number, code, name, n, tmp_path):
    """SIGTERM kills, which a shell shows as 143. What was trained is not lost."""
    out = tmp_path / "run"
    code_of_child = STOPPED.format(root=str(ROOT), name=name, n=n, signal=number)
    command = [sys.executable, "-c", code_of_child, *RUN[:-4], "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert result.returncode == code
    assert result.stderr == ("" if code < 0 else "stopped by Ctrl-C\n")
    trained = n == 2 or name in ("export", "save_results")
    assert len(list(out.glob("checkpoints/*"))) == trained
    if trained:
        main("--resume", "--out", out)
        assert (out / "results.json").exists()


def head(lines, command):
    """`command | head -n lines` -> the command's exit code and stderr."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    for _ in range(lines):
        child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read()
    return child.wait(timeout=120), said


def test_a_reader_of_stdout_that_leaves_is_as_a_signal(tmp_path):
    """While it trains: a checkpoint, then 141, which is what shells give to SIGPIPE."""
    command = [sys.executable, ROOT / "train.py", *RUN, "--epochs", "4000", "--save-every", "10000",
               "--log-every", "1", "--out", tmp_path]
    code, said = head(6, command)
    (file,) = (tmp_path / "checkpoints").iterdir()
    step = int(file.stem.removeprefix("step-"))
    assert code == 141 and said == f"stopped after step {step}: --resume --out {tmp_path} goes on from here\n"
    with safe_open(file, "pt") as f:
        assert len(f.get_tensor("history.gates")) == step


@pytest.mark.parametrize("python", [[], ["-u"]])
@pytest.mark.parametrize("args", [["--dry-run"], ["--eval-only", "toy", "--eval-limit", "4"],
                                  ["--limit", "8", "--epochs", "1"]])
def test_a_reader_that_leaves_before_or_after_the_training_ends_a_program_in_one_line(args, python, tmp_path):
    code, said = head(0, [sys.executable, *python, ROOT / "train.py", "--device", "cpu", *args,
                          "--out", tmp_path / "run"])
    assert code == 141 and said.count("\n") == 1 and said.startswith("stopped")


def test_a_pure_bf16_run_keeps_nothing_in_fp32_and_goes_on(tmp_path):
    flags = ["--task", "med", "--limit", "32", "--epochs", "2", "--batch-size", "8", "--pure-bf16", "--device",
             "cpu", "--no-before", "--eval-limit", "2"]
    train.main([*flags, "--out", str(tmp_path / "whole"), "--save-every", "3", "--keep", "9"])
    out = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        saved = train.Checkpoints.save

        def save_and_stop(self, step, history):
            saved(self, step, history)
            for state in self.optimizer.state.values():
                assert all(x.dtype == torch.bfloat16 for x in state.values())
            assert all(p.dtype == torch.bfloat16 for p in self.model.parameters())
            assert not any(layer.folded for _, layer in molf_layers(self.model))
            raise KeyboardInterrupt
        patch.setattr(train.Checkpoints, "save", save_and_stop)
        with pytest.raises(SystemExit):
            train.main([*flags, "--out", str(out), "--save-every", "3"])
    train.main(["--resume", "--out", str(out)])
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("flags", [["--dtype", "float32"], ["--dry-run"]])
def test_pure_bf16_is_refused_where_it_is_not(flags, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--pure-bf16", *flags])
    assert e.value.code == 2 and "--pure-bf16" in capsys.readouterr().err
