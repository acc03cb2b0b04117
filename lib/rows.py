"""The rows of a run: which train, which are looked at on the way, which are evaluated on, and which are left
out, and why.

    rows = read_data(flags, tokenizer)      # rows.examples, rows.held_out, rows.questions, rows.skipped
"""
import random
from collections import Counter
from typing import NamedTuple

from data import TASKS, Question, ask, encode_row, load_rows
from lib.chat import TemplateError

TENTH = "a tenth of --data"       # where --eval-data is not given, for a task without a source

class Rows(NamedTuple):
    examples: list          # to train on
    held_out: list          # [(Example, Question)] to evaluate on during training
    questions: list         # [Question] to evaluate on before and after
    skipped: Counter        # {which: how many rows}

def why_too_long(what, a):
    return f"{what} rows longer than --max-length {a.max_length} tokens"

def fitting(what, numbered, make, length, a, skipped):
    """{i: row} -> [make(i, row)]. Rows that the tokenizer cannot encode, and those of a length above
    --max-length tokens, are counted in `skipped`. length: what make returns -> tokens"""
    made = []
    why_unknown = f"{what} rows that the tokenizer cannot encode"
    for i, row in numbered.items():
        try:
            new = make(i, row)
        except TemplateError as e:
            raise ValueError(f"{what} row {i} (the first is 0): {e}") from e
        except ValueError as e:         # SmolLM2's vocabulary, for one, lacks some bytes
            if why_unknown not in skipped:
                print(f"{what} row {i} is skipped: {e}")
            skipped[why_unknown] += 1
            continue
        if length(new) > a.max_length:
            skipped[why_too_long(what, a)] += 1
        else:
            made.append(new)
    return made

def split_off(rows, n, seed):
    """rows: {i: row} -> n of them, chosen by the seed"""
    return {i: rows[i] for i in random.Random(seed).sample(sorted(rows), n)}

def keep_a_tenth(rows, a):
    """rows: {i: row} -> those to evaluate on, and the others. The same ones whenever the seed is the same."""
    if len(rows) < 2:
        raise ValueError(f"{a.data}: of a single row none can be kept to evaluate on: give more, or "
                         f"--eval-data")
    asked = split_off(rows, max(1, len(rows) // 10), f"evaluation {a.seed}")
    print(f"{len(asked)} of {len(rows)} rows of {a.data} are kept to evaluate on: no --eval-data")
    return asked, {i: row for i, row in rows.items() if i not in asked}

def read_training(rows, a, tokenizer, skipped):
    """rows: {i: row} -> examples, held_out of Rows."""
    task = TASKS[a.task]
    example = lambda i, row: encode_row(tokenizer, task, row, i)
    size = lambda example: len(example.ids)
    both = lambda i, row: (example(i, row), ask(tokenizer, task, row, i))
    larger = lambda pair: max(size(pair[0]), pair[1].longest())
    n = min(len(rows), max(1, min(128, len(rows) // 10))) if a.eval_every else 0
    picked = split_off(rows, n, f"held out {a.seed}")
    held_out = fitting("held-out", picked, both, larger, a, skipped)
    kept = {i: row for i, row in rows.items() if task.tests_training_rows or i not in picked}
    examples = fitting("training", kept, example, size, a, skipped)
    if not examples:
        raise ValueError(f"no training row is left of {len(rows)}: {len(held_out)} are held out, "
                         f"{skipped[why_too_long('training', a)]} longer than --max-length {a.max_length}")
    return examples, held_out

def read_data(a, tokenizer):
    """a: the flags -> Rows. Says how many rows were left out, and why; none is cut."""
    task = TASKS[a.task]
    skipped = Counter()
    question = lambda i, row: ask(tokenizer, task, row, i)
    training, examples, held_out = {}, [], []
    if not a.eval_only or a.eval_data == TENTH:
        rows, unusable = load_rows(a.task, "train", a.data, a.limit)
        skipped["training rows without an answer"] = unusable
        if not rows:
            raise ValueError(f"{a.data}: no row has an answer")
        training = dict(enumerate(rows))
    if a.eval_data == TENTH:
        asked, training = keep_a_tenth(training, a)
    if not a.eval_only:
        examples, held_out = read_training(training, a, tokenizer, skipped)
    if a.eval_data != TENTH:
        limit = a.limit if task.tests_training_rows and a.eval_data == a.data else None
        rows, unusable = load_rows(a.task, "test", a.eval_data, limit)
        skipped["evaluation rows without an answer"] = unusable
        asked = dict(enumerate(rows))
    asked = dict(list(asked.items())[:a.eval_limit])
    questions = fitting("evaluation", asked, question, Question.longest, a, skipped)
    learn_ends(tokenizer, examples + [e for q in questions for e in q.examples])
    skipped = Counter({what: n for what, n in skipped.items() if n})
    for what, n in skipped.items():
        print(f"skipped {n} {what}")
    if not questions:
        raise ValueError(f"{a.eval_data}: no row is left to evaluate on")
    return Rows(examples, held_out, questions, skipped)

def learn_ends(tokenizer, examples):
    """What ends a target ends a generation: where a chat template does it by another control token, that one
    as well. An export says so."""
    last = {e.ids[e.targets()[-1]] for e in examples}
    tokenizer.eos_ids += sorted(last & set(tokenizer.control.values()) - set(tokenizer.eos_ids))
