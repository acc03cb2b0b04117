"""A row's way from a file to a batch on the device, and the tasks with their prompts and metrics.

    load_rows("med", "train", source)       rows of a task: from a file, the hub, or the toy world
    TASKS["med"].pair(row)                  -> prompt, target: the one function that makes a prompt
    encode(tokenizer, prompt, target)       -> Example: token ids, and where the target begins
    ask(tokenizer, task, row)               -> Question: what evaluation puts to a model
    batch_of, micro_batches, to_device      -> the examples of a step, as rows of tokens on the device

A new task is one more entry in TASKS, at the end.
"""
import math
import random
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import torch

from lib.chat import encode_chat
from lib.files import download, hub_files
from lib.read import check_row, is_chat, read_rows, text_usable
from lib.sandbox import execute_in_parallel, execute_pairs, sql_tokens, unfence     # noqa: F401
from lib.tokenizer import MAX_CHARS, Tokenizer                                      # noqa: F401
from model import Packed, on_device
from toy.world import toy_facts, toy_med, toy_sql, toy_world

# ----------------------------------------------------------------------------------------------------------
# rows: from a local file (lib/read.py), the data set's official source, or the toy world

def load_rows(name, split, source="hub", limit=None):
    """Rows of a task. split: "train" or "test"; source: "hub" (the official one), "toy", or a file.
    -> (rows, number of rows skipped because they have no answer)"""
    task = TASKS[name]
    official = task.splits[split]
    if source == "toy":
        found = [("toy world", row) for row in task.toy(official)]
    elif source != "hub":
        found = read_rows(source)
    elif task.source.startswith("https:"):
        found = read_rows(download(task.source))
    else:
        found = [row for file in hub_files(task.source, official) for row in read_rows(file)]
    if not found:
        raise ValueError(f"{source}: no rows")
    for where, row in found:
        check_row(where, row, task.fields)
    rows = [row for _, row in task.usable(found)]
    return rows[:limit], len(found) - len(rows)

# ----------------------------------------------------------------------------------------------------------
# examples: one function makes a prompt's tokens, for training and evaluation alike

class Example(NamedTuple):
    ids: list           # prompt, target, EOS
    n_prompt: int       # tokens of the prompt (with BOS); the rest is the target, the only part with a loss
    row: int            # its number among the rows that have an answer, from 0, to name it in messages
    mask: bytes = b""   # of a conversation: 1 for each token that has a loss, 0 for the others

    def targets(self):
        """The places of the tokens that have a loss."""
        if self.mask:
            return [i for i, has_loss in enumerate(self.mask) if has_loss]
        return range(self.n_prompt, len(self.ids))

class Question(NamedTuple):
    """What evaluation puts to a model: a prompt to continue, and answers to score."""
    row: dict
    prompt: list        # token ids, with BOS
    examples: list      # those whose answers the task scores, see Task.queries

    def longest(self):
        """Tokens of the longest sequence that a model has to read."""
        return max([len(self.prompt)] + [len(e.ids) for e in self.examples])

class Scored(NamedTuple):
    logprobs: list      # log-probability of each target token (the last is the EOS)
    first: int          # the first target token
    greedy: int         # the most probable token in its place
    choices: list       # log-probabilities there of the first tokens of Task.choices
    hits: int = 0       # how many of the target tokens are the most probable in their places

def encode_prompt(tokenizer, prompt):
    """The prompt, after BOS if the family has one: Gemma has, and its loss nearly doubles without it."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return bos + tokenizer.encode(prompt)

def encode(tokenizer, prompt, target, row=-1):
    """-> Example. The target is encoded by itself, so its tokens never depend on the prompt's end."""
    head = encode_prompt(tokenizer, prompt)
    if not head:
        raise ValueError(f"row {row}: an empty prompt, which nothing can be predicted from")
    return Example(head + tokenizer.encode(target) + [tokenizer.eos_id], len(head), row)

def encode_row(tokenizer, task, row, i=-1):
    """-> the Example that training sees of a row. A conversation is written by the model's chat template."""
    if task.queries is not None or not is_chat(row):
        return encode(tokenizer, *task.pair(row), row=i)
    ids, mask = encode_chat(tokenizer, row["messages"], row.get("tools"))
    return Example(ids, mask.index(1), i, mask)

def ask(tokenizer, task, row, i=-1):
    """-> Question. Its prompt has the very tokens that training sees before the target, which in a
    conversation is the assistant's last turn."""
    if task.queries is not None:
        prompt, _ = task.pair(row)
        return Question(row, encode_prompt(tokenizer, prompt),
                        [encode(tokenizer, *query, row=i) for query in task.queries(row)])
    example = encode_row(tokenizer, task, row, i)
    begin = example.n_prompt
    if example.mask:
        begin = example.mask.rindex(0, 0, example.targets()[-1]) + 1
    return Question(row, example.ids[:begin], [example])

