"""Compiles ahead, while the model is read and evaluated: for train.py, on one GPU.

The first call of a fast step (lib/fast.py) compiles its functions one after the other, for half a minute. That
is Python's work, and it needs shapes, but no weights. So as soon as the rows are known, a few processes share
the functions out. Each runs a step on a model with one block of each kind, in which only its functions are
compiled. The compiler keeps on disk what it makes. The real step finds it there, and so does the next run.
"""
import argparse
import atexit
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data import Example, batch_of
from lib.fast import FastStep
from model import Config, Transformer, add_experts
from molf import ROUTES, SCORES, MoLFAdamW, param_groups

# What each process compiles, of the parts in lib/fast.py
SHARES = (("forward",), ("cross_entropy",), ("observe_and_score",),
          ("lora_gradients", "fold_layer", "move", "observe_and_move"))
ROOM = 4e9      # bytes of a process beside its parameters: CUDA's own, activations, logits

def with_few_blocks(config):
    """The same model with one block of each kind."""
    kinds = list(dict.fromkeys(config.layer_types))
    return replace(config, num_hidden_layers=len(kinds), layer_types=kinds)

def start(config, rows, a):
    """-> processes, for `finish`. There are none where the step will not be compiled, or where they would not
    fit beside a model that is being evaluated."""
    if not a.device.startswith("cuda") or a.eager or a.eval_only or a.world_size > 1:
        return []
    with torch.device("meta"):
        whole, few = (sum(p.numel() for p in Transformer(c).parameters())
                      for c in (config, with_few_blocks(config)))
    free, _ = torch.cuda.mem_get_info()
    if 4 * whole + len(SHARES) * (16 * few + ROOM) > free:
        return []
    processes = processes_for(config, rows.examples, a)
    atexit.register(lambda: [process.kill() for process in processes])
    return processes

def processes_for(config, examples, a):
    lengths = [(len(e.ids), len(e.targets())) for e in examples]
    work = json.dumps(dict(flags=vars(a), config=config.raw, lengths=lengths))
    processes = []
    for i in range(len(SHARES)):
        with tempfile.TemporaryFile("w+") as file:
            file.write(work)
            file.seek(0)
            processes.append(subprocess.Popen(
                [sys.executable, "-m", "lib.ahead", str(i)], cwd=Path(__file__).parents[1], stdin=file,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return processes

def finish(processes):
    """Wait for them. What one could not compile, the step itself will."""
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            why = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1]
            print(f"compiling ahead failed, which costs time only: {why}")

def compile_share(a, config, lengths, share):
    """One process's work. lengths: (tokens, targets) of each training row, which decide how steps are cut."""
    from train import train_step        # (train.py imports this file)
    examples = [Example([0] * n, n - n_targets, i) for i, (n, n_targets) in enumerate(lengths)]
    n_steps = a.epochs * math.ceil(len(examples) / a.batch_size)
    batches = [batch_of(i, examples, a) for i in range(n_steps)]
    with torch.device(a.device):
        model = Transformer(with_few_blocks(config)).to(getattr(torch, a.dtype))
        ok = torch.ones((), dtype=torch.bool)
    model.checkpointing = a.checkpointing
    add_experts(model, a.ranks, a.alpha, a.method in ("fft", "molf"), a.dropout, train_rest=a.rest == "train")
    optimizer = MoLFAdamW(param_groups(model), score=SCORES[a.score], route=ROUTES[a.route], top_k=a.top_k)
    step_on_micros = partial(train_step, model, optimizer, max_norm=a.clip, ok=ok)
    step = FastStep(step_on_micros, model.train(), optimizer, batches, a.max_tokens)
    others = set(sum(SHARES, ())) - set(share)
    step.parts = {place: part for place, part in step.parts.items() if place[1] not in others}
    step(batches[0])

def main():
    work = json.load(sys.stdin)
    a = argparse.Namespace(**work["flags"])
    if a.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(a.device).index or 0)
    compile_share(a, Config.from_dict(work["config"]), work["lengths"], SHARES[int(sys.argv[1])])

if __name__ == "__main__":
    main()
