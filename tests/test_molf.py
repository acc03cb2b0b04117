"""The optimizer against torch.optim.AdamW and plain autograd, the routing rules against
hand-computed values."""
import copy
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import molf
from model import MoLFLinear, add_experts, fold, unfold
from molf import LR, ROUTES, SCORES, Expert, MoLFAdamW, epd, param_groups, pfn, softmax, sticky, topk

TARGETS = ("up", "mid", "down")


class Net(nn.Module):
    """Three targets of different shapes, and a norm and an embedding that are not routed."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up, self.mid, self.down = nn.Linear(6, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 3)
        self.norm = nn.LayerNorm(20)

    def forward(self, x):
        return self.down(self.norm(torch.tanh(self.mid(torch.relu(self.up(self.emb(x)))))))


def batches(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(11, (16,), generator=g), torch.randn(16, 3, generator=g)) for _ in range(n)]


def step(net, optimizer, batch, schedule=None):
    x, y = batch
    (net(x) - y).square().mean().backward()
    unfold(net)
    optimizer.step()
    fold(net)
    optimizer.zero_grad()
    if schedule:
        schedule.step()


def molf_net(ranks=(2,), full=True, seed=0, dropout=0.0, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    net = Net().to(dtype)
    add_experts(net, ranks, alpha=4, full=full, dropout=dropout, targets=TARGETS)
    groups = param_groups(net, lr=3e-3, lora_lr=5e-3, weight_decay=0.1, lora_weight_decay=0.01)
    return net, MoLFAdamW(groups, **kwargs)


# ---------------------------------------------------------------------------------------------- against AdamW

def test_one_full_expert_is_torch_adamw():
    net, optimizer = molf_net(ranks=())
    torch.manual_seed(0)
    plain = Net()
    decay = [p for p in plain.parameters() if p.dim() > 1]
    other = [p for p in plain.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=other, weight_decay=0.0)]
    reference = torch.optim.AdamW(groups, lr=3e-3, foreach=False)
    for batch in batches(50):
        step(net, optimizer, batch)
        step(plain, reference, batch)
        for name in TARGETS:
            torch.testing.assert_close(net.get_submodule(name).weight, plain.get_submodule(name).weight,
                                       rtol=0, atol=1e-7)
        for name in ("emb.weight", "norm.weight", "up.bias"):
            torch.testing.assert_close(net.get_parameter(name), plain.get_parameter(name), rtol=0, atol=1e-7)


def test_one_lora_expert_is_torch_adamw_on_a_and_b():
    net, optimizer = molf_net(full=False)
    plain, _ = molf_net(full=False)
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=5e-3,
                                  weight_decay=0.01, foreach=False)
    frozen = net.emb.weight.clone(), net.mid.weight.clone()
    for batch in batches(50):
        step(net, optimizer, batch)
        step(plain, reference, batch)
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert torch.equal(net.emb.weight, frozen[0]) and torch.equal(net.mid.weight, frozen[1])


# ------------------------------------------------------------------------------------------ folded = unfolded

class Sum(nn.Module):
    """W + sum s B A by plain autograd: the reference that knows nothing of folding."""

    def __init__(self, layer):
        super().__init__()
        self.full = nn.Parameter(layer.full.detach().clone())
        self.A = nn.ParameterList(a.detach().clone() for a in layer.A)
        self.B = nn.ParameterList(b.detach().clone() for b in layer.B)
        self.bias, self.scales, self.folded = layer.bias, layer.scales, False

    @property
    def weight(self):
        return self.full + sum(s * b @ a for s, a, b in zip(self.scales, self.A, self.B))

    def experts(self):
        full = [self.full] + ([] if self.bias is None else [self.bias])
        return [("full", 1.0, full)] + [("lora", s, [a, b]) for s, a, b in zip(self.scales, self.A, self.B)]

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_folded_equals_two_path_equals_autograd_over_200_routed_steps():
    folded, opt1 = molf_net(ranks=(2, 4))
    two_path, _ = molf_net(ranks=(2, 4))
    reference, _ = molf_net(ranks=(2, 4))
    for name in TARGETS:
        layer = two_path.get_submodule(name)
        layer.folded = False                            # the same class, its other branch: W itself trains
        del layer.full
        setattr(reference, name, Sum(reference.get_submodule(name)))
    kwargs = dict(lr=3e-3, lora_lr=5e-3, weight_decay=0.1, lora_weight_decay=0.01)
    opt2, opt3 = MoLFAdamW(param_groups(two_path, **kwargs)), MoLFAdamW(param_groups(reference, **kwargs))
    wins = torch.zeros(3, 3)
    for batch in batches(200):
        for net, optimizer in ((folded, opt1), (two_path, opt2), (reference, opt3)):
            step(net, optimizer, batch)
        assert torch.equal(opt1.winners, opt2.winners) and torch.equal(opt1.winners, opt3.winners)
        wins += opt1.winners
    assert (wins.sum(0) > 0).all()                      # every expert won somewhere: routing was on
    for name in TARGETS:
        a, b, c = (net.get_submodule(name) for net in (folded, two_path, reference))
        torch.testing.assert_close(a.full, b.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.full, c.full, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.weight, b.merged(), rtol=0, atol=1e-5)
        for i in range(2):
            torch.testing.assert_close(a.A[i], c.A[i], rtol=0, atol=1e-5)
            torch.testing.assert_close(a.B[i], b.B[i], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ routing

@pytest.mark.parametrize("top_k", [1, 2])
def test_losers_keep_their_bits_but_their_moments_move(top_k):
    net, optimizer = molf_net(ranks=(2, 4), top_k=top_k, score=molf.coin)
    for batch in batches(20):
        before = {p: p.clone() for g in optimizer.param_groups for p in g["params"]}
        moments = {p: optimizer.state[p]["exp_avg_sq"].clone() for p in before}
        step(net, optimizer, batch)
        assert (optimizer.winners.sum(1) == top_k).all()
        for group in optimizer.param_groups:
            if group["kind"] == "rest":
                continue
            won = optimizer.winners[optimizer.module_names.index(group["module"]), group["expert"]]
            for p in group["params"]:
                assert torch.equal(p.view(torch.int32), before[p].view(torch.int32)) != bool(won)
                # B = 0 at the very first step gives A a gradient of exactly 0
                assert not torch.equal(optimizer.state[p]["exp_avg_sq"], moments[p]) or not moments[p].any()


def test_winners_are_the_highest_scores_and_ties_go_to_the_first():
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 1.0], [0.0, 0.0, 0.0]])
    assert topk(scores, None, 0, 1).tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert topk(scores, None, 0, 2).tolist() == [[0, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert (topk(scores, None, 0, 3) == 1).all()


def hand_made(kind):
    torch.manual_seed(3)
    shapes = {"full": [(7, 5)], "full with bias": [(7, 5), (7,)], "lora": [(2, 5), (7, 2)]}[kind]
    draw = lambda: [torch.randn(s, dtype=torch.float64) for s in shapes]   # noqa: E731
    lr, decay, beta1, beta2, t = 0.25, 0.9, 0.8, 0.99, 3
    rates = torch.tensor([lr, decay, lr / (1 - beta1 ** t), (1 - beta2 ** t) ** 0.5, t, 0.375],
                         dtype=torch.float64)
    w = draw()
    return Expert(kind.split()[0], p=w, w=w, g=draw(), m=draw(), v=[x ** 2 for x in draw()], m_before=draw(),
                  v_before=[x ** 2 for x in draw()], weight=torch.randn(7, 5, dtype=torch.float64),
                  rates=rates, betas=(beta1, beta2), eps=1e-3, scale=1.5)


@pytest.mark.parametrize("kind", ["full", "full with bias", "lora"])
def test_scores_by_hand(kind):
    """Each rule again as a loop over single numbers, and align's norm with the full matrix that it avoids."""
    e = hand_made(kind)
    m = [x for t in e.m for x in t.flatten().tolist()]
    v = [x for t in e.v for x in t.flatten().tolist()]
    n = len(m)
    want = {"epd": 0.25 / n * sum(a * a / (math.sqrt(b) + 1e-3) for a, b in zip(m, v)),
            "pfn": math.sqrt(sum((a / (math.sqrt(b) + 1e-3)) ** 2 for a, b in zip(m, v)) / n),
            "snr": sum(a * a for a in m) / sum(v),
            "always_full": float(e.kind == "full"), "always_lora": float(kind == "lora"), "even": 0.0}
    u = [a / (b.sqrt() + 1e-3) for a, b in zip(e.m_before, e.v_before)]
    moved = [1.5 * (u[1] @ e.w[0] + e.w[1] @ u[0])] if kind == "lora" else u
    norm = math.sqrt(sum(x ** 2 for t in moved for x in t.flatten().tolist()))
    want["align"] = sum((g * x).sum().item() for g, x in zip(e.g, u)) / norm
    assert e.t == 3 and e.lr == 0.25 and e.numel == n
    for name, value in want.items():
        assert SCORES[name](e).item() == pytest.approx(value, rel=1e-6), name
    assert SCORES["random"](e).item() == 0.375


