"""lib/fast.py against the plain step: compiled on a CPU, captured on a GPU."""
import argparse
import itertools
import random
from functools import partial

import pytest
import torch

import data
import lib.fast
import model as model_py
import molf
import train
from data import Tokenizer, encode
from lib.fast import FastStep, few_sizes, padded, replaced
from model import Transformer, add_experts, molf_layers
from molf import ROUTES, SCORES, MoLFAdamW, param_groups

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def every_size_pays(monkeypatch):
    """So a short run has as many as a long one."""
    monkeypatch.setattr(lib.fast, "price_of_a_size", lambda model, tokens: 1)


def flags(**kwargs):
    a = train.parse_args(["--device", "cpu"])
    return argparse.Namespace(**(vars(a) | kwargs))


def steps_of(method, fast, device, n=4, score="epd", route="topk", lr=1e-4, **options):
    """n steps on MedMCQA-like toy rows. -> losses and norms, gates, scores, the step with its model and
    optimizer, the weights"""
    torch.manual_seed(0)
    a = flags(method=method, device=device, batch_size=8, eager=not fast, **{"max_tokens": 500, **options})
    tokenizer = Tokenizer.from_file("toy")
    rows, _ = data.load_rows("med", "train", "toy", limit=8 * n)
    examples = [encode(tokenizer, *data.med_pair(r), row=i) for i, r in enumerate(rows)]
    model = Transformer.from_pretrained("toy", torch.float32 if device == "cpu" else torch.bfloat16, device)
    model.checkpointing = a.checkpointing
    ranks = {"fft": (), "molf-e": (4, 16)}.get(method, (16,))
    add_experts(model.train(), ranks, 12, method in ("fft", "molf"), a.dropout)
    optimizer = MoLFAdamW(param_groups(model, lr, lr), score=SCORES[score], route=ROUTES[route])
    batches = [examples[i:i + 8 - (i == 8)] for i in range(0, 8 * n, 8)]        # one is a sequence short
    ok = torch.ones((), dtype=torch.bool, device=device)

    one_step = partial(train.train_step, model, optimizer, max_norm=a.clip, ok=ok)
    step = FastStep(one_step, model, optimizer, batches, a.max_tokens) if fast \
        else train.make_step(model, optimizer, batches, a)
    seen = []
    for i, batch in enumerate(batches):
        loss, norm = step(batch)
        compiled = compiled if i else torch._dynamo.utils.counters["stats"]["unique_graphs"]
        numbers = torch.stack([loss, norm])
        seen.append([t.clone().cpu() for t in (numbers, optimizer.gates, optimizer.scores)])
    # whatever is compiled later than in the first step would be compiled in the middle of a capture
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    numbers, gates, scores = (torch.stack(x) for x in zip(*seen))
    merged = [layer.merged().float().cpu() for _, layer in molf_layers(model)]
    run = argparse.Namespace(step=step, model=model, optimizer=optimizer, ok=ok, batches=batches)
    return numbers, gates, scores, run, merged


@pytest.mark.parametrize("method, options", [
    ("molf", {}), ("molf-e", dict(checkpointing=True)), ("fft", {}), ("lora", {}),
    ("molf", dict(score="align", route="softmax"))])
def test_a_compiled_step_is_the_plain_one(method, options):
    """On a CPU, in fp32, with micro-batches that are padded: losses to 1e-6, the same winners."""
    want, gates, scores, _, weights = steps_of(method, False, "cpu", **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    got, gates2, scores2, _, weights2 = steps_of(method, True, "cpu", **options)
    least = 5 if method.startswith("molf") else 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > least   # it was compiled
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, 1], want[:, 1], rtol=1e-4, atol=0)
    torch.testing.assert_close(gates2, gates, rtol=0, atol=1e-3 if "route" in options else 0)
    torch.testing.assert_close(scores2, scores, rtol=1e-4, atol=1e-12 if "score" not in options else 1e-3)
    for w, w2 in zip(weights, weights2):        # Adam makes full steps of gradients that are rounding errors
        assert (w - w2).norm() < 1e-3 * w.norm()


