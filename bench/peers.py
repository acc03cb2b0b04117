"""What `transformers` and `peft` make of the very rows, prompts, batches and learning rates of train.py.

    python bench/peers.py --peer lora -- --seed 1 --out runs/x          # on the toy
    python bench/peers.py --peer adalora -- --model DIR --task sql --data TRAIN --eval-data TEST --out runs/y

train.py's flags stand behind the --. Its `--eval-only` scores the exported model at the end.

    fft       all weights train, with --lr and --weight-decay
    lora      rsLoRA: W + s B A with s = alpha / sqrt(rank), --lora-lr and --lora-weight-decay
    dora      the same, and the length of each row of the sum trains as well (arXiv 2402.09353)
    adalora   W + s B diag(E) A, and the modules that need it least lose ranks (arXiv 2303.10512)

fft and lora are to agree with --method fft and lora of train.py. dora and adalora are rivals of molf-e.

AdaLoRA begins with 1.5 times the rank, as peft's defaults do, and ends with the rank as the mean of the
modules. The first 10 % of the steps prune nothing and the last 20 % keep what is left, as in the example of
peft's documentation. Every step between them prunes. peft scales by alpha / (first rank), and is given the
alpha that makes it lora's s. E begins at 0, A and B at 0.02: at the same rate it learns more slowly than
LoRA. So look for its best --lora-lr before you compare.

Precision on a GPU: products are in bf16, by autocast. What trains is fp32, because bf16 weights lose most
small steps: all weights for fft, the adapters for the others, whose frozen base is bf16. The merge is in
fp32, and its result is rounded once, to --export-dtype. fft is evaluated in --dtype, and the others in fp32,
because train.py evaluates LoRA beside its base, where the sum is not rounded. On a CPU all is fp32.

OUT has model/, evaluation/results.json, log.jsonl (loss, gradient norm, AdaLoRA's mean rank) and config.json.
Batches are padded on the right. --max-tokens does not count the padding.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train        # noqa: E402
import peft         # noqa: E402
import torch        # noqa: E402
import torch.nn.functional as F     # noqa: E402
import transformers                 # noqa: E402
from torch.nn.utils import clip_grad_norm_      # noqa: E402

from data import Tokenizer, batch_of, count_targets, micro_batches      # noqa: E402
from lib.files import (clear_run, copy_companions, find_checkpoint, only_one,  # noqa: E402
                       run_inputs, save_record, set_eos)
from lib.report import begun, peak_memory, provenance, stop    # noqa: E402
from lib.rows import read_data      # noqa: E402
from model import TARGETS           # noqa: E402

PEERS = ("fft", "lora", "dora", "adalora")
# flags of train.py
NOT_HERE = ("method", "score", "route", "top_k", "resume", "eval_only", "eval_every", "dry_run",
            "tensorboard", "pure_bf16")


def parse_args(argv):
    """-> the peer, and train.py's flags"""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", required=True, choices=PEERS)
    cut = argv.index("--") if "--" in argv else len(argv)
    peer = p.parse_args(argv[:cut]).peer
    rest = argv[cut + 1:]
    theirs = train.make_parser()
    theirs.set_defaults(method=None, score=None, route=None, top_k=None)
    given = theirs.parse_args(rest)
    for key in NOT_HERE:
        if getattr(given, key):
            p.error(f"--{key.replace('_', '-')} is not for peers")
    if given.out is None or Path(given.out).exists() and not given.overwrite:
        p.error(f"--out {given.out}: give a new directory behind --, or --overwrite")
    a = train.parse_args([*rest, "--method", "fft" if peer == "fft" else "lora"])
    if len(a.ranks) != (peer != "fft") or a.rest != ("train" if peer == "fft" else "freeze"):
        p.error("a peer has one rank, and --rest as it is without the flag")
    if a.world_size > 1:
        p.error("a peer trains on one device: start it without torchrun")
    return peer, a


# ------------------------------------------------------------------------------------------------------------
# the model


