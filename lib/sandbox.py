"""Runs a predicted SQL query and its reference in SQLite and compares what they did: for data.py's sql task.

A model's SQL is hostile input. It runs in a child process that can open no file, has 1 GiB of memory and a
timer kept by the kernel, in a fresh in-memory database behind an authorizer. The child's program is this
file, started as a script: so it imports the standard library only.
"""
import itertools
import json
import math
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import NamedTuple

PROGRAM = os.path.abspath(__file__)
LIMITS = {"seconds": 10, "steps": 20_000_000}   # of a query, steps of SQLite's virtual machine
CHILDREN = min(8, os.cpu_count())               # at a time; no more than 8, because each may take 1 GiB
ORDER = {type(None): 0, int: 1, float: 1, str: 2, bytes: 3}     # in which SQLite sorts the types of cells

class Result(NamedTuple):
    columns: list       # of a table their names; of a query, whose names do not count, a None each
    rows: list
    ordered: bool       # does the order of the rows count?

def unfence(text):
    """A code fence around the whole text goes. Nothing else is cut: SQLite judges what the model wrote."""
    return re.sub(r"\A\s*```(?:sqlite|sql)?\s((?:(?!```).)*)```\s*\Z", r"\1", text, flags=re.S | re.I)

def sql_tokens(sql):
    """Tokens without comments, lower case unless quoted. An open quote takes the rest; 'it''s' is two."""
    quoted = r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^]]*(?:]|\Z)"""
    found = (m[0] for m in re.finditer(quoted + r"|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|\S", sql, re.S))
    return (t if t[0] in "'\"`[" else t.lower() for t in found if not t.startswith(("--", "/*")))

def sql_statements(sql):
    """Cut after each semicolon that ends a statement: not in a string, a comment or a trigger's body."""
    found = [""]
    for piece in re.findall(r"[^;]*;?", sql):
        found[-1] += piece
        if sqlite3.complete_statement(found[-1]):
            found.append("")
    return found

def is_ordered(statement):
    """Does it sort its own rows? ORDER BY in parentheses is a subquery's, a window's or an aggregate's.
    Ties then count in the order that SQLite gives them, as in Spider's own evaluation."""
    found = list(sql_tokens(statement))
    depth = itertools.accumulate((t == "(") - (t == ")") for t in found)
    return any(d == 0 and pair == ["order", "by"] for d, *pair in zip(depth, found, found[1:]))

def same_cell(a, b):
    """1 is 1.0 but not '1', and NULL is only NULL. Floats count to 9 digits: a sum depends on its order."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float)) and float in (type(a), type(b))
    return a == b or numbers and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)

def row_key(row):
    """(rough, exact): to sort rows by numbers of 6 digits first, so that rows whose cells are the same but
    for the noise of a sum come in one order."""
    rough = [float(f"{round(c, 9):.6g}") if isinstance(c, (int, float)) else c for c in row]
    return tuple([(ORDER[type(c)], 0 if c is None else c) for c in cells] for cells in (rough, row))

def same_rows(a, b, ordered):
    """Two lists of rows, as sequences or as multisets."""
    if len(a) == len(b) and a != b and not ordered:
        a, b = sorted(a, key=row_key), sorted(b, key=row_key)
    return len(a) == len(b) and all(len(x) == len(y) and all(map(same_cell, x, y)) for x, y in zip(a, b))

def same_outcome(reference, other):
    """Two {key: Result}: keys, columns and rows agree. The reference says whether the order counts."""
    return reference.keys() == other.keys() and all(
        a.columns == b.columns and same_rows(a.rows, b.rows, a.ordered)
        for a, b in ((reference[key], other[key]) for key in reference))

def open_database(steps):
    """An empty database in memory that refuses to reach outside and stops after so many VM steps."""
    actions = [getattr(sqlite3, f"SQLITE_{name}")               # VACUUM is an ATTACH inside
               for name in ("ATTACH", "DETACH", "PRAGMA", "CREATE_VTABLE", "DROP_VTABLE")]
    unsafe = "load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"

    def authorize(action, _, name, *where):
        refused = action in actions or action == sqlite3.SQLITE_FUNCTION and name.lower() in unsafe
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    count = itertools.count(1)
    db = sqlite3.connect(":memory:", isolation_level=None)      # None: Python adds no BEGIN of its own
    db.execute("PRAGMA temp_store = MEMORY")
    db.set_authorizer(authorize)
    db.set_progress_handler(lambda: next(count) * 1000 > steps, 1000)
    return db

def fetch_rows(cursor, max_rows=10_000, max_size=2_000_000):
    """All rows, in no more cells + characters + bytes than max_size."""
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(c) if isinstance(c, (str, bytes)) else 1 for c in row)
        if len(rows) > max_rows or size > max_size:
            raise ValueError("result too large")
    return rows

def execute_all(db, sql):
    """Run each statement -> {"result": Result} of the last that yields rows, else {}."""
    result = {}
    for statement in sql_statements(sql):
        cursor = db.execute(statement)
        if cursor.description:
            columns = [None] * len(cursor.description)
            result = {"result": Result(columns, fetch_rows(cursor), is_ordered(statement))}
    return result

def database_contents(db):
    """{(kind, name): Result}. A view counts by its rows; an index or trigger is one row, its own text."""
    found = {}
    objects = " UNION ALL ".join(f"SELECT type, name, sql FROM sqlite_{t}master" for t in ("", "temp_"))
    for kind, name, sql in db.execute(objects).fetchall():
        key = kind, name.lower()
        if kind in ("index", "trigger"):
            found[key] = Result(["sql"], [list(sql_tokens(sql or ""))], ordered=True)
        elif not name.startswith("sqlite_"):                    # those are SQLite's own
            cursor = db.execute('SELECT * FROM "{}"'.format(name.replace('"', '""')))
            columns = [c[0].lower() for c in cursor.description]
            found[key] = Result(columns, fetch_rows(cursor), ordered=False)
    return found

def attempt_sql(stage, context, sql, steps):
    """Run sql after its context -> outcome (None: it failed), did it find and change nothing?, error."""
    running = "context: "
    try:
        with closing(open_database(steps)) as db:
            execute_all(db, context)
            before = database_contents(db)
            running = stage
            if all(t == ";" for t in sql_tokens(sql)):
                raise ValueError("no statement")
            result = execute_all(db, sql)
            after = database_contents(db)
            nothing = not any(r.rows for r in result.values()) and same_outcome(before, after)
            return after | result, nothing, None
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError) as e:
        text = "step limit" if str(e) == "interrupted" else str(e) or "out of memory"
        return None, False, running + text[:200]

def judge_sql(context, reference, prediction, steps=LIMITS["steps"]):
    """Yield the verdict twice: the reference's part, lest the prediction kill us, and then the whole."""
    ref, ref_empty, error = attempt_sql("reference: ", context, reference, steps)
    verdict = {"ref_ok": error is None, "ref_empty": ref_empty, "error": error}
    yield verdict
    pred, empty, pred_error = attempt_sql("", context, unfence(prediction), steps)
    match = error is None and pred_error is None and same_outcome(ref, pred)
    yield {**verdict, "valid": pred_error is None, "match": match, "both_empty": ref_empty and empty,
           "error": error or pred_error}