# ----------------------------------------------------------------------------------------------------------
# batches: the examples of a step, in micro-batches, on the device

@lru_cache(maxsize=2)
def order_of(n, seed, epoch):
    """The order of n examples in an epoch depends on the seed and the epoch alone."""
    return random.Random(f"{seed} {epoch}").sample(range(n), n)

def batch_of(step, examples, a):
    """The examples of an optimizer step; the last batch of an epoch may be smaller."""
    epoch, i = divmod(step, math.ceil(len(examples) / a.batch_size))
    order = order_of(len(examples), a.seed, epoch)
    return [examples[j] for j in order[i * a.batch_size:(i + 1) * a.batch_size]]

def count_tokens(examples):
    return sum(len(e.ids) for e in examples)

def count_targets(examples):
    return sum(len(e.targets()) for e in examples)

def micro_batches(examples, max_tokens):
    """Cut a list of examples, in order, into lists of at most max_tokens tokens (or one longer example)."""
    batch, n = [], 0
    for e in examples:
        if batch and n + len(e.ids) > max_tokens:
            yield batch
            batch, n = [], 0
        batch.append(e)
        n += len(e.ids)
    if batch:
        yield batch

def pack(examples):
    """Examples end to end, no padding -> ids (N), lengths (S), where (M), labels (M), as lists: the token at
    where[i] predicts labels[i]. Prompts carry no loss."""
    ids, lengths, where, labels = [], [], [], []
    for e in examples:
        places = e.targets()
        where += [len(ids) + i - 1 for i in places]
        labels += [e.ids[i] for i in places]
        ids += e.ids
        lengths.append(len(e.ids))
    return ids, lengths, where, labels

def to_device(examples, device, size=None):
    """-> ids (N,), layout, where (M,), labels (M,): the arguments of Transformer.loss. size: pad them to so
    many tokens, sequences and targets, with no sequence longer than that: what is added counts for nothing
    in the loss."""
    ids, lengths, where, labels = pack(examples)
    longest = None
    if size:
        n_tokens, n_sequences, n_targets, longest = size
        more, rest = divmod(n_tokens - len(ids), longest)
        lengths += [longest] * more + [rest] * (rest > 0)
        lengths += [0] * (n_sequences - len(lengths))
        ids += [0] * (n_tokens - len(ids))
        where += [0] * (n_targets - len(where))
        labels += [-100] * (n_targets - len(labels))
    tensor = lambda x: on_device(torch.tensor(x), device)
    return tensor(ids), Packed(lengths, device, longest), tensor(where), tensor(labels)

# ----------------------------------------------------------------------------------------------------------
# the tasks

class Verdict(NamedTuple):
    metrics: dict               # name -> a number, of which evaluation takes the mean over the rows that
                                # have it; or (sum, n), and it divides the sum of the sums by that of the n
    kinds: dict                 # the same of one kind of row: "execution: single join"
    counts: dict                # name -> bool; evaluation takes the sum
    error: str | None = None    # what went wrong, or ""; None in a task where nothing can

def fact_usable(rows):
    for where, row in rows:
        if "{}" not in row["requested_rewrite"]["prompt"]:
            raise ValueError(f"{where}: field requested_rewrite.prompt has no {{}} for the subject")
    return rows

def after_space(answer):
    return answer if answer.startswith(" ") else " " + answer

def fact_pair(row):
    r = row["requested_rewrite"]
    return r["prompt"].replace("{}", r["subject"]), after_space(r["target_new"]["str"])

def fact_queries(row):
    """Each prompt with the new and with the true answer: the rewrite prompt, paraphrases, neighbourhood."""
    r = row["requested_rewrite"]
    prompts = [fact_pair(row)[0]] + row["paraphrase_prompts"] + row["neighborhood_prompts"]
    return [(p, after_space(r[t]["str"])) for p in prompts for t in ("target_new", "target_true")]