def adapter_config(peer, a, steps):
    rank = a.ranks[0]
    same = dict(target_modules=list(TARGETS), lora_dropout=a.dropout, task_type="CAUSAL_LM")
    if peer != "adalora":
        return peft.LoraConfig(r=rank, lora_alpha=a.alpha, use_rslora=True, use_dora=peer == "dora", **same)
    first_rank = math.ceil(1.5 * rank)
    scale = a.alpha / math.sqrt(rank)
    return peft.AdaLoraConfig(init_r=first_rank, target_r=rank, lora_alpha=scale * first_rank,
                              tinit=round(0.1 * steps), tfinal=max(1, round(0.2 * steps)), total_step=steps,
                              **same)


def load(source, peer, a, steps):
    """-> the model of `transformers` at `source`, for all peers but fft with `peft`'s adapters in it"""
    dtype = torch.float32 if peer == "fft" else getattr(torch, a.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    model.to(a.device)
    if a.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if peer == "fft":
        return model
    torch.manual_seed(a.seed)                               # of A and of dropout
    return peft.get_peft_model(model, adapter_config(peer, a, steps))


def inner(model):
    """-> the model of `transformers` inside, with the adapters in its layers"""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def export(model, source, tokenizer, a):
    """Write OUT/model, in which adapters are merged with the base."""
    folder = Path(a.out) / "model"
    if isinstance(model, peft.PeftModel):
        model = model.float().merge_and_unload(safe_merge=True)         # safe: an error if it isn't finite
    model.to(train.EXPORT_DTYPES[a.export_dtype]).save_pretrained(folder)
    copy_companions(source, folder)
    set_eos(folder, tokenizer.eos_ids)


# ------------------------------------------------------------------------------------------------------------
# one step


def padded(examples, device):
    """-> ids (S, L) and mask (S, L), padded on the right; rows (M,), places (M,), labels (M,): the token at
    places[i] of rows[i] predicts labels[i]"""
    longest = max(len(e.ids) for e in examples)
    pad = [longest - len(e.ids) for e in examples]
    ids = [e.ids + [0] * n for e, n in zip(examples, pad)]
    mask = [[1] * len(e.ids) + [0] * n for e, n in zip(examples, pad)]
    targets = [(row, i) for row, e in enumerate(examples) for i in e.targets()]
    rows = [row for row, _ in targets]
    places = [i - 1 for _, i in targets]
    labels = [ids[row][i] for row, i in targets]
    return [torch.tensor(x, device=device) for x in (ids, mask, rows, places, labels)]


def target_loss(model, examples, dtype):
    """-> the sum of the cross-entropy over the target tokens, 0-d in fp32. Only targets meet the vocabulary,
    as in train.py, because the logits of all places would not fit into a GPU."""
    net = inner(model)
    ids, mask, rows, places, labels = padded(examples, net.device)
    with torch.autocast(net.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        found = net.model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = found.last_hidden_state[rows, places]              # (M, C)
        logits = net.lm_head(hidden)                                # (M, V)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def orthogonality(model):
    """-> AdaLoRA's regulariser, 0-d: |A A^T - I| and |B^T B - I|, the mean over all modules. peft adds it to
    the loss of each forward pass that is given labels, so once a micro-batch. A step needs it once."""
    named = list(model.named_parameters())
    grams = [p @ p.T for name, p in named if "lora_A" in name]          # (r, r) each
    grams += [p.T @ p for name, p in named if "lora_B" in name]
    far = [torch.dist(gram, torch.eye(len(gram), device=gram.device)) for gram in grams]
    return torch.stack(far).mean()


def backward(model, peer, batch, a):
    """-> the mean loss of a target token of the batch, 0-d, without AdaLoRA's regulariser"""
    loss = 0
    for micro in micro_batches(batch, a.max_tokens):
        part = target_loss(model, micro, a.dtype) / count_targets(batch)
        part.backward()
        loss = loss + part.detach()
    if peer == "adalora":
        weight = model.peft_config["default"].orth_reg_weight           # 0.5
        (weight * orthogonality(model)).backward()
    return loss


# ------------------------------------------------------------------------------------------------------------
# the run


def param_groups(model, peer, a):
    """Matrices decay, as in train.py. Vectors do not: norms, biases, DoRA's lengths."""
    lr = a.lr if peer == "fft" else a.lora_lr
    decay = a.weight_decay if peer == "fft" else a.lora_weight_decay
    params = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p], lr=lr, weight_decay=decay if p.dim() > 1 else 0.0) for p in params]


