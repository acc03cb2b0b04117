"""MoLF's optimizer: AdamW that lets the experts of a module compete for each step (arXiv 2605.07111).

Every expert's Adam moments see every gradient. A routing rule scores the experts, and only the top-k move:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2                       for every expert, every step
    S  = score(expert)            winners = the top-k scores of the module
    w <- w - lr wd w - lr m^ / (sqrt(v^) + eps)                                  for the winners only

With one expert a module this is torch.optim.AdamW. What is not routed (embedding, norms, biases) takes a
plain AdamW step. All arithmetic is fp32; a parameter in bf16 has an fp32 master copy in the state.

    optimizer = MoLFAdamW(param_groups(model, lr=5e-5, lora_lr=5e-5), score=epd, top_k=1)
    optimizer.winners, optimizer.scores         # (modules, experts) of the last step, on the device

    python molf.py                              # a demonstration: which expert wins where, rule by rule
"""
from itertools import chain
from typing import NamedTuple

import torch

# ------------------------------------------------------------------------------------------------------------
# ROUTING RULES: EDIT HERE. A rule is a function of one expert at one step that returns a 0-d tensor; the
# highest scores of a module win. To try your own, write it and name it in SCORES: `train.py --score yours`.
# On a GPU it is compiled and replayed: no .item(), no `if` on a tensor, no state of its own, or use --eager.

class Expert(NamedTuple):
    """What a rule sees; it must change nothing. The lists run over the expert's matrices: [W] of a full
    expert, [A, B] of a LoRA expert. All are fp32."""
    kind: str           # "full" or "lora"
    w: list             # parameters: W (out, in), or A (r, in) and B (out, r)
    g: list             # gradients of this step, clipped
    m: list             # Adam moments with this step's gradient in them, without bias correction
    v: list
    m_before: list      # and as they were before it
    v_before: list
    lr: torch.Tensor    # 0-d: this step's learning rate of this expert
    scale: float        # s in W_eff = W + s B A; 1 for a full expert
    eps: float

    @property
    def numel(self):
        return sum(w.numel() for w in self.w)


def total(matrices):
    """The sum of all their entries, 0-d. By rows first: so the compiled pass needs to read them only once."""
    return torch.cat([x.sum(dim=-1) for x in matrices]).sum()


def epd(e):
    """The paper's rule: S = lr/N sum m^2 / (sqrt(v) + eps), the fall of the loss that the step
    m / (sqrt(v) + eps) promises, per parameter. It depends on matrix shapes and on both learning rates."""
    return e.lr / e.numel * total(m.square() / (v.sqrt() + e.eps) for m, v in zip(e.m, e.v))


def pfn(e):
    """The paper's scale-free ablation: S = root mean square of the step m / (sqrt(v) + eps)."""
    return (total((m / (v.sqrt() + e.eps)).square() for m, v in zip(e.m, e.v)) / e.numel).sqrt()


def snr(e):
    """S = sum m^2 / sum v: how much of the gradient is signal, not noise. Free of shape and learning rate."""
    return total(m.square() for m in e.m) / (total(e.v) + 1e-30)


def align(e):
    """Does the direction learnt from earlier batches still help on this one, per unit that it moves W_eff?
    S = g.u / |dW_eff(u)|, u = m / (sqrt(v) + eps) from before this step. For LoRA dW_eff = s (u_B A + B u_A);
    r x r Gram matrices give its norm, so no (out, in) matrix is made. At the first step u = 0: all tie."""
    u = [m / (v.sqrt() + e.eps) for m, v in zip(e.m_before, e.v_before)]
    gain = total(g * x for g, x in zip(e.g, u))
    if e.kind == "full":
        square = total([u[0].square()])
    else:
        (a, b), (ua, ub) = e.w, u
        square = e.scale ** 2 * (((ub.T @ ub) * (a @ a.T)).sum() + ((b.T @ b) * (ua @ ua.T)).sum()
                                 + 2 * ((ub.T @ b) * (a @ ua.T)).sum())
    return gain / (square.clamp_min(0).sqrt() + 1e-30)


def always_full(e):
    """No routing: full fine-tuning (but clipped by the norm over both experts' gradients)."""
    return torch.full_like(e.lr, e.kind == "full")