def fact_metrics(row, scored, text):
    """CounterFact (Meng et al. 2022, arXiv 2202.05262): ES, PS, NS, the shares of rewrite, paraphrase and
    neighbourhood prompts where the wanted answer is the more probable, by its first token. `... full`: by the
    mean log-probability over the whole answer. Answers that share their first token count as failures.
    accuracy, recalls true: the greedy text is exactly the new, or still the true answer."""
    n = len(row["paraphrase_prompts"])
    first, whole = [], []       # by how much the new answer is the more probable, for each prompt
    for new, true in zip(scored[::2], scored[1::2]):
        first.append(new.logprobs[0] - true.logprobs[0] if new.first != true.first else 0.0)
        means = [sum(s.logprobs[:-1]) / len(s.logprobs[:-1]) for s in (new, true)]
        whole.append(means[0] - means[1])
    metrics = {}
    for suffix, (rewrite, *others) in (("", first), (" full", whole)):
        metrics["ES" + suffix] = float(rewrite > 0)
        if n:
            metrics["PS" + suffix] = sum(x > 0 for x in others[:n]) / n
        if others[n:]:
            metrics["NS" + suffix] = sum(x < 0 for x in others[n:]) / len(others[n:])
    wanted, truth = (after_space(row["requested_rewrite"][t]["str"]) for t in ("target_new", "target_true"))
    metrics |= {"accuracy": float(text == wanted), "recalls true": float(text == truth)}
    return Verdict(metrics, kinds={}, counts={})

MED_CHOICES = " A", " B", " C", " D"

def med_usable(rows):
    """Rows that have an answer, with cop as 0 to 3 (the hub's). The older JSON's 1 to 4 shows by its 4s."""
    missing = [None, -1]                                            # the hub's test split has -1
    for where, row in rows:
        if row["cop"] not in missing + [0, 1, 2, 3, 4]:
            raise ValueError(f"{where}: field cop is {row['cop']!r}, not the number of an option")
    kept = [(where, row) for where, row in rows if row["cop"] not in missing]
    found = {row["cop"] for _, row in kept}
    if kept and (0 in found) == (4 in found):
        raise ValueError(f"{kept[0][0]}: field cop holds {sorted(found)} in this file, so it cannot be told "
                         f"whether it counts the options from 0 (some row must have 0) or from 1 (some 4)")
    return [(where, row | {"cop": int(row["cop"]) - (4 in found)}) for where, row in kept]

def med_pair(row):
    options = "".join(f"{letter}) {row['op' + letter.lower()]}\n" for letter in "ABCD")
    return (f"Answer the medical question with the letter of the right option.\n\n"
            f"Question: {row['question']}\n{options}Answer:", MED_CHOICES[row["cop"]])

def med_metrics(row, scored, text):
    """MedMCQA (Pal et al. 2022, arXiv 2203.14371). The answer is the greedy next token; what is no letter is
    wrong, and counted. Beside it the accuracy of the most probable of the four letters."""
    letters, right = scored[0].choices, row["cop"]
    metrics = {"accuracy": float(text == MED_CHOICES[right]),
               "accuracy among A-D": float(letters.index(max(letters)) == right)}
    return Verdict(metrics, kinds={}, counts={"no letter": text not in MED_CHOICES})

def sql_usable(rows):
    """Rows that have a query."""
    return [(where, row) for where, row in rows if (row["sql"] or "").strip()]

def sql_pair(row):
    return (f"Write the SQL query that answers the question.\n\nQuestion: {row['sql_prompt']}\n"
            f"Tables: {row['sql_context']}\nSQL:", " " + row["sql"])

def exact_match(a, b):
    """The same tokens: spacing, comments, letter case outside quotes and closing semicolons do not count."""
    first, second = (" ".join(sql_tokens(sql)).rstrip("; ") for sql in (a, b))
    return first == second

def sql_metrics(rows, scored, texts):
    """Execution accuracy over the rows whose reference runs, and by sql_complexity. `shaken`: on generated
    databases beside the row's own, see lib/sandbox.py. `not empty`: where the reference finds a value other
    than NULL or 0, or changes something. A row may have an `sql_database`, a script that fills more than the
    context shows: there the two are tried as well."""
    tries = [(i, "", row["sql_context"]) for i, row in enumerate(rows)]
    tries += [(i, " on the database", row["sql_database"]) for i, row in enumerate(rows)
              if row.get("sql_database")]
    found = execute_in_parallel([(context, rows[i]["sql"], texts[i]) for i, _, context in tries])
    verdicts = [Verdict({}, {}, {}, "") for _ in rows]
    for (i, where, _), ran in zip(tries, found):
        v = verdicts[i]
        right = float(ran["match"])
        if ran["ref_ok"]:
            if not where:
                v.metrics["execution, shaken"] = float(ran["shaken"])
            v.metrics.update({f"execution{where}": right, f"valid SQL{where}": float(ran["valid"])})
            if not ran["ref_empty"]:
                v.metrics[f"execution{where}, not empty"] = right
            if not where and rows[i].get("sql_complexity"):
                v.kinds[f"execution: {rows[i]['sql_complexity']}"] = right
        v.counts.update({f"reference fails{where}": not ran["ref_ok"],
                         f"both empty{where}": ran["both_empty"], f"child killed{where}": ran["killed"]})
        if ran["error"]:
            error = f"on the database: {ran['error']}" if where else ran["error"]
            verdicts[i] = v._replace(error=f"{v.error}; {error}" if v.error else error)
    for row, text, v in zip(rows, texts, verdicts):
        v.metrics["exact match"] = float(exact_match(row["sql"], unfence(text)))
    return verdicts

