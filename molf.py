"""MoLF's optimizer: AdamW in which the experts of a layer compete for each step (arXiv 2605.07111).

The weight of a linear layer (a module) is a sum of experts, a full matrix W and pairs of LoRA matrices A, B:

    W_eff = W + sum_i s_i B_i A_i               s_i = alpha / sqrt(rank_i)

The forward pass uses W_eff. A training step is loss.backward(), unfold, optimizer.step(), fold. unfold turns
the gradient of W_eff into a gradient g for every expert, and fold writes the new sum into the layer (both are
in model.py). This is the optimizer's part:

    m <- b1 m + (1 - b1) g                      m_hat = m / (1 - b1^t)          every expert, every step
    v <- b2 v + (1 - b2) g^2                    v_hat = v / (1 - b2^t)
    S = score(expert)                           gates = route(the scores of each module), 0 to 1
    w <- w - gate (lr wd w + lr m_hat / (sqrt(v_hat) + eps))                    where gate > 0

A losing expert keeps its weights. Its moments go on, so that the moments of all experts have seen the same
batches. With one expert a module this is torch.optim.AdamW. What is not routed (embedding, norms) takes a
plain AdamW step. All arithmetic is fp32, and the state holds an fp32 master copy of each bf16 parameter, but
for an experiment with pure bf16.

    optimizer = MoLFAdamW(param_groups(model, lr=5e-5, lora_lr=5e-5), score=epd, route=topk, top_k=1)
    optimizer.gates, optimizer.scores           # (modules, experts) of the last step, on the device
    python molf.py                              # a demonstration: which expert moves where, rule by rule
"""
import hashlib
import math
from typing import NamedTuple

import torch

# Where Expert.rates has lr, 1 - lr wd, lr / (1 - b1^t), sqrt(1 - b2^t), t and a random number
LR, DECAY, STEP_SIZE, CORRECTION, T, CHANCE = range(6)

# ------------------------------------------------------------------------------------------------------------
# ROUTING RULES: EDIT HERE. A rule scores one expert at one step and returns a 0-d tensor. To try your own,
# write a function and add it to SCORES, then run `train.py --score yours`. On a GPU, train.py compiles the
# rule and replays it as a CUDA graph: a rule with .item(), with `if` on a tensor, or with a state of its own
# needs `--eager` there. The same holds for a route.

class Expert(NamedTuple):
    """What a rule sees of an expert. The rule must change nothing. The lists run over the expert's
    parameters: [W] or [W, bias] of a full expert, [A, B] of a LoRA expert."""
    kind: str               # "full" or "lora"
    p: list                 # the parameters as the model holds them, perhaps in bf16
    w: list                 # the same in fp32: W (out, in) and bias (out,), or A (r, in) and B (out, r)
    g: list                 # gradients of this step, clipped
    m: list                 # Adam's moments after this gradient, without bias correction
    v: list
    m_before: list          # Adam's moments before this gradient
    v_before: list
    weight: torch.Tensor    # (out, in), model's dtype: W_eff of the module. Where LoRA is a side branch (W is
                            # frozen, with dropout, or not folded), this is W alone.
    rates: torch.Tensor     # (6,): the numbers of this step, see LR to CHANCE above
    betas: tuple
    eps: float
    scale: float            # s in W_eff = W + s B A; 1 for a full expert

    @property
    def lr(self):           # 0-d: the learning rate of this step
        return self.rates[LR]

    @property
    def t(self):            # 0-d: the number of gradients that the expert has seen, including this one
        return self.rates[T]

    @property
    def chance(self):       # 0-d: a random number of this expert and step, from 0 to 1
        return self.rates[CHANCE]

    @property
    def numel(self):        # N in the rules
        return sum(w.numel() for w in self.w)

    def adamw_step(self):
        """What AdamW would add to each parameter now, with bias correction and weight decay: a list. For
        LoRA these are the steps of A and of B, not the change of W_eff."""
        return [adamw(self, w, m, v) - w for w, m, v in zip(self.w, self.m, self.v)]

def total(tensors):
    """The sum of all entries, 0-d. Row sums come first: then the compiler fuses them into one read."""
    rows = [torch.atleast_2d(x).sum(dim=-1) for x in tensors]
    return torch.cat(rows).sum()

