"""How soon a run trains: seconds from the command to the first step and to the last of a short run.

    python bench/start.py TOKENIZER_DIR ROWS                # Qwen2.5-1.5B shapes, molf on sql, 25 steps
    python bench/start.py TOKENIZER_DIR ROWS --no-eager     # compiled, which so short a run is not by itself
    python bench/start.py TOKENIZER_DIR ROWS --train OLD/train.py   # of a version that knows no --no-eager
    python bench/start.py toy ROWS --shape toy --task med   # a CPU

A checkpoint with random weights is made once, with the tokenizer's files. Then train.py runs on the first
rows of ROWS, cold, with nothing compiled before, and once more, warm. After its last step it is killed. For
each run a line has the seconds from the command until the model is loaded, evaluated, the first step done,
and the last one; and what the last line says of tokens a second and of memory.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import speed  # noqa: E402
from model import Config, Transformer  # noqa: E402


def make_checkpoint(folder, shape, tokenizer):
    if shape == "toy":
        shutil.copytree(ROOT / "toy", folder)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Transformer(Config.from_dict(speed.SHAPES[shape])).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / name, folder)


def run(command, cache, steps):
    """-> {step, "loaded" or "evaluated": seconds from the command to the line that says so}, the last one"""
    begin, seen = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache),
                                                 "PYTHONUNBUFFERED": "1"})
    for line in process.stdout:
        found = re.match(r"step +(\d+)/\d+  loss", line)
        now = time.perf_counter() - begin
        if ", to be evaluated on " in line:
            seen["loaded"] = now
        if line.startswith("parameters: "):
            seen["evaluated"] = now
        if found:
            seen[int(found[1])] = now
            if int(found[1]) == steps:
                process.kill()
                return seen, line
    sys.exit(f"{' '.join(command)} failed")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tokenizer")
    p.add_argument("rows")
    p.add_argument("--shape", default="qwen2.5-1.5b", choices=["toy", *speed.SHAPES])
    p.add_argument("--task", default="sql", choices=list(speed.FILES))
    p.add_argument("--method", default="molf")
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--eval-rows", type=int, default=32, help="to evaluate on, before and after (default: 32)")
    p.add_argument("--eager", action=argparse.BooleanOptionalAction, help="as train.py's (default: its own)")
    p.add_argument("--train", default=str(ROOT / "train.py"), help="another version's, to compare with")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_checkpoint(folder / "model", a.shape, a.tokenizer)
        for i, name in enumerate(("cold", "warm")):
            command = [sys.executable, a.train, "--model", str(folder / "model"), "--task", a.task,
                       "--method", a.method, "--data", a.rows, "--eval-data", a.rows, "--epochs", "1",
                       "--limit", str(32 * a.steps), "--eval-limit", str(a.eval_rows),
                       "--log-every", "5", "--out", str(folder / f"out{i}")]
            if a.eager is not None:
                command.append("--eager" if a.eager else "--no-eager")
            seen, last = run(command, folder / "cache", a.steps)
            result = {f"step {k}" if isinstance(k, int) else k: round(s, 1) for k, s in seen.items()
                      if k in ("loaded", "evaluated", 1, a.steps)}
            result["tok/s"] = re.search(r"(\S+) tok/s", last)[1]
            result["peak GB"] = re.search(r"(\S+) GB", last)[1]
            print(json.dumps({"run": name} | result), flush=True)


if __name__ == "__main__":
    main()
