"""Rows of the toy world, as many as wanted, for bench/compare.py:

    python bench/toy_rows.py med 300 train > train.jsonl
    python bench/toy_rows.py med 2000 test > test.jsonl

Those of text are the questions of sql, as prompt and completion.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import TASKS  # noqa: E402
from toy import world  # noqa: E402

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("task", choices=["med", "sql", "text"])
p.add_argument("n", type=int)
p.add_argument("split", choices=["train", "test"])
p.add_argument("--seed", type=int, default=0)
a = p.parse_args()
if a.task == "med":
    rows = world.toy_med(world.toy_world(), a.seed, a.n, "validation" if a.split == "test" else "train")
else:
    rows = world.toy_sql(world.toy_world(), a.seed, a.n, a.split)
if a.task == "text":
    rows = [dict(zip(("prompt", "completion"), TASKS["sql"].pair(row))) for row in rows]
for row in rows:
    print(json.dumps(row))
