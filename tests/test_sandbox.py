"""The SQL sandbox: what counts as the same, hostile statements, and a child process that dies."""
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib import sandbox
from lib.sandbox import execute_pairs, is_ordered, judge_sql, sql_statements, unfence

CONTEXT = """CREATE TABLE t (id INT, name TEXT, x REAL);
INSERT INTO t VALUES (1, 'a', 0.1), (2, 'b; c', 0.2), (3, 'it''s', NULL), (3, 'it''s', NULL);
CREATE TABLE none (a INT);"""
GOOD = CONTEXT, "SELECT id FROM t", "SELECT id FROM t"


def judge(reference, prediction, context=CONTEXT):
    return list(judge_sql(context, reference, prediction))[-1]


# ----------------------------------------------------------------------------------------------- what matches

SAME = [
    ("SELECT id FROM t", "SELECT T.id AS other FROM t AS T"),               # column names do not count
    ("SELECT id FROM t", "SELECT id FROM t ORDER BY id DESC"),              # the reference has no order
    ("SELECT id FROM t ORDER BY id", "SELECT id FROM (SELECT id FROM t ORDER BY id DESC) ORDER BY 1"),
    ("SELECT id FROM (SELECT id FROM t ORDER BY id DESC)", "SELECT id FROM t ORDER BY id"),
    ("SELECT rank() OVER (ORDER BY id) FROM t WHERE id < 3", "SELECT id FROM t WHERE id < 3 ORDER BY -id"),
    ("SELECT x FROM t", "SELECT x FROM t ORDER BY x DESC"),                 # NULLs among the rows
    ("SELECT 1", "SELECT 1.0"),
    ("SELECT 1 UNION ALL SELECT 1234567891", "SELECT 1234567891.0 UNION ALL SELECT 1.0"),
    ("SELECT sum(id) FROM t", "SELECT total(id) FROM t"),
    ("SELECT 0.3", "SELECT 0.1 + 0.2"),
    ("SELECT 1, 0", "SELECT 1, 1e-17"),
    ("SELECT 1, 'b' UNION ALL SELECT 0.1 + 0.2, 'a'", "SELECT 0.3, 'a' UNION ALL SELECT 1.0, 'b'"),
    ("SELECT 0.4999999 + 1e-16, 'b' UNION ALL SELECT 0.4999999, 'a'",
     "SELECT 0.4999999, 'b' UNION ALL SELECT 0.4999999 + 1e-16, 'a'"),
    ("SELECT 0.00000050000000000001, 'b' UNION ALL SELECT 0.0000005, 'a'",      # 6 digits would part them
     "SELECT 0.0000005, 'b' UNION ALL SELECT 0.00000050000000000001, 'a'"),
    ("SELECT CAST(x'ff' AS TEXT)", "SELECT CAST(x'ff' AS TEXT)"),               # text that is no UTF-8
    ("CREATE TABLE u (a INTEGER PRIMARY KEY, b TEXT UNIQUE)", "CREATE TABLE u (a INT PRIMARY KEY, b)"),
    ("SELECT id FROM t", "PRAGMA foreign_keys=OFF; SELECT id FROM t"),
    ("SELECT 12345678901", "SELECT 12345678901.000002"),
    ("SELECT 1234567891.0 UNION ALL SELECT 5e-18", "SELECT 0.0 UNION ALL SELECT 1234567891.0000002"),
    ("SELECT 1000000001 UNION ALL SELECT 1000000002", "SELECT 1000000002 UNION ALL SELECT 1000000001"),
    ("SELECT '' UNION ALL SELECT 'a' UNION ALL SELECT x''",
     "SELECT 'a' UNION ALL SELECT x'' UNION ALL SELECT ''"),
    ("SELECT 2, NULL UNION ALL SELECT 1, 'a' UNION ALL SELECT NULL, x'00' UNION ALL SELECT '1', 1",
     "SELECT '1', 1 UNION ALL SELECT 1, 'a' UNION ALL SELECT 2, NULL UNION ALL SELECT NULL, x'00'"),
    ("SELECT 1e300 * 1e300", "SELECT 9e999"),
    ("SELECT 0.3, 'a' UNION ALL SELECT 0.1 + 0.2, 'b'", "SELECT 0.3, 'b' UNION ALL SELECT 0.1 + 0.2, 'a'"),
    ("SELECT 9007199254740993", "SELECT 9007199254740992 + 1"),
    ("SELECT max(id) FROM t", "WITH m AS (SELECT max(id) AS v FROM t) SELECT v FROM m"),
    ("SELECT 'b; c'", "SELECT name FROM t WHERE id = (SELECT max(id) FROM t WHERE id < 3)"),
    ("SELECT 1 UNION SELECT 2", "SELECT id FROM t WHERE id < 3"),
    ("SELECT 'axc'", "SELECT REPLACE('abc', 'b', 'x')"),
    ("SELECT id FROM t", "SELECT id FROM t; -- and that is all"),
    ("SELECT id FROM t", "/* q: */ SELECT id FROM t /* open"),
    ("SELECT id FROM t", ";;SELECT 5;\nSELECT id FROM t;;"),                # the last result counts
    ("SELECT id FROM t", "```sql\nSELECT id FROM t\n```"),
    ("SELECT id FROM t", " ```\nSELECT id FROM t;```\n"),
    ("SELECT count(*) FROM t WHERE name = \"it's\"", "SELECT 2"),           # SQLite reads it as a string
    ("SELECT '\u00e9\U0001f600'", "SELECT '\u00e9' || char(128512)"),
    ("SELECT x'ff'", "SELECT X'FF'"),
    ("DELETE FROM t WHERE id = 1", "DELETE FROM t WHERE name = 'a'"),
    ("INSERT INTO none VALUES (1), (2)", "INSERT INTO none VALUES (2); INSERT INTO none VALUES (1);"),
    ("UPDATE t SET x = 0 WHERE x IS NULL", "UPDATE t SET x = coalesce(x, 0)"),
    ("CREATE TABLE u (a INT)", "create table U (A TEXT)"),
    ("DROP TABLE none", "DROP TABLE IF EXISTS none;"),
    ("ALTER TABLE t RENAME TO u", "ALTER TABLE t RENAME TO u;"),
    ("CREATE VIEW v AS SELECT sum(id*2) FROM t", "CREATE VIEW v AS SELECT sum( id * 2 ) FROM t"),
    ("CREATE VIEW v AS SELECT id FROM t", "CREATE VIEW v AS SELECT DISTINCT id FROM t UNION ALL SELECT 3"),
    ("SELECT id FROM t", "ANALYZE; SELECT id FROM t"),                      # SQLite's own do not count
    ("ALTER TABLE t ADD COLUMN y INT DEFAULT 3", "ALTER TABLE t ADD y DEFAULT 3.0"),
    ("CREATE INDEX i ON t (id)", "create index i  on t(id);"),
    ("CREATE TRIGGER g AFTER DELETE ON t BEGIN INSERT INTO none SELECT 1; SELECT ';'; END; DELETE FROM t",
     "create trigger g AFTER DELETE ON t\nBEGIN INSERT INTO none SELECT 1; SELECT ';'; END;DELETE FROM t;"),
    ("BEGIN; DELETE FROM t; ROLLBACK; DELETE FROM t WHERE id = 1", "DELETE FROM t WHERE id = 1"),
    ("DELETE FROM t WHERE id = 1 RETURNING name", "DELETE FROM t WHERE id = 1; SELECT 'a'"),
]
DIFFERENT = [
    ("SELECT id FROM t", "SELECT DISTINCT id FROM t"),                      # duplicates count
    ("SELECT id FROM t ORDER BY id", "SELECT id FROM t ORDER BY id DESC"),
    ("SELECT 2 UNION ALL SELECT 1 ORDER BY 1", "SELECT 2 UNION ALL SELECT 1"),
    ("SELECT 1", "SELECT '1'"),
    ("SELECT NULL", "SELECT 0"),
    ("SELECT NULL", "SELECT ''"),
    ("SELECT 'a'", "SELECT x'61'"),
    ("SELECT 'a'", "SELECT 'A'"),
    ("SELECT 'a'", "SELECT 'a '"),
    ("SELECT 0.3", "SELECT 0.3001"),
    ("SELECT 1e-10", "SELECT 9e-10"),
    ("SELECT julianday('2024-05-01 10:00:00')", "SELECT julianday('2024-05-01 10:00:01')"),
    ("SELECT 1714557600.0", "SELECT 1714557601.0"),
    ("SELECT CAST(x'ff' AS TEXT)", "SELECT CAST(x'fe' AS TEXT)"),
    ("DROP TABLE none", "CREATE TEMP TABLE keep AS SELECT * FROM none; DROP TABLE none;"
                        "CREATE TEMP TABLE none AS SELECT * FROM keep; DROP TABLE keep"),
    ("SELECT id FROM t", "DROP TABLE none; CREATE TEMP TABLE none (a INT); SELECT id FROM t"),
    ("INSERT INTO none VALUES (1)", "SELECT 1"),
    ("SELECT 1234567.8", "SELECT 1234567.9"),
    ("SELECT 1, 'b' UNION ALL SELECT 2, 'a'", "SELECT 1, 'a' UNION ALL SELECT 2, 'b'"),
    ("SELECT 1000000001", "SELECT 1000000002"),
    ("SELECT 9007199254740993", "SELECT 9007199254740992"),
    ("SELECT id, name FROM t", "SELECT name, id FROM t"),
    ("SELECT id FROM t", "SELECT id, id FROM t"),
    ("SELECT id FROM t WHERE id > 9", "SELECT id, name FROM t WHERE id > 9"),   # even no rows have a width
    ("SELECT id FROM t WHERE id > 9", "SELECT id FROM t"),
    ("SELECT id FROM t", "SELECT id FROM t WHERE id > 9"),
    ("DELETE FROM t WHERE id = 1", "DELETE FROM t WHERE id = 2"),
    ("DELETE FROM t WHERE id = 1", "SELECT * FROM t"),
    ("SELECT id FROM t", "DELETE FROM t"),
    ("SELECT id FROM t", "SELECT id FROM t; DELETE FROM t"),
    ("SELECT id FROM t WHERE id > 9", "DELETE FROM t WHERE id > 9"),        # a result of no rows is one
    ("SELECT 3", "CREATE TEMP TABLE s AS SELECT 3 AS a; SELECT a FROM s"),  # a temporary table stays
    ("CREATE TABLE u (a INT)", "CREATE TABLE u (b INT)"),
    ("CREATE TABLE u (a INT)", "CREATE VIEW u AS SELECT 1 AS a"),
    ("CREATE INDEX i ON t (id)", "CREATE INDEX i ON t (name)"),
    ("CREATE INDEX i ON t (id)", "DELETE FROM none"),
    ("DROP TABLE none", "DELETE FROM none"),
    ("ALTER TABLE t RENAME TO u", "ALTER TABLE t RENAME TO v"),
    ("ALTER TABLE t RENAME TO u", "DELETE FROM t; ALTER TABLE t RENAME TO u"),
    ("ALTER TABLE t RENAME TO u", "UPDATE t SET id = 0; ALTER TABLE t RENAME TO u"),
]
INVALID = [
    "SELECT id FROM t\nThis query returns all ids.",
    "SELECT id FROM t; This returns the ids.",
    "Here it is: SELECT id FROM t",
    "Here:\n```sql\nSELECT id FROM t\n```",
    "```sql\nSELECT id FROM t\n```\nThat is all.",
    "```sql\nSELECT id FROM t\n```\n```sql\nSELECT id FROM t\n```",
    "```sql\nSELECT id FROM t",
    "SELECT id FROM t\n```",
    "SELECT id FROM t WHERE x=(SELECT MAX(x) FROM t",
    "SELECT id FROM t WHERE name = 'a",
    "SELECT id FROM t)",
    "", " \n", ";", "-- nothing", "``````", "```sql\n```",
    "SELECT id FROM nowhere",
    "SELECT id FROM t; SELECT nothing FROM t",
    "SELECT id FROM t;SELEC",
    "SELECT id FROM t\0", "SELECT '\0'", "SELECT '\ud800'", "\udcff",
    "SELECT ?", "SELECT :name",
    "CREATE VIEW v AS SELECT * FROM gone",
]


