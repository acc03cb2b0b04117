"""`python molf.py`: two layers learn a change of their weight. Which expert moves, rule by rule?"""
import torch

from lib.report import quiet_ends
from model import add_experts, fold, unfold
from molf import SCORES, MoLFAdamW, param_groups

LESSONS = {         # what the lines above each of them show
    "epd": "the change of rank 2 mostly trains LoRA, and the dense one mostly the full expert.",
    "pfn": "it goes by time, not by layer. The full expert comes first and LoRA later, whatever the change.",
    "snr": "the full expert's gradient is the less noisy one in both layers, so it wins nearly always.",
    "align": "for each unit that it moves the weight, the full expert's step helps more in both layers.",
    "always_full": "the control for all rules. What the full expert alone can reach is hard to beat here.",
    "always_lora": "the other control. Rank 4 holds the change of rank 2, but not the dense one.",
    "random": "a coin lets both layers learn as well. A rule is worth something where it beats the coin.",
    "even": "all scores tie, so the first expert, the full one, moves. The softmax route moves both.",
}

def learn(score, steps=240, d=64, seed=0):
    """-> gates of the full expert and losses, (steps, 2), for a change of rank 2 and one of full rank"""
    torch.manual_seed(seed)
    net = torch.nn.ModuleDict({name: torch.nn.Linear(d, d, bias=False) for name in ("rank2", "dense")})
    low, dense = torch.randn(d, 2) @ torch.randn(2, d) / d, torch.randn(d, d) / d ** 0.5 / 4
    goals = [net["rank2"].weight.detach() + low, net["dense"].weight.detach() + dense]
    add_experts(net, ranks=(4,), alpha=8, targets=tuple(net))
    optimizer = MoLFAdamW(param_groups(net, 1e-3, 1e-3, 0, 0), score=score)
    gates, losses = [], []
    for _ in range(steps):
        x = torch.randn(64, d)
        errors = [layer(x) - x @ goal.T for layer, goal in zip(net.values(), goals)]
        loss = torch.stack([error.square().mean() for error in errors])
        loss.sum().backward()
        unfold(net)
        optimizer.step()
        optimizer.zero_grad()
        fold(net)
        gates.append(optimizer.gates[:, 0].clone())
        losses.append(loss.detach())
    return torch.stack(gates), torch.stack(losses)

def verdict(share):
    """share (2,): of the steps that the full expert of each layer moved at"""
    if share.max() < 0.05 or share.min() > 0.95:
        return "does not route"
    return "routes by layer" if share.max() - share.min() > 0.2 else "moves both, in no layer's favour"

@quiet_ends()
def demo():
    torch.set_num_threads(1)                            # the matrices are tiny
    print("Two 64 x 64 linears, each with a full and a LoRA expert of rank 4, learn a change of their\n"
          "weight, `rank2` one of rank 2, `dense` one of full rank. Each character stands for 4 steps:\n"
          "# the full expert moved     . LoRA moved     + both did, at different steps\n")
    for name, score in SCORES.items():
        gates, losses = learn(score)
        bins = gates.unflatten(0, (60, -1)).mean(dim=1)                     # (60, 2)
        for j, layer in enumerate(("rank2", "dense")):
            line = "".join("#" if x > 0.9 else "." if x < 0.1 else "+" for x in bins[:, j].tolist())
            print(f"{name if j == 0 else '':12s}{layer} {line}  full {gates[:, j].mean():4.0%}  "
                  f"loss {losses[0, j]:.3f} -> {losses[-1, j]:.1e}")
        print(f"{'':12s}{verdict(gates.mean(dim=0))}:\n{'':12s}{LESSONS.get(name, 'a rule of your own')}\n")
