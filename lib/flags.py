"""What is refused of train.py's flags, and what a run that is resumed or evaluated brings along. The flags
and their defaults are in train.py.
"""
import os
from pathlib import Path

import torch

from lib import ranks, track
from lib.files import run_flags

OF_THIS_CALL = "out", "overwrite", "resume", "dry_run", "world_size"        # not a part of what the run is
# --resume may change these
MAY_CHANGE = OF_THIS_CALL + ("log_every", "save_every", "keep", "device", "eager", "max_tokens",
                             "tensorboard", "no_before")
EVALUATION_FLAGS = ("task", "data", "eval_data", "limit", "eval_limit", "dtype", "max_tokens", "max_length",
                    "seed")

def parse(p, argv):
    """-> the flags, with whole paths: --resume may be said in another working directory."""
    a = p.parse_args(argv)
    if Path(a.model).resolve() == Path(__file__).resolve().parents[1] / "toy":
        a.model = "toy"
    for key in ("model", "data", "eval_data"):
        value = getattr(a, key)
        if value not in (None, "hub", "toy") and Path(value).exists():
            setattr(a, key, os.path.abspath(value))
    return a

def flags_of_the_evaluated(p, a, argv):
    """--eval-only: the flags of the run that is evaluated are the defaults."""
    folder = Path(a.eval_only)
    flags = run_flags(folder)
    if a.model != "toy":
        p.error("--eval-only names the model, so --model must not")
    if a.dry_run:
        p.error("--eval-only trains nothing that --dry-run could count")
    if flags and not (folder / "model").is_dir():
        p.error(f"--eval-only {a.eval_only}: a run that did not finish, it has no model/")
    if not flags and (folder / "model" / "config.json").is_file():
        p.error(f"--eval-only {a.eval_only}: {folder / 'config.json'} is damaged or missing, so its "
                f"flags are not known: give {folder / 'model'}, --task and what else it ran with")
    if folder.name == "model":
        flags = flags or run_flags(folder.parent)
    p.set_defaults(**{k: flags[k] for k in EVALUATION_FLAGS if k in flags})
    a = parse(p, argv)
    a.model = a.eval_only
    return a

def flags_of_the_resumed(p, a, argv):
    """--resume: the flags of the run are the defaults, and most of them must stay as they were."""
    if not a.out:
        p.error("--resume wants --out DIR, the run to go on with")
    flags = run_flags(a.out)
    if not flags:
        p.error(f"--resume: {a.out} has no config.json of a run, or a damaged one. If it was stopped before "
                f"it wrote one, nothing is lost: start it again without --resume")
    p.set_defaults(**{k: v for k, v in flags.items() if k not in OF_THIS_CALL})
    a = parse(p, argv)
    changed = [k for k in flags if k not in MAY_CHANGE and getattr(a, k) != flags[k]]
    if changed:
        names = ", ".join(f"--{k.replace('_', '-')}" for k in changed)
        p.error(f"--resume goes on with the flags of {a.out}, so {names} must stay as they were")
    return a

def refuse_nonsense(p, a):
    experts = (a.method in ("fft", "molf")) + len(a.ranks)
    if a.method == "fft" and a.ranks:
        p.error("--ranks: fft has no LoRA expert")
    if any(r < 1 for r in a.ranks):
        p.error("--ranks must be at least 1 each")
    if not 1 <= a.top_k <= experts:
        p.error(f"--top-k {a.top_k}: {a.method} with ranks {a.ranks} has {experts} experts a module")
    for key in ("epochs", "batch_size", "max_tokens", "max_length", "limit", "eval_limit", "eval_every",
                "log_every", "save_every", "keep", "world_size"):
        value = getattr(a, key)
        if value is not None and value < 1:
            p.error(f"--{key.replace('_', '-')} must be at least 1")
    if a.no_before and a.eval_only:
        p.error("--no-before: --eval-only evaluates what there is, and trains nothing")
    if a.pure_bf16 and (a.dtype != "bfloat16" or a.world_size > 1 or a.dry_run):
        p.error("--pure-bf16 wants --dtype bfloat16, and knows neither several ranks nor --dry-run")
    if a.pure_bf16 and a.device.startswith("cuda") and not a.eager:
        p.error("--pure-bf16 wants --eager on a GPU: compiled code rounds less often")
    if a.tensorboard and not track.summary_writer():
        p.error("--tensorboard wants TensorBoard: pip install tensorboard")
    if a.batch_size < a.world_size:
        p.error(f"--batch-size {a.batch_size}: fewer sequences than the {a.world_size} ranks")
    if a.dropout and a.checkpointing and not a.eager and a.device.startswith("cuda"):
        p.error("--checkpointing with --dropout wants --eager: a CUDA graph can't repeat the random numbers")
    if min(a.lr, a.lora_lr, a.weight_decay, a.lora_weight_decay) < 0 or min(a.alpha, a.clip) <= 0:
        p.error("learning rates and weight decays can't be negative; --alpha and --clip must be above 0")
    if not 0 <= a.dropout < 1 or not 0 <= a.warmup <= 1:
        p.error("--dropout and --warmup are shares, from 0 to 1")
    try:
        torch.device(a.device)                          # is it the name of one?
        if not a.dry_run:                               # which counts for a GPU that is elsewhere, too
            torch.empty(0, device=ranks.own_device(a.device)).cpu()
    except (RuntimeError, AssertionError, ValueError) as e:
        p.error(f"--device {a.device}: {str(e).splitlines()[0]} (--device cpu needs no GPU)")
