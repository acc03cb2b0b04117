"""Rows, prompts, packing and batches, and the tasks' metrics by hand."""
import argparse
import gzip
import hashlib
import json
import math
import random
import re
import sqlite3
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_tokenizer import random_text, small       # noqa: F401

import data
import train
from data import (Example, Scored, Tokenizer, Verdict, batch_of, encode, exact_match, execute_pairs,
                  load_rows, micro_batches, pack, read_rows, sql_metrics, to_device)
from lib import sandbox
from lib.evaluate import evaluate, record
from lib.rows import read_data
from model import Transformer
from toy.world import TOY_FACTS, toy_facts, toy_med, toy_sql, toy_world

TOY = Path(__file__).parents[1] / "toy"


# --------------------------------------------------------------------------------------- examples and packing

class Letters:
    """A tokenizer of one id a character, BOS 2 and EOS 1."""
    bos_id, eos_id, eos_ids = 2, 1, [1]

    def encode(self, text):
        return [ord(c) for c in text]


def test_an_example_is_bos_prompt_target_eos_and_the_loss_covers_target_and_eos():
    e = encode(Letters(), "ab", " c", row=7)
    assert e == Example([2, 97, 98, 32, 99, 1], 3, 7)
    no_bos = Letters()
    no_bos.bos_id = None
    with pytest.raises(ValueError, match="row 3: an empty prompt"):
        encode(no_bos, "", "x", row=3)
    assert encode(no_bos, "ab", " c").ids == [97, 98, 32, 99, 1]
    ids, lengths, where, labels = pack([e, encode(Letters(), "x", "yz")])
    assert ids == [2, 97, 98, 32, 99, 1, 2, 120, 121, 122, 1] and lengths == [6, 5]
    assert [(ids[w], y) for w, y in zip(where, labels)] == [(98, 32), (32, 99), (99, 1), (120, 121),
                                                            (121, 122), (122, 1)]


@pytest.mark.parametrize("text", ["a <|endoftext|> b", "<eos>", "<bos>hello<eos>", "<|endoftext|>" * 3])
def test_data_text_never_yields_a_control_token(small, text):
    _, spec, t = small
    control = {a["id"] for a in spec["added_tokens"] if a["special"]} | {t.eos_id}
    example = encode(t, text, text)
    inner = example.ids[t.bos_id is not None:-1]
    assert not set(inner) & control and example.ids[-1] == t.eos_id and example.ids.count(t.eos_id) == 1
    assert t.decode(t.encode(text)) == text


# ------------------------------------------------------------------------------------------------------- rows

ROW = {"requested_rewrite": {"prompt": "The capital of {} is", "subject": "France",
                             "target_new": {"str": "Rome"}, "target_true": {"str": "Paris"}},
       "paraphrase_prompts": ["France is ruled from", "Seat of France:"],
       "neighborhood_prompts": ["Paris lies in"]}


def flags(**changed):
    """Those that read_data looks at, as train.py sets them for the toy."""
    usual = dict(task="fact", data="toy", eval_data="toy", limit=None, eval_limit=None, eval_every=None,
                 eval_only=None, max_length=1024, seed=42)
    return argparse.Namespace(**usual | changed)


def write(path, rows):
    text = "\n".join(json.dumps(r) for r in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else text)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_rows_from_every_kind_of_file(tmp_path, name):
    for split in ("train", "test"):
        assert load_rows("fact", split, write(tmp_path / name, [ROW, ROW, ROW]), limit=2) == ([ROW, ROW], 0)


def test_json_lines_by_the_name_of_json_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b"\n".join([json.dumps(ROW).encode()] * 2) + b"\n")
    assert load_rows("fact", "train", tmp_path / "a.json") == ([ROW, ROW], 0)


def without(*path):
    row = json.loads(json.dumps(ROW))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return row


@pytest.mark.parametrize("rows, message", [
    ([ROW, without("requested_rewrite", "subject")], "line 2: field requested_rewrite.subject is missing"),
    ([without("paraphrase_prompts")], "line 1: field paraphrase_prompts is missing"),
    ([ROW | {"neighborhood_prompts": "one"}], "field neighborhood_prompts is not a list of strings"),
    ([ROW | {"requested_rewrite": ROW["requested_rewrite"] | {"prompt": "no place"}}], "prompt has no {}"),
    ([{"Question": "?", "Context": "x"}], "needed are .*paraphrase_prompts.*; found: Question, Context"),
    ([3], "line 1: fields are missing: this is no JSON object"), ([], "no rows")])
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message) as e:
        load_rows("fact", "train", write(tmp_path / "bad.jsonl", rows))
    assert "bad.jsonl" in str(e.value)