@pytest.mark.parametrize("reference, prediction", SAME)
def test_same(reference, prediction):
    verdict = judge(reference, prediction)
    assert verdict["ref_ok"] and verdict["valid"] and verdict["match"] and verdict["error"] is None
    assert not verdict["ref_empty"] and not verdict["both_empty"]


@pytest.mark.parametrize("reference, prediction", DIFFERENT)
def test_different(reference, prediction):
    verdict = judge(reference, prediction)
    assert verdict["ref_ok"] and verdict["valid"] and not verdict["match"] and verdict["error"] is None


def test_invalid_predictions_are_verdicts():
    verdicts = execute_pairs([(CONTEXT, "SELECT id FROM t", p) for p in INVALID])
    for prediction, verdict in zip(INVALID, verdicts):
        assert verdict["ref_ok"] and not verdict["valid"] and not verdict["match"], prediction
        assert verdict["error"] and "killed" not in verdict["error"], prediction


@pytest.mark.parametrize("reference, prediction", [
    ("SELECT id FROM t WHERE id > 9", "SELECT a FROM none"),
    ("SELECT NULL", "SELECT x FROM t WHERE id = 3 LIMIT 1"),
    ("SELECT 0", "SELECT 0.0"),
    ("SELECT count(*), max(a) FROM none", "SELECT 0, NULL"),
    ("DELETE FROM t WHERE id > 9", "UPDATE t SET id = id")])
