"""bench/candidates.py against the same scores by other means: whole matrices, NumPy's norms, no shortcut."""
import numpy as np
import pytest
import torch

from bench.candidates import CANDIDATES
from molf import Expert

EPS = 1e-8


def expert(kind, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (5,)] if kind == "full" else [(3, 7), (5, 3)]
    draw = lambda: [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    square = lambda: [x.square() + 0.1 for x in draw()]
    w = draw()
    rates = torch.tensor([3e-4] + [0.0] * 5)
    return Expert(kind, w, w, draw(), draw(), square(), draw(), square(), w[0], rates, (0.9, 0.999), EPS,
                  1.0 if kind == "full" else 2.5)


def flat_of(tensors):
    return np.concatenate([x.numpy().ravel() for x in tensors])


def change_of_weight(e, u):
    """By a finite step along u: what the folded weight (and the bias) does."""
    if e.kind == "full":
        return flat_of(u)
    (a, b), (u_a, u_b), h = [x.numpy() for x in e.w], [x.numpy() for x in u], 1e-6
    return e.scale * ((b + h * u_b) @ (a + h * u_a) - b @ a).ravel() / h


def by_other_means(name, e):
    u_new = [m / (v.sqrt() + EPS) for m, v in zip(e.m, e.v)]
    u_old = [m / (v.sqrt() + EPS) for m, v in zip(e.m_before, e.v_before)]
    g, m, old, new = flat_of(e.g), flat_of(e.m), flat_of(u_old), flat_of(u_new)
    return {
        "gain": 3e-4 * g @ old,
        "trend": m @ old / np.linalg.norm(change_of_weight(e, u_old)),
        "fisher": g @ old / np.linalg.norm(np.sqrt(flat_of(e.v_before)) * old),
        "flat": m @ new / np.sqrt(flat_of(e.v)).sum(),
        "pace": m @ new / np.linalg.norm(change_of_weight(e, u_new)),
    }[name]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "t_test"])
def test_a_candidate_is_what_it_says(name, kind):
    e = expert(kind)
    assert CANDIDATES[name](e).item() == pytest.approx(by_other_means(name, e), rel=1e-4)


@pytest.mark.parametrize("name", ["flat", "pace", "fisher", "trend"])
def test_a_candidate_does_not_depend_on_the_learning_rate(name):
    e = expert("lora")
    assert CANDIDATES[name](e._replace(rates=10 * e.rates)) == CANDIDATES[name](e)


def test_flat_does_not_depend_on_the_size_of_gradients():
    e = expert("lora")
    larger = e._replace(m=[100 * m for m in e.m], v=[1e4 * v for v in e.v])
    assert CANDIDATES["flat"](larger).item() == pytest.approx(CANDIDATES["flat"](e).item(), rel=1e-6)


def test_t_test_is_the_mean_over_the_deviation_of_past_gains():
    """By weights of all past batches, for two experts of a kind in turn. One begins anew with each run, and
    where its state is not that of the step before, as after --resume."""
    experts, gains = [expert("lora", 1), expert("lora", 2)], {}
    for run, ts in enumerate([range(1, 7), range(1, 4), range(5, 9)]):
        for t in ts:
            for i, e in enumerate(experts):
                g, rates = expert(e.kind, 100 * run + 10 * t + i).g, torch.tensor([0, 0, 0, 0, t, 0])
                e = e._replace(g=g, rates=rates)
                if t == 1:
                    e = e._replace(m_before=[torch.zeros_like(m) for m in e.m])
                u = flat_of(e.m_before) / (np.sqrt(flat_of(e.v_before)) + EPS)
                gain = flat_of(e.g) @ u
                past = gains[i] = np.append(gains[i] if t > 2 and t != ts[0] else [], gain)
                weights = 0.9 ** np.arange(len(past))[::-1] * np.where(np.arange(len(past)), 0.1, 1.0)
                mean = weights @ past
                deviation = np.sqrt(weights @ past ** 2 - mean ** 2)
                want = mean / deviation if len(past) > 1 else 0.0
                assert CANDIDATES["t_test"](e).item() == pytest.approx(want, rel=1e-4), (run, t, i)