def test_a_coin_is_fair_in_every_module_and_forgets_its_last_tosses():
    _, optimizer = molf_net(score=molf.coin)
    seen = [True] * len(optimizer.param_groups)
    chances = torch.stack([optimizer.rates(seen)[:6, molf.CHANCE] for _ in range(900)])
    wins = (chances[:, ::2] > chances[:, 1::2]).float()                     # (steps, modules)
    sigma = 900 ** -0.5
    assert ((wins.mean(0) - 0.5).abs() < 5 * sigma / 2).all()
    assert (torch.corrcoef(wins.T) - torch.eye(3)).abs().max() < 5 * sigma
    for series in (*wins.T, *chances.T):
        for lag in range(1, 10):
            assert torch.corrcoef(torch.stack([series[:-lag], series[lag:]]))[0, 1].abs() < 5 * sigma


def test_epd_depends_on_shape_as_predicted_at_the_start():
    """With B = 0 and white gradients, LoRA's score is about 1.63 out/(in + out) of the full expert's
    (alpha 32, r 128, A of standard deviation 1/sqrt(3 in)): what EPD prefers at the start is set by shapes,
    not by the task."""
    torch.manual_seed(0)
    for n_in, n_out in ((512, 1024), (1024, 512), (512, 512)):
        net = nn.ModuleDict({"up": nn.Linear(n_in, n_out, bias=False)})
        add_experts(net, ranks=(128,), alpha=32, targets=("up",))
        optimizer = MoLFAdamW(param_groups(net, lr=1e-4, lora_lr=1e-4))
        net["up"].weight.grad = torch.randn(n_out, n_in)
        unfold(net)
        optimizer.step()
        full, lora = optimizer.scores[0].tolist()
        assert lora / full == pytest.approx(1.63 * n_out / (n_in + n_out), rel=0.03)