def always_lora(e):
    """No routing: LoRA, but what is not routed (embedding, norms) trains as well."""
    return torch.full_like(e.lr, e.kind == "lora")


def random(e):
    """A coin: what is routing worth, beside moving each expert less often?"""
    return torch.rand_like(e.lr)


SCORES = {f.__name__: f for f in (epd, pfn, snr, align, always_full, always_lora, random)}


def route(scores, top_k):
    """scores (modules, experts) -> winners, bool, top_k True in each row. Ties go to the first expert."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[:, :top_k], True)

# END OF THE ROUTING RULES
# ------------------------------------------------------------------------------------------------------------


def adam_moments(g, m, v, beta1, beta2):
    """-> the moments with gradient g in them; m and v stay as they are."""
    return torch.lerp(m, g, 1 - beta1), (v * beta2).addcmul_(g, g, value=1 - beta2)


def adamw(w, m, v, decay, step_size, correction, eps):
    """-> the new w. decay = 1 - lr wd, step_size = lr / (1 - b1^t), correction = sqrt(1 - b2^t)."""
    return (w * decay).sub_((m * step_size).div_(v.sqrt().div_(correction).add_(eps)))


# The two passes over memory, one expert (or one parameter that is not routed) at a time. Lists run over its
# matrices; what is written is written in place, and only where a 0-d bool on the device (ok, wins) says so.
# hyper (4,): lr, 1 - lr wd, lr / (1 - b1^t), sqrt(1 - b2^t).

def observe(score, kind, w, g, m, v, hyper, ok, clip, scale, betas, eps):
    """First pass: the gradients g into the moments m and v, where ok. -> the score, 0-d; None if no rule."""
    g = [x.float() if clip is None else x.float() * clip for x in g]
    now = [adam_moments(*x, *betas) for x in zip(g, m, v)]
    m_now, v_now = [x for x, _ in now], [x for _, x in now]
    value = score and score(Expert(kind, w, g, m_now, v_now, m, v, hyper[0], scale, eps))
    for old, new in zip(m + v, m_now + v_now):
        old.copy_(torch.where(ok, new, old))
    return value


def move(w, copies, m, v, hyper, wins, eps):
    """Second pass: the AdamW step where the expert wins; a loser keeps its very bits. `copies` are parameters
    of a lower precision, whose masters w are."""
    for w, copy, m, v in zip(w, copies, m, v):
        w.copy_(torch.where(wins, adamw(w, m, v, *hyper[1:], eps), w))
        if copy is not None:
            copy.copy_(w)


def observe_and_move(w, copies, g, m, v, hyper, ok, clip, betas, eps):
    """Both in one pass, for what has no other expert beside it: plain AdamW."""
    observe(None, "", w, g, m, v, hyper, ok, clip, 1.0, betas, eps)
    move(w, copies, m, v, hyper, ok, eps)


class MoLFAdamW(torch.optim.Optimizer):
    """AdamW with routing. `groups` come from `param_groups`: one an expert, with keys kind, module, expert
    and scale (strings and numbers, so any LR scheduler and state_dict work), and "rest" groups, not routed.

    score: a rule as above. top_k: how many experts of a module move at each step. A module without gradients
    sits the step out (scores NaN, no winner); one with a single expert needs no scores (they are 0). step()
    never waits for the device.
    step(ok=..., clip=...): 0-d tensors on the device. Where ok is False (train.py: where loss or norm is not
    finite) no weight and no moment changes; clip is a factor for every gradient."""

    def __init__(self, groups, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, score=epd, top_k=1):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, kind="rest",
                                      module="", expert=0, scale=1.0, t=0))
        experts = {}                                    # module -> indices of its experts' groups
        for i, group in enumerate(self.param_groups):
            if group["kind"] != "rest":
                experts.setdefault(group["module"], []).append(i)
            for p in group["params"]:                   # all state is made here: no surprise in memory later
                self.state[p] = {"exp_avg": torch.zeros_like(p, dtype=torch.float32),
                                 "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}
                if p.dtype != torch.float32:
                    self.state[p]["master"] = p.detach().float()
        self.module_names, self.modules = list(experts), list(experts.values())
        n = len(self.modules[0]) if self.modules else 1
        if any(len(m) != n for m in self.modules):
            raise ValueError("every module needs the same number of experts")
        if not 1 <= top_k <= n:
            raise ValueError(f"top_k is {top_k}, but a module has {n} expert{'s' * (n > 1)}: give 1 to {n}")
        self.score, self.top_k = score, top_k
        self.observe, self.move, self.observe_and_move = observe, move, observe_and_move
        self.each = map             # how to go through the experts: train.py does it on several streams
        device = self.param_groups[0]["params"][0].device
        self.hyper = torch.zeros(len(self.param_groups), 4, device=device)
        self.true, self.zero = torch.ones((), dtype=torch.bool, device=device), torch.zeros((), device=device)
        self.scores = torch.full((len(self.modules), n), torch.nan, device=device)
        self.winners = torch.zeros(len(self.modules), n, dtype=torch.bool, device=device)
        # The same again, each group's by itself: compiled functions make a new version for every odd view.
        self.hypers = [torch.zeros_like(row) for row in self.hyper]
        self.wins = [torch.zeros_like(self.true) for _ in self.winners.flatten()]

    def compile(self):
        """Let torch.compile make one kernel of a pass over a matrix. The first step takes longer for it."""
        torch._dynamo.config.recompile_limit = 64           # versions of a function: one for each shape
        self.observe = torch.compile(observe, dynamic=False)        # its sums are faster so
        self.move, self.observe_and_move = (torch.compile(f, dynamic=True) for f in (move, observe_and_move))

    @torch.no_grad()
    def step(self, closure=None, ok=None, clip=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.refresh(self.present())
        self.update(ok, clip)
        return loss

    def present(self):
        """For each group, whether it has a gradient: True or False."""
        present = [any(p.grad is not None for p in group["params"]) for group in self.param_groups]
        if self.modules and not any(present[m[0]] for m in self.modules):
            raise RuntimeError("no expert has a gradient: call unfold(model) between backward() and step()")
        return present

    def refresh(self, present):
        """The step's numbers, reckoned on the host in double precision, to the device in one copy."""
        rows = []
        for group, here in zip(self.param_groups, present):
            group["t"] += here
            lr, (beta1, beta2), t = float(group["lr"]), group["betas"], max(group["t"], 1)
            rows.append([lr, 1 - lr * group["weight_decay"], lr / (1 - beta1 ** t), (1 - beta2 ** t) ** 0.5])
        self._opt_called = True                         # what torch's LR schedulers look for
        rows = torch.tensor(rows)
        self.hyper.copy_(rows.pin_memory() if self.hyper.is_cuda else rows, non_blocking=True)

    @torch.no_grad()
    def update(self, ok=None, clip=None):
        """The step itself: device work only, on tensors that stay where they are, so that a CUDA graph of it
        can be replayed, each time after a refresh()."""
        ok, alone = self.true if ok is None else ok, self.scores.shape[1] == 1
        torch._foreach_copy_(self.hypers, list(self.hyper))
        experts = list(chain(*self.modules))
        rest = [i for i, group in enumerate(self.param_groups) if group["kind"] == "rest"]
        passes = [(i, alone) for i in experts] + [(i, True) for i in rest]
        scores = list(self.each(lambda x: self._pass(*x, ok, clip), passes))[:len(experts)]
        if experts:
            self.scores.copy_(torch.stack(scores).view_as(self.scores))
            alive = ~self.scores.isnan().any(dim=-1, keepdim=True)
            self.winners.copy_(route(self.scores, self.top_k) & alive & ok)
        if not alone:
            torch._foreach_copy_(self.wins, list(self.winners.flatten()))
            list(self.each(lambda x: self._move(*x), zip(experts, self.wins)))

    def _pass(self, i, whole, ok, clip):
        """The first pass over group i, or the whole step. -> its score; NaN where there is no gradient."""
        group, (w, copies, g, m, v) = self.param_groups[i], self._tensors(i)
        if not g:
            return self.hyper.new_full((), torch.nan)
        hyper, betas, eps = self.hypers[i], group["betas"], group["eps"]
        if whole:
            self.observe_and_move(w, copies, g, m, v, hyper, ok, clip, betas, eps)
            return self.zero
        kind, scale = group["kind"], group["scale"]
        return self.observe(self.score, kind, w, g, m, v, hyper, ok, clip, scale, betas, eps)

    def _move(self, i, wins):
        w, copies, _, m, v = self._tensors(i)
        self.move(w, copies, m, v, self.hypers[i], wins, self.param_groups[i]["eps"])

    def _tensors(self, i):
        """What a pass goes over: of the parameters of group i that have a gradient, lists."""
        params = [p for p in self.param_groups[i]["params"] if p.grad is not None]
        masters = [self.state[p].get("master") for p in params]
        w = [p.detach() if master is None else master for p, master in zip(params, masters)]
        copies = [None if master is None else p.detach() for p, master in zip(params, masters)]
        return (w, copies, [p.grad for p in params], [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params])

    def load_state_dict(self, state_dict):
        params = [p for g in self.param_groups for p in g["params"]]
        for i, p in enumerate(params):
            if set(self.state[p]) != set(state_dict["state"][i]):
                raise ValueError(f"parameter {i} is {p.dtype}, and was saved from one of another precision")
        super().load_state_dict(state_dict)
        for i, p in enumerate(params):
            for key, value in state_dict["state"][i].items():   # torch has cast it to the parameter's dtype
                self.state[p][key] = value.to(p.device, torch.float32, copy=True)