def test_both_empty(reference, prediction):
    verdict = judge(reference, prediction)
    assert verdict["match"] and verdict["ref_empty"] and verdict["both_empty"]


def test_an_error_that_speaks_of_killing_is_no_killed_child():
    (verdict,) = execute_pairs([("", "SELECT 1", "SELECT killed")])
    assert verdict["error"] == "no such column: killed" and verdict["killed"] is False


def test_failing_reference_and_context():
    verdict = judge("SELECT YEAR(x) FROM t", "SELECT 1")
    assert not verdict["ref_ok"] and verdict["valid"] and not verdict["match"]
    assert verdict["error"] == "reference: no such function: YEAR"
    verdict = judge("SELECT 1", "SELECT 1", context="CREATE TABLE t (id INT); INSERT INTO u VALUES (1);")
    assert not verdict["ref_ok"] and not verdict["valid"] and not verdict["match"]
    assert verdict["error"] == "context: no such table: u"


@pytest.mark.parametrize("statement, answer", [
    ("SELECT a FROM t order  /* ; */ by a", True),
    ("SELECT a FROM t UNION SELECT 1 ORDER\nBY 1 LIMIT 3", True),
    ("WITH c AS (SELECT 1 ORDER BY 1) SELECT * FROM c ORDER BY 1", True),
    ("SELECT ')' FROM t ORDER BY a", True),
    ("SELECT \"(\", [)(], `(` FROM t -- (\nORDER BY a", True),
    ("WITH c AS (SELECT 1 ORDER BY 1) SELECT * FROM c", False),
    ("SELECT sum(a) OVER (ORDER BY a) FROM t", False),
    ("SELECT a FROM t WINDOW w AS (PARTITION BY b ORDER BY a)", False),
    ("SELECT a FROM t WHERE b IN (SELECT b FROM u ORDER BY c LIMIT 1)", False),
    ("SELECT 'ORDER BY a' FROM t", False),
    ("SELECT a FROM t -- ORDER BY a", False),
    ("SELECT a FROM t /* ORDER BY a */", False),
    ("SELECT \"order\" by", False)])
def test_is_ordered(statement, answer):
    assert is_ordered(statement) is answer


def test_statements():
    trigger = "CREATE TEMP TRIGGER g DELETE ON t BEGIN DELETE FROM t; SELECT CASE a WHEN 1 THEN 2 END; END;"
    parts = ["SELECT ';' AS \"a;b\";", " -- one; two\nSELECT 2 /* ; */;", trigger, " SELECT [;]"]
    assert sql_statements("".join(parts)) == parts


def test_unfence():
    assert unfence("```SQL\na\n```").strip() == "a" and unfence("```\na```") == "a"
    for kept in ("x```sql\na\n```", "```sql\na\n``` x", "```\na\n```\n```\nb\n```", "SELECT '```'",
                 "```SELECT 1```"):
        assert unfence(kept) == kept


def test_children_side_by_side_keep_the_order():
    rows = [(f"CREATE TABLE t (a INT); INSERT INTO t VALUES ({i})", f"SELECT {i}",
             "SELECT a FROM t WHERE a % 3") for i in range(20)]
    verdicts = sandbox.execute_in_parallel(rows, 3)
    assert [v["match"] for v in verdicts] == [i % 3 > 0 for i in range(20)]
    assert verdicts == execute_pairs(rows)


def test_an_error_of_one_side_leaves_the_other_alone():
    """A view whose table is gone stops only what reads it; so does a table that is too large to compare."""
    context = (CONTEXT + "CREATE VIEW broken AS SELECT * FROM gone; CREATE TABLE big (n INT);"
               "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 20000)"
               "INSERT INTO big SELECT i FROM n;")
    assert judge("SELECT count(*) FROM big", "SELECT count(n) FROM big", context)["match"]
    assert judge("DELETE FROM t WHERE id = 1", "DELETE FROM t WHERE id < 2", context)["match"]
    assert judge("SELECT 1", "SELECT * FROM broken", context)["error"] == "no such table: main.gone"
    large = judge("UPDATE big SET n = 0", "UPDATE big SET n = 0", context)
    assert large["error"] == "reference: result too large"


def test_a_dump_of_sqlite3_is_a_context(tmp_path):
    db = sqlite3.connect(tmp_path / "db")
    db.executescript(CONTEXT + "CREATE TABLE c (a INT REFERENCES t (id));")
    db.execute("INSERT INTO none VALUES (CAST(x'e9' AS TEXT))")
    db.text_factory = lambda text: text.decode("latin-1")
    dump = "PRAGMA foreign_keys=OFF;\n" + "\n".join(db.iterdump()).replace("'\xe9'", "CAST(x'e9' AS TEXT)")
    assert "BEGIN TRANSACTION" in dump and "x'e9'" in dump
    verdict = judge("SELECT id, a FROM t, none", "SELECT t.id, none.a FROM none JOIN t", dump)
    assert verdict["match"] and verdict["ref_ok"] and verdict["error"] is None


def test_what_a_statement_changes_is_noticed():
    insert = "INSERT INTO t VALUES (9, 'z', 0)"                # the very text that the context has run
    assert not judge("SELECT 1", insert + "; SELECT 1", f"{CONTEXT}; {insert}")["match"]
    family = ("PRAGMA foreign_keys=ON; CREATE TABLE p (id INT PRIMARY KEY);"
              "CREATE TABLE c (id INT REFERENCES p (id) ON DELETE CASCADE);"
              "INSERT INTO p VALUES (1), (2); INSERT INTO c VALUES (1), (2);")
    assert judge("DELETE FROM p WHERE id = 1", "DELETE FROM c WHERE id = 1; DELETE FROM p WHERE id = 1",
                 family)["match"]
    assert not judge("DELETE FROM p WHERE id = 1", "PRAGMA foreign_keys=OFF; DELETE FROM p WHERE id = 1",
                     family)["match"]
    view = ("CREATE VIEW v AS SELECT id FROM t;"
            "CREATE TRIGGER g INSTEAD OF INSERT ON v BEGIN DELETE FROM t; END;")
    assert judge("INSERT INTO v VALUES (1)", "DELETE FROM t", CONTEXT + view)["match"]
    assert not judge("INSERT INTO v VALUES (1)", "SELECT 1", CONTEXT + view)["match"]