def test_a_rule_sees_the_moments_before_and_after_and_the_step_lr():
    seen = []

    def spy(e):
        tensors = [x[0].clone() for x in (e.g, e.m, e.m_before, e.v, e.v_before)]
        seen.append((e.kind, tensors, e.lr.item(), e.scale))
        return e.lr * 0
    net, optimizer = molf_net(score=spy)
    for batch in batches(2):
        step(net, optimizer, batch)
    kind, (g, m, m0, v, v0), lr, scale = seen[6]        # module 0's full expert at the second step
    assert kind == "full" and lr == pytest.approx(3e-3) and scale == 1.0
    torch.testing.assert_close(m, 0.9 * m0 + 0.1 * g)
    torch.testing.assert_close(v, 0.999 * v0 + 0.001 * g ** 2)
    assert torch.equal(m0, seen[0][1][1])
    assert seen[7][0] == "lora" and seen[7][3] == pytest.approx(4 / 2 ** 0.5)


def test_a_module_without_gradient_sits_the_step_out():
    net, optimizer = molf_net()
    x, y = batches(1)[0]
    (torch.relu(net.up(net.emb(x))).mean() - 1).square().backward()         # mid and down take no part
    before = net.mid.full.clone()
    unfold(net)
    optimizer.step()
    fold(net)
    assert torch.equal(net.mid.full, before)
    assert not optimizer.winners[1:].any() and optimizer.winners[0].any()
    assert optimizer.scores[1:].isnan().all()
    optimizer.zero_grad()
    step(net, optimizer, (x, y))
    assert optimizer.winners.any(1).all()


# ------------------------------------------------------------------------------------------------ bookkeeping