def mean_rank(model):
    """-> how many ranks AdaLoRA has left in a module, the mean of all"""
    left = [(p != 0).sum().item() for name, p in model.named_parameters() if "lora_E" in name]
    return sum(left) / len(left)


def count_steps(examples, a):
    return a.epochs * math.ceil(len(examples) / a.batch_size)


def train_peer(model, peer, examples, a, log):
    """Train `model`. log(record) is called at the steps at which train.py logs as well."""
    steps = count_steps(examples, a)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, peer, a), fused=a.device.startswith("cuda"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: train.lr_factor(i, steps, a.warmup))
    model.train()
    for step in range(steps):
        rate = optimizer.param_groups[0]["lr"]
        loss = backward(model, peer, batch_of(step, examples, a), a)
        norm = clip_grad_norm_(params, a.clip)
        if not (loss + norm).isfinite():
            raise FloatingPointError(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}")
        optimizer.step()
        schedule.step()
        if peer == "adalora":
            model.base_model.update_and_allocate(step)      # reads the gradients, sets pruned E to 0
        optimizer.zero_grad()
        if step in (0, steps - 1) or (step + 1) % a.log_every == 0:
            record = dict(step=step + 1, loss=loss.item(), lr=rate, grad_norm=norm.item())
            if peer == "adalora":
                record["rank"] = mean_rank(model)
            log(record)
    model.eval()


def train_and_export(peer, a):
    out = Path(a.out)
    source = find_checkpoint(a.model)
    tokenizer = Tokenizer.from_file(source)
    rows = read_data(a, tokenizer)
    examples = rows.examples
    steps = count_steps(examples, a)
    model = load(source, peer, a, steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{peer} on {a.model}, task {a.task}: {len(examples)} rows, {steps} steps, seed {a.seed}, "
          f"{trained:,} parameters train")
    clear_run(out)
    clear_run(out / "evaluation")
    date, begin = begun(out, a), time.perf_counter()
    with open(out / "log.jsonl", "w") as log_file:
        def log(record):
            values = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
            print(f"step {record['step']:4d}/{steps}  {values}", flush=True)
            print(json.dumps(record), file=log_file, flush=True)
        train_peer(model, peer, examples, a, log)
    seconds = time.perf_counter() - begin
    export(model, source, tokenizer, a)
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    said = dict(peer=peer, rows=len(examples), steps=steps, parameters=trained, train_seconds=seconds,
                peak_gb=peak_memory(torch.device(a.device)), inputs=run_inputs(rows, source), date=date)
    save_record(out / "config.json", dict(flags=vars(a)) | said | versions | provenance())


def main(argv=None):
    peer, a = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_flush_denormal(True)          # as in train.py
    out = Path(a.out)
    try:
        out.mkdir(parents=True, exist_ok=a.overwrite)
        with only_one(out):
            train_and_export(peer, a)
    except (FloatingPointError, FileExistsError) as e:
        stop(e)
    # train.py evaluates LoRA beside its base, not merged and rounded: here the sum stays in fp32
    dtype = a.dtype if peer == "fft" else "float32"
    # (reads task, rows and limits from OUT/config.json)
    train.main(["--eval-only", f"{a.out}/model", "--out", f"{a.out}/evaluation", "--device", a.device,
                "--dtype", dtype, "--overwrite"])


if __name__ == "__main__":
    main()