def epd(e):
    """Expected parameter-wise descent, the paper's rule: S = lr/N sum m^2 / (sqrt(v) + eps).
    A step of lr u with u = m / (sqrt(v) + eps) lowers the loss by about lr sum g u. EPD expects the gradient
    g to be m, and divides by the number N of the expert's parameters. So S depends on the shapes of the
    matrices and on the expert's learning rate. As in the paper, no score corrects the bias of m and v."""
    descent = [m.square() / (v.sqrt() + e.eps) for m, v in zip(e.m, e.v)]
    return e.lr / e.numel * total(descent)

def pfn(e):
    """Preconditioned first-moment norm, the paper's scale-free ablation: S = rms of m / (sqrt(v) + eps)."""
    square = [(m / (v.sqrt() + e.eps)).square() for m, v in zip(e.m, e.v)]
    return (total(square) / e.numel).sqrt()

def snr(e):
    """Signal-to-noise ratio: S = sum m^2 / sum v. It depends on neither shapes nor learning rates."""
    signal = total(m.square() for m in e.m)
    return signal / (total(e.v) + 1e-30)

def align(e):
    """Does the direction learnt from earlier batches help on this one? By how much, for its length in W_eff?
    S = g.u / |dW(u)| with u = m / (sqrt(v) + eps) from before this gradient. A step against u lowers the
    loss if g.u > 0. At the first step all tie."""
    u = [m / (v.sqrt() + e.eps) for m, v in zip(e.m_before, e.v_before)]
    gain = total(g * x for g, x in zip(e.g, u))
    return gain / (movement(e, u) + 1e-30)

def movement(e, u):
    """|dW(u)|, 0-d: how far W_eff moves with a small step u, which has a direction for each of e.w. For LoRA
    dW = s (u_B A + B u_A). Its norm needs r x r matrices only, because |u_B A|^2 = tr(u_B^T u_B A A^T), the
    sum over (u_B^T u_B) * (A A^T)."""
    if e.kind == "full":
        return total(x.square() for x in u).sqrt()
    a, b = e.w
    u_a, u_b = u
    first = (u_b.T @ u_b) * (a @ a.T)                   # sums to |u_B A|^2
    last = (b.T @ b) * (u_a @ u_a.T)                    # sums to |B u_A|^2
    mixed = (u_b.T @ b) * (a @ u_a.T)                   # sums to the inner product of u_B A and B u_A
    square = e.scale ** 2 * (first + last + 2 * mixed).sum()
    return square.clamp_min(0).sqrt()

def always_full(e):
    """Control: with topk the full expert moves at every step."""
    return torch.full_like(e.lr, e.kind == "full")

def always_lora(e):
    """Control: with topk LoRA moves at every step. Unlike plain LoRA it also trains embedding and norms."""
    return torch.full_like(e.lr, e.kind == "lora")

def coin(e):
    """Control: a random winner."""
    return e.chance.clone()

def even(e):
    """Control: no winner. With `--route softmax` both experts move, at half their learning rates."""
    return torch.zeros_like(e.lr)

SCORES = {
    "epd": epd,
    "pfn": pfn,
    "snr": snr,
    "align": align,
    "always_full": always_full,
    "always_lora": always_lora,
    "random": coin,
    "even": even,
}

# A route turns the scores of a step into gates. An expert moves with gate x lr: 0 keeps its bits, 1 is AdamW.
# Add yours to ROUTES and run `train.py --route yours`.
#   scores  (modules, experts)    of any size and sign (EPD's are tiny); NaN where a module has no gradient,
#                                 which then doesn't move, whatever its gates
#   gates   (modules, experts)    those of the last step; 0 at first, and where a module didn't move.
#                                 They are in the checkpoints.
#   step    0-d tensor            the number of steps before this one

def topk(scores, gates, step, top_k):
    """The paper's route: the top_k highest scores of each module move. Ties go to the first expert."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(-1, order[:, :top_k], 1.0)

def softmax(scores, gates, step, top_k, temperature=0.2):
    """All experts move, the better ones more. The gates are top_k times a softmax, and at most 1. Scores are
    first divided by the largest of their module, because EPD's are tiny and decay with the learning rate."""
    largest = scores.abs().amax(dim=-1, keepdim=True)
    share = scores / largest.clamp_min(1e-30)
    return (top_k * (share / temperature).softmax(dim=-1)).clamp_max(1)

