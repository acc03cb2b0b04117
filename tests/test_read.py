"""lib/read.py: whatever a file holds, it is read, or refused by one line within bounded memory."""
import gzip
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import train
from lib import read
from lib.read import naming, parse_json, read_json, read_rows, tensor_names
from model import Transformer

ROOT = Path(__file__).parents[1]
TOY = ROOT / "toy"
DEEP = "[" * 100_000 + "]" * 100_000


def refusal(*argv):
    with pytest.raises(SystemExit) as e:
        train.main(list(map(str, argv)))
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value) and len(str(e.value)) < 2000
    return str(e.value)


HOSTILE = {"deep": DEEP, "deep inside": f'{{"a": {DEEP}}}', "open": f'{{"a": {DEEP[:100_000]}', "empty": "",
           "nul": "\x00", "null": "null", "string": '"a"', "twice": '{"vocab_size": 1, "vocab_size": 2}',
           "bom": "\ufeff[", "quotes": "{'a': 1}"}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json", "model.safetensors.index.json"])
def test_a_json_file_of_a_model_that_is_none_is_named(name, content, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TOY, model)
    (model / name).write_text(content)
    if "index" in name:
        (model / "model.safetensors").unlink()
    assert str(model / name) in refusal("--model", model, "--data", "toy", "--eval-data", "toy", "--limit", 4,
                                        "--out", tmp_path / "run", "--device", "cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, place", [("a.jsonl", "a.jsonl line 2"), ("a.json", "a.json"),
                                         ("a.jsonl.gz", "a.jsonl.gz line 2")])
def test_rows_nested_too_deep_are_named(name, place, tmp_path):
    text = f"[{DEEP}]" if name == "a.json" else f'{{"a": 1}}\n{DEEP}\n'
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.raises(ValueError, match=f"{tmp_path}/{place} cannot be read: "):
        read_rows(tmp_path / name)


def test_a_parquet_is_not_gzipped(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(ValueError, match="rows are read from .json, .jsonl .both also .gz. and .parquet"):
        read_rows(tmp_path / "a.parquet.gz")


def test_nesting_that_people_use_is_read():
    value = {"a": [[{"b": [1, {"c": None}]}], "x"]}
    assert parse_json(json.dumps(value)) == value
    nested = "[" * read.MAX_DEPTH + "]" * read.MAX_DEPTH
    assert parse_json(nested) == json.loads(nested)
    with pytest.raises(ValueError, match=f"nested more than {read.MAX_DEPTH} deep"):
        parse_json(f"[{nested}]")


def bomb(path, n):
    """n bytes that take a thousandth on the disk."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb") as f:
            for _ in range(n // 10 ** 6):
                f.write(b'{"a": 1}' + b" " * (10 ** 6 - 9) + b"\n")
    else:
        column = pyarrow.DictionaryArray.from_arrays([0] * (n // 10 ** 4), ["x" * 10 ** 4])
        pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    assert path.stat().st_size < n / 100


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.parquet"])
def test_a_file_that_unpacks_to_more_than_the_bound_takes_little_memory(name, tmp_path, monkeypatch):
    path = tmp_path / name
    bomb(path, 3 * 10 ** 8)
    monkeypatch.setattr(read, "MAX_ROWS", 10 ** 7)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{path} cannot be read: more than 10,000,000 bytes unpacked"):
            read_rows(path)
        assert tracemalloc.get_traced_memory()[1] < 5 * 10 ** 7
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(read, "MAX_ROWS", 10 ** 9)
    assert len(read_rows(path)) == (300 if path.suffix == ".gz" else 30_000)


def test_a_json_file_too_large_to_be_one_is_not_opened(tmp_path):
    with open(tmp_path / "config.json", "wb") as f:
        f.truncate(2 ** 40)                                     # a hole: no byte of it is on the disk
    with pytest.raises(ValueError, match="config.json: larger than"):
        read_json(tmp_path / "config.json")


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize("error, text", [
    (MemoryError(), "f: MemoryError"), (RecursionError("too deep"), "f: too deep"), (Panic("a\nb"), "f: a b"),
    (KeyError("x"), "f: no 'x'"), (ValueError("y" * 5000), "f: " + "y" * 1000 + " ...")])
def test_what_goes_wrong_in_a_parser_becomes_one_line(error, text):
    with pytest.raises(ValueError) as e, naming("f"):
        raise error
    assert str(e.value) == text and e.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, FileNotFoundError])
def test_what_is_no_fault_of_the_file_passes(error):
    with pytest.raises(error), naming("f"):
        raise error


def safetensors(header, data=b"\0" * 16):
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = '"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'


@pytest.mark.parametrize("content, message", [
    (safetensors(f"{{{TENSOR}, {TENSOR}}}"), "'w' stands twice"), (safetensors(DEEP), "nested|recursion"),
    (struct.pack("<Q", 2 ** 63) + b"{}", "its header would have 9,223,372,036,854,775,808 bytes"),
    (safetensors(f"{{{TENSOR}")[:-20], "."), (b"", ".")])
def test_a_header_of_weights_that_is_none_is_named(content, message, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"w.safetensors is not a whole safetensors file: .*({message})"):
        tensor_names(tmp_path / "w.safetensors")


def test_one_tensor_in_two_files_is_refused(tmp_path):
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "a.safetensors")
    shutil.copy(tmp_path / "m" / "a.safetensors", tmp_path / "m" / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "x": "b.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="stands in two files"):
        Transformer.from_pretrained(tmp_path / "m")


def test_malformed_inputs_of_every_kind_are_refused_by_one_line_or_run(tmp_path):
    """A few of each; bench/fuzz.py makes thousands."""
    command = [sys.executable, ROOT / "bench" / "fuzz.py", "--n", "8", "--seed", "1"]
    run = subprocess.run([*command, "--keep", tmp_path / "kept"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    kinds = [line.partition(":")[0] for line in run.stdout.splitlines()]
    assert kinds == ["config", "tokenizer", "weights", "rows", "checkpoint"]
    assert not (tmp_path / "kept").exists()