@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.01] * len(o.param_groups), total_steps=12),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.0 if i == 3 else 1.0)])
def test_torch_schedulers_drive_every_expert(make):
    net, optimizer = molf_net(top_k=2)
    schedule = make(optimizer)
    rates, seen = optimizer.rates, []
    optimizer.rates = lambda groups: seen.append(rates(groups)) or seen[-1]
    for i, batch in enumerate(batches(8)):
        lrs = [g["lr"] for g in optimizer.param_groups]
        before = [g["params"][0].clone() for g in optimizer.param_groups]
        step(net, optimizer, batch, schedule)
        torch.testing.assert_close(seen[-1][:, LR], torch.tensor(lrs))
        for lr, old, group in zip(lrs, before, optimizer.param_groups):
            a_at_first_step = i == 0 and group["kind"] == "lora"            # A's gradient is 0 where B is
            assert torch.equal(old, group["params"][0]) == (lr == 0) or a_at_first_step


@pytest.mark.parametrize("options", [
    dict(), dict(full=False, ranks=(2, 4)), dict(ranks=()), dict(dropout=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(options, dtype):
    def run(net, optimizer, part):
        for i, batch in enumerate(part):
            torch.manual_seed(i)                        # of the dropout
            step(net, optimizer, batch)
    data = batches(12)
    net, optimizer = molf_net(dtype=dtype, **options)
    run(net, optimizer, data[:7])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    run(net, optimizer, data[7:])
    again, restored = molf_net(dtype=dtype, seed=9, **options)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    assert all(t.dtype == torch.float32 for s in restored.state.values() for t in s.values())
    run(again, restored, data[7:])
    for (name, p), q in zip(net.named_parameters(), again.parameters()):
        assert torch.equal(p, q), name
    assert torch.equal(optimizer.scores, restored.scores)
    assert all(isinstance(v, (str, int, float, tuple, list))
               for g in saved[1]["param_groups"] for v in g.values())


def test_pure_bf16_has_the_moments_of_torch_adamw_in_bf16():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 30).bfloat16())
    q = torch.nn.Parameter(p.detach().clone())
    reference = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1, foreach=False)
    optimizer = MoLFAdamW([dict(params=[p], weight_decay=0.1)], lr=1e-2, pure_bf16=True)
    for _ in range(20):
        p.grad = torch.randn(40, 30).bfloat16()
        q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"}
    for key, mine in optimizer.state[p].items():
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, reference.state[q][key])
    torch.testing.assert_close(p, q, rtol=2 ** -6, atol=1e-2)       # a few roundings of 2^-8


@pytest.mark.parametrize("pure, falls", [(True, False), (False, True)])
def test_a_second_moment_in_bf16_never_falls(pure, falls):
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = MoLFAdamW([p], pure_bf16=pure)
    p.grad = torch.randn(8, 8).bfloat16()
    optimizer.step()
    peak = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad = torch.zeros_like(p)
    for _ in range(200):
        optimizer.step()
    assert (optimizer.state[p]["exp_avg_sq"] < peak).all() == falls


def test_bf16_parameters_have_fp32_masters():
    """A step far below bf16's spacing is not lost: it adds up in the master."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MoLFAdamW([dict(params=[p])], lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p.data, torch.full((4,), 0.99, dtype=torch.bfloat16))
    assert optimizer.state[p]["master"][0].item() == pytest.approx(0.99, abs=1e-5)


def test_every_trainable_parameter_is_in_exactly_one_group():
    net, optimizer = molf_net()
    names = {p: n for n, p in net.named_parameters()}
    grouped = sorted(names[p] for g in optimizer.param_groups for p in g["params"])
    assert grouped == sorted(n for n in names.values() if n not in ("up.weight", "mid.weight", "down.weight"))
    decays = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays["emb.weight"] == decays["mid.full"] == 0.1
    assert decays["mid.A.0"] == decays["mid.B.0"] == 0.01
    assert decays["norm.weight"] == decays["norm.bias"] == 0
    net.mid.experts = lambda: [("full", 1.0, [net.up.full])]
    with pytest.raises(AssertionError, match="two groups, or in none"):
        param_groups(net)


def test_a_forgotten_unfold_is_an_error():
    net, optimizer = molf_net()
    x, y = batches(1)[0]
    (net(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match="call unfold"):
        optimizer.step()


def test_groups_of_ones_own_and_bare_parameters_take_torch_adamw():
    """What is not routed decays as its group says, vectors too."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 3))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = MoLFAdamW(ours, lr=0.1, weight_decay=0.5)
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.5, foreach=False)
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="takes all its groups when it is made"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match="2 experts: give 1 to 2"):
        molf_net(top_k=top_k)