def serve_sql(seconds, steps):
    """The child's loop: a row a line in, two verdicts out. SIGALRM ends it, wherever in SQLite it hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the parent, whose end ends us
    sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit = {2**26}")    # for the whole process
    if sys.platform == "linux":                                 # macOS does not know this limit
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))          # the pipes stay; nothing more can be opened
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)           # the step limit is the usual end, and exact
        for verdict in judge_sql(*json.loads(line), steps):
            print(json.dumps(verdict), flush=True)
            signal.setitimer(signal.ITIMER_REAL, seconds)       # anew for the prediction
        signal.setitimer(signal.ITIMER_REAL, 0)

def start_sql_child():
    child = subprocess.Popen([sys.executable, "-I", PROGRAM, json.dumps(LIMITS)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if child.stdout.readline() != "ready\n":
        child.communicate()
        raise RuntimeError("the SQL child process did not start; its own message is above")
    return child

def execute_pairs(rows):
    """[(context, reference, prediction)] -> a verdict each: ref_ok, valid (it ran), match (the last results
    and the databases agree), ref_empty, both_empty (no rows and nothing changed), killed (the child, by this
    row), error (None or a text)."""
    verdicts, child = [], start_sql_child()
    for row in rows:
        verdict = dict.fromkeys(("ref_ok", "valid", "match", "ref_empty", "both_empty", "killed"), False)
        with suppress(BrokenPipeError):
            print(json.dumps(row), file=child.stdin, flush=True)
        part, whole = child.stdout.readline(), child.stdout.readline()      # "" from a dead child
        verdict |= json.loads(whole or part or "{}")
        if not whole:
            child.communicate()                                             # reap it and close its pipes
            code = child.returncode                                         # minus the signal's number
            death = "timeout" if code == -signal.SIGALRM else f"worker killed ({code})"
            verdict["killed"] = True
            verdict["error"] = verdict.get("error") or ("" if part else "reference: ") + death
            child = start_sql_child()
        verdicts.append(verdict)
    child.communicate()
    return verdicts

def execute_in_parallel(rows, n=CHILDREN):
    """execute_pairs in n children at a time, each with every n-th row."""
    verdicts = [None] * len(rows)
    with ThreadPoolExecutor(n) as pool:
        for i, part in enumerate(pool.map(execute_pairs, [rows[i::n] for i in range(n) if rows[i::n]])):
            verdicts[i::n] = part
    return verdicts

if __name__ == "__main__":
    serve_sql(**json.loads(sys.argv[1]))
