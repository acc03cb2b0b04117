"""Runs a predicted SQL query and its reference in SQLite and compares what they did: for data.py's sql task.

A model's SQL is hostile input. It runs in a child process that can open no file, has 1 GiB of memory and a
time limit that the kernel enforces (SIGALRM), in a fresh in-memory database behind an authorizer. The child's
program is this file, started as a script: so it imports the standard library only.
"""
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

PROGRAM = os.path.abspath(__file__)
LIMITS = {"seconds": 10, "steps": 20_000_000}   # of a query, steps of SQLite's virtual machine
CHILDREN = min(8, os.cpu_count())               # at a time; no more than 8, because each may take 1 GiB
UNFIT = sqlite3.IntegrityError, ValueError, OverflowError      # a text in an INTEGER PRIMARY KEY, say
FAILURES = sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError

# ------------------------------------------------------------------------------------------------------------
# the text of a query

def unfence(text):
    """A code fence around the whole text goes. Nothing else is cut: SQLite judges what the model wrote."""
    return re.sub(r"\A\s*```(?:sqlite|sql)?\s((?:(?!```).)*)```\s*\Z", r"\1", text, flags=re.S | re.I)

TOKEN = re.compile(
    r"""[xX]?'(?:[^']+|'')*(?:'|\Z)|"(?:[^"]+|"")*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^]]*(?:]|\Z)"""   # quoted
    r"|--[^\n]*|/\*.*?(?:\*/|\Z)|\d+\.\d+|\w+|[<>=!]=|<>|<<|>>|\|\||\S", re.S)

def sql_tokens(sql):
    """Tokens without comments, lower case unless quoted. An open quote takes the rest."""
    found = (m[0] for m in TOKEN.finditer(sql))
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
    """Does it sort its own rows? Inside parentheses, ORDER BY belongs to a subquery, window or aggregate.
    Ties then count in the order that SQLite gives them, as in Spider's own evaluation."""
    if "order" not in statement.lower():
        return False
    found = list(sql_tokens(statement))
    depth = itertools.accumulate((t == "(") - (t == ")") for t in found)
    return any(d == 0 and pair == ["order", "by"] for d, *pair in zip(depth, found, found[1:]))

# ------------------------------------------------------------------------------------------------------------
# what counts as the same

class Result(NamedTuple):
    columns: list       # names, of a table or view; of a query a None each, because its names do not count
    rows: list
    ordered: bool       # does the order of the rows count?

def one_of_close(a, b):
    """Two lists of rows -> the same, where numbers of a column that agree are all replaced by the smallest of
    them. They agree if equal to 12 digits or within 1e-12, because a sum depends on its order; two whole
    numbers must be equal."""
    columns = []
    for column in zip(*a, *b):
        numbers = sorted({c for c in column if isinstance(c, (int, float))})
        if any(isinstance(c, float) for c in numbers):
            name = {x: x for x in numbers}
            for x, y in zip(numbers, numbers[1:]):
                if float in (type(x), type(y)) and math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-12):
                    name[y] = name[x]
            column = [name.get(c, c) if isinstance(c, (int, float)) else c for c in column]
        columns.append(column)
    rows = list(zip(*columns))
    return rows[:len(a)], rows[len(a):]

def same_rows(a, b, ordered):
    """Two lists of rows, as sequences or as multisets. 1 is not '1', and NULL is only NULL."""
    if len(a) != len(b) or a and len(a[0]) != len(b[0]):
        return False
    if a == b or not a:
        return True
    a, b = one_of_close(a, b)
    return a == b if ordered else Counter(a) == Counter(b)

def same_result(reference, other):
    """Two Results, or None: the reference says whether the order counts. The order of columns does."""
    if reference is None or other is None:
        return reference is other
    same_columns = reference.columns == other.columns
    return same_columns and same_rows(reference.rows, other.rows, reference.ordered)

def same_contents(a, b):
    """Two {key: Result}."""
    return a.keys() == b.keys() and all(same_result(a[key], b[key]) for key in a)

# ------------------------------------------------------------------------------------------------------------
# a database that reaches nothing outside

