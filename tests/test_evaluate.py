"""What evaluation makes of a model's answers: scores, continuations, counts and intervals."""
import math
import pytest
import torch

import data
from data import Tokenizer, Verdict, encode
from lib import evaluate as evaluation
from lib.evaluate import batch_loss, bootstrap, continue_all, evaluate, flat, record, score_targets
from model import Transformer

TOY = "toy"


def toy_examples(n=8):
    tokenizer = Tokenizer.from_file(TOY)
    rows, _ = data.load_rows("fact", "train", "toy", limit=n)
    return tokenizer, [encode(tokenizer, *data.fact_pair(r), row=i) for i, r in enumerate(rows)]


def test_continuations_do_not_depend_on_how_they_are_batched():
    tokenizer = Tokenizer.from_file(TOY)
    rows, _ = data.load_rows("sql", "test", "toy", limit=12)
    prompts = [data.encode_prompt(tokenizer, data.sql_pair(r)[0]) for r in rows] + [tokenizer.encode("Tamo")]
    model = Transformer.from_pretrained("toy", torch.float32)
    alone = [model.generate([p], 24, tokenizer.eos_ids)[0] for p in prompts]
    assert continue_all(model, prompts, 24, tokenizer.eos_ids, 10 ** 6) == alone
    batches, generate = [], model.generate
    model.generate = lambda ps, *args, bar: batches.append([len(p) for p in ps]) or generate(ps, *args)
    assert continue_all(model, prompts, 24, tokenizer.eos_ids, 600) == alone
    assert sum(batches, []) == sorted(map(len, prompts), reverse=True) and len(batches) > 3
    assert all(len(b) * (b[0] + 24) <= 600 for b in batches if len(b) > 1)


def test_a_model_that_never_stops_and_one_that_writes_no_text_are_counted(monkeypatch):
    tokenizer = Tokenizer.from_file(TOY)
    rows, _ = data.load_rows("sql", "test", "toy", limit=4)
    questions = [data.ask(tokenizer, data.TASKS["sql"], r) for r in rows]
    right = tokenizer.encode(data.sql_pair(rows[0])[1])
    half = next(i for i, b in tokenizer.bytes.items() if b == b"\xf0")
    eos = tokenizer.eos_id
    new = iter([right + [eos], right + [eos], [half, eos], [right[0]] * 256])
    model = Transformer.from_pretrained("toy", torch.float32)
    monkeypatch.setattr(evaluation, "continue_all",
                        lambda model, prompts, *args: [next(new) for _ in prompts])
    result, predictions = evaluate(model, tokenizer, data.TASKS["sql"], questions, 1000)
    counts = result["counts"]
    assert counts["not stopped"] == 1 and counts["not UTF-8"] == 1 and counts["child killed"] == 0
    assert result["metrics"]["exact match"]["value"] == 0.25 and predictions[0]["verdict"]["execution"] == 1
    assert predictions[2]["prediction"] == "\ufffd" and len(predictions[3]["prediction"]) > 256
    assert "syntax error" in predictions[2]["verdict"]["error"]


def test_scores_of_targets_do_not_depend_on_packing():
    _, examples = toy_examples(6)
    model = Transformer.from_pretrained("toy", torch.float32)
    together = score_targets(model, examples, choices=(5, 700))
    alone = score_targets(model, examples, max_tokens=1)
    for e, x, y in zip(examples, together, alone):
        logp = model(torch.tensor([e.ids]))[0, e.n_prompt - 1:-1].log_softmax(-1)
        want = logp.gather(1, torch.tensor(e.ids[e.n_prompt:])[:, None])[:, 0].tolist()
        assert x.logprobs == pytest.approx(want, abs=1e-4) and y.logprobs == pytest.approx(want, abs=1e-4)
        assert x.greedy == logp[0].argmax() and x.first == e.ids[e.n_prompt]
        assert x.choices == pytest.approx(logp[0, [5, 700]].tolist(), abs=1e-4)


def test_close_answers_of_a_bf16_model_do_not_tie():
    """Two answers whose logits are 20.0 and 20.05 are one number in bf16, but not to the evaluation."""
    model = Transformer.from_pretrained("toy", torch.bfloat16)
    hidden = torch.zeros(2, 128, dtype=torch.bfloat16)
    hidden[:, 0], hidden[:, 1] = 16.0, 0.125
    model.hidden = lambda ids, layout, where: hidden[:1].expand(len(where), -1)
    with torch.no_grad():
        model.head.zero_()
        model.head[5, :2] = torch.tensor([1.25, 0.0])                       # 20.0
        model.head[6, :2] = torch.tensor([1.25, 0.40])                      # 20.05
        assert model.logits(hidden)[0, 5] == model.logits(hidden)[0, 6]
    a, b = score_targets(model, [data.Example([3, t], 1, 0) for t in (5, 6)], choices=(5, 6))
    assert b.logprobs[0] - a.logprobs[0] == pytest.approx(0.05, abs=1e-3)
    assert a.choices == b.choices == [a.logprobs[0], b.logprobs[0]]
    assert a.greedy == b.greedy == 6