def param_groups(model, lr=5e-5, lora_lr=5e-5, weight_decay=0.1, lora_weight_decay=0.01):
    """Groups for MoLFAdamW: every expert of every MoLFLinear, by its `experts()`; then the rest, at the full
    expert's lr; its vectors (biases, norms) do not decay. Each trainable parameter is in exactly one."""
    groups, derived = [], set()
    for name, module in model.named_modules():
        if not hasattr(module, "folded"):               # (MoE blocks have an attribute `experts` as well)
            continue
        if module.folded:                               # its weight is computed from the experts, not trained
            derived.add(module.weight)
        for i, (kind, scale, params) in enumerate(module.experts()):
            rates = (lr, weight_decay) if kind == "full" else (lora_lr, lora_weight_decay)
            groups.append(dict(zip(("lr", "weight_decay"), rates), params=params, kind=kind, module=name,
                               expert=i, scale=scale))
    routed = {p for g in groups for p in g["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad and p not in derived]
    for p in trainable:
        if p not in routed:
            groups.append(dict(params=[p], kind="rest", lr=lr, weight_decay=weight_decay * (p.dim() > 1)))
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trainable), \
        "a trainable parameter is in two groups, or in none"
    return groups


def demo(steps=240, seed=0):
    """Two modules learn a change of their weight, of rank 2 and of full rank. Who moves at each step?"""
    from model import add_experts, fold, unfold         # only this demonstration needs it
    torch.set_num_threads(1)                            # the matrices are tiny
    d, bins = 64, 60
    print(f"Two {d} x {d} linears, each a full and a LoRA expert of rank 4, learn a change of their weight,\n"
          f"`rank2` one of rank 2 and `dense` one of full rank. Each character is {steps // bins} steps:\n"
          f"# the full expert moved   . LoRA moved   + now one, now the other\n")
    for name, score in SCORES.items():
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({n: torch.nn.Linear(d, d, bias=False) for n in ("rank2", "dense")})
        change = [torch.randn(d, 2) @ torch.randn(2, d) / d, torch.randn(d, d) / d ** 0.5 / 4]
        goal = {n: net[n].weight.detach() + c for n, c in zip(net, change)}
        add_experts(net, ranks=(4,), alpha=8, targets=tuple(net))
        optimizer = MoLFAdamW(param_groups(net, 1e-3, 1e-3, 0, 0), score=score)
        won, history = [], []
        for _ in range(steps):
            x = torch.randn(64, d)
            losses = [(net[n](x) - x @ goal[n].T).square().mean() for n in net]
            sum(losses).backward()
            unfold(net)
            optimizer.step()
            fold(net)
            won.append(optimizer.winners[:, 0].clone())
            history.append([loss.item() for loss in losses])
        full = torch.stack(won).float().unflatten(0, (bins, -1)).mean(1)        # (bins, modules)
        for j, n in enumerate(net):
            line = "".join("#" if x > 0.9 else "." if x < 0.1 else "+" for x in full[:, j].tolist())
            print(f"{name if j == 0 else '':12s}{n:6s} {line}  full won {full[:, j].mean():4.0%}   "
                  f"loss {history[0][j]:.3f} -> {history[-1][j]:.4f}")


if __name__ == "__main__":
    demo()