@pytest.mark.parametrize("name, place", [("bad.jsonl", "line 2"), ("bad.jsonl.gz", "line 2"),
                                         ("bad.json", "row 2"), ("bad.parquet", "row 2")])
def test_a_bad_row_is_a_line_where_the_file_has_lines(tmp_path, name, place):
    with pytest.raises(ValueError, match=f"{name} {place}: field cop is 7, not the number of an option"):
        load_rows("med", "train", write(tmp_path / name, [MED, MED | {"cop": 7}]))
    (tmp_path / "gaps.jsonl").write_text("\n\n" + json.dumps(MED | {"cop": 7}))
    with pytest.raises(ValueError, match="gaps.jsonl line 3: field cop is 7"):
        load_rows("med", "train", tmp_path / "gaps.jsonl")


def test_a_file_that_is_missing_or_not_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.json"):
        read_rows(tmp_path / "nowhere.json")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="a.jsonl line 2 cannot be read"):
        read_rows(tmp_path / "a.jsonl")
    cut = gzip.compress(b"{}" * 99)[:-9]
    for name, content in (("b.json", b"[1, 2"), ("c.json", b"x"), ("d.jsonl", b"\xff\xfe"),
                          ("e.parquet", b"PAR1"), ("f.jsonl.gz", cut), ("g.json.gz", b"no gzip")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* cannot be read"):
            read_rows(tmp_path / name)


# ------------------------------------------------------------------------------------------ rows of one's own

TEXT = {"prompt": "Who wrote Emma?", "completion": " Jane Austen"}
CHAT = {"messages": [{"role": "user", "content": "Who wrote Emma?"},
                     {"role": "assistant", "content": "Jane Austen."},
                     {"role": "user", "content": "When?"}, {"role": "assistant", "content": "In 1815."}]}
USER = CHAT["messages"][:1]


def test_rows_of_ones_own_have_either_form_and_lose_other_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT | {"messages": None, "id": 3}, CHAT | {"prompt": "Who"}])
    assert load_rows("text", "train", path) == ([TEXT, CHAT], 0)


@pytest.mark.parametrize("row, why", [
    (TEXT | CHAT,
     "a row has either prompt and completion, or messages; this one has prompt, completion, mess"),
    ({"prompt": "a"}, "a row has either prompt and completion, or messages; this one has prompt"),
    ({}, "a row has either prompt and completion, or messages; this one has no field"),
    (TEXT | {"completion": " \n"}, "field completion is empty"),
    (TEXT | {"completion": ["a"]}, "field completion is not a string, null or absent"),
    ({"messages": "hello"}, "field messages is not a list, null or absent"),
    ({"messages": USER}, "no message is the assistant's, so there is nothing to learn"),
    ({"messages": USER + [{"role": "assistant"}]}, "message 2 has no role and content that are strings"),
    ({"messages": []}, "no message is the assistant's")])
def test_rows_of_ones_own_that_nothing_can_be_learnt_from_are_refused(row, why, tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT, row])
    with pytest.raises(ValueError, match=f"a.jsonl line 2: {why}"):
        load_rows("text", "train", path)


def chat_tokenizer(folder):
    """The toy's tokenizer, with a template that ends a turn by another control token than the toy's EOS."""
    spec = json.loads((Path(TOY) / "tokenizer.json").read_text())
    free = 1 + max([*spec["model"]["vocab"].values(), *(a["id"] for a in spec["added_tokens"])])
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": free, "content": "<|end|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}")
    return Tokenizer.from_file(folder)