READING = [getattr(sqlite3, f"SQLITE_{name}") for name in ("SELECT", "READ", "FUNCTION", "RECURSIVE")]
REFUSED = [getattr(sqlite3, f"SQLITE_{name}")                   # VACUUM is an ATTACH inside
           for name in ("ATTACH", "DETACH", "CREATE_VTABLE", "DROP_VTABLE")]
UNSAFE = "load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"
PRAGMAS = set("application_id case_sensitive_like defer_foreign_keys encoding foreign_key_check "
              "foreign_key_list foreign_keys index_info index_list index_xinfo integrity_check quick_check "
              "recursive_triggers synchronous table_info table_list table_xinfo user_version".split())

EVERYTHING = ";"        # stands in Database.changed for every table: no name that a statement reports

def fold(name):
    """A name in lower case as SQLite has it: in ASCII only."""
    return re.sub("[A-Z]+", lambda m: m[0].lower(), name)

def quote(name):
    return '"{}"'.format(name.replace('"', '""'))

def fetch_rows(cursor, max_rows=10_000, max_size=2_000_000):
    """All rows, in no more cells + characters + bytes than max_size."""
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(c) if isinstance(c, (str, bytes)) else 1 for c in row)
        if len(rows) > max_rows or size > max_size:
            raise ValueError("result too large")
    return rows

class Database:
    """A database in memory, made by a script. Its statements reach nothing outside, and stop after so many
    steps. `changed` has the names, in lower case, of all that statements may have changed since the script or
    the last fill()."""

    def __init__(self, script, steps):
        self.steps = steps
        self.ticks = 0                          # of 1,000 steps, left to a statement
        # isolation_level None: Python adds no BEGIN of its own. No cached statement, because the authorizer
        # hears of a statement only when it is compiled.
        self.db = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        self.db.execute("PRAGMA temp_store = MEMORY")
        self.db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        self.db.set_authorizer(self.authorize)
        self.db.set_progress_handler(self.tick, 1000)
        self.changed = set()
        self.run(script)
        self.changed = set()

    def authorize(self, action, name, other, *where):
        refused = (action in REFUSED or action == sqlite3.SQLITE_PRAGMA and name.lower() not in PRAGMAS
                   or action == sqlite3.SQLITE_FUNCTION and other.lower() in UNSAFE)
        if refused:
            return sqlite3.SQLITE_DENY
        if action not in READING:
            self.changed = self.changed | {fold(name or ""), fold(other or "")}
        if action == sqlite3.SQLITE_ALTER_TABLE:                # it does not say what the new name is
            self.changed = self.changed | {EVERYTHING}
        return sqlite3.SQLITE_OK

    def tick(self):
        self.ticks -= 1
        return self.ticks < 0

    def run(self, sql):
        """Run each statement -> Result of the last that yields rows, or None."""
        self.ticks = self.steps // 1000
        result = None
        for statement in sql_statements(sql):
            cursor = self.db.execute(statement)
            if cursor.description:
                columns = [None] * len(cursor.description)
                result = Result(columns, fetch_rows(cursor), is_ordered(statement))
        return result

    def look(self, statement):
        """-> all rows of a statement of ours, which changes nothing that counts."""
        before = self.changed
        self.ticks = self.steps // 1000
        rows = fetch_rows(self.db.execute(statement))
        self.changed = before
        return rows

    def contents(self, names):
        """{(schema, kind, name): Result}. A table or view counts by its rows; one that is not in `names` has
        None in their place. An index or trigger is one row, its own text. sqlite_... is left out."""
        found = {}
        for schema in ("main", "temp") if names else ():
            for kind, name, sql in self.look(f"SELECT type, name, sql FROM {schema}.sqlite_master"):
                key = schema, kind, fold(name)
                if kind in ("index", "trigger"):
                    found[key] = Result(["sql"], [tuple(sql_tokens(sql or ""))], ordered=True)
                elif fold(name) in names or EVERYTHING in names:
                    table = f"{schema}.{quote(name)}"
                    header = self.db.execute(f"SELECT * FROM {table} LIMIT 0").description
                    rows = self.look(f"SELECT * FROM {table}")
                    columns = [" ".join(sql_tokens(c[0])) for c in header]
                    found[key] = Result(columns, rows, ordered=False)
                else:
                    found[key] = None
        return {key: result for key, result in found.items() if not key[2].startswith("sqlite_")}

    def fill(self, tables):
        """tables: {name: (columns, rows)}. These rows take the place of all others. One that breaks a
        constraint is left out; then those are deleted whose foreign key points to no row."""
        for name, (columns, rows) in tables.items():
            self.ticks = self.steps // 1000
            self.db.execute(f"DELETE FROM main.{quote(name)}")
            places = ", ".join("?" * len(columns))
            insert = (f"INSERT OR IGNORE INTO main.{quote(name)} ({', '.join(map(quote, columns))}) "
                      f"VALUES ({places})")
            try:
                self.db.executemany(insert, rows)
            except UNFIT:                                       # leave out the rows that do not fit
                self.db.execute(f"DELETE FROM main.{quote(name)}")
                for row in rows:
                    with suppress(*UNFIT):
                        self.db.execute(insert, row)
        with suppress(sqlite3.OperationalError):                # a foreign key may point to what is no key
            for _ in range(10):
                orphans = self.look("PRAGMA main.foreign_key_check")
                if not orphans:
                    break
                for name, rowid, *_ in orphans:
                    self.db.execute(f"DELETE FROM main.{quote(name)} WHERE rowid = ?", (rowid,))
        self.changed = set()

    def shadow(self, names):
        """Queries now find these tables with their rows in the opposite order, in temporary tables."""
        for name in names:
            with suppress(sqlite3.OperationalError):            # a table WITHOUT ROWID has no other order
                self.look(f"CREATE TEMP TABLE {quote(name)} AS SELECT * FROM main.{quote(name)} "
                          f"ORDER BY rowid DESC")

    def unshadow(self, names):
        for name in names:
            self.look(f"DROP TABLE IF EXISTS temp.{quote(name)}")