def sticky(scores, gates, step, top_k, every=10):
    """topk, but decided again every 10 steps only. A module that did not move at the last step decides now:
    its old gates are 0."""
    idle = gates.sum(dim=-1, keepdim=True) == 0
    decide = idle | (step % every == 0)
    return torch.where(decide, topk(scores, gates, step, top_k), gates)

ROUTES = {"topk": topk, "softmax": softmax, "sticky": sticky}

# END OF THE ROUTING RULES
# ------------------------------------------------------------------------------------------------------------
# The functions that touch large tensors. lib/fast.py compiles observe_and_score, move and observe_and_move.

spread = iter       # the optimizer's loops run through it; lib/fast.py puts them on several CUDA streams

def adam_moments(g, m, v, beta1, beta2):
    """-> the moments after gradient g; m and v stay as they are."""
    g = g.to(m.dtype)
    return torch.lerp(m, g, 1 - beta1), torch.addcmul(v * beta2, g, g, value=1 - beta2)

def adamw(e, w, m, v):
    """-> w after AdamW's step. The bias of a full expert does not decay."""
    decay = e.rates[DECAY] if w.dim() > 1 or e.kind == "rest" else 1.0
    return w * decay - e.rates[STEP_SIZE] * m / (v.sqrt() / e.rates[CORRECTION] + e.eps)

def observe(e, clip):
    """Expert e sees its gradient times clip. -> clipped gradients, new m, new v; nothing is written yet"""
    clipped = [g.float() * clip for g in e.g]
    moments = [adam_moments(g, m, v, *e.betas) for g, m, v in zip(clipped, e.m, e.v)]
    return clipped, [m for m, _ in moments], [v for _, v in moments]

def write_moments(e, m, v, ok):
    """Write the new moments over the old ones, where ok (a 0-d bool)."""
    for old, new in zip(e.m + e.v, m + v):
        old.copy_(torch.where(ok, new, old))

def observe_and_score(score, e, clip, ok):
    """The first pass over an expert that has rivals. -> its score"""
    g, m, v = observe(e, clip)
    value = score(e._replace(g=g, m=m, v=v))            # m_before and v_before are still the old ones
    write_moments(e, m, v, ok)
    return value

def move(e, gate):
    """The AdamW step times gate (0-d), in place. Gate 0 keeps every bit, gate 1 is the whole step exactly."""
    for p, w, m, v in zip(e.p, e.w, e.m, e.v):
        new = torch.lerp(w, adamw(e, w, m, v), gate.to(w.dtype))
        w.copy_(torch.where(gate > 0, new, w))
        if p is not w:
            p.copy_(w)

def observe_and_move(e, clip, ok):
    """Plain AdamW in one pass, for what has no rival."""
    _, m, v = observe(e, clip)
    write_moments(e, m, v, ok)
    move(e, ok.float())                                 # e.m and e.v, the stored ones, are new now

def random_number(seed, t):
    """-> from 0 to 1, the same on any number of GPUs. A digest has no state that a checkpoint would keep."""
    digest = hashlib.sha256(f"{seed} {t}".encode()).digest()
    return int.from_bytes(digest[:3], "big") / 2 ** 24

def name_of(function):
    return getattr(function, "__name__", function)