def test_a_column_may_be_called_like_a_function_that_is_refused():
    assert judge("SELECT edit FROM e", "SELECT e.edit FROM e",
                 "CREATE TABLE e (edit INT); INSERT INTO e VALUES (1)")["match"]


# ---------------------------------------------------------------------------------------- generated databases

SHOP = """CREATE TABLE customer (customer_id INT, name TEXT, city TEXT, age INT);
CREATE TABLE purchase (purchase_id INT, customer_id INT, day TEXT, price REAL, paid BOOL);
INSERT INTO customer VALUES (1, 'Ann', 'Rome', 30), (2, 'Bob', 'Oslo', 41), (3, 'Cy', 'Rome', 50);
INSERT INTO purchase VALUES (10, 1, '2024-01-05', 5.5, 'T'), (11, 3, '2024-02-01', 7.0, 'F'),
    (12, 3, '2024-03-09', 2.5, 'T');"""
DECLARED = (SHOP.replace("customer (customer_id INT", "customer (customer_id INTEGER PRIMARY KEY")
            .replace("purchase_id INT, customer_id INT", "purchase_id INTEGER PRIMARY KEY,"
                     "customer_id INT NOT NULL REFERENCES customer"))
JOIN = "FROM customer AS c JOIN purchase AS p ON c.customer_id = p.customer_id"
WRONG = [       # the reference, and what its own few rows take for the same
    ("SELECT name FROM customer WHERE city = 'Rome' AND age > 41",
     "SELECT name FROM customer WHERE age > 41"),
    ("SELECT name FROM customer WHERE age > 40", "SELECT name FROM customer WHERE age >= 40"),
    ("SELECT name FROM customer WHERE age > 40", "SELECT name FROM customer WHERE age > 39"),
    ("SELECT count(*) FROM customer WHERE age < 40", "SELECT count(*) FROM customer WHERE age < 41"),
    ("SELECT DISTINCT name FROM customer", "SELECT name FROM customer"),
    ("SELECT name FROM customer WHERE city = 'Oslo'", "SELECT name FROM customer WHERE city LIKE '%Oslo%'"),
    ("SELECT name FROM customer WHERE name LIKE 'A%'", "SELECT name FROM customer WHERE name LIKE '%A%'"),
    ("SELECT name FROM customer WHERE city = 'Paris'", "SELECT name FROM customer WHERE city = 'London'"),
    ("SELECT max(age) FROM customer", "SELECT age FROM customer WHERE name = 'Cy'"),
    ("SELECT name FROM customer ORDER BY age", "SELECT name FROM customer ORDER BY name"),
    ("SELECT name FROM customer ORDER BY age DESC LIMIT 1", "SELECT max(name) FROM customer"),
    (f"SELECT c.name {JOIN}", f"SELECT c.name {JOIN} AND p.price < 9"),
    (f"SELECT c.name {JOIN} GROUP BY c.customer_id HAVING count(*) > 1",
     f"SELECT c.name {JOIN} GROUP BY c.customer_id HAVING count(*) = 2"),
    ("SELECT city FROM customer WHERE age > 40 INTERSECT SELECT city FROM customer WHERE age < 40",
     "SELECT city FROM customer WHERE age > 49 INTERSECT SELECT city FROM customer WHERE age < 40"),
    ("SELECT name FROM customer WHERE customer_id NOT IN (SELECT customer_id FROM purchase)",
     "SELECT name FROM customer WHERE customer_id NOT IN (SELECT customer_id FROM purchase WHERE price > 5)"),
    ("SELECT count(*) FROM customer", "SELECT 3"),
    ("SELECT count(age) FROM customer", "SELECT count(*) FROM customer"),
    ("DELETE FROM purchase WHERE price > 6", "DELETE FROM purchase WHERE price >= 6"),
    ("UPDATE customer SET city = 'Paris' WHERE age = 41",
     "UPDATE customer SET city = 'Paris' WHERE name = 'Bob'"),
]
RIGHT = [       # the same on every database that respects the keys
    ("SELECT name FROM customer WHERE age > 40", "SELECT name FROM customer WHERE NOT age <= 40"),
    ("SELECT count(*) FROM purchase", f"SELECT count(*) {JOIN}"),
    ("SELECT count(*) FROM customer", "SELECT count(DISTINCT customer_id) FROM customer"),
    (f"SELECT c.name, count(*) {JOIN} GROUP BY c.customer_id",
     f"SELECT c.name, count(*) {JOIN} GROUP BY p.customer_id"),
    (f"SELECT DISTINCT c.customer_id {JOIN}",
     "SELECT customer_id FROM customer WHERE customer_id IN (SELECT customer_id FROM purchase)"),
    ("SELECT name FROM customer WHERE customer_id NOT IN (SELECT customer_id FROM purchase)",
     "SELECT name FROM customer AS c WHERE NOT EXISTS "
     "(SELECT 1 FROM purchase WHERE customer_id = c.customer_id)"),
    ("SELECT name, age FROM customer ORDER BY age",             # ties come in another order
     "SELECT * FROM (SELECT name, age FROM customer ORDER BY name) ORDER BY age"),
    ("SELECT name FROM customer ORDER BY age DESC LIMIT 1",
     "SELECT name FROM customer WHERE age = (SELECT max(age) FROM customer) LIMIT 1"),
    ("SELECT sum(price) FROM purchase", "SELECT avg(price) * count(price) FROM purchase"),
    ("DELETE FROM purchase WHERE price > 6", "DELETE FROM purchase WHERE NOT price <= 6"),
    ("DROP TABLE purchase", "DELETE FROM purchase; DROP TABLE purchase"),
    ("SELECT random() * 0 + count(*) FROM customer", "SELECT count(*) FROM customer"),
]


@pytest.mark.parametrize("schema", [SHOP, DECLARED], ids=["keys unsaid", "keys declared"])
def test_generated_databases_tell_wrong_from_right(schema):
    wrong, right = ([judge(*pair, schema) for pair in pairs] for pairs in (WRONG, RIGHT))
    assert all(v["match"] for v in wrong + right)               # the row's own database cannot tell
    assert [pair for pair, v in zip(WRONG, wrong) if v["shaken"]] == []
    assert [pair for pair, v in zip(RIGHT, right) if not v["shaken"]] == []