# ------------------------------------------------------------------------------------------------------------
# generated databases, on which a wrong query shows (Zhong et al. 2020, arXiv 2010.02840)

class Shake(NamedTuple):
    """How to make a database."""
    rows: int           # of each table
    redrawn: float      # the share of cells, in columns that a query names, that are not copied
    nulls: float        # the share of cells that become NULL
    distinct: bool      # has no column the same value twice?

SHAKES = (Shake(16, redrawn=0.4, nulls=0, distinct=False), Shake(8, redrawn=0.4, nulls=0, distinct=True),
          Shake(16, redrawn=0.4, nulls=0.1, distinct=False), Shake(12, redrawn=0.3, nulls=0, distinct=False))

class Table(NamedTuple):
    name: str
    columns: list       # names
    numeric: list       # bool each: does it hold numbers, by its rows or its type?
    needed: list        # bool each: never NULL
    keys: list          # bool each: no value twice
    parents: dict       # column -> (its foreign key, parent table, parent column)
    rows: list          # of the context, at most 100
    values: list        # of each column, without NULLs

def describe(db):
    """-> {name in lower case: Table} of the database's tables, with their keys."""
    tables = {}
    primary_keys = {}
    for name, in db.look("SELECT name FROM main.sqlite_master WHERE type = 'table'"):
        if name.startswith("sqlite_"):
            continue
        info = db.look(f"PRAGMA main.table_info({quote(name)})")
        columns = [column for _, column, *_ in info]
        rows = db.look(f"SELECT {', '.join(map(quote, columns))} FROM main.{quote(name)} LIMIT 100")
        values = [[row[i] for row in rows if row[i] is not None] for i in range(len(columns))]
        numeric = [isinstance(v[0], (int, float)) if v else not re.search("CHAR|TEXT|CLOB|DATE", kind.upper())
                   for v, (_, _, kind, *_) in zip(values, info)]
        primary = [pk for *_, pk in info]
        keys = [pk == 1 and max(primary) == 1 for pk in primary]
        for _, index, unique, *_ in db.look(f"PRAGMA main.index_list({quote(name)})"):
            members = [column for *_, column in db.look(f"PRAGMA main.index_info({quote(index)})")]
            if unique and len(members) == 1 and members[0] in columns:      # not an expression
                keys[columns.index(members[0])] = True
        needed = [bool(not_null or pk) for _, _, _, not_null, _, pk in info]
        primary_keys[name.lower()] = [column for pk, column in sorted(zip(primary, columns)) if pk]
        tables[name.lower()] = Table(name, columns, numeric, needed, keys, {}, rows, values)
    for t in tables.values():
        declared = db.look(f"PRAGMA main.foreign_key_list({quote(t.name)})")
        for number, place, parent, column, to, *_ in declared:
            to = to or (primary_keys.get(parent.lower(), []) + [None] * len(declared))[place]
            if to:
                t.parents[column.lower()] = number, parent.lower(), to.lower()
    add_keys_unsaid(tables)
    return tables