def test_a_sum_and_a_number_make_one_mean_and_a_huge_loss_has_a_perplexity():
    x = bootstrap([(6.0, 3), (1.0, 1), (0.0, 4)])
    assert (x["value"], x["n"]) == (7 / 8, 3) and x["low"] <= 7 / 8 <= x["high"] <= 2
    task = data.TASKS["text"]._replace(metrics=lambda rows, *_: [Verdict({"loss": (4000.0, 4)}, {}, {})])
    tokenizer, row = Tokenizer.from_file(TOY), {"prompt": "a", "completion": "b"}
    model = Transformer.from_pretrained("toy", torch.float32)
    result, _ = evaluate(model, tokenizer, task, [data.ask(tokenizer, task, row)], 1000)
    assert result["metrics"]["loss"]["value"] == 1000 and result["metrics"]["perplexity"]["value"] == math.inf


def test_bootstrap_interval_of_a_coin():
    x = bootstrap([0.0, 1.0] * 200)
    assert x["value"] == 0.5 and x["n"] == 400
    assert x["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)          # the normal approximation
    assert x["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)


def test_a_verdict_and_a_result_in_the_files_are_one_level():
    verdict = Verdict({"a": 1.0}, {"a: of b": 0.5}, {"odd": True}, "no such table")
    assert list(record(verdict).items()) == [("a", 1.0), ("a: of b", 0.5), ("# odd", True),
                                             ("error", "no such table")]
    assert record(Verdict({"b": (6.0, 4)}, {}, {})) == {"b": 1.5, "# n of b": 4}
    assert record(Verdict({}, {}, {}, "")) == {"error": ""} and record(Verdict({}, {}, {})) == {}
    value = {"value": 1.0, "n": 1, "low": 1.0, "high": 1.0}
    result = {"metrics": {"a": value}, "counts": {"odd": 3}, "seconds": 2.5}
    assert list(flat(result).items()) == [("a", value), ("# odd", 3), ("seconds", 2.5)]


def test_a_metric_is_the_mean_of_the_rows_that_have_it_and_kinds_come_last():
    """By hand: rows of "x" and of "y" in turn, a metric that only one of them has, a count."""
    def judge(rows, scored, texts):
        for i, row in enumerate(rows):
            kind = "xy"[i % 2]
            yield Verdict({"third": float(i % 3 == 0)} | ({"only y": 0.25} if kind == "y" else {}),
                          {f"third: {kind}": float(i % 3 == 0)}, {"seen": True, "late": i > 4})

    tokenizer, task = Tokenizer.from_file(TOY), data.TASKS["fact"]._replace(metrics=judge, new_tokens=2)
    rows, _ = data.load_rows("fact", "test", "toy", limit=6)
    questions = [data.ask(tokenizer, task, r) for r in rows]
    model = Transformer.from_pretrained("toy", torch.float32)
    result, predictions = evaluate(model, tokenizer, task, questions, 1000)
    means = {name: (x["value"], x["n"]) for name, x in result["metrics"].items()}
    assert means == {"third": (2 / 6, 6), "only y": (0.25, 3), "third: x": (1 / 3, 3), "third: y": (1 / 3, 3)}
    assert list(means) == ["third", "only y", "third: x", "third: y"]
    assert result["counts"].items() >= {"seen": 6, "late": 1, "not UTF-8": 0, "too long": 0}.items()
    assert [p["verdict"]["# late"] for p in predictions] == [False] * 5 + [True]
    assert result["seconds"] > 0


def test_the_loss_of_a_batch_by_hand_however_it_is_cut():
    _, examples = toy_examples(5)
    model, total, n = Transformer.from_pretrained("toy", torch.float32), 0.0, 0
    for e in examples:
        logp = model(torch.tensor([e.ids]))[0].log_softmax(-1)
        total -= sum(logp[i - 1, e.ids[i]].item() for i in range(e.n_prompt, len(e.ids)))
        n += len(e.ids) - e.n_prompt
    for max_tokens in (1, 30, 10_000):
        assert batch_loss(model, examples, max_tokens) == pytest.approx(total / n, abs=1e-5)