def test_a_conversation_is_trained_on_the_assistants_turns_and_asked_for_the_last(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    end, task = tokenizer.control["<|end|>"], data.TASKS["text"]
    example = data.encode_row(tokenizer, task, CHAT, 7)
    plain = lambda text: [end if part == "<|end|>" else tokenizer.encode(part)      # noqa: E731
                          for part in re.split(r"(<\|end\|>)", text) if part]
    flat = lambda parts: sum(([x] if isinstance(x, int) else x for x in parts), [])     # noqa: E731
    text = ("user:Who wrote Emma?<|end|>\nassistant:Jane Austen.<|end|>\nuser:When?<|end|>\n"
            "assistant:In 1815.<|end|>\n")
    assert example.ids == flat(plain(text)) and example.row == 7
    said = tokenizer.decode([example.ids[i] for i in example.targets()])
    assert said == "Jane Austen.In 1815." and example.ids[example.targets()[-1]] == end
    assert data.count_targets([example]) == len(example.targets())
    ids, lengths, where, labels = data.pack([example, example])
    n = len(example.ids)
    assert where == [i + k * n - 1 for k in range(2) for i in example.targets()]
    assert labels == [example.ids[i] for i in example.targets()] * 2 and lengths == [n, n]
    question = data.ask(tokenizer, task, CHAT)
    assert tokenizer.decode(question.prompt).endswith("user:When?\nassistant:")
    assert question.prompt == example.ids[:len(question.prompt)] and question.examples[0].ids == example.ids
    assert example.mask == bytes(i in set(example.targets()) for i in range(n))
    assert task.pair(CHAT) == ("user: Who wrote Emma?\nassistant: Jane Austen.\nuser: When?", "In 1815.")


def test_a_conversation_in_a_row_of_another_task_is_not_looked_at():
    rows, _ = load_rows("med", "train", "toy", limit=1)
    tokenizer, task = Tokenizer.from_file(TOY), data.TASKS["med"]
    for messages in (3, CHAT["messages"]):
        row = rows[0] | {"messages": messages}
        assert data.encode_row(tokenizer, task, row) == data.encode_row(tokenizer, task, rows[0])
        assert data.ask(tokenizer, task, row).prompt == data.ask(tokenizer, task, rows[0]).prompt


def test_tools_travel_with_a_conversation_and_a_table_may_have_empty_columns(tmp_path):
    rows = [CHAT | {"tools": [{"name": "clock"}], "prompt": None, "completion": None},
            TEXT | {"messages": None}]
    path = write(tmp_path / "a.parquet", rows)
    assert load_rows("text", "train", path) == ([CHAT | {"tools": [{"name": "clock"}]}, TEXT], 0)


def test_loss_perplexity_and_accuracy_are_those_of_all_target_tokens():
    """By hand, from the logits of each row by itself."""
    tokenizer, task = Tokenizer.from_file(TOY), data.TASKS["text"]
    facts, _ = load_rows("fact", "train", "toy", limit=12)
    rows = [dict(zip(("prompt", "completion"), data.fact_pair(row))) for row in facts]
    rows[3]["completion"] = " nobody knows that"
    rows[4]["completion"] = data.after_space(facts[4]["requested_rewrite"]["target_true"]["str"])
    rows[5]["completion"] = data.after_space(facts[5]["requested_rewrite"]["target_true"]["str"])
    model = Transformer.from_pretrained("toy", torch.float32)
    questions = [data.ask(tokenizer, task, row) for row in rows]
    result, predictions = evaluate(model, tokenizer, task, questions, 300)
    losses, hits = [], []
    for row in rows:
        e = encode(tokenizer, *task.pair(row))
        with torch.no_grad():
            logp = model(torch.tensor([e.ids]))[0, e.n_prompt - 1:-1].log_softmax(-1)
        target = torch.tensor(e.ids[e.n_prompt:])
        losses += (-logp[torch.arange(len(target)), target]).tolist()
        hits += (logp.argmax(-1) == target).tolist()
    value = {name: x["value"] for name, x in result["metrics"].items()}
    loss = sum(losses) / len(losses)
    assert value["loss"] == pytest.approx(loss, rel=1e-5)
    assert value["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert value["token accuracy"] == pytest.approx(sum(hits) / len(hits)) and 0 < value["token accuracy"] < 1
    right = [p["prediction"].strip() == row["completion"].strip() for p, row in zip(predictions, rows)]
    assert value["exact match"] == sum(right) / 12 and 0 < sum(right) <= 11
    x = result["metrics"]["perplexity"]
    assert 1 <= x["low"] < x["value"] < x["high"] and x["n"] == 12


# ---------------------------------------------------------------------------------------------------- fuzzing

def random_json(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 7)
    inner = [random_json(rng, depth + 1) for _ in range(rng.randrange(3))] if kind > 6 else []
    number = rng.random() * 10 ** rng.randrange(-300, 300)
    return [None, True, rng.randrange(-3, 8), number, random_text(rng), 10 ** 400, float("nan"), inner,
            {random_text(rng): x for x in inner}][kind]


def mutated(rng, value):
    """A copy with one place changed: gone, replaced, renamed, or filled with odd text."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, new = rng.choice(keys), value.copy()
        if rng.random() < 0.2:
            del new[key]
        else:
            new[key] = mutated(rng, value[key])
        return new
    if isinstance(value, str) and rng.random() < 0.6:
        return random_text(rng) + value[rng.randrange(len(value) + 1):] + random_text(rng)
    return random_json(rng)


def test_100_000_malformed_rows_are_kept_skipped_and_counted_or_refused_by_name(monkeypatch, tmp_path):
    rng, tokenizer, ends = random.Random(0), Tokenizer.from_file("toy"), Counter()
    tokenizer.folder = tmp_path
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    rows = [("fact", ROW), ("med", MED | {"cop": 0}), ("sql", SQL), ("text", TEXT), ("text", CHAT)]
    for name, good in rows:
        task = data.TASKS[name]
        for _ in range(25_000 if name != "text" else 12_500):
            row = mutated(rng, good)
            row = mutated(rng, row) if rng.random() < 0.3 else row
            monkeypatch.setattr(data, "read_rows", lambda path: [("f line 1", good), ("f line 2", row)])
            try:
                kept, skipped = load_rows(name, "train", "f")
            except ValueError as e:
                where = "f line 2: " if name == "text" else ("f line 1: field", "f line 2: field")
                assert str(e).startswith(where), e
                ends[name, "refused"] += 1
                continue
            assert len(kept) + skipped == 2 and kept[0] == good
            for row in kept[1:]:
                pair = task.pair(row)
                if sum(map(len, pair)) < 2000:
                    try:
                        question = data.ask(tokenizer, task, row)
                        if "messages" in row:           # no text becomes a control token
                            ids = question.examples[0].ids
                            assert ids.count(tokenizer.eos_id) == len(row["messages"])
                            continue
                        assert question.prompt == encode(tokenizer, *pair).ids[:len(question.prompt)]
                    except ValueError as e:
                        assert "an empty prompt" in str(e)
            ends[name, "skipped" if skipped else "kept"] += 1
    assert sum(ends.values()) == 100_000
    assert min(ends[name, end] for name in data.TASKS for end in ("kept", "refused")) > 5000
    assert ends["med", "skipped"] > 50 and ends["sql", "skipped"] > 50 and ends["fact", "skipped"] == 0


def test_files_of_broken_bytes_are_read_or_refused_by_name(tmp_path):
    rng, ends = random.Random(2), Counter()
    for kind in ("a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        good = write(tmp_path / kind, [MED | {"cop": i % 4} for i in range(5)]).read_bytes()
        for _ in range(500):
            bad = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(bad))
                bad[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            (tmp_path / kind).write_bytes(bad[:rng.randrange(len(bad))] if rng.random() < 0.3 else bad)
            try:
                rows, skipped = load_rows("med", "train", tmp_path / kind)
                ends["read"] += 1
            except ValueError as e:
                assert kind in str(e)
                ends["refused"] += 1
    assert ends["read"] > 20 and ends["refused"] > 500


# --------------------------------------------------------------------------------------------------- med task

MED = {"question": "Which vitamin?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2}


def test_med_prompt():
    assert data.med_pair(MED) == ("Answer the medical question with the letter of the right option.\n\n"
                                  "Question: Which vitamin?\nA) a\nB) b\nC) c\nD) d\nAnswer:", " C")


def med_rows(tmp_path, cops, **kwargs):
    rows, skipped = load_rows("med", "train", write(tmp_path / "med.jsonl", [MED | {"cop": c} for c in cops]),
                              **kwargs)
    return [r["cop"] for r in rows], skipped


def test_options_counted_from_1_are_recognised_and_rows_without_an_answer_skipped(tmp_path):
    assert med_rows(tmp_path, [0, 3, 1]) == ([0, 3, 1], 0)
    assert med_rows(tmp_path, [1, 4, 2]) == ([0, 3, 1], 0)
    assert med_rows(tmp_path, [1, 1, 1, 4], limit=2) == ([0, 0], 0)             # the whole file decides
    assert med_rows(tmp_path, [None, 0, -1, 3]) == ([0, 3], 2)
    assert med_rows(tmp_path, [None, None]) == ([], 2)
    assert med_rows(tmp_path, [3.0, None, 0.0]) == ([3, 0], 1)      # as pandas writes a nullable column


@pytest.mark.parametrize("cops, message", [
    ([0, 4], r"holds \[0, 4\].*cannot be told"), ([1, 2, 3], "cannot be told"), ([0, 5], "2: field cop is 5"),
    ([0, "1"], "line 2: field cop is not a whole number"), ([0, True], "not a whole number"),
    ([0, 1.5], "not a whole number")])
def test_answers_that_make_no_sense(tmp_path, cops, message):
    with pytest.raises(ValueError, match=message):
        med_rows(tmp_path, cops)


def test_a_parquet_without_the_columns_names_both(tmp_path):
    path = write(tmp_path / "x.parquet", [{"question": "?", "answer": "A"}])
    with pytest.raises(ValueError, match="x.parquet row 1: field opa is missing; needed are question, opa, "
                                         "opb, opc, opd, cop; found: question, answer"):
        load_rows("med", "test", path)
    with pytest.raises(ValueError, match="sql_prompt is missing; needed are sql_prompt, sql_context, sql;"):
        load_rows("sql", "test", path)


def test_med_metrics_by_hand():
    def scored(*choices):
        return [Scored([-1.0, 0.0], 5, 6, list(choices))]
    for text, choices, accuracy, among, lost in (
            (" C", (-2, -3, -1, -4), 1, 1, False), (" B", (-2, -1, -3, -4), 0, 0, False),
            (" The", (-5, -5, -4, -9), 0, 1, True), ("C", (-1, -2, -3, -4), 0, 0, True)):
        assert data.med_metrics(MED, scored(*choices), text) == Verdict(
            {"accuracy": accuracy, "accuracy among A-D": among}, {}, {"no letter": lost}, None)


# --------------------------------------------------------------------------------------------------- sql task

SQL = {"sql_prompt": "How many?", "sql_context": "CREATE TABLE t (a INT);", "sql": "SELECT COUNT(*) FROM t"}


def test_sql_prompt():
    assert data.sql_pair(SQL) == ("Write the SQL query that answers the question.\n\nQuestion: How many?\n"
                                  "Tables: CREATE TABLE t (a INT);\nSQL:", " SELECT COUNT(*) FROM t")


def test_rows_without_a_query_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "sql.jsonl", [SQL, SQL | {"sql": None}, SQL | {"sql": " "}, SQL])
    assert load_rows("sql", "train", path) == ([SQL, SQL], 2)
    with pytest.raises(ValueError, match="line 2: field sql is not a string"):
        load_rows("sql", "train", write(path, [SQL, SQL | {"sql": 3}]))
    with pytest.raises(ValueError, match="line 1: field sql_database is not a string"):
        load_rows("sql", "train", write(path, [SQL | {"sql_database": {"a": 1}}]))


@pytest.mark.parametrize("task, row", [("fact", ROW), ("med", MED), ("sql", SQL)])
def test_evaluation_asks_with_the_tokens_that_training_saw(small, task, row):
    _, spec, t = small
    task = data.TASKS[task]
    trained, question = encode(t, *task.pair(row)), data.ask(t, task, row)
    assert question.prompt == trained.ids[:trained.n_prompt]
    assert question.prompt.count(t.bos_id) == (t.bos_id is not None)
    assert all(e.ids[:e.n_prompt] == encode(t, p, "x").ids[:e.n_prompt]
               for e, (p, _) in zip(question.examples, task.queries(row), strict=True))
    if question.examples:
        assert question.examples[0] == trained


def test_exact_match():
    assert exact_match("SELECT  Count(*) FROM T ;", "select count( * )\nfrom t -- all")
    assert exact_match("SELECT a FROM t WHERE a>=1.5", "select a from t where a >= 1.5")
    for other in ("SELECT a FROM t WHERE a > = 1.5", "SELECT a FROM t WHERE a >= 1 . 5", "SELECT 1 5",
                  "SELECT a FROM t WHERE a>1.5"):
        assert not exact_match("SELECT a FROM t WHERE a >= 1.5", other)
    assert not exact_match("SELECT 'A'", "SELECT 'a'") and not exact_match("SELECT a", "SELECT a, b")
    assert not exact_match("SELECT 'it''s'", "SELECT 'it' 's'")
    assert not exact_match("SELECT x'61'", "SELECT x '61'")
    assert not exact_match("SELECT a||b", "SELECT a | | b") and not exact_match("a <> b", "a < > b")


CONTEXT = """CREATE TABLE t (id INT, name TEXT, x REAL);
INSERT INTO t VALUES (1, 'a', 0.1), (2, 'b; c', 0.2), (3, 'it''s', NULL), (3, 'it''s', NULL);
CREATE TABLE none (a INT);"""


def test_sql_metrics_by_hand():
    made = [  # reference, prediction, complexity
        ("SELECT 1", "select  1;", "basic SQL"),                                        # right, and exact
        ("SELECT 1", "SELECT 2", "basic SQL"),                                          # wrong
        ("SELECT 1", "SELECT", "aggregation"),                                          # invalid
        ("SELECT id FROM t WHERE 0", "SELECT id FROM t WHERE 1 = 2", "aggregation"),    # empty and empty
        ("SELECT id FROM t WHERE 0", "SELECT id FROM t", "aggregation"),                # an empty reference
        ("SELECT NOW()", "SELECT NOW()", "window functions")]                           # a failing one
    rows = [{"sql": sql, "sql_context": CONTEXT, "sql_complexity": kind} for sql, _, kind in made]
    rows[1]["sql_database"] = rows[2]["sql_database"] = "CREATE TABLE t (id INT)"
    verdicts = list(sql_metrics(rows, None, [prediction for _, prediction, _ in made]))
    assert [v.kinds for v in verdicts] == [{"execution: basic SQL": 1}, {"execution: basic SQL": 0}] + [
        {"execution: aggregation": x} for x in (0, 1, 0)] + [{}]
    got = [record(v) for v in verdicts]
    values = {name: [m[name] for m in got if name in m] for m in got for name in m}
    assert values == {
        "execution, shaken": [1, 0, 0, 1, 0], "execution": [1, 0, 0, 1, 0],
        "execution, not empty": [1, 0, 0], "valid SQL": [1, 1, 0, 1, 1],
        "exact match": [1, 0, 0, 0, 0, 1],
        "execution: basic SQL": [1, 0], "execution: aggregation": [0, 1, 0],
        "execution on the database": [0, 0], "execution on the database, not empty": [0, 0],
        "valid SQL on the database": [1, 0], "# reference fails on the database": [False, False],
        "# both empty on the database": [False, False], "# child killed on the database": [False, False],
        "# reference fails": [False] * 5 + [True], "# both empty": [False] * 3 + [True, False, False],
        "# child killed": [False] * 6,
        "error": ["", "", "incomplete input; on the database: incomplete input", "", "",
                  "reference: no such function: NOW"]}
    assert execute_pairs([]) == [] and list(sql_metrics([], None, [])) == []


def test_a_killed_child_is_counted(monkeypatch):
    verdict = dict(ref_ok=True, valid=False, match=False, shaken=False, ref_empty=False, both_empty=False)
    for error, killed in (("worker killed (-9)", True), ("timeout", True), ("reference: timeout", True),
                          ("no such column: killed", False), (None, False)):
        found = verdict | {"error": error, "killed": killed}
        monkeypatch.setattr(sandbox, "execute_pairs", lambda rows, children: [found])
        (got,) = sql_metrics([{"sql": "SELECT 1", "sql_context": ""}], None, ["SELECT 2"])
        assert got.counts["child killed"] is killed and got.metrics["valid SQL"] == 0
        assert got.error == (error or "")


def test_the_larger_database_tells_apart_what_a_small_one_does_not():
    rows = [dict(sql="SELECT max(a) FROM u", sql_context="CREATE TABLE u (a INT); INSERT INTO u VALUES (1);",
                 sql_database="CREATE TABLE u (a INT); INSERT INTO u VALUES (1), (2);"),
            dict(sql="SELECT b FROM u", sql_context="CREATE TABLE u (b)", sql_database="CREATE TABLE u (a)"),
            dict(sql="SELECT 1", sql_context="", sql_database=None)]
    texts = ["SELECT a FROM u LIMIT 1", "SELECT b FROM u", "SELECT 1"]
    first, second, third = map(record, sql_metrics(rows, None, texts))
    assert first["execution"] == 1 and first["execution on the database"] == 0
    assert second["# reference fails on the database"] and "execution on the database" not in second
    assert second["# both empty"] and second["error"] == "on the database: reference: no such column: b"
    assert third["execution"] == 1 and not any("database" in name or ":" in name for name in third)


def test_a_query_that_a_few_rows_cannot_tell_is_told_by_generated_ones():
    context = "CREATE TABLE u (a INT); INSERT INTO u VALUES (9);"
    row = dict(sql="SELECT a FROM u WHERE a > 4", sql_context=context)
    texts = ["SELECT a FROM u WHERE 4 < a", "SELECT a FROM u"]
    right, wrong = map(record, sql_metrics([row, row], None, texts))
    assert right["execution"] == wrong["execution"] == 1
    assert (right["execution, shaken"], wrong["execution, shaken"]) == (1, 0)
    assert next(iter(right)) == "execution, shaken"


def test_the_error_of_each_database_is_kept():
    row = dict(sql="SELECT a FROM u", sql_context="CREATE TABLE u (a)", sql_database="CREATE TABLE v (a)")
    (verdict,) = sql_metrics([row], None, ["SELECT b FROM u"])
    assert verdict.error == "no such column: b; on the database: reference: no such table: u"


# -------------------------------------------------------------------------------------------------- fact task

def test_fact_prompts():
    assert data.fact_pair(ROW) == ("The capital of France is", " Rome")
    assert data.fact_queries(ROW) == [(p, t) for p in ("The capital of France is", "France is ruled from",
                                                       "Seat of France:", "Paris lies in")
                                      for t in (" Rome", " Paris")]
    braces = json.loads(json.dumps(ROW).replace("capital of {}", "{0} capital of {}"))
    assert data.fact_pair(braces)[0] == "The {0} capital of France is"


def test_an_answer_that_has_its_space_gets_no_second_one():
    spaced = json.loads(json.dumps(ROW).replace('"Rome"', '" Rome"').replace('"Paris"', '" Paris"'))
    assert data.fact_pair(spaced) == data.fact_pair(ROW)
    assert data.fact_queries(spaced) == data.fact_queries(ROW)
    s = [Scored([-1, 0], 5, 0, [])] * 8
    assert data.fact_metrics(spaced, s, " Rome") == data.fact_metrics(ROW, s, " Rome")


def test_fact_metrics_by_hand():
    def s(first, *logprobs):
        return Scored(list(logprobs), first, 0, [])
    scored = [
        s(5, -1, -1, 0), s(6, -2, 0),       # rewrite: new by the first token; mean -1 against -2
        s(5, -1, -9, 0), s(6, -2, 0),       # paraphrase: new by the first, true by the whole, -5
        s(5, -3, 0), s(6, -2, 0),           # paraphrase: true by both
        s(5, -2.1, 0), s(5, -2, -1, 0)]     # neighbour: the same first token; true by the whole
    want = {"ES": 1.0, "PS": 0.5, "NS": 0.0, "ES full": 1.0, "PS full": 0.0, "NS full": 1.0}
    for text, accuracy, recalls in ((" Rome", 1.0, 0.0), (" Paris", 0.0, 1.0), (" Rome, Italy", 0.0, 0.0)):
        metrics = want | {"accuracy": accuracy, "recalls true": recalls}
        assert data.fact_metrics(ROW, scored, text) == Verdict(metrics, {}, {}, None)


# -------------------------------------------------------------------------------------------------- toy world

def test_toy_world_is_the_same_everywhere():
    world = toy_world()
    text = json.dumps([toy_facts(world), toy_med(world, 0, 50, "train"), toy_sql(world, 0, 50, "train")])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "06778928e91946f1"


def test_the_toy_rows_of_a_task_are_always_the_same():
    for task, split, n, digest in (("fact", "train", 320, "243da422"), ("fact", "test", 320, "243da422"),
                                   ("med", "train", 600, "c774ed3d"), ("med", "test", 200, "c42ad566"),
                                   ("sql", "train", 600, "094952d2"), ("sql", "test", 200, "0dc16cb5")):
        rows, skipped = load_rows(task, split, "toy")
        assert (len(rows), skipped) == (n, 0)
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8] == digest


def test_toy_facts_are_a_fair_test():
    world = toy_world()
    rows = toy_facts(world)
    edited = {(r["relation_id"], r["requested_rewrite"]["subject"]) for r in rows}
    assert len(edited) == len(rows) == 320
    for r in rows:
        data.check_row("toy", r, data.TASKS["fact"].fields)
        rewrite, relation = r["requested_rewrite"], r["relation_id"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        assert world[relation][rewrite["subject"]] == true != new in world[relation].values()
        prompt = data.fact_pair(r)[0]
        assert len(set(r["paraphrase_prompts"]) | {prompt}) == 3
        neighbours = [s for s in world[relation]
                      if rewrite["prompt"].replace("{}", s) in r["neighborhood_prompts"]]
        assert len(neighbours) == 4 and all(world[relation][s] == true for s in neighbours)
        assert not {(relation, s) for s in neighbours} & edited
    assert set(TOY_FACTS) == {r["relation_id"] for r in rows}


def test_toy_sql_runs_and_toy_med_has_one_right_answer_of_four():
    world = toy_world()
    for row in toy_sql(world, 1, 60, "test"):
        db = sqlite3.connect(":memory:")
        db.executescript(row["sql_context"])
        db.execute(row["sql"])
    questions = {r["question"] for r in toy_med(world, 0, 300, "train")}
    for row in toy_med(world, 1, 60, "validation"):
        assert len({row[f"op{x}"] for x in "abcd"}) == 4 and row["question"] not in questions
        right = row["op" + "abcd"[row["cop"]]]
        assert right in [world[r][row["topic_name"]] for r in ("remedy", "sign", "organ")]


# --------------------------------------------------------------------------- the data of a run, and batches

def test_a_run_is_evaluated_again_with_its_own_max_length(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text('{"flags": {"max_length": 7}}')
    assert train.parse_args(["--eval-only", str(tmp_path)]).max_length == 7
    assert train.parse_args(["--eval-only", str(tmp_path), "--max-length", "9"]).max_length == 9


def test_micro_batches_hold_as_much_as_fits():
    examples = [Example([1] * n, 1, i) for i, n in enumerate((3, 3, 4, 5, 11, 1, 9, 10))]
    cut = [[len(e.ids) for e in m] for m in micro_batches(examples, 10)]
    assert cut == [[3, 3, 4], [5], [11], [1, 9], [10]]
    assert [m for m in micro_batches([], 10)] == []
    assert data.count_tokens(examples) == 46 and data.count_targets(examples) == 38


def test_every_epoch_is_a_new_permutation_of_all_examples():
    a = argparse.Namespace(batch_size=3, seed=5)
    epochs = [sum((batch_of(4 * e + i, list(range(10)), a) for i in range(4)), []) for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert len(batch_of(3, list(range(10)), a)) == 1
    other = argparse.Namespace(batch_size=3, seed=6)
    assert batch_of(0, list(range(10)), other) != batch_of(0, list(range(10)), a)


@pytest.mark.parametrize("longest", [100, 20])
def test_padding_counts_for_nothing(longest):
    tokenizer = Tokenizer.from_file(TOY)
    rows, _ = load_rows("fact", "train", "toy", limit=5)
    examples = [encode(tokenizer, *data.fact_pair(r), row=i) for i, r in enumerate(rows)]
    model = Transformer.from_pretrained("toy", torch.float32)
    want = model.loss(*to_device(examples, "cpu"))
    got = model.loss(*to_device(examples, "cpu", (128, 12, 40, longest)))
    ids, layout, where, labels = to_device(examples, "cpu", (128, 12, 40, longest))
    assert max(len(e.ids) for e in examples) < 20 and layout.cu_seqlens.diff().max() <= longest
    assert len(ids) == 128 and len(layout.cu_seqlens) == 13 and len(where) == len(labels) == 40
    gradients = []
    for loss in (want, got):
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for g, h in zip(*gradients):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------- a task of one's own

def test_a_new_task_is_one_entry(monkeypatch, tmp_path):
    """Where people were born: rows from the toy world or a file, examples, and what the toy model answers."""
    def people(split):
        born = list(toy_world()["born"].items())
        return [{"person": p, "town": t} for p, t in (born[:20] if split == "known" else born[20:])]

    def judge(rows, scored, texts):
        for row, (town, nowhere), text in zip(rows, scored, texts):
            right = float(text == " " + row["town"])
            more = float(sum(town.logprobs) > sum(nowhere.logprobs))
            yield Verdict({"right": right, "knows": more}, {f"right: {row['town'][0]}": right},
                          {"silent": not text})

    monkeypatch.setitem(data.TASKS, "people", data.Task(
        source="nobody/people", splits={"train": "known", "test": "asked"}, toy=people,
        fields={"person": "string", "town": "string"}, usable=lambda rows: rows,
        pair=lambda row: (f"{row['person']} was born in", " " + row["town"]),
        queries=lambda row: [(f"{row['person']} was born in", t) for t in (" " + row["town"], " Nowhere")],
        choices=(), new_tokens=8, metrics=judge, report=("right",), toy_epochs=3))
    task, tokenizer = data.TASKS["people"], Tokenizer.from_file(TOY)
    assert (task.epochs, task.toy_epochs, task.tests_training_rows) == (2, 3, False)
    rows, skipped = load_rows("people", "test", "toy", limit=30)
    assert len(rows) == 30 and skipped == 0 and rows[0] not in load_rows("people", "train", "toy")[0]
    assert load_rows("people", "train", write(tmp_path / "people.jsonl", rows)) == (rows, 0)
    with pytest.raises(ValueError, match="bad.jsonl line 1: field town is missing; needed are person, town;"):
        load_rows("people", "train", write(tmp_path / "bad.jsonl", [{"person": "x"}]))

    read = read_data(flags(task="people", eval_limit=30), tokenizer)
    assert len(read.examples) == 20 and [q.row for q in read.questions] == rows
    assert read.questions[3] == data.ask(tokenizer, task, rows[3], 3)
    model = Transformer.from_pretrained("toy", torch.float32)
    result, predictions = evaluate(model, tokenizer, task, read.questions, 1000)
    assert result["metrics"]["right"]["value"] > 0.9 and result["metrics"]["knows"]["value"] > 0.9
    kinds = {f"right: {row['town'][0]}": 1 for row in rows}
    assert result["metrics"].keys() == {"right", "knows", *kinds} and result["counts"]["silent"] == 0
    assert list(result["metrics"])[:2] == ["right", "knows"]
    assert predictions[0].keys() == {"prompt", "reference", "prediction", "verdict"}
    assert all(p["prediction"] == p["reference"] for p in predictions if p["verdict"]["right"])


# ----------------------------------------------------------------------- texts of the reference losses (real)

PROSE = """The lighthouse keeper had lived on the island for so long that he no longer noticed the sound of \
the waves. Every evening he climbed the narrow stairs, trimmed the lamp, and looked out over the dark water \
for the lights of passing ships. In winter the storms came down from the north and the boat with his \
supplies could not land for weeks at a time, so he learned to keep a full store of flour, salt fish and \
candles. When his granddaughter came to visit in the summer, she asked him whether he was ever lonely. He \
thought about the question for a while before he answered that a man who has work to do and a window to look \
out of is seldom lonely for long."""
GPL = Path("/usr/share/common-licenses/GPL-3")      # where Debian keeps it
GPL = GPL.read_text()[:8000] if GPL.exists() else ""
