"""lib/ahead.py: what its processes compile is what the step wants."""
import json
import os
import subprocess
import sys

import pytest
import torch

import data
import train
from lib import ahead
from lib.rows import read_data
from model import Transformer, read_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WHOLE_STEP = """
import argparse, json, sys, torch
from lib import ahead
from model import Config
work = json.load(sys.stdin)
ahead.with_few_blocks = lambda config: config
everything = sum(ahead.SHARES, ())
a = argparse.Namespace(**work["flags"])
ahead.compile_share(a, Config.from_dict(work["config"]), work["lengths"], everything)
print(json.dumps(torch._dynamo.utils.counters["inductor"]))
"""


def compiled_by_a_step(config, examples, a):
    """-> Inductor's counters of another process that does a step with all blocks"""
    lengths = [(len(e.ids), len(e.targets())) for e in examples]
    work = json.dumps(dict(flags=vars(a), config=config.raw, lengths=lengths))
    done = subprocess.run([sys.executable, "-c", WHOLE_STEP], input=work, text=True, capture_output=True,
                          cwd=os.path.dirname(train.__file__))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method, device", [
    ("fft", "cpu"), pytest.param("molf", "cuda", marks=needs_gpu), pytest.param("lora", "cuda", marks=needs_gpu)])
def test_a_step_finds_all_that_it_compiles(method, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    a = train.parse_args(["--task", "med", "--method", method, "--limit", "64", "--eval-limit", "2",
                          "--epochs", "1", "--device", device, "--out", "unused"])
    config, rows = read_config("toy"), read_data(a, data.Tokenizer.from_file("toy"))
    capsys.readouterr()
    ahead.finish(ahead.processes_for(config, rows.examples, a))
    assert capsys.readouterr().out == ""
    counters = compiled_by_a_step(config, rows.examples, a)
    assert counters["fxgraph_cache_hit"] > 2 and counters.get("fxgraph_cache_miss", 0) == 0


def test_a_process_that_fails_is_named(tmp_path, monkeypatch, capsys):
    a = train.parse_args(["--task", "med", "--out", "unused"])
    a.method = a.ranks = None
    ahead.finish(ahead.processes_for(read_config("toy"), [], a))
    out = capsys.readouterr().out
    assert out.count("compiling ahead failed") == len(ahead.SHARES) and "Error" in out


def test_it_does_not_start_where_nothing_is_compiled():
    a = train.parse_args(["--task", "med", "--out", "unused"])
    assert ahead.start(read_config("toy"), None, a) == []


def test_few_blocks_are_one_of_each_kind():
    config = read_config("toy")
    few = ahead.with_few_blocks(config)
    assert sorted(few.layer_types) == sorted(set(config.layer_types))
    assert len(Transformer(few).model["layers"]) == len(few.layer_types) < config.num_hidden_layers
