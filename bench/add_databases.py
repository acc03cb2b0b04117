"""Give text-to-SQL rows the full database that each is about, so that evaluation also runs queries there.

    python bench/add_databases.py ROWS DATABASES OUT.jsonl

ROWS have a `db_id`. DATABASES has one a line: db_id and tables, each with name, create (its CREATE TABLE) and
rows. A row whose database is not among them goes out as it came in. (What a model is asked stays the same:
its prompt shows `sql_context`, the small one.)
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import read_rows  # noqa: E402


def literal(value):
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else repr(value)


def script(tables):
    """The statements that make and fill the tables."""
    out = []
    for table in tables:
        out.append(table["create"].rstrip("; \n") + ";")
        rows = [f"({', '.join(map(literal, row))})" for row in table["rows"]]
        out += [f'INSERT INTO "{table["name"]}" VALUES {", ".join(rows[i:i + 400])};'
                for i in range(0, len(rows), 400)]
    return "\n".join(out)


if __name__ == "__main__":
    rows, databases, out = sys.argv[1:]
    scripts = {d["db_id"]: script(d["tables"]) for _, d in read_rows(databases)}
    with open(out, "w") as f:
        for _, row in read_rows(rows):
            if row["db_id"] in scripts:
                row["sql_database"] = scripts[row["db_id"]]
            print(json.dumps(row), file=f)