def add_keys_unsaid(tables):
    """Many a schema declares no keys. The first column of table `singer` is taken for one if it is called id,
    singer_id or the like, and no two rows share a value. A column of its name in another table, if not just
    id, is taken for a foreign key, without NULLs."""
    owners = {}
    for name, t in tables.items():
        first = t.columns[0].lower()
        if not any(t.needed) and first.endswith("id") and len(set(t.values[0])) == len(t.rows):
            t.keys[0] = t.needed[0] = name.startswith(first.removesuffix("id").rstrip("_"))
            if t.keys[0] and first != "id":
                owners[first] = name
    for name, t in tables.items():
        for i, column in enumerate(map(str.lower, t.columns)):
            if owners.get(column, name) != name and column not in t.parents:
                t.parents[column] = column, owners[column], column
                t.needed[i] = True

def parents_first(tables):
    """-> the names, those of parents before those of their children, as far as there is no circle."""
    order, left = [], list(tables)
    while left:
        parents = {name: {parent for _, parent, _ in tables[name].parents.values()} - {name} for name in left}
        order.append(next((name for name in left if parents[name].isdisjoint(left)), left[0]))
        left.remove(order[-1])
    return order

def neighbours(literal, negative):
    """A literal's token -> its value, twice, so that it is drawn more often, and values just beside it,
    where a comparison gives another result. negative: is there a minus before it?"""
    if literal[0] not in "'\"":
        number = int(literal) if literal.isdecimal() else float(literal)
        number = -number if negative else number
        return [number, number, number + 1, number - 1]
    text = literal[1:-1].replace(2 * literal[0], literal[0])
    meant = text.replace("%", "").replace("_", "x")
    if meant.isdecimal() and len(meant) < 16:
        return [meant, meant, str(int(meant) + 1), str(int(meant) - 1)]
    return [meant, meant, meant + "x", "x" + meant, meant.swapcase(), meant[:-1]]

def literals(sql, columns):
    """-> {column: [values]}: values near what a query compares with each column that it names. A literal is
    taken to be compared with the last column named before it."""
    found = {}
    column = before = None
    for token in sql_tokens(sql):
        name = token.strip("\"`[]").lower()
        if name in columns:
            column = name
            found.setdefault(column, [])
        elif token[0] in "'\"" or re.fullmatch(r"\d{1,15}(\.\d+)?(e\d{1,2})?", token):
            found.setdefault(column, []).extend(neighbours(token, negative=before == "-"))
        before = token
    return found

def joined(sql, columns):
    """-> [(column, column)] that a query sets equal, as a join does: `ON t.a = u.b` gives (a, b)."""
    words = [token.strip("\"`[]").lower() for token in sql_tokens(sql)]
    bare = [word for word, after in zip(words, words[1:] + [""]) if "." not in (word, after)]
    return [(a, b) for a, sign, b in zip(bare, bare[1:], bare[2:]) if sign == "=" and {a, b} <= columns]

def draw(rng, own, near, numeric, n, distinct):
    """-> n values for a column, from those that it has and those that are near a literal."""
    if not own + near:
        own = [1, 2, 3] if numeric else ["a", "b", "c"]
    if not distinct:
        sources = rng.choices([values for values in (own, near) if values], k=n)
        return [values[int(rng.random() * len(values))] for values in sources]
    values = list(dict.fromkeys(own + near))
    rng.shuffle(values)
    top = max((v for v in values if isinstance(v, (int, float)) and v < 2 ** 53), default=0)
    values += [top + i if numeric else f"{values[0]}{i}" for i in range(1, n + 1 - len(values))]
    return values[:n]