KEYED = """CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, age INTEGER);
INSERT INTO t VALUES (1, 'a', 10), (2, 'b', 20), (3, 'c', 30);"""
PAIRS = """CREATE TABLE p (a INT, b INT, n TEXT, PRIMARY KEY (a, b));
CREATE TABLE c (x INT, y INT, v INT, FOREIGN KEY (x, y) REFERENCES p);
INSERT INTO p VALUES (1, 7, 'q'), (2, 8, 'r'), (1, 8, 's'); INSERT INTO c VALUES (1, 7, 10), (2, 8, 20);"""


@pytest.mark.parametrize("context, reference, prediction", [
    # some drawn rows do not fit: a text for an integer key, a text that is no UTF-8, a key beyond the largest
    (KEYED, "SELECT id, 'x' FROM t WHERE age > 10", "SELECT id, 'x' FROM t WHERE age >= 20"),
    (KEYED, "SELECT count(id) * 0.5 FROM t WHERE age > 10", "SELECT count(id) * 0.5 FROM t WHERE age >= 20"),
    (KEYED + "INSERT INTO t VALUES (7, CAST(x'e9' AS TEXT), 40)", "SELECT id FROM t WHERE age > 10",
     "SELECT id FROM t WHERE age >= 20"),
    (KEYED + "INSERT INTO t VALUES (9223372036854775807, 'z', 40)", "SELECT id FROM t WHERE age > 10",
     "SELECT id FROM t WHERE age >= 20"),
    (PAIRS, "SELECT v FROM c WHERE v > 10", "SELECT v FROM c WHERE v >= 20"),   # a key of two columns, unsaid
    ("CREATE TABLE t (n TEXT, x REAL); INSERT INTO t VALUES ('a', -20), ('b', 5)",
     "SELECT n FROM t WHERE x < -10", "SELECT n FROM t WHERE x <= -10"),
    ("CREATE TABLE t (n TEXT, x INT); INSERT INTO t VALUES ('a', 2000000), ('b', 5)",
     "SELECT n FROM t WHERE x > 1e6", "SELECT n FROM t WHERE x >= 1e6")])
def test_rows_that_do_not_fit_are_left_out_and_the_others_tell(context, reference, prediction):
    verdict = judge(reference, prediction, context)
    assert verdict["match"] and not verdict["shaken"] and verdict["error"] is None


@pytest.mark.parametrize("reference, prediction", [
    ("SELECT name FROM t ORDER BY age DESC LIMIT 1", "SELECT name FROM t ORDER BY age DESC, id DESC LIMIT 1"),
    ("SELECT name FROM t ORDER BY age", "SELECT name FROM t ORDER BY age, name"),
    ("SELECT name FROM t LIMIT 1", "SELECT name FROM t ORDER BY id LIMIT 1")])
def test_a_tie_that_the_order_of_storage_decides_is_not_held_against_a_prediction(reference, prediction):
    verdict = judge(reference, prediction, KEYED)
    assert verdict["match"] and verdict["shaken"]
    wrong = reference.replace("age", "-age").replace("LIMIT 1", "LIMIT 2")
    assert not judge(reference, wrong, KEYED)["shaken"]


def test_generated_columns_and_odd_names():
    context = ("CREATE TABLE g (b INT AS (a * 2) STORED UNIQUE, a INT, c TEXT UNIQUE);"
               "INSERT INTO g (a) VALUES (1)")
    assert judge("SELECT a FROM g", "SELECT g.a FROM g", context)["shaken"]
    assert sandbox.describe(sandbox.Database(context, 10 ** 6))["g"].keys == [False, True]
    context = "CREATE TABLE \xc4 (x INT); CREATE TABLE \xe4 (y TEXT); INSERT INTO \xc4 VALUES (1), (2);"
    verdict = judge("DELETE FROM \xc4 WHERE x = 1", "DELETE FROM \xc4", context)  # SQLite folds ASCII only
    assert verdict["ref_ok"] and not verdict["match"] and not verdict["ref_empty"]


def test_columns_that_a_join_sets_equal_get_values_in_common():
    """No row of the context finds a partner, so that both queries are empty there."""
    context = """CREATE TABLE country (code TEXT, name TEXT); CREATE TABLE speech (land TEXT, language TEXT);
        INSERT INTO country VALUES ('IN', 'India'), ('FR', 'France');
        INSERT INTO speech VALUES ('AF', 'Dari'), ('BR', 'Portuguese'), ('PE', 'Spanish');"""
    join = "SELECT c.name FROM country AS c JOIN speech AS s ON c.code = s.land"
    assert sandbox.joined(join, {"code", "land", "name", "language"}) == [("code", "land")]
    wrong = judge(join + " WHERE s.language = 'Dari'", join, context)
    right = judge(join, "SELECT name FROM speech JOIN country ON land = code", context)
    assert wrong["match"] and wrong["both_empty"] and not wrong["shaken"]
    assert right["match"] and right["shaken"]


def test_generated_rows_respect_the_schema():
    """SQLite's own checks find no key twice, no orphan, no NULL where none may be. The same come again."""
    schema = """CREATE TABLE a (x INT, y TEXT, PRIMARY KEY (x, y));
        CREATE TABLE b (id INTEGER PRIMARY KEY, p INT, q TEXT, up INT REFERENCES B,
            name TEXT NOT NULL UNIQUE, size INT CHECK (size BETWEEN 1 AND 9),
            twice INT GENERATED ALWAYS AS (2 * size),
            FOREIGN KEY (p, q) REFERENCES A (X, Y));
        INSERT INTO a VALUES (1, 'u'), (2, 'v'), (3, 'u');
        INSERT INTO b (id, p, q, up, name, size) VALUES (1, 2, 'v', 1, 'n', 3), (2, 1, 'u', 1, 'm', 4);"""
    query = "SELECT x, id, p, q, up, name, size FROM a, b WHERE size > 4 AND name = 'k' AND p = 7 AND up = 2"
    made = []
    for _ in range(2):
        db = sandbox.Database(schema, 1_000_000)
        made.append(list(sandbox.shakes_of(db, query, query)))
    assert made[0] == made[1] and len(made[0]) == len(sandbox.SHAKES)
    counts = []
    for rows in made[0]:
        db.fill(rows)
        assert db.look("PRAGMA foreign_key_check") == [] and db.look("PRAGMA integrity_check") == [("ok",)]
        counts.append(db.look("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)")[0])
    assert sum(min(pair) > 3 for pair in counts) >= len(counts) - 1