def test_a_transformers_model_trains_unchanged():
    torch.manual_seed(0)
    net = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True))
    layers = add_experts(net, ranks=(4,))
    optimizer = MoLFAdamW(param_groups(net, lr=2e-3, lora_lr=2e-3))
    ids = torch.randint(50, (4, 12))
    losses, wins = [], 0
    for _ in range(60):
        loss = net(ids, labels=ids).loss
        loss.backward()
        unfold(net)
        optimizer.step()
        fold(net)
        optimizer.zero_grad()
        losses.append(loss.item())
        wins += optimizer.winners
    assert losses[-1] < 0.5 * losses[0] and len(layers) == 14 and (wins.sum(0) > 0).all()
    for m in net.modules():
        if isinstance(m, MoLFLinear):
            torch.testing.assert_close(m.weight, m.full + m.scales[0] * m.B[0] @ m.A[0])


def test_the_demonstration_shows_epd_sending_low_rank_to_lora_and_full_rank_to_the_full_expert():
    out = subprocess.run([sys.executable, molf.__file__], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    shares = [float(x.split("full")[1].split("%")[0]) for x in out.stdout.split("pfn")[0].splitlines()
              if x.rstrip()[-4:-2] == "e-"]
    assert len(shares) == 2 and shares[0] < 50 < shares[1]
    assert all(name in out.stdout for name in SCORES)
    verdicts = [line[12:-1] for line in out.stdout.splitlines()
                if line.startswith(" " * 12) and line[-1] == ":"]
    assert len(verdicts) == len(SCORES) and verdicts[0] == "routes by layer"
    assert verdicts[4] == verdicts[5] == "does not route"
    assert verdicts[6] == "moves both, in no layer's favour"


def test_a_parameter_that_joins_late_counts_its_own_steps():
    """AdamW's bias correction goes by each parameter's own steps, also in the rest."""
    net, optimizer = molf_net(ranks=())
    torch.manual_seed(0)
    plain = Net()
    groups = [dict(params=[p], weight_decay=0.1 * (p.dim() > 1)) for p in plain.parameters()]
    reference = torch.optim.AdamW(groups, lr=3e-3, foreach=False)
    for i, (x, y) in enumerate(batches(12)):
        for model, opt in ((net, optimizer), (plain, reference)):
            h = model.mid(torch.relu(model.up(model.emb(x))))       # norm and down join at the fifth step
            loss = h.square().mean() if i < 4 else (model.down(model.norm(h)) - y).square().mean()
            loss.backward()
            unfold(model)
            opt.step()
            fold(model)
            opt.zero_grad()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), p, rtol=0, atol=1e-7)


def from_readme(start):
    """The names of molf.py with the code of README that begins like this."""
    text = (Path(molf.__file__).parent / "README.md").read_text(encoding="utf-8")
    block = text[text.index("    " + start):].split("\n\n")[0]
    names = dict(vars(molf))
    exec(textwrap.dedent(block), names)
    return names


def test_the_rule_in_the_readme_works():
    net, optimizer = molf_net(score=from_readme("def grad_norm(e):")["grad_norm"])
    x, y = batches(1)[0]
    (net(x) - y).square().mean().backward()
    unfold(net)
    want = [[sum(p.grad.norm() ** 2 for p in params) for _, _, params in net.get_submodule(n).experts()]
            for n in TARGETS]
    optimizer.step()
    torch.testing.assert_close(optimizer.scores, torch.tensor(want))


def test_the_route_in_the_readme_works():
    net, optimizer = molf_net(route=from_readme("def half(scores")["half"])
    step(net, optimizer, batches(1)[0])
    assert sorted(optimizer.gates.flatten().tolist()) == [0.5] * 3 + [1.0] * 3


# ------------------------------------------------------------------------- the paper's equations, transcribed