def text_pair(row):
    """A conversation has it only to be shown."""
    if not is_chat(row):
        return row["prompt"], row["completion"]
    last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
    before = "\n".join(f"{m['role']}: {m['content']}" for m in row["messages"][:last])
    return before, row["messages"][last]["content"]

def text_metrics(row, scored, text):
    """Loss and accuracy over all target tokens, with what ends them. exact match: the greedy text is the
    answer, but for white space around it."""
    s, n = scored[0], len(scored[0].logprobs)
    _, answer = text_pair(row)
    metrics = {"loss": (-sum(s.logprobs), n), "token accuracy": (s.hits, n),
               "exact match": float(text.strip() == answer.strip())}
    return Verdict(metrics, kinds={}, counts={})

class Task(NamedTuple):
    source: str         # the official one: a repository on the hub, or an address; None: rows of one's own
    splits: dict        # "train", "test" -> its name of the rows to train and to evaluate on
    toy: Callable       # that name -> rows of the toy world
    fields: dict        # what a row must have: dotted path -> one of lib.read.KINDS
    usable: Callable    # [(where, row)] -> those that can be used; ValueError if they make no sense
    pair: Callable      # row -> (prompt, target): what training sees
    queries: Callable   # row -> [(prompt, answer)]: what is scored, without generating; None: the pair
    choices: tuple      # options ranked as the next token after queries(row)[0]
    new_tokens: int     # how many tokens evaluation generates at most; 0: it takes the greedy next token
    metrics: Callable   # rows, [[Scored]], greedy texts -> a Verdict for each row
    report: tuple       # the metrics that results.csv has a column for
    toy_epochs: int
    epochs: int = 2     # the paper's
    tests_training_rows: bool = False       # is it evaluated on the rows that train?

TOY_ROWS = {"train": 600, "validation": 200, "test": 200}       # of med and sql; there are 320 facts
TASKS = {
    "fact": Task(
        source="https://rome.baulab.info/data/dsets/counterfact.json",
        splits={"train": "train", "test": "train"}, tests_training_rows=True,
        toy=lambda split: toy_facts(toy_world()), toy_epochs=10,
        fields={"requested_rewrite.prompt": "string", "requested_rewrite.subject": "string",
                "requested_rewrite.target_new.str": "string", "requested_rewrite.target_true.str": "string",
                "paraphrase_prompts": "list of strings", "neighborhood_prompts": "list of strings"},
        usable=fact_usable, pair=fact_pair, queries=fact_queries, choices=(), new_tokens=16,
        metrics=partial(map, fact_metrics), report=("ES", "PS", "NS", "accuracy")),
    "med": Task(
        source="openlifescienceai/medmcqa", splits={"train": "train", "test": "validation"},
        toy=lambda split: toy_med(toy_world(), seed=1, n=TOY_ROWS[split], split=split), toy_epochs=4,
        fields=dict.fromkeys("question opa opb opc opd".split(), "string") | {"cop": "whole number or null"},
        usable=med_usable, pair=med_pair, queries=lambda row: [med_pair(row)], choices=MED_CHOICES,
        new_tokens=0, metrics=partial(map, med_metrics), report=("accuracy", "accuracy among A-D")),
    "sql": Task(
        source="gretelai/synthetic_text_to_sql", splits={"train": "train", "test": "test"},
        toy=lambda split: toy_sql(toy_world(), seed=1, n=TOY_ROWS[split], split=split), toy_epochs=4,
        fields={"sql_prompt": "string", "sql_context": "string", "sql": "string or null",
                "sql_database": "string, null or absent", "sql_complexity": "string, null or absent"},
        usable=sql_usable, pair=sql_pair, queries=lambda row: [], choices=(), new_tokens=256,
        metrics=sql_metrics, report=("execution, shaken", "execution", "valid SQL", "exact match")),
    "text": Task(
        source=None, splits={"train": "train", "test": "test"}, toy=None, toy_epochs=4,
        fields={"prompt": "string, null or absent", "completion": "string, null or absent",
                "messages": "list, null or absent"},
        usable=text_usable, pair=text_pair, queries=None, choices=(), new_tokens=256,
        metrics=partial(map, text_metrics), report=("loss", "perplexity", "token accuracy", "exact match")),
}