@pytest.mark.parametrize("literal", [
    "'" + "7" * 5000 + "'", "9" * 400, "1e999", "-0.0", "x'00ff'", "''", "'%'", "'\u0661'",
    "9223372036854775807", "'it''s'", '"b; c"', "NULL", "'\U0001f600'"])
def test_every_literal_has_neighbours_or_none(literal):
    verdict = judge(f"SELECT id FROM t WHERE name = {literal}", f"SELECT id FROM t WHERE {literal} = name")
    assert verdict["match"] and verdict["shaken"] and verdict["error"] is None


def test_a_schema_that_takes_no_other_rows_is_judged_by_its_own():
    closed = CONTEXT + "CREATE TRIGGER g BEFORE DELETE ON t BEGIN SELECT RAISE(ABORT, 'closed'); END;"
    verdict = judge("SELECT id FROM t", "SELECT t.id FROM t", closed)
    assert verdict["match"] and verdict["shaken"]


def test_a_prediction_that_hangs_on_more_rows(monkeypatch):
    """It was right on its own rows. That it was killed later is said, and it is not right when shaken."""
    monkeypatch.setitem(sandbox.LIMITS, "seconds", 1)
    hang = f"SELECT CASE WHEN (SELECT count(*) FROM t) < 5 THEN 4 ELSE ({HANG}) END"
    endless = hang.replace(HANG, f"{ENDLESS} SELECT count(*) FROM n")
    first, second, third = execute_pairs([(CONTEXT, "SELECT count(*) FROM t", hang),
                                          (CONTEXT, "SELECT count(*) FROM t", endless), GOOD])
    assert first["match"] and first["killed"] and not first["shaken"] and first["error"] == "timeout"
    assert second["match"] and not second["killed"] and not second["shaken"] and third["shaken"]


# ------------------------------------------------------------------------------------------------ hostile SQL

SECRET = "the-secret-4711"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
DOUBLING = "WITH RECURSIVE n(i) AS (SELECT 'a' UNION ALL SELECT i || i FROM n) "
MILLION = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000) "
VIEWS = "".join(f"CREATE VIEW v{i + 1} AS SELECT x.a FROM v{i} AS x, v{i} AS y;" for i in range(40))
LONG = "printf('%.*c', 5000000, 'a')"
HANG = "SELECT " + "+".join(["instr(zeroblob(9000000), zeroblob(4000000) || x'01')"] * 30)   # long steps