def transcribed(shapes, ranks, alpha, rule, lr, lora_lr, with_bias, experts, data, steps):
    """MoLF as its paper writes it, on a chain of linears and tanh, with loops and plain autograd, and nothing
    of molf.py or model.py. experts: {layer: (W, bias or None, [A], [B])}. -> winners (steps, layers)"""
    beta1, beta2, eps, decay, lora_decay = 0.9, 0.999, 1e-8, 0.1, 0.01
    layers = []
    for name in shapes:
        W, bias, As, Bs = experts[name]
        modules = [dict(params=[W] + ([bias] if with_bias else []), lr=lr, decays=[decay, 0.0], s=1.0)]
        for r, A, B in zip(ranks, As, Bs):
            s = alpha / r ** 0.5
            modules.append(dict(params=[A, B], lr=lora_lr, decays=[lora_decay, lora_decay], s=s))
        for e in modules:
            e["m"] = [torch.zeros_like(p) for p in e["params"]]
            e["v"] = [torch.zeros_like(p) for p in e["params"]]
        layers.append(modules)
    winners = []
    for t in range(1, steps + 1):
        x, y = data[t - 1]
        for modules in layers:
            for e in modules:
                e["params"] = [p.detach().requires_grad_() for p in e["params"]]
            full, *loras = modules
            weight = full["params"][0]
            for e in loras:
                A, B = e["params"]
                weight = weight + e["s"] * B @ A
            x = x @ weight.T + (full["params"][1] if with_bias else 0)
            x = torch.tanh(x)
        ((x - y) ** 2).mean().backward()
        row = []
        for modules in layers:
            scores = []
            for e in modules:
                n = sum(p.numel() for p in e["params"])
                S = 0.0
                for i, p in enumerate(e["params"]):
                    g = p.grad
                    e["m"][i] = beta1 * e["m"][i] + (1 - beta1) * g
                    e["v"][i] = beta2 * e["v"][i] + (1 - beta2) * g ** 2
                    m, v = e["m"][i], e["v"][i]
                    if rule == "epd":
                        S += (m ** 2 / (v.sqrt() + eps)).sum() * e["lr"] / n
                    else:
                        S += ((m / (v.sqrt() + eps)) ** 2).sum() / n
                scores.append(float(S if rule == "epd" else S ** 0.5))
            best = scores.index(max(scores))
            e = modules[best]
            for i, p in enumerate(e["params"]):
                m_hat, v_hat = e["m"][i] / (1 - beta1 ** t), e["v"][i] / (1 - beta2 ** t)
                with torch.no_grad():
                    p.mul_(1 - e["lr"] * e["decays"][i]).sub_(e["lr"] * m_hat / (v_hat.sqrt() + eps))
            row.append(best)
        winners.append(row)
    return torch.tensor(winners), layers


