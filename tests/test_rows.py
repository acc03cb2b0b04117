"""Which rows of a run train, which are evaluated on, and which are left out and counted."""
import json
import shutil

import pytest
from test_data import CHAT, TEXT, TOY, chat_tokenizer, flags, write

import train
from data import Tokenizer, load_rows
from lib.rows import read_data


def test_without_rows_to_evaluate_on_a_tenth_is_kept_for_that(tmp_path, capsys):
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}"} for i in range(40)]
    path, tokenizer = write(tmp_path / "a.jsonl", rows), Tokenizer.from_file(TOY)
    a = train.parse_args(["--device", "cpu", "--task", "text", "--data", str(path)])
    read = read_data(a, tokenizer)
    asked = [q.row for q in read.questions]
    assert "4 of 40 rows" in capsys.readouterr().out and len(asked) == 4
    kept = [i for i, row in enumerate(rows) if row not in asked]
    assert [e.row for e in read.examples] == kept
    again = train.parse_args(["--device", "cpu", "--task", "text", "--data", str(path), "--seed", "1"])
    assert [q.row for q in read_data(again, tokenizer).questions] != asked
    a.eval_only = "somewhere"                           # the same rows, and none to train on
    again = read_data(a, tokenizer)
    one = write(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(ValueError, match="of a single row none can be kept to evaluate on"):
        read_data(train.parse_args(["--device", "cpu", "--task", "text", "--data", str(one)]), tokenizer)
    assert [q.row for q in again.questions] == asked and again.examples == []


def test_what_a_template_ends_turns_with_ends_a_generation(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    path = write(tmp_path / "a.jsonl", [CHAT, CHAT, TEXT])
    before = list(tokenizer.eos_ids)
    read_data(train.parse_args(["--device", "cpu", "--task", "text", "--data", str(path)]), tokenizer)
    assert tokenizer.eos_ids == before + [tokenizer.control["<|end|>"]]


def test_rows_that_cannot_be_encoded_or_answered_are_left_out_counted_and_said(tmp_path, capsys):
    spec = json.loads((TOY / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["\u0103"]                       # byte 3, as in SmolLM2's vocabulary
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(spec))
    rows, _ = load_rows("med", "train", "toy", limit=8)
    for i in (1, 4):
        rows[i]["question"] += "\x03"
    rows[2]["cop"] = None
    path = write(tmp_path / "rows.jsonl", rows)
    a = flags(task="med", data=path, eval_data=path)
    found = read_data(a, Tokenizer.from_file(tmp_path / "m"))
    assert found.skipped == {
        "training rows that the tokenizer cannot encode": 2, "training rows without an answer": 1,
        "evaluation rows that the tokenizer cannot encode": 2, "evaluation rows without an answer": 1}
    assert len(found.examples) == len(found.questions) == 5 and found.held_out == []
    assert [e.row for e in found.examples] == [0, 2, 4, 5, 6]   # of those with an answer
    printed = capsys.readouterr().out.splitlines()
    assert [p.partition(":")[0] for p in printed] == [
        "training row 1 is skipped", "evaluation row 1 is skipped",
        "skipped 1 training rows without an answer",
        "skipped 2 training rows that the tokenizer cannot encode",
        "skipped 1 evaluation rows without an answer",
        "skipped 2 evaluation rows that the tokenizer cannot encode"]


def test_long_rows_do_not_train_and_limits_are_kept(capsys):
    tokenizer = Tokenizer.from_file(TOY)
    every = read_data(flags(), tokenizer)
    assert len(every.examples) == len(every.questions) == 320 and every.skipped == {}
    short = read_data(flags(max_length=8), tokenizer)
    n = sum(len(e.ids) > 8 for e in every.examples)
    assert 0 < n < 320 and short.examples == [e for e in every.examples if len(e.ids) <= 8]
    assert f"skipped {n} training rows longer than --max-length 8 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no training row is left of 320: 0 are held out, 320 longer than"):
        read_data(flags(max_length=3), tokenizer)
    with pytest.raises(ValueError, match="no training row is left of 1: 1 are held out"):
        read_data(flags(task="med", limit=1, eval_every=1), tokenizer)
    # facts are tested on those that train, other tasks on rows of their own
    for task, n_train, n_test in (("fact", 5, 5), ("med", 5, 200)):
        rows = read_data(flags(task=task, limit=5), tokenizer)
        assert (len(rows.examples), len(rows.questions)) == (n_train, n_test)
    only = read_data(flags(task="sql", eval_only="toy", data="nowhere", eval_limit=7), tokenizer)
    assert only.examples == only.held_out == [] and len(only.questions) == 7


def test_long_rows_are_not_evaluated_but_counted_and_said(capsys):
    """A row is as long as its prompt, or as a prompt and answer that it scores, whichever is longer."""
    tokenizer = Tokenizer.from_file(TOY)
    every = read_data(flags(task="med", limit=40, eval_every=1, eval_limit=50), tokenizer)
    length = lambda q: max(map(len, [q.prompt, *(e.ids for e in q.examples)]))
    limit = sorted(map(length, every.questions))[25]
    n = sum(length(q) > limit for q in every.questions)
    some = read_data(flags(task="med", limit=40, eval_every=1, eval_limit=50, max_length=limit), tokenizer)
    assert 0 < n < 50 and some.questions == [q for q in every.questions if length(q) <= limit]
    assert some.held_out == [p for p in every.held_out if max(length(p[1]), len(p[0].ids)) <= limit]
    assert some.skipped[f"evaluation rows longer than --max-length {limit} tokens"] == n
    assert f"skipped {n} evaluation rows longer than --max-length {limit} tokens" in capsys.readouterr().out
    seven = read_data(flags(task="sql", eval_only="toy", eval_limit=7), tokenizer)
    longest = max(map(length, seven.questions))
    only = read_data(flags(task="sql", eval_only="toy", eval_limit=7, max_length=longest - 1), tokenizer)
    assert sum(only.skipped.values()) == 7 - len(only.questions) > 0
    with pytest.raises(ValueError, match="no row is left to evaluate on"):
        read_data(flags(task="sql", eval_only="toy", eval_limit=7, max_length=3), tokenizer)


def test_held_out_rows_do_not_train_but_facts_do():
    tokenizer = Tokenizer.from_file(TOY)
    for task, n in (("med", 600), ("fact", 320)):
        rows = read_data(flags(task=task, eval_every=5), tokenizer)
        held = {example.row for example, _ in rows.held_out}
        assert len(held) == n // 10 and len(rows.examples) == (n - len(held) if task == "med" else n)
        assert bool(held & {e.row for e in rows.examples}) == (task == "fact")
        assert all(q.prompt == e.ids[:e.n_prompt] for e, q in rows.held_out)