ATTACKS = {     # {file}: a path that must stay absent, {secret}: a file that must not be read
    # the file system
    "attach": "ATTACH DATABASE '{file}' AS f; CREATE TABLE f.x (a); SELECT 1",
    "attach uri": "ATTACH 'file:{file}?mode=rwc' AS f",
    "attach secret": "ATTACH '{secret}' AS f; SELECT * FROM f.sqlite_master",
    "attach memory": "ATTACH ':memory:' AS f",
    "attach in pieces": "SELECT 1; /* ; */ AT/**/TACH '{file}' AS f",
    "attach in comments": "SELECT 1;--\nATTACH/**/'{file}'/**/AS/**/f",
    "attach after comment": "SELECT 1 /*; */; ATTACH '{file}' AS f; /* ",
    "attach after trigger": "SELECT 'CREATE TRIGGER x BEGIN;'; ATTACH '{file}' AS f",
    "attach in fence": "```sql\nATTACH '{file}' AS f\n```",
    "detach": "DETACH main",
    "vacuum": "VACUUM",
    "vacuum into": "VACUUM INTO '{file}'",
    "vacuum main into": "VACUUM main INTO 'file:{file}'",
    "readfile": "SELECT readfile('{secret}')",
    "writefile": "SELECT writefile('{file}', 'x')",
    "edit": "SELECT edit('x', 'sh -c \"touch {file}\"')",
    "load_extension": "SELECT load_extension('{secret}')",
    "load_extension entry": "SELECT load_extension('libc.so.6', 'system')",
    "csv": "CREATE VIRTUAL TABLE temp.c USING csv(filename='{secret}'); SELECT * FROM c",
    "fsdir": "SELECT * FROM fsdir('.')",
    "zipfile": "SELECT * FROM zipfile('{secret}')",
    "fts5": "CREATE VIRTUAL TABLE f USING fts5(a)",
    "rtree": "CREATE VIRTUAL TABLE r USING rtree(id, a, b)",
    "fts3_tokenizer": "SELECT fts3_tokenizer('x', x'4141414141414141')",
    "fts3_tokenizer quoted": "SELECT \"FTS3_Tokenizer\"('simple')",
    "view function": "CREATE VIEW v AS SELECT load_extension('{secret}') AS a; SELECT a FROM v",
    "trigger function": "CREATE TRIGGER g AFTER INSERT ON none BEGIN SELECT load_extension('{secret}'); END;"
                        "INSERT INTO none VALUES (1)",
    "temp store": "PRAGMA temp_store_directory = '.'",
    # the settings and the schema
    "writable_schema": "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'x'",
    "heap limit": "PRAGMA hard_heap_limit = 0",
    "pragma quoted": "PRAGMA main.'journal_mode' = WAL",
    "pragma table": "SELECT * FROM pragma_database_list",
    "pragma explained": "EXPLAIN PRAGMA journal_mode = WAL",
    "pragma in trigger": "CREATE TRIGGER g AFTER INSERT ON t BEGIN PRAGMA writable_schema = 1; END",
    "schema insert": "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (a)')",
    "schema delete": "DELETE FROM sqlite_master",
    "schema drop": "DROP TABLE sqlite_master",
    "schema alter": "ALTER TABLE sqlite_master RENAME TO x",
    "schema shadow": "CREATE TEMP TABLE sqlite_temp_master (a)",
    # time
    "endless": ENDLESS + "SELECT count(*) FROM n",
    "endless rows": ENDLESS + "SELECT i FROM n",
    "endless insert": ENDLESS + "INSERT INTO t (id) SELECT i FROM n",
    "endless view": "CREATE VIEW v AS " + ENDLESS + "SELECT count(*) AS a FROM n",      # met when we look
    "cartesian": MILLION + "SELECT count(*) FROM n a, n b, n c",
    "cartesian rows": MILLION + "SELECT * FROM n a, n b",
    "trigger loop": "CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t SELECT a.* FROM t a, t b; END;"
                    "INSERT INTO t SELECT * FROM t",
    "like": f"SELECT {LONG} LIKE '%' || printf('%.*c', 40000, 'a') || 'b'",
    "glob": f"SELECT {LONG} GLOB '*' || printf('%.*c', 40000, 'a') || 'b'",
    "long like": "SELECT 'a' LIKE printf('%.*c', 60000, '%')",
    "instr": HANG,
    "sort": MILLION + "SELECT count(*) FROM (SELECT hex(randomblob(99)) h FROM n ORDER BY h)",
    "doubling views": "CREATE VIEW v0 AS SELECT 1 AS a;" + VIEWS + "SELECT * FROM v40",
    "semicolons": ";" * 300_000,
    "open trigger": "CREATE TRIGGER g BEGIN " + ";" * 100_000,
    # memory and size
    "randomblob": "SELECT randomblob(1000000000)",
    "zeroblob": "SELECT zeroblob(999999999)",
    "hex": "SELECT length(hex(zeroblob(500000000)))",
    "printf": "SELECT printf('%.*c', 1000000000, 'x')",
    "printf width": "SELECT printf('%1000000000d', 1)",
    "group_concat": MILLION + "SELECT group_concat(hex(zeroblob(9999))) FROM n",
    "replace": "SELECT " + "replace(" * 12 + "'a'" + ", 'a', 'aaaaaaaaaa')" * 12,
    "concat": DOUBLING + "SELECT length(i) FROM n",
    "json group": MILLION + "SELECT length(json_group_array(hex(zeroblob(99)))) FROM n",
    "json depth": "SELECT json('" + "[" * 100_000 + "]" * 100_000 + "')",
    "json tree": "WITH j(a) AS (SELECT '[" + ",".join(["[1,2,3]"] * 2000) + "]') "
                 "SELECT count(*) FROM j, json_tree(j.a) a, json_tree(j.a) b",
    "many rows": MILLION.replace("1000000", "10001") + "SELECT i FROM n",
    "big rows": MILLION + "SELECT zeroblob(1000) FROM n",
    "big table": "CREATE TABLE w AS SELECT " + ",".join(f"zeroblob(900000) AS c{i}" for i in range(90)),
    "columns": "SELECT " + ",".join(["1"] * 3000),
    "10 MB string": "SELECT '" + "x" * 10_000_000 + "'",
    "10 MB open string": "SELECT '" + "x" * 10_000_000,
    "open parentheses": "SELECT " + "(" * 1_000_000,
    "not": "SELECT " + "NOT " * 100_000 + "1",
    "minus": "SELECT " + "- " * 100_000 + "1",
    "sum": "SELECT 1" + "+1" * 100_000,
    "subqueries": "SELECT " + "(SELECT " * 3000 + "1" + ")" * 3000,
    "unions": "SELECT 1" + " UNION SELECT 1" * 3000,
    "joins": "SELECT 1 FROM t t0" + "".join(f", t t{i}" for i in range(1, 100)),
    "cases": "SELECT " + "CASE WHEN 1 THEN " * 3000 + "1" + " END" * 3000,
    "quine": "WITH q(a) AS (SELECT replace(replace('x', 'x', a), 'y', a) FROM q) SELECT * FROM q",
    "nul": "SELECT 1\0; ATTACH '{file}' AS f",
    "surrogate": "SELECT '\udc80'; ATTACH '{file}' AS f",
}
HARMLESS = {    # these run, but reach nothing beyond their own database
    "analyze": "ANALYZE; REINDEX; SELECT 1",
    "savepoint": "SAVEPOINT a; DELETE FROM t",
    "transaction": "BEGIN EXCLUSIVE; DELETE FROM t",
    "drop": "DROP TABLE t; DROP TABLE none",
    "schema": "SELECT * FROM sqlite_master",
    "10 MB string": "SELECT length('" + "x" * 10_000_000 + "')",
    "10 MB name": f"SELECT 1 AS \"{'x' * 10_000_000}\"",
    "recursive trigger": "CREATE TRIGGER g AFTER UPDATE ON t BEGIN UPDATE t SET id = id + 1; END;"
                         "UPDATE t SET id = 1",
}
EITHER = {      # these run or not, as SQLite's version has it
    "json array": "SELECT " + "json_array(" * 900 + "1" + ")" * 900,
    "parentheses": "SELECT " + "(" * 10_000 + "1" + ")" * 10_000,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a secret, and lower limits for the child."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "LIMITS", {"seconds": 1, "steps": 2_000_000})
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path


def run_attacks(attacks, here):
    """Each attack, a good row after it -> {name: verdict}. The reference is what a leak would return."""
    starts = []

    def rows():
        for text in attacks.values():
            starts.append(time.monotonic())
            text = text.replace("{file}", str(here / "made")).replace("{secret}", str(here / "secret"))
            yield CONTEXT, f"SELECT '{SECRET}'", text
            yield GOOD

    verdicts = execute_pairs(rows())
    assert len(verdicts) == 2 * len(attacks)
    for name, attack, after in zip(attacks, verdicts[::2], verdicts[1::2]):
        assert after["match"], f"the row after {name}: {after}"
        assert attack["ref_ok"] and not attack["match"], f"{name}: {attack}"
        assert SECRET not in str(attack["error"])
    assert all(b - a < 60 for a, b in zip(starts, starts[1:] + [time.monotonic()]))     # the limit is 1
    assert os.listdir(here) == ["secret"] and (here / "secret").read_text() == SECRET
    return dict(zip(attacks, verdicts[::2]))


def test_attacks(here):
    verdicts = run_attacks(ATTACKS, here)
    assert not [name for name, verdict in verdicts.items() if verdict["valid"] or not verdict["error"]]
    assert not [name for name, verdict in verdicts.items() if "killed" in verdict["error"]]
    for name in "attach", "detach", "pragma table", "csv", "fts5", "rtree":
        assert verdicts[name]["error"] == "not authorized", name
    for name in "load_extension", "fts3_tokenizer", "fts3_tokenizer quoted", "trigger function":
        assert "not authorized to use function" in verdicts[name]["error"], name


def test_harmless(here):
    run_attacks(EITHER, here)
    verdicts = run_attacks(HARMLESS, here)
    assert not [name for name, verdict in verdicts.items() if not verdict["valid"]]


def test_hostile_context_and_reference(here):
    verdicts = execute_pairs([
        ("ATTACH 'made' AS f", "SELECT 1", "SELECT 1"), ("", "VACUUM INTO 'made'", "SELECT 1"),
        ("", ENDLESS + "SELECT count(*) FROM n", "SELECT 1"), GOOD])
    assert [v["ref_ok"] for v in verdicts] == [False, False, False, True] and verdicts[3]["match"]
    assert verdicts[0]["error"] == "context: not authorized"
    assert verdicts[2]["error"] == "reference: step limit"
    assert os.listdir(here) == ["secret"]


def test_no_file_opens_even_without_the_authorizer(here, monkeypatch, tmp_path_factory):
    source = Path(sandbox.PROGRAM).read_text()
    gate = "        if refused:\n            return sqlite3.SQLITE_DENY\n"
    assert source.count(gate) == 1
    open_gate = tmp_path_factory.mktemp("changed") / "sandbox.py"
    open_gate.write_text(source.replace(gate, ""))
    monkeypatch.setattr(sandbox, "PROGRAM", str(open_gate))
    tries = ["ATTACH ':memory:' AS f; SELECT 1",                                # so the gate is open
             "ATTACH 'made' AS f; CREATE TABLE f.x (a); SELECT 1", "VACUUM INTO 'made'",
             "ATTACH 'secret' AS f; SELECT count(*) FROM f.sqlite_master"]
    verdicts = execute_pairs([("", "SELECT 1", text) for text in tries])
    assert [v["valid"] for v in verdicts] == [True, False, False, False]
    assert all("unable to open" in v["error"] for v in verdicts[1:]) and os.listdir(here) == ["secret"]


# ------------------------------------------------------------------------------------------ a child that dies

def kill_first_child(monkeypatch, seconds):
    start, children = sandbox.start_sql_child, []

    def start_and_kill():
        children.append(start())
        if len(children) == 1:
            threading.Timer(seconds, children[0].kill).start()
        return children[-1]

    monkeypatch.setattr(sandbox, "start_sql_child", start_and_kill)
    return children


def test_killed_in_the_prediction(monkeypatch):
    children = kill_first_child(monkeypatch, 1)
    first, second, third = execute_pairs([GOOD, (CONTEXT, "SELECT id FROM t WHERE 0", HANG), GOOD])
    assert second == {"ref_ok": True, "valid": False, "match": False, "shaken": False, "ref_empty": True,
                      "both_empty": False, "killed": True, "error": f"worker killed ({-signal.SIGKILL})"}
    assert first["match"] and third["match"] and len(children) == 2


def test_killed_in_the_reference(monkeypatch):
    kill_first_child(monkeypatch, 1)
    first, second = execute_pairs([("", HANG, "SELECT 1"), GOOD])
    assert first["error"] == f"reference: worker killed ({-signal.SIGKILL})" and second["match"]
    assert not first["ref_ok"] and not first["valid"] and not first["match"]


def test_killed_between_rows(monkeypatch):
    children = kill_first_child(monkeypatch, 0)

    def rows():
        children[0].wait()
        yield CONTEXT, "SELECT 1", "SELECT 1" + " " * 1_000_000                 # more than a pipe holds
        yield GOOD

    first, second = execute_pairs(rows())
    assert "worker killed" in first["error"] and second["match"]


def test_timeout(monkeypatch):
    monkeypatch.setitem(sandbox.LIMITS, "seconds", 1)
    first, second, third = execute_pairs([(CONTEXT, "SELECT 1", HANG), ("", HANG, "SELECT 1"), GOOD])
    assert first["error"] == "timeout" and first["ref_ok"] and not first["valid"]
    assert second["error"] == "reference: timeout" and not second["ref_ok"] and third["match"]
    assert first["killed"] and second["killed"] and not third["killed"]


def test_the_time_limit_holds_where_a_parent_has_blocked_its_signal(monkeypatch):
    monkeypatch.setitem(sandbox.LIMITS, "seconds", 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        (verdict,) = execute_pairs([(CONTEXT, "SELECT 1", HANG)])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    assert verdict["error"] == "timeout"


def test_ctrl_c_waits_for_no_query(tmp_path):
    """Two children have 40 queries of ten seconds each before them."""
    script = (f"import signal, sys; sys.path.insert(0, {str(Path(sandbox.PROGRAM).parents[1])!r})\n"
              f"signal.signal(signal.SIGINT, signal.default_int_handler)\n"      # a shell's & ignores it
              f"from lib import sandbox\nprint('begun', flush=True)\n"
              f"sandbox.execute_in_parallel([('', {HANG!r}, 'SELECT 1')] * 80, 2)\n")
    run = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b"begun\n"
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=8)                         # less than the first query takes
    assert run.returncode == -signal.SIGINT and err.strip().endswith(b"KeyboardInterrupt")


def test_a_child_that_is_found_too_late_gets_no_query():
    """Ctrl-C has cleared the rows, but the one that the loop has in its hands, and found no child to kill."""
    rows = [("", HANG, "SELECT 1")]

    class Late(list):
        def __setitem__(self, *args):
            rows.clear()
            super().__setitem__(*args)
    late = Late()
    assert execute_pairs(rows, late) == [] and late[0].returncode == 0


def test_a_child_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "sandbox.py").write_text("raise SystemExit('no')")
    monkeypatch.setattr(sandbox, "PROGRAM", str(tmp_path / "sandbox.py"))
    with pytest.raises(RuntimeError, match="did not start"):
        execute_pairs([GOOD])