class MoLFAdamW(torch.optim.Optimizer):
    """AdamW with routing. `groups` come from `param_groups`: one for each expert, and groups of kind "rest",
    which are not routed. score and route are functions as above; top_k goes to route. A module without
    gradients sits the step out. A single expert always has score 0 and gate 1.

    step(clip=..., ok=...) takes 0-d tensors on the device and never waits for it. clip is a factor of all
    gradients (train.py: from the norm of all experts' gradients together). Where ok is False, no parameter
    and no moment changes, but steps and t are counted. Without ok, step() checks that scores are finite and
    gates from 0 to 1. With ok the caller should check, because a NaN score only stops its module.

    pure_bf16 is for an experiment: no fp32 masters, and moments in the parameter's dtype. In bf16 v * 0.999
    rounds to v again, so v never falls, and a weight loses most of its small steps."""

    def __init__(self, groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 score=epd, route=topk, top_k=1, pure_bf16=False):
        groups = [dict(g) if isinstance(g, dict) else dict(params=[g]) for g in groups]
        self.weights = [group.pop("weight", None) for group in groups]      # not for state_dict()
        routing = dict(kind="rest", module="", expert=0, scale=1.0, seed="", t=0)
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **routing))
        self.score = score
        self.route = route
        self.top_k = top_k
        modules = {}                                    # name -> indices of its experts' groups
        for i, group in enumerate(self.param_groups):
            if group["kind"] != "rest":
                modules.setdefault(group["module"], []).append(i)
            for p in group["params"]:                   # the whole state now, so memory doesn't grow later
                dtype = p.dtype if pure_bf16 else torch.float32
                self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=dtype)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)
                if p.dtype != dtype:
                    self.state[p]["master"] = p.detach().float()
        self.module_names = list(modules)
        n = max((len(experts) for experts in modules.values()), default=1)
        if any(len(experts) != n for experts in modules.values()):
            raise ValueError("every module needs the same number of experts")
        if not 1 <= top_k <= n:
            raise ValueError(f"top_k is {top_k}, but a module has {n} expert{'s' * (n > 1)}: give 1 to {n}")
        self.experts = sum(modules.values(), [])
        self.routed = self.experts if n > 1 else []     # with one expert there is nothing to route
        self.alone = sorted(set(range(len(groups))) - set(self.routed))
        p = self.param_groups[0]["params"][0]
        self.scores = torch.zeros(len(modules), n, device=p.device)
        self.gates = torch.zeros_like(self.scores) if n > 1 else torch.ones_like(self.scores)
        self.steps = torch.zeros((), dtype=torch.long, device=p.device)

    def add_param_group(self, group):
        if hasattr(self, "steps"):
            raise RuntimeError("MoLFAdamW takes all its groups when it is made")
        super().add_param_group(group)

    @property
    def winners(self):
        return self.gates > 0

    @torch.no_grad()
    def step(self, closure=None, clip=1.0, ok=None):
        loss = torch.enable_grad()(closure)() if closure else None
        check = ok is None
        if ok is None:
            ok = torch.ones_like(self.steps, dtype=torch.bool)
        rates = self.rates(self.groups_with_gradient())
        if self.routed:
            scores = [self.score_expert(i, rates[i], clip, ok) for i in spread(self.routed)]
            self.scores.copy_(torch.stack(scores).view_as(self.scores))
            gates = self.route(self.scores, self.gates, self.steps, self.top_k)
            self.refuse_other_shape(gates)
            idle = self.scores.isnan().any(dim=-1, keepdim=True)            # (modules, 1): no gradient
            self.gates.copy_(torch.where(ok & ~idle, gates, 0.0))
            if check:
                self.refuse_strange_numbers()                               # waits for the device
            for i, gate in spread(zip(self.routed, self.gates.flatten())):
                move(self.expert(i, rates[i]), gate)
        for i in spread(self.alone):
            observe_and_move(self.expert(i, rates[i]), clip, ok)
        self.steps += 1
        return loss

    def score_expert(self, i, rates, clip, ok):
        """The moments of expert i see its gradient. -> the score, NaN where there is no gradient"""
        e = self.expert(i, rates)
        if not e.g:
            return rates.new_full((), torch.nan)
        score = observe_and_score(self.score, e, clip, ok)
        if not isinstance(score, torch.Tensor) or score.shape != ():
            what = f"shape {list(score.shape)}" if isinstance(score, torch.Tensor) else score
            raise TypeError(f"rule {name_of(self.score)} gave {what}, not a 0-d tensor")
        return score

    def refuse_other_shape(self, gates):
        if gates.shape != self.scores.shape:
            raise TypeError(f"route {name_of(self.route)} gave gates of shape {list(gates.shape)}, not "
                            f"(modules, experts)")

    def refuse_strange_numbers(self):
        for i, score in zip(self.routed, self.scores.flatten().tolist()):
            group = self.param_groups[i]
            has_gradient = any(p.grad is not None for p in group["params"])
            if has_gradient and not math.isfinite(score):
                raise FloatingPointError(f"rule {name_of(self.score)} gave {score} for the {group['kind']} "
                                         f"expert of {group['module']}")
        if not ((0 <= self.gates) & (self.gates <= 1)).all():
            raise FloatingPointError(f"route {name_of(self.route)} gave a gate that is not from 0 to 1")

    def expert(self, i, rates):
        """-> group i as an Expert, with what the state holds now: old moments, or new ones after
        observe_and_score. Its gradient is not clipped yet."""
        group = self.param_groups[i]
        params = [p for p in group["params"] if p.grad is not None]
        state = [self.state[p] for p in params]
        p = [x.detach() for x in params]
        m = [s["exp_avg"] for s in state]
        v = [s["exp_avg_sq"] for s in state]
        return Expert(
            kind=group["kind"],
            p=p,
            w=[s.get("master", x) for s, x in zip(state, p)],
            g=[x.grad for x in params],
            m=m,
            v=v,
            m_before=m,
            v_before=v,
            weight=self.weights[i],
            rates=rates,
            betas=group["betas"],
            eps=group["eps"],
            scale=group["scale"],
        )

    def groups_with_gradient(self):
        """-> a bool for each group"""
        matrices = [self.param_groups[i]["params"][0] for i in self.experts]
        if matrices and all(w.grad is None for w in matrices):      # biases have one even without unfold
            raise RuntimeError("no expert has a gradient: call unfold(model) between backward() and step()")
        return [any(p.grad is not None for p in group["params"]) for group in self.param_groups]

    def rates(self, seen):
        """seen: a bool for each group. Counts the new gradients, then computes the numbers of this step, in
        double precision on the host. -> (groups, 6), fp32 on the device"""
        table = []
        for group, new in zip(self.param_groups, seen):
            group["t"] += new
            t = max(group["t"], 1)
            lr = float(group["lr"])
            beta1, beta2 = group["betas"]
            decay = 1 - lr * group["weight_decay"]
            step_size = lr / (1 - beta1 ** t)
            correction = (1 - beta2 ** t) ** 0.5
            table.append((lr, decay, step_size, correction, t, random_number(group["seed"], t)))
        rates = torch.tensor(table)
        if self.gates.is_cuda:
            return rates.pin_memory().to(self.gates.device, non_blocking=True)
        return rates

    def state_dict(self):
        return super().state_dict() | {"routing": {"gates": self.gates, "step": self.steps}}

    def load_state_dict(self, state_dict):
        params = [p for group in self.param_groups for p in group["params"]]
        saved = state_dict["state"]
        for i, p in enumerate(params):
            if set(self.state[p]) != set(saved[i]):
                raise ValueError(f"parameter {i} is {p.dtype}, and was saved from one of another precision")
        super().load_state_dict(state_dict)
        for i, p in enumerate(params):                  # torch has cast the state to the parameter's dtype
            for key, value in saved[i].items():
                self.state[p][key] = value.to(p.device, copy=True)
        self.gates.copy_(state_dict["routing"]["gates"])
        self.steps.copy_(state_dict["routing"]["step"])