def test_a_fast_step_leaves_everything_in_its_place():
    """What it rebinds while it runs is back afterwards, also behind an error: evaluation is not compiled."""
    places = [(model_py, "cross_entropy"), (model_py, "fold_layer"),
              (model_py, "spread"), (molf, "observe_and_score"), (molf, "move"), (molf, "observe_and_move"),
              (molf, "spread"), (model_py.Block, "forward")]
    before = [getattr(*p) for p in places]
    parts = lib.fast.fast_parts(cuda=False)
    assert set(parts) < set(places)
    with pytest.raises(KeyError), replaced(parts):
        assert all(getattr(*p) is part for p, part in parts.items())
        raise KeyError
    assert [getattr(*p) for p in places] == before
    optimizer = MoLFAdamW([torch.nn.Parameter(torch.ones(2))])
    with replaced({(optimizer, "rates"): len}):
        assert optimizer.rates is len
    assert "rates" not in vars(optimizer) and optimizer.rates([True]).shape == (1, 6)


def test_padded_sizes_are_few_and_little_larger():
    sizes = [padded(n) for n in range(1, 20000)]
    assert all(n <= p < 1.016 * n + 16 for n, p in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 400


def test_padding_and_sizes_together_cost_least():
    """Against all ways to choose the sizes."""
    rng = random.Random(0)
    for _ in range(200):
        counts = {16 * n: rng.randint(1, 9) for n in rng.sample(range(1, 40), rng.randint(1, 7))}
        price = rng.choice([0.5, 20, 100, 1000, 1e6])
        sizes = sorted(counts)

        def cost(chosen):
            padding = sum(c * (min(x for x in chosen if x >= n) - n) for n, c in counts.items())
            return price * len(chosen) + padding
        chosen = [[*some, sizes[-1]] for k in range(len(sizes))
                  for some in itertools.combinations(sizes[:-1], k)]
        got = few_sizes(counts, price)
        assert got.keys() == counts.keys()
        assert all(got[n] == min(x for x in got.values() if x >= n) for n in got)
        assert cost(set(got.values())) == pytest.approx(min(map(cost, chosen)))


def test_a_short_run_has_few_sizes_and_a_long_one_pads_little(monkeypatch):
    """25 steps, and 2,000, of batches with about 9,600 tokens, on a model for which a size costs 11,000."""
    monkeypatch.setattr(lib.fast, "price_of_a_size", lambda model, tokens: 11_000)
    rng = random.Random(0)
    batches = [[data.Example([1] * rng.randint(100, 500), 90, 0) for _ in range(32)] for _ in range(25)]
    model = Transformer.from_pretrained("toy")
    add_experts(model, ranks=(2,))
    optimizer = MoLFAdamW(param_groups(model))
    for repeats, most, padding in ((1, 4, 1.15), (80, 25, 1.016)):
        step = FastStep(None, model, optimizer, batches * repeats, 16384)
        sizes = {tuple(m[0].shape) for batch in batches for m in step.inputs(batch)[0]}
        total = sum(len(m[0]) for batch in batches for m in step.inputs(batch)[0])
        assert len(sizes) <= most and total < padding * sum(map(data.count_tokens, batches))
        for batch in batches:
            for _, layout, _, _ in step.inputs(batch)[0]:
                assert len(layout.cu_seqlens) == step.sequences + 1
                assert layout.cu_seqlens.diff().max() <= step.longest == 500
    assert len(sizes) > 8
    FastStep(None, model, optimizer, [], 16384)         # a resumed run may have no step left


def test_a_batch_is_cut_evenly_and_into_few_sizes():
    rng = random.Random(0)
    batches = [[data.Example([1] * rng.randint(20, 900), 10, 0) for _ in range(32)] for _ in range(300)]
    model = Transformer.from_pretrained("toy")
    add_experts(model, ranks=(2,))
    step = FastStep(None, model, MoLFAdamW(param_groups(model)), batches, 4096)
    seen = set()
    for batch in batches:
        n, (micros,) = step.cut(batch)
        sizes = [data.count_tokens(m) for m in micros]
        assert [e for m in micros for e in m] == batch and max(sizes) <= min(n, 4096)
        assert len(micros) == len(list(data.micro_batches(batch, 4096)))
        assert n * len(micros) < 1.35 * sum(sizes)
        seen.add((n, len(micros)))
    assert len(seen) < 60
    long = [data.Example([1] * 5000, 10, 0), data.Example([1] * 10, 5, 0)]      # longer than --max-tokens
    assert [len(m) for m in step.cut(long)[1][0]] == [1, 1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_every_size_is_compiled_before_the_second_step(device):
    """Inductor makes another version of a block for more than 4,096 tokens. Those batches are neither the one
    with the fewest targets nor the one with the most."""
    model = Transformer.from_pretrained("toy", torch.float32, device)
    model.model["layers"] = model.model["layers"][:1]
    add_experts(model.train(), ranks=())
    optimizer = MoLFAdamW(param_groups(model))
    ok = torch.ones((), dtype=torch.bool, device=device)
    rows = lambda n, targets: [data.Example([1] * 500, 500 - targets, 0)] * n      # noqa: E731
    batches = [rows(2, 20), rows(10, 10), rows(4, 200)]
    step = FastStep(partial(train.train_step, model, optimizer, max_norm=1.0, ok=ok), model, optimizer, batches,
                    8192)
    step(batches[0])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in batches[1:]:
        step(batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled > 2


@needs_gpu
@pytest.mark.parametrize("method, options", [
    ("fft", {}), ("lora", {}), ("molf", {}), ("molf-e", {}), ("molf", dict(checkpointing=True)),
    ("molf", dict(max_tokens=16384)), ("molf", dict(score="align"))])
def test_a_captured_step_is_the_plain_one(method, options):
    want, gates, scores, _, weights = steps_of(method, False, "cuda", n=10, **options)
    got, gates2, scores2, run, weights2 = steps_of(method, True, "cuda", n=10, **options)
    assert 1 < len(run.step.recordings)
    assert all(group["t"] == 10 for group in run.optimizer.param_groups)
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(got[:5, 1], want[:5, 1], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(got[5:, 1], want[5:, 1], rtol=0.2, atol=1e-3)    # of weights that have drifted
    assert (gates == gates2).float().mean() > 0.97
    for w, w2 in zip(weights, weights2):
        assert (w - w2).norm() < 0.01 * w.norm()


@needs_gpu
@pytest.mark.parametrize("route", ["softmax", "sticky"])
def test_captured_routes_are_the_plain_ones(route):
    """sticky needs the step number and the last gates inside the graph."""
    _, gates, _, _, _ = steps_of("molf", False, "cuda", n=22, route=route)
    _, gates2, _, run, _ = steps_of("molf", True, "cuda", n=22, route=route)
    assert run.optimizer.steps == 22
    if route == "softmax":
        assert (gates - gates2).abs().mean() < 0.02
    else:
        assert (gates == gates2).float().mean() > 0.97
        changes = [i for i in range(1, 22) if not torch.equal(gates2[i], gates2[i - 1])]
        assert changes and set(changes) <= {10, 20}


@needs_gpu
def test_a_replayed_step_draws_new_random_numbers():
    _, gates, _, _, _ = steps_of("molf", True, "cuda", n=10, score="random", max_tokens=16384)
    assert len({tuple(g.flatten().tolist()) for g in gates}) == len(gates)
    for dropout, different in ((0.5, 3), (0.0, 1)):
        _, _, _, run, _ = steps_of("lora", True, "cuda", n=10, lr=1e-2, dropout=dropout, max_tokens=16384)
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0
        losses = {run.step(run.step.largest)[0].item() for _ in range(3)}
        assert len(losses) == different


@needs_gpu
def test_a_loss_that_is_not_finite_moves_nothing_in_a_captured_step():
    _, _, _, run, _ = steps_of("molf", True, "cuda", n=4, max_tokens=16384)
    run.step(run.step.largest)
    graphs = len(run.step.recordings)
    with torch.no_grad():       # (what the forward pass uses, not its master: the next fold mends it)
        run.model.model["layers"][0].mlp.up_proj.weight[3, 3] = torch.nan
    params = [p for g in run.optimizer.param_groups for p in g["params"]]
    tensors = [*params, *(t for s in run.optimizer.state.values() for t in s.values())]
    before = [t.clone() for t in tensors]
    loss, *_ = run.step(run.step.largest)
    assert loss.isnan() and not run.ok and len(run.step.recordings) == graphs
    assert all(torch.equal(t, q) for t, q in zip(tensors, before))
    assert not run.optimizer.winners.any()


@needs_gpu
def test_a_step_never_waits_for_the_gpu():
    _, _, _, fast, _ = steps_of("molf", True, "cuda", n=4, max_tokens=16384)
    _, _, _, plain, _ = steps_of("molf", False, "cuda", n=4, max_tokens=16384)
    batch = fast.step.largest
    fast.step(batch), plain.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast.step(batch), plain.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
