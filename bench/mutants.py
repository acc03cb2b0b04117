"""How many wrong queries does the sql task take for right ones?

    python bench/mutants.py sql_test.jsonl.gz sql_test_databases.jsonl.gz

Makes one-edit mutants of each reference, keeps those that differ from it on the row's full database, and asks
lib/sandbox.py to judge them on the row's own few rows: by those alone (`match`), and by the generated
databases beside them (`shaken`). Prints the shares that are judged right, by kind of edit, for one half of
the databases ("tuned", which the generator may be adapted to) or for the other ("held out").
"""
import argparse
import gzip
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from add_databases import script    # noqa: E402
from lib.sandbox import execute_in_parallel, sql_tokens                                 # noqa: E402

SWAPS = {       # token -> [(kind of edit, its replacement)]
    ">": [("> for >= and the like", ">="), ("> for < and the like", "<")],
    "<": [("> for >= and the like", "<="), ("> for < and the like", ">")],
    ">=": [("> for >= and the like", ">"), ("> for < and the like", "<=")],
    "<=": [("> for >= and the like", "<"), ("> for < and the like", ">=")],
    "=": [("= for !=", "!=")], "!=": [("= for !=", "=")],
    "and": [("AND for OR", "or")], "or": [("AND for OR", "and")],
    "max": [("aggregate", "min")], "min": [("aggregate", "max")],
    "avg": [("aggregate", "sum"), ("aggregate", "max")], "sum": [("aggregate", "avg"), ("aggregate", "max")],
    "desc": [("direction of ORDER BY", "asc")], "asc": [("direction of ORDER BY", "desc")],
    "union": [("set operation", "union all"), ("set operation", "intersect")],
    "intersect": [("set operation", "union"), ("set operation", "except")],
    "except": [("set operation", "union"), ("set operation", "intersect")],
    "in": [("IN for NOT IN", "not in")], "join": [("LEFT JOIN", "left join")],
    "distinct": [("dropped DISTINCT", "")], "limit": [("dropped LIMIT", "-- ")],
    "select": [("added DISTINCT", "select distinct")]}
ENDS = {"group", "order", "limit", "having", "union", "intersect", "except", "where", ";"}

def clause_end(tokens, start, ends):
    """The index behind the clause that begins at `start`: of one of `ends`, or of a closing bracket."""
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] == "(") - (tokens[i] == ")")
        if depth < 0 or depth == 0 and tokens[i] in ends:
            return i
    return len(tokens)

def mutants(sql, columns):
    """Yield (kind of edit, the tokens of the edited query). columns: those that a name may be taken for."""
    tokens = list(sql_tokens(sql))
    for i, token in enumerate(tokens):
        before, after = tokens[:i], tokens[i + 1:]
        between = token == "and" and "between" in tokens[max(0, i - 3):i]
        if not between:
            for kind, other in SWAPS.get(token, []):
                yield kind, before + [other] + after
        if token in ("and", "or") and not between:
            end = clause_end(tokens, i + 1, ENDS | {"and", "or"})
            yield f"dropped {token.upper()}", before + tokens[end:]
        if token in ("where", "having"):
            yield f"dropped {token.upper()}", before + tokens[clause_end(tokens, i + 1, ENDS):]
            second = clause_end(tokens, i + 1, ENDS | {"and", "or"})
            if second < len(tokens) and tokens[second] in ("and", "or") and "between" not in tokens[i:second]:
                yield f"dropped {tokens[second].upper()}", before + [token] + tokens[second + 1:]
        if token in ("order", "group"):
            yield f"dropped {token.upper()} BY", before + tokens[clause_end(tokens, i + 1, ENDS):]
        if token == "not" and after[:1] == ["in"]:
            yield "IN for NOT IN", before + after
        if re.fullmatch(r"\d+(\.\d+)?", token):
            yield "number + 1", before + [str(float(token) + 1 if "." in token else int(token) + 1)] + after
            yield "number - 1", before + [str(float(token) - 1 if "." in token else int(token) - 1)] + after
        if token[0] in "'\"" and token.strip("'\"").lower() not in columns:
            yield "another string", before + [token[:-1] + "x" + token[-1]] + after
            if token[1:2] == "%":
                yield "LIKE without a %", before + [token[0] + token[2:]] + after
        if token in columns:
            for other in columns:
                if other != token:
                    yield "another column", before + [other] + after

def columns_of(context):
    found = re.findall(r"CREATE TABLE \S+ \((.*?)\);", context, re.S)
    names = [re.match(r'\s*["`\[]?(\w+)', part)[1].lower() for table in found for part in table.split(",")]
    return list(dict.fromkeys(names))

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rows")
    parser.add_argument("databases")
    parser.add_argument("--half", choices=["tuned", "held out"], default="held out")
    parser.add_argument("--per-query", type=int, default=24, help="mutants of a reference, at most")
    parser.add_argument("--show", type=int, default=0, help="print so many that are still judged right")
    a = parser.parse_args()
    lines = lambda path: [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    databases = {d["db_id"]: script(d["tables"]) for d in lines(a.databases)}
    half = sorted(databases)[::2] if a.half == "tuned" else sorted(databases)[1::2]
    rows = [row for row in lines(a.rows) if row["db_id"] in half]
    cases = []
    for row in rows:
        made = list(mutants(row["sql"], columns_of(row["sql_context"])))
        chosen = random.Random(row["id"]).sample(made, min(len(made), a.per_query))
        cases += [(row, kind, " ".join(tokens)) for kind, tokens in chosen]
    own = execute_in_parallel([(row["sql_context"], row["sql"], text) for row, _, text in cases])
    full = execute_in_parallel([(databases[row["db_id"]], row["sql"], text) for row, _, text in cases])
    counts = defaultdict(Counter)
    shown = []
    for (row, kind, text), few, all_rows in zip(cases, own, full):
        if not (all_rows["ref_ok"] and all_rows["valid"] and few["ref_ok"]):
            continue
        group = kind if not all_rows["match"] else "(right on the full database)"
        counts[group].update(n=1, match=few["match"], shaken=few["shaken"])
        if few["shaken"] and not all_rows["match"]:
            shown.append((kind, row["sql"], text))
    right = counts.pop("(right on the full database)")
    total = Counter()
    for count in counts.values():
        total.update(count)
    print(f"{a.half}: {len(rows)} references of {len(half)} databases\n"
          f"{'wrong mutants':32s}       n   own rows   shaken")
    for kind, c in [*sorted(counts.items()), ("all", total), ("right on the full database", right)]:
        print(f"{kind:32s}{c['n']:8d}{c['match'] / c['n']:11.1%}{c['shaken'] / c['n']:9.1%}")
    for kind, reference, text in random.Random(0).sample(shown, min(a.show, len(shown))):
        print(f"{kind}\n  {reference}\n  {text}")
    pairs = [(row["sql_context"], row["sql"], row["sql"]) for row in lines(a.rows)]
    start = time.perf_counter()
    itself = execute_in_parallel(pairs)
    print(f"references against themselves: {sum(not v['shaken'] for v in itself)} of {len(itself)} fail, "
          f"{time.perf_counter() - start:.2f} s")

if __name__ == "__main__":
    main()
