"""Puts a task's questions to a model and sums up its answers. train.py calls evaluate before, during and
after training, and batch_loss to compare a model with its export.
"""
import time

import torch

from data import Scored, count_targets, micro_batches, to_device
from lib.progress import progress
from lib.ranks import gathered, on_first, part_of
from model import LOGIT_ROWS

@torch.no_grad()
def score_targets(model, examples, max_tokens=16384, choices=()):
    """-> a Scored for each example, from packed forward passes without generation. choices: token ids to
    compare in the place of a target's first token."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    found = []
    with progress(what="scoring", unit="answers", total=len(order)) as bar:
        for batch in micro_batches([examples[i] for i in order], max_tokens):
            found += score_batch(model, batch, list(choices))
            bar.update(len(batch))
    scored = dict(zip(order, found))
    return [scored[i] for i in range(len(examples))]

def score_batch(model, batch, choices):
    """-> a Scored for each example, from one forward pass. Softmax in fp32."""
    ids, layout, where, labels = to_device(batch, model.head.device)
    hidden = model.hidden(ids, layout, where)                               # (M, C)
    pieces = []
    for x, y in zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS)):
        logits = model.logits(x).float()                                    # (rows, V)
        norm = logits.logsumexp(1)
        # The compared logits again, in fp32, because bf16 ties: 20.0 and 20.05 would be one number.
        of_target = (x.float() * model.head[y].float()).sum(1) - norm
        of_choices = x.float() @ model.head[choices].float().T - norm[:, None]
        pieces.append((of_target, of_choices, logits.argmax(1)))
    logprobs, others, greedy = (torch.cat(t).tolist() for t in zip(*pieces))
    scored = []
    start = 0
    for e in batch:
        targets = [e.ids[i] for i in e.targets()]
        n = len(targets)
        hits = sum(token == other for token, other in zip(targets, greedy[start:start + n]))
        best = greedy[start]
        if best in choices:         # it may tie with another choice, and only be the first of them
            best = choices[others[start].index(max(others[start]))]
        scored.append(Scored(logprobs[start:start + n], targets[0], best, others[start], hits))
        start += n
    return scored

def continue_all(model, prompts, max_new_tokens, eos_ids, places):
    """Greedy continuations of any number of prompts (lists of ids): those of like length together, longest
    first, in batches whose KV cache has at most `places` places. -> the new tokens of each, with the EOS"""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    new = [None] * len(prompts)
    with progress(what="generating", unit="tokens", total=len(order) * max_new_tokens) as bar:
        while order:
            n = max(1, places // (len(prompts[order[0]]) + max_new_tokens))
            batch, order = order[:n], order[n:]
            texts = model.generate([prompts[i] for i in batch], max_new_tokens, eos_ids, bar=bar)
            for i, ids in zip(batch, texts):
                new[i] = ids
            bar.total = bar.n + len(order) * max_new_tokens         # most texts end before that
    return new

def evaluate(model, tokenizer, task, questions, max_tokens):
    """questions: [data.Question] -> (result, predictions). result: {"metrics": {name: {"value", "n", "low",
    "high"}}, those of kinds last, "counts": {name: n}, "seconds"}. predictions: a dict for each question."""
    begin = time.perf_counter()
    choices = [tokenizer.encode(c)[0] for c in task.choices]
    mine = part_of(questions, model)                            # of several ranks each asks its part
    scores = iter(score_targets(model, [e for q in mine for e in q.examples], max_tokens, choices))
    scored = [[next(scores) for _ in q.examples] for q in mine]
    if task.new_tokens:
        # A place of the cache takes 18 KB in Gemma-3-270M, 28 KB in Qwen2.5-1.5B (keys and values, bf16). In
        # training, which max_tokens is meant for, a token takes over 1 MB: so on a GPU it may be 8 places.
        places = max_tokens * (8 if model.head.is_cuda else 1)
        new = continue_all(model, [q.prompt for q in mine], task.new_tokens, tokenizer.eos_ids, places)
    else:
        new = [[s[0].greedy] for s in scored]
    scored, new = gathered(scored, model), gathered(new, model)
    texts = [tokenizer.decode(ids) for ids in new]
    judged = on_first(lambda: list(task.metrics([q.row for q in questions], scored, texts)))
    verdicts, predictions = [], []
    for q, ids, text, verdict in zip(questions, new, texts, judged):
        counts = {"not UTF-8": "\ufffd" in text,
                  "too long": len(q.prompt) + task.new_tokens > model.config.max_position_embeddings}
        if task.new_tokens:
            counts["not stopped"] = ids[-1] not in tokenizer.eos_ids
        v = verdict._replace(counts=verdict.counts | counts)
        verdicts.append(v)
        prompt, reference = task.pair(q.row)
        predictions.append(dict(prompt=prompt, reference=reference, prediction=text, verdict=record(v)))
    metrics = columns([v.metrics for v in verdicts]) | columns([v.kinds for v in verdicts])
    counts = columns([v.counts for v in verdicts])
    metrics = {name: bootstrap(values) for name, values in metrics.items()}
    if "loss" in metrics:
        exp = lambda x: torch.tensor(x, dtype=torch.float64).exp().item()       # (math.exp has no inf)
        metrics["perplexity"] = {k: x if k == "n" else exp(x) for k, x in metrics["loss"].items()}
    return {"metrics": metrics,
            "counts": {name: sum(values) for name, values in counts.items()},
            "seconds": time.perf_counter() - begin}, predictions

def columns(dicts):
    """[{name: value}] -> {name: [value, ...]}, of those that have it"""
    names = dict.fromkeys(name for d in dicts for name in d)
    return {name: [d[name] for d in dicts if name in d] for name in names}

def record(verdict):
    """A data.Verdict as predictions.jsonl has it: one level, where "# " begins the name of a count. "# n of
    loss" counts the tokens of which the loss is the mean."""
    counts = {f"# {name}": value for name, value in verdict.counts.items()}
    counts |= {f"# n of {name}": x[1] for name, x in verdict.metrics.items() if isinstance(x, tuple)}
    error = {} if verdict.error is None else {"error": verdict.error}
    means = {name: x[0] / x[1] if isinstance(x, tuple) else x for name, x in verdict.metrics.items()}
    return {**means, **verdict.kinds, **counts, **error}

def flat(result):
    """The result of evaluate as results.json and log.jsonl have it: one level, "# " before counts."""
    counts = {f"# {name}": n for name, n in result["counts"].items()}
    return {**result["metrics"], **counts, "seconds": result["seconds"]}

def bootstrap(values, resamples=1000):
    """values: of the rows, as in data.Verdict.metrics -> their mean, and an interval from rows drawn anew"""
    pairs = [x if isinstance(x, tuple) else (x, 1) for x in values]
    sums, ns = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    pick = torch.randint(len(pairs), (resamples, len(pairs)), generator=torch.Generator().manual_seed(0))
    means = sums[pick].sum(1) / ns[pick].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": (sums.sum() / ns.sum()).item(), "n": len(pairs), "low": low, "high": high}

@torch.no_grad()
def batch_loss(model, examples, max_tokens):
    """Mean loss of a target token. Before and after an export it should be the same."""
    total = sum(model.loss(*to_device(m, model.head.device)) for m in micro_batches(examples, max_tokens))
    return total.item() / count_targets(examples)