def param_groups(model, lr=5e-5, lora_lr=5e-5, weight_decay=0.1, lora_weight_decay=0.01):
    """Groups for MoLFAdamW: one for each expert of each MoLFLinear, then one for each other trainable
    parameter, with the full expert's lr. Vectors (norms, biases) do not decay."""
    groups, derived = [], set()
    for name, layer in model.named_modules():
        if not hasattr(layer, "folded"):                # MoLFLinears have it; no need to import model.py
            continue
        if layer.folded:                                # its weight is W_eff, which no optimizer step trains
            derived.add(layer.weight)
        for i, (kind, scale, params) in enumerate(layer.experts()):
            full = kind == "full"
            groups.append(dict(
                params=params,
                kind=kind,
                module=name,
                expert=i,
                scale=scale,
                seed=f"{torch.initial_seed()} {len(groups)}",
                weight=layer.weight.detach(),
                lr=lr if full else lora_lr,
                weight_decay=weight_decay if full else lora_weight_decay,
            ))
    routed = {p for group in groups for p in group["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad and p not in derived]
    for p in trainable:
        if p not in routed:                             # one group each: every parameter counts its own steps
            decay = weight_decay if p.dim() > 1 else 0.0
            groups.append(dict(params=[p], kind="rest", lr=lr, weight_decay=decay))
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trainable), \
        "a trainable parameter is in two groups, or in none"
    return groups

if __name__ == "__main__":
    from lib.demo import demo
    demo()