def test_script_without_main_guard_in_another_directory(tmp_path):
    """The program that the child runs is found from anywhere, and what calls it is not run again."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(sandbox.PROGRAM).parents[1])!r})\n"
                      "from lib.sandbox import execute_pairs\n"
                      "print('once', execute_pairs([('', 'SELECT 1', 'SELECT 1')])[0]['match'])\n")
    run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.stdout == "once True\n" and run.stderr == ""


def test_the_program_needs_the_standard_library_only():
    """No site-packages, no working directory on the path: an import of anything else would fail."""
    assert sandbox.PROGRAM == str(Path(sandbox.__file__).resolve())
    command = [sys.executable, "-I", "-S", sandbox.PROGRAM, json.dumps(sandbox.LIMITS)]
    row = json.dumps(GOOD) + "\n"
    run = subprocess.run(command, cwd="/", input=row, capture_output=True, text=True, timeout=60)
    ready, part, own, whole = run.stdout.splitlines()
    assert ready == "ready" and run.stderr == ""
    assert json.loads(part)["ref_ok"] and json.loads(own)["match"] and json.loads(whole)["shaken"]


def test_the_limits_are_those_of_the_child(monkeypatch):
    """A query of about a million steps: within the usual limit, beyond a lower one."""
    row = "", MILLION + "SELECT count(*) FROM n", MILLION + "SELECT count(i) FROM n"
    assert execute_pairs([row])[0]["match"]
    monkeypatch.setitem(sandbox.LIMITS, "steps", 100_000)
    assert execute_pairs([row])[0]["error"] == "reference: step limit"