def shaken_rows(tables, near, shake, rng):
    """{name: Table}, {column that a query names: [values near its literals]} -> {name: (columns, rows)} for
    Database.fill. Rows are copies of the context's, with cells drawn anew."""
    n = shake.rows
    made = {}                                                   # (table, column) -> n values
    for name in parents_first(tables):
        t = tables[name]
        copied = list(zip(*rng.choices(t.rows, k=n))) if t.rows else []
        picked = {}                                             # foreign key -> n places in its parent
        for i, column in enumerate(map(str.lower, t.columns)):
            named = column in near
            anew = partial(draw, rng, t.values[i], near.get(column, []), t.numeric[i])
            key, *parent = t.parents.get(column, (None,))
            if tuple(parent) in made:
                places = picked.setdefault(key, rng.choices(range(n), k=n))
                cells = [made[tuple(parent)][j] for j in places]
            elif t.keys[i] or named and shake.distinct or not copied:
                cells = anew(n, distinct=t.keys[i] or shake.distinct)
            else:
                cells = list(copied[i])
                if named:
                    places = rng.sample(range(n), round(shake.redrawn * n))
                    for j, value in zip(places, anew(len(places), distinct=False)):
                        cells[j] = value
            if named and not t.needed[i]:
                for j in rng.sample(range(n), round(shake.nulls * n)):
                    cells[j] = None
            made[name, column] = cells
    return {t.name: (t.columns, list(zip(*(made[name, column.lower()] for column in t.columns))))
            for name, t in tables.items()}

# ------------------------------------------------------------------------------------------------------------
# a verdict

class Outcome(NamedTuple):
    db: Database | None         # as the query left it
    result: Result | None       # None: no statement yields rows
    changed: frozenset          # names of what it may have changed
    error: str | None

def attempt(stage, make, sql, db=None):
    """Run sql -> Outcome. db: an unchanged database to use again; without one, make() builds it."""
    running = "context: "
    try:
        db = db or make()
        running = stage
        if all(t == ";" for t in sql_tokens(sql)):
            raise ValueError("no statement")
        result = db.run(sql)
        db.contents(db.changed)                                 # can it be read?
        return Outcome(db, result, frozenset(db.changed), None)
    except FAILURES as e:
        text = "step limit" if str(e) == "interrupted" else str(e) or "out of memory"
        return Outcome(None, None, frozenset(), running + text[:200])

def unchanged(outcome):
    """Its database, if that is still as it was made, else None."""
    return None if outcome.changed else outcome.db

def same_outcome(make, reference, other):
    """Do two outcomes agree in the last result and in what is in the database?"""
    names = reference.changed | other.changed
    if not same_result(reference.result, other.result):
        return False
    if not names:
        return True
    try:
        states = [(o.db if o.changed else make()).contents(names) for o in (reference, other)]
        return same_contents(*states)
    except FAILURES:
        return False

def nothing_happened(make, outcome):
    """Is no cell of the result other than NULL or 0, and nothing changed?"""
    found = outcome.result and any(cell not in (None, 0) for row in outcome.result.rows for cell in row)
    idle = Outcome(None, outcome.result, frozenset(), None)
    return outcome.error is None and not found and same_outcome(make, outcome, idle)

def shakes_of(db, reference, prediction):
    """-> for each of SHAKES, tables for Database.fill; [] if they cannot be made."""
    try:
        tables = describe(db)
    except FAILURES:
        return []
    stored = defaultdict(list)                                  # column -> its values in all tables
    for t in tables.values():
        for column, values in zip(t.columns, t.values):
            stored[column.lower()] += values
    columns = stored.keys()
    near = {}
    for sql in (reference, prediction):
        for column, values in literals(sql, columns).items():
            near.setdefault(column, []).extend(values)
        for a, b in joined(sql, columns):
            near[a] += stored[b]
            near[b] += stored[a]
    return (shaken_rows(tables, near, shake, random.Random(i)) for i, shake in enumerate(SHAKES))