@pytest.mark.parametrize("ranks", [(4,), (8,), (2, 8)])
@pytest.mark.parametrize("rule", [epd, pfn])
@pytest.mark.parametrize("with_bias", [True, False])
def test_200_steps_are_those_of_the_papers_equations(ranks, rule, with_bias):
    """fp32; the same winners at every step, and at the end the same weights. A bias is part of its layer's
    full expert: in the score and in N, moved when that expert wins, without weight decay."""
    torch.manual_seed(0)
    shapes = {"a": (12, 32), "b": (32, 32), "c": (32, 6)}
    net = nn.ModuleDict({n: nn.Linear(*shape, bias=with_bias) for n, shape in shapes.items()})
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 12, generator=g), torch.randn(16, 6, generator=g).tanh()) for _ in range(200)]
    add_experts(net, ranks, alpha=4, targets=tuple(shapes))
    optimizer = MoLFAdamW(param_groups(net, lr=2e-3, lora_lr=3e-3, weight_decay=0.1, lora_weight_decay=0.01),
                          score=rule)
    copies = {n: (m.full.detach().clone(), m.bias.detach().clone() if with_bias else None,
                  [a.detach().clone() for a in m.A], [b.detach().clone() for b in m.B])
              for n, m in net.items()}
    want, layers = transcribed(shapes, ranks, 4, rule.__name__, 2e-3, 3e-3, with_bias, copies, data, 200)
    for t, (x, y) in enumerate(data):
        for layer in net.values():
            x = torch.tanh(layer(x))
        (x - y).square().mean().backward()
        unfold(net)
        optimizer.step()
        optimizer.zero_grad()
        fold(net)
        assert optimizer.gates.argmax(1).tolist() == want[t].tolist(), f"step {t + 1}"
    for (full, *loras), m in zip(layers, net.values()):
        torch.testing.assert_close(m.full, full["params"][0], rtol=0, atol=1e-5)
        if with_bias:
            torch.testing.assert_close(m.bias, full["params"][1], rtol=0, atol=1e-5)
        for e, b in zip(loras, m.B):
            torch.testing.assert_close(b, e["params"][1], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- gates and their routes

def test_an_expert_moves_with_gate_times_lr_and_a_bias_does_not_decay():
    """Against AdamW with lr and weight decay scaled by the gate: 0 keeps every bit, 1 is the whole step."""
    for gate in (0.0, 0.25, 1.0):
        net, optimizer = molf_net(route=lambda scores, *_: torch.full_like(scores, gate))
        torch.manual_seed(5)
        groups = [g for g in optimizer.param_groups if g["kind"] != "rest"]
        start, twins = {}, {}
        for g in groups:
            for p in g["params"]:
                p.grad = torch.randn_like(p)
                p.detach()[0] = -0.0                            # a bit that 0 times something would lose
                start[p] = p.detach().clone()
                twins[p] = nn.Parameter(start[p].clone())
                twins[p].grad = p.grad.clone()
                decay = 0.0 if p.dim() == 1 else g["weight_decay"]
                torch.optim.AdamW([twins[p]], lr=gate * g["lr"], weight_decay=decay, foreach=False).step()
        optimizer.step()
        assert (optimizer.gates == gate).all()
        for p, twin in twins.items():
            if gate == 0:
                assert torch.equal(p.view(torch.int32), start[p].view(torch.int32))
            else:
                torch.testing.assert_close(p, twin, rtol=0, atol=1e-7)


def test_softmax_gates_by_hand_and_free_of_the_learning_rate():
    scores = torch.tensor([[4.0, 1.0], [0.0, 0.0], [-2.0, 1.0]])
    got = softmax(scores, None, 0, 1, temperature=0.5)
    e = [math.exp(x / 0.5) for x in (1, 0.25, -1, 0.5)]
    torch.testing.assert_close(got[0], torch.tensor([e[0], e[1]]) / (e[0] + e[1]))
    torch.testing.assert_close(got[1], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(got[2], torch.tensor([e[2], e[3]]) / (e[2] + e[3]))
    torch.testing.assert_close(softmax(scores * 1e-9, None, 0, 1, temperature=0.5), got)
    assert (softmax(scores, None, 0, 2) <= 1).all() and (softmax(scores, None, 0, 2)[1] == 1).all()


def test_sticky_decides_every_10_steps_and_where_nothing_moved():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    gates, seen = torch.zeros(1, 2), []
    for step in range(25):
        gates = sticky(a if step in (0, 20) else b, gates, torch.tensor(step), 1)
        seen.append(gates.argmax().item())
    assert seen == [1] * 10 + [0] * 10 + [1] * 5
    assert sticky(b, torch.zeros(1, 2), torch.tensor(3), 1).tolist() == [[1, 0]]


@pytest.mark.parametrize("route", list(ROUTES))
def test_every_route_and_a_coin_resume_bit_for_bit(route):
    def run(net, optimizer, part):
        seen = []
        for batch in part:
            step(net, optimizer, batch)
            seen.append(optimizer.gates.clone())
        return seen
    options = dict(route=ROUTES[route], score=molf.coin, ranks=(2, 4))
    data = batches(34)
    net, optimizer = molf_net(**options)
    run(net, optimizer, data[:13])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    want = run(net, optimizer, data[13:])
    again, restored = molf_net(seed=9, **options)
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert all(torch.equal(x, y) for x, y in zip(run(again, restored, data[13:]), want, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert len({tuple(g.flatten().tolist()) for g in want}) > 1


# ------------------------------------------------------------------------------------------- what a rule sees

def test_a_rule_sees_the_step_that_adamw_would_take_and_the_weight_of_its_module():
    """The step is the change of a copy under torch.optim.AdamW; the weight is W_eff, or the frozen W."""
    seen = {}

    def spy(e):
        steps = [x.clone() for x in e.adamw_step()]
        seen.setdefault(e.kind, []).append((e.t.item(), steps, e.weight.clone()))
        return e.lr * 0
    for full in (True, False):
        seen.clear()
        net, optimizer = molf_net(score=spy, ranks=(2, 4), full=full)
        plain, _ = molf_net(ranks=(2, 4), full=full)
        layer, twin = net.up, plain.up
        experts = [params for _, _, params in twin.experts()]
        decay = [0.1] * full + [0.01] * 4
        matrices = [params[0] for params in experts[:full]] + [p for params in experts[full:] for p in params]
        lrs = [3e-3] * full + [5e-3] * 4
        if full:
            matrices, decay, lrs = matrices + [twin.bias], decay + [0.0], lrs + [3e-3]
        reference = torch.optim.AdamW([dict(params=[p], lr=lr, weight_decay=d)
                                       for p, lr, d in zip(matrices, lrs, decay)], foreach=False)
        for t, batch in enumerate(batches(3), 1):
            before = [p.detach().clone() for p in matrices]
            weight = layer.merged() if full else layer.weight
            weight = weight.detach().clone()
            x, y = batch
            (plain(x) - y).square().mean().backward()
            unfold(plain)
            reference.step()
            plain.zero_grad()
            moved = [p.detach() - b for p, b in zip(matrices, before)]
            step(net, optimizer, batch)
            for p, b in zip(matrices, before):                      # the twin goes where the routed net went
                p.data.copy_(b)
            for kind, start, n in (("full", 0, 1), ("lora", full, 2)):
                if kind in seen:
                    count, steps, shown = seen[kind][0]
                    assert count == t and torch.equal(shown, weight)
                    for got, want in zip(steps, moved[start:start + n]):
                        torch.testing.assert_close(got, want, rtol=0, atol=3e-7)
                    if kind == "full":
                        torch.testing.assert_close(steps[1], moved[-1], rtol=0, atol=3e-7)
            seen.clear()
            for p, q in zip(plain.parameters(), net.parameters()):
                p.data.copy_(q)


@pytest.mark.parametrize("rule, error, message", [
    (lambda e: 0.5, TypeError, "rule <lambda> gave 0.5, not a 0-d tensor"),
    (lambda e: e.g[0], TypeError, r"rule <lambda> gave shape \[\d+, \d+\], not a 0-d tensor"),
    (lambda e: e.lr * math.nan, FloatingPointError, "rule <lambda> gave nan for the full expert of up")])
def test_a_rule_that_gives_no_finite_number_is_named_at_once(rule, error, message):
    net, optimizer = molf_net(score=rule)
    with pytest.raises(error, match=message):
        step(net, optimizer, batches(1)[0])


@pytest.mark.parametrize("route, error, message", [
    (lambda scores, *_: scores[:, :1], TypeError, r"gates of shape \[3, 1\], not \(modules, experts\)"),
    (lambda scores, *_: scores * math.nan, FloatingPointError, "not from 0 to 1"),
    (lambda scores, *_: torch.full_like(scores, 2.0), FloatingPointError, "not from 0 to 1")])
def test_a_route_that_gives_no_gates_is_refused_at_once(route, error, message):
    net, optimizer = molf_net(route=route)
    with pytest.raises(error, match=message):
        step(net, optimizer, batches(1)[0])


def test_molf_py_works_alone(tmp_path):
    """Copied into another project it needs torch only, and a layer with the attributes that it looks at."""
    (tmp_path / "molf.py").write_text(Path(molf.__file__).read_text())
    program = """import sys, torch, molf
class Two(torch.nn.Linear):
    folded = False
    def __init__(self):
        super().__init__(3, 3, bias=False)
        self.A, self.B = (torch.nn.Parameter(torch.ones(*s) / 5) for s in ((1, 3), (3, 1)))
    def experts(self):
        return [("full", 1.0, [self.weight]), ("lora", 2.0, [self.A, self.B])]
    def forward(self, x):
        return x @ (self.weight + 2.0 * self.B @ self.A).T
net = torch.nn.Sequential(Two())
optimizer = molf.MoLFAdamW(molf.param_groups(net, lr=0.05, lora_lr=0.05))
losses = []
for _ in range(60):
    loss = (net(torch.eye(3)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses[-1] < 0.05 * losses[0], sorted(m for m in sys.modules if m in ("model", "data", "train", "lib")))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                            timeout=120, env={"PATH": "", "OMP_NUM_THREADS": "1"})
    assert result.stdout.strip() == "True []", result.stderr