def survives_shaking(db, make, reference, prediction):
    """Does the prediction agree with the reference on each generated database on which the reference runs? A
    database is skipped if the reference's own result depends on the order in which SQLite reads rows.
    db: the context's database, which is used up; make() makes it anew. Each query gets a tenth of the steps,
    because the databases are small."""
    db.steps //= 10
    by_chance = not {"order", "limit"}.isdisjoint(sql_tokens(reference))
    for rows in shakes_of(db, reference, prediction):
        def make_shaken():
            fresh = make()
            fresh.steps //= 10
            fresh.fill(rows)
            return fresh
        try:
            if db:
                db.fill(rows)
            else:
                db = make_shaken()
        except FAILURES:                                        # a trigger may not let the rows in
            db = None
            continue
        wanted = attempt("", make_shaken, reference, db)
        db = unchanged(wanted)
        if wanted.error:
            continue
        if by_chance and db:
            db.shadow(rows)
            again = attempt("", make_shaken, reference, db)
            db.unshadow(rows)
            if not same_result(wanted.result, again.result):
                wanted = wanted._replace(result=wanted.result._replace(ordered=False))
            if not same_result(wanted.result, again.result):
                continue
        found = attempt("", make_shaken, prediction, db)
        if found.error or not same_outcome(make_shaken, wanted, found):
            return False
        db = unchanged(found)
    return True

def judge_sql(context, reference, prediction, steps=LIMITS["steps"]):
    """Yield the verdict three times: the reference's part alone, so that it is known even if the prediction
    kills this process; the whole on the context's own rows; the same with the generated databases."""
    make = lambda: Database(context, steps)
    ref = attempt("reference: ", make, reference)
    ref_empty = nothing_happened(make, ref)
    verdict = {"ref_ok": ref.error is None, "ref_empty": ref_empty, "error": ref.error}
    yield verdict
    prediction = unfence(prediction)
    pred = attempt("", make, prediction, unchanged(ref))
    match = ref.error is None and pred.error is None and same_outcome(make, ref, pred)
    verdict |= {"valid": pred.error is None, "match": match, "error": ref.error or pred.error,
                "both_empty": ref_empty and nothing_happened(make, pred)}
    yield verdict
    identical = list(sql_tokens(reference)) == list(sql_tokens(prediction))
    shaken = match and (identical or survives_shaking(unchanged(pred) or make(), make, reference, prediction))
    yield verdict | {"shaken": shaken}

# ------------------------------------------------------------------------------------------------------------
# the child, and its parent

def serve_sql(seconds, steps):
    """The child's loop: a row a line in, three verdicts out. SIGALRM ends it, wherever in SQLite it hangs."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])    # a parent may have blocked it
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

def execute_pairs(rows, children=None):
    """[(context, reference, prediction)] -> a verdict each: ref_ok, valid (it ran), match (the last results
    and the databases agree), shaken (also on the generated databases), ref_empty (no value but NULL or 0, and
    nothing changed), both_empty, killed (the child, by this row), error (None or a text).
    children: a list that the child processes are put into."""
    keys = "ref_ok", "valid", "match", "shaken", "ref_empty", "both_empty", "killed"
    children = [] if children is None else children
    verdicts, child = [], start_sql_child()
    for row in rows:
        children[:] = [child]
        if not rows:                            # they were cleared just before this child could be found
            break
        verdict = dict.fromkeys(keys, False)
        with suppress(BrokenPipeError):
            print(json.dumps(row), file=child.stdin, flush=True)
        parts = [child.stdout.readline() for _ in range(3)]                 # "" from a dead child
        verdict |= json.loads(next(filter(None, reversed(parts)), "{}"))
        if not parts[2]:
            child.communicate()                                             # reap it and close its pipes
            code = child.returncode                                         # minus the signal's number
            death = "timeout" if code == -signal.SIGALRM else f"worker killed ({code})"
            verdict["killed"] = True
            verdict["error"] = verdict.get("error") or ("" if parts[0] else "reference: ") + death
            child = start_sql_child()
        verdicts.append(verdict)
    child.communicate()
    return verdicts

def execute_in_parallel(rows, n=CHILDREN):
    """execute_pairs in n children at a time, each with every n-th row."""
    verdicts = [None] * len(rows)
    parts = [rows[i::n] for i in range(n) if rows[i::n]]
    children = [[] for _ in parts]
    with ThreadPoolExecutor(n) as pool:
        try:
            for i, part in enumerate(pool.map(execute_pairs, parts, children)):
                verdicts[i::n] = part
        except BaseException:               # Ctrl-C: the threads find no more rows, and no child to wait for
            for part in parts:
                part.clear()
            for child in itertools.chain(*children):
                child.kill()
            raise
    return verdicts

if __name__ == "__main__":
    serve_sql(**json.loads(sys.argv[1]))
