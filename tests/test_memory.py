"""What lib/memory.py reckons, against what PyTorch saves, allocates and keeps."""
import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.library import _scoped_library
from torch.nn.attention.varlen import varlen_attn

import data
import lib.fast
import train
from lib import memory, parallel, report
from lib.memory import estimate_bytes
from model import GQA, Block, Config, Packed, Transformer, add_experts, cross_entropy, fold, unfold
from molf import MoLFAdamW, param_groups

ROOT = Path(__file__).parents[1]
QWEN = dict(model_type="qwen2", vocab_size=64, hidden_size=160, intermediate_size=448, num_hidden_layers=6,
            num_attention_heads=6, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
GEMMA = QWEN | dict(model_type="gemma3_text", sliding_window=64)
METHODS = {
    "fft": dict(ranks=()),
    "molf": dict(ranks=(16,)),
    "lora": dict(ranks=(16,), full=False),
    "lora, the rest trains": dict(ranks=(16,), full=False, train_rest=True),
    "molf-e": dict(ranks=(8, 16), full=False),
    "molf with dropout": dict(ranks=(16,), dropout=0.1),
    "lora with dropout": dict(ranks=(16,), full=False, dropout=0.1)}
N = 1024


def small(raw, method, dtype=torch.bfloat16):
    model = Transformer(Config.from_dict(raw)).to(dtype)
    add_experts(model, **METHODS[method])
    return model.train()


class OnAGPU(Packed):
    """A layout that attends as on a GPU. In the tests its kernel gives zeros; what it saves is PyTorch's."""

    def attend(self, q, k, v, layer):
        back = layer.window - 1 if layer.window else -1
        return varlen_attn(q, k, v, self.cu_seqlens, self.cu_seqlens, self.max_len, self.max_len,
                           scale=layer.scale, window_size=(back, 0), **GQA)


@pytest.fixture
def attention_on_a_cpu():
    def zeros(q, k, v, *_):
        rng_state = torch.zeros(2, dtype=torch.uint64)
        return torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[1], len(q)), rng_state
    with _scoped_library("torch_attn", "IMPL") as kernels:
        kernels.impl("_varlen_attn", zeros, "CPU")
        yield


@pytest.fixture
def compiler():
    lib.fast.configure_compiler()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def saved_bytes(model, forward):
    """Of the distinct storages that autograd saves of the first block, without parameters and the layout."""
    block = model.model["layers"][0]
    layout = OnAGPU([N // 2, N // 2])
    tables = model.rope(layout.pos, block.self_attn.q_proj.weight.dtype)[model.config.layer_types[0]]
    x = torch.randn(N, model.config.hidden_size, dtype=tables[0].dtype, requires_grad=True)
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *tables, layout.cu_seqlens)}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in others:
            saved[storage.data_ptr()] = storage         # (alive, so that no other gets its place)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(block, x, tables, layout)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def reckoned(model, fast):
    model.model["layers"] = model.model["layers"][:1]
    return memory.activation_bytes(model, N, fast)


@pytest.mark.parametrize("family", [QWEN, GEMMA], ids=["qwen", "gemma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_an_eager_block_saves_is_reckoned(family, dtype, attention_on_a_cpu):
    for method in METHODS:
        if "dropout" not in method:         # whose masks have a byte a number on a GPU alone
            model = small(family, method, dtype)
            want = saved_bytes(model, Block.forward)
            assert reckoned(model, fast=False) == pytest.approx(want, rel=0.02), method


@pytest.mark.parametrize("family, method", [
    (QWEN, "molf"), (QWEN, "lora"), (QWEN, "lora with dropout"), (GEMMA, "molf"), (GEMMA, "molf-e"),
    (GEMMA, "molf with dropout")], ids=lambda x: x if isinstance(x, str) else x["model_type"])
def test_what_a_compiled_block_saves_is_reckoned(family, method, attention_on_a_cpu, compiler):
    model = small(family, method)
    want = saved_bytes(model, torch.compile(Block.forward, dynamic=True))
    assert reckoned(model, fast=True) == pytest.approx(want, rel=0.02)


def allocated(f, tmp_path):
    """-> what f() leaves allocated on the CPU, and the most that it had on the way"""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = f()                          # noqa: F841
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    now = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return now, most


def test_with_checkpointing_each_block_keeps_its_input(tmp_path):
    model = small(QWEN, "molf")
    model.checkpointing = True
    ids, layout = torch.zeros(N, dtype=torch.long), Packed([N])
    now, _ = allocated(lambda: model.hidden(ids, layout, torch.tensor([5])), tmp_path)
    whole = memory.activation_bytes(model, N, fast=False)
    block = N * memory.saved_by_block(model.model["layers"][0], model.config, fast=False)
    assert whole - block == pytest.approx(now, rel=0.1)


@pytest.mark.parametrize("fast", [False, True])
def test_what_the_loss_holds_is_reckoned(fast, tmp_path, compiler):
    model = small(QWEN | dict(vocab_size=8000), "molf")
    x = torch.randn(512, 160, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(512, dtype=torch.long)
    loss = torch.compile(cross_entropy, dynamic=True) if fast else cross_entropy
    loss(model.head, x, labels).backward()
    model.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):    # on some CPUs its bf16 products pack the weights
        _, most = allocated(lambda: loss(model.head, x, labels).backward(), tmp_path)
    assert memory.logit_bytes(model, 512, fast) == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("fast", [False, True])
def test_what_a_step_of_the_optimizer_needs_is_reckoned(fast, tmp_path, compiler):
    """Its largest parameter is the embedding; compiled it is one layer's, on one stream of the four."""
    sizes = dict(vocab_size=9000, hidden_size=320, intermediate_size=1600, num_hidden_layers=1)
    model = small(QWEN | sizes, "molf")
    optimizer = MoLFAdamW(param_groups(model))
    ok, clip = torch.tensor(True), torch.tensor(1.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p, dtype=torch.bfloat16)

    def step():
        optimizer.step(clip=clip, ok=ok)
        fold(model)
    with lib.fast.replaced(lib.fast.fast_parts(cuda=False) if fast else {}):
        step()
        _, most = allocated(step, tmp_path)
    streams = lib.fast.STREAMS if fast else 1
    assert memory.step_bytes(model, fast, 1) / streams == pytest.approx(most, rel=0.15)


def test_bytes_of_a_run_are_counted_as_they_are():
    """Weights, gradients and moments of the estimate against the tensors of a real step."""
    tokenizer = data.Tokenizer.from_file(ROOT / "toy")
    rows, _ = data.load_rows("fact", "train", "toy", limit=8)
    examples = [data.encode(tokenizer, *data.fact_pair(r), row=i) for i, r in enumerate(rows)]
    a = train.parse_args(["--device", "cpu"])
    for options in (dict(ranks=(4,)), dict(ranks=(4,), full=False), dict(ranks=()),
                    dict(ranks=(4,), dropout=0.1), dict(ranks=(4,), full=False, train_rest=True)):
        for dtype in ("float32", "bfloat16"):
            model = Transformer.from_pretrained("toy", getattr(torch, dtype))
            add_experts(model, **options)
            optimizer = MoLFAdamW(param_groups(model))
            model.loss(*data.to_device(examples, "cpu")).backward()
            unfold(model)
            size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)   # noqa: E731
            want = {"weights": size(model.parameters()),
                    "gradients": size(p.grad for p in model.parameters() if p.grad is not None),
                    "moments and masters": size(t for s in optimizer.state.values() for t in s.values())}
            got = estimate_bytes(model, a, 100)
            assert {k: got[k] for k in want} == want
            optimizer.step()
            fold(model)


RANK = """import json, sys, torch
import data
from lib import parallel, ranks
from model import Transformer, add_experts, unfold
from molf import MoLFAdamW, param_groups
options, parallel.SMALL_BYTES = json.loads(sys.argv[1])
with ranks.processes():
    model = Transformer.from_pretrained("toy", torch.bfloat16, "meta")
    add_experts(model, **options)
    optimizer = MoLFAdamW(parallel.distribute(model, param_groups(model), "cpu"))
    size = lambda tensors: sum(t.nbytes for t in tensors)
    held = [parallel.local(p) for p in model.parameters()] + list(parallel.owned(model).parameters())
    weights = size({p.data_ptr(): p for p in held}.values())
    state = size(t for s in optimizer.state.values() for t in s.values())
    model.loss(*data.to_device([data.Example([1, 2, 3], 1, 0)], "cpu")).backward()
    rows = size(p.grad.to_local() for p in model.parameters() if p.grad is not None)
    unfold(parallel.pull(model))
    whole = size(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
    print(json.dumps([weights, max(rows, whole), state]), file=sys.stderr)
"""


@pytest.mark.parametrize("n, options, small", [
    (2, dict(ranks=(4,)), 0), (3, dict(ranks=(4,)), 1e9), (2, dict(ranks=(4, 8), full=False), 0),
    (2, dict(ranks=(4, 8), full=False), 1e9)])
def test_bytes_of_a_rank_are_counted_as_they_are(n, options, small, monkeypatch):
    monkeypatch.setattr(parallel, "SMALL_BYTES", small)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, json.dumps([options, small])]
    children = [subprocess.Popen(command, text=True, cwd=ROOT, stderr=subprocess.PIPE,
                                 env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(n)]
    said = [child.communicate(timeout=120)[1] for child in children]
    assert [child.returncode for child in children] == [0] * n, said
    want = max((json.loads(text.strip().splitlines()[-1]) for text in said), key=sum)
    model = Transformer.from_pretrained("toy", torch.bfloat16)
    add_experts(model, **options)
    got = estimate_bytes(model, argparse.Namespace(device="cpu", eager=False), 100, n)
    got = [got[kind] for kind in ("weights", "gradients", "moments and masters")]
    assert got == pytest.approx(want, rel=0.01)
    assert got[0] == want[0] and got[2] == want[2]


def test_the_peak_of_several_gpus_by_hand():
    """Three small blocks on three ranks, bf16, compiled: all sums are written out."""
    raw = dict(model_type="qwen2", vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
               num_attention_heads=2, num_key_value_heads=1, attention_bias=False, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Transformer(Config.from_dict(raw)).to(torch.bfloat16)
        add_experts(model, ranks=(2,))
    got = estimate_bytes(model, argparse.Namespace(device="cuda", eager=False), 1000, 3)
    # q, o: 8 x 8; k, v: 4 x 8; gate, up: 16 x 8; down: 8 x 16. A rank owns as many of each as a block has.
    linears = 2 * 64 + 2 * 32 + 3 * 128
    lora = 2 * (2 * (8 + 8) + 2 * (4 + 8) + 3 * (16 + 8))
    norms = 2 * 8
    root = 30 * 8 + 8 + 30 * 8
    row_numbers = 3 * (2 * 3 * 8 + 2 * 2 * 8 + 2 * 6 * 8 + 3 * 16)      # 3, 2, 6, 3 of 8, 4, 16, 8 rows
    rest = 3 * 2 * 3 + 2 * 10 * 8 + 3                                   # norms, embedding, head, last norm
    want = {"weights": 2 * linears + 4 * linears + 2 * lora + 2 * (row_numbers + rest),
            "gradients": 2 * linears + 2 * lora + 2 * rest,
            "moments and masters": 8 * linears + 12 * lora + 12 * rest,
            "activations (estimate)": 3 * 1000 * (2 * (4 * 8 + 2 * 8 + 2 * 4 + 3 * 16) + 4 * (2 + 2)),
            "logits (estimate)": 2 * 1000 * 30 + 2 * 30 * 8,
            "gathered (estimate)": 4 * root + 3 * (2 + 2 + 2 + 4) * (linears + norms),      # one unit
            "backward's end (estimate)": (2 + 2 + 4) * root,
            "step (estimate)": max(2 * 2 * row_numbers, 4 * 2 * 128)}
    begin = want["activations (estimate)"] + want["logits (estimate)"] + want["gathered (estimate)"]
    kept = want["weights"] + want["gradients"] + want["moments and masters"]
    assert got == want | {"peak (estimate)": kept + begin}
    few = estimate_bytes(model, argparse.Namespace(device="cuda", eager=False), 0, 3)
    assert few["peak (estimate)"] == kept + max(want["step (estimate)"],
                                                few["gathered (estimate)"] + 2 * 30 * 8,
                                                want["backward's end (estimate)"])


def test_a_dry_run_counts_for_other_numbers_of_gpus(capsys):
    def counts(*args):
        train.main(["--device", "cpu", "--dry-run", "--limit", "16", *args])
        text = capsys.readouterr().out
        tokens = int(text.partition(" tokens in a micro-batch")[0].rpartition(" ")[2])
        lines = [line.rsplit(maxsplit=2) for line in text.splitlines() if line.endswith(" GB")]
        return tokens, {kind.strip(): float(gb) for kind, gb, _ in lines}
    tokens, one = counts()
    assert (tokens, one) == counts("--world-size", "1")
    fewer, four = counts("--world-size", "4")
    assert tokens / 4 <= fewer < tokens / 3
    assert "gathered (estimate)" in four and "gathered (estimate)" not in one
    for kind in ("weights", "gradients", "moments and masters", "peak (estimate)"):
        assert four[kind] < one[kind]


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_largest_micro_batch_that_fits_is_the_largest(method, n_ranks):
    """Against all sizes one by one: cards that hold nothing, something, and everything."""
    model = small(QWEN, method)
    a = argparse.Namespace(device="cuda", eager=False)
    peak = {n: memory.estimate_bytes(model, a, n, n_ranks)["peak (estimate)"] for n in range(0, 8193, 64)}
    assert sorted(peak.values()) == list(peak.values())
    for size in (peak[0] - 1, peak[64] - 1, peak[64], peak[1984] + 5, peak[2048], peak[4096] - 1,
                 peak[8192] + 9):
        want = max((n for n, need in peak.items() if need <= size), default=0)
        got = memory.largest_that_fits(model, a, n_ranks, size / memory.USABLE / 1e9 * (1 + 1e-12), 8192)
        assert got == want, size
    between = memory.largest_that_fits(model, a, n_ranks, 1e6, 1000)
    assert between == 1000                                          # all that a batch has


def test_a_dry_run_says_what_fits_on_gpus_that_are_elsewhere(capsys):
    train.main(["--device", "cuda", "--dry-run", "--limit", "16"])
    text = capsys.readouterr().out
    assert "world size 1, cuda, bfloat16" in text and "the largest --max-tokens that fits" in text
    rows = [line.split() for line in text.splitlines()[-4:]]
    assert [(row[0], row[2]) for row in rows] == [(gb, "any:") for gb in ("24", "40", "80", "141")]


def test_a_short_run_is_not_compiled_where_its_activations_fit(monkeypatch, capsys):
    """A dry run says with what peak. A longer run, or one that would not fit, is compiled."""
    def dry(*flags):
        train.main(["--device", "cuda", "--dry-run", "--limit", "64", *flags])
        return capsys.readouterr().out

    def peak(*flags):
        line, = [line for line in dry(*flags).splitlines() if line.startswith("  peak (estimate)")]
        return line.split()[2]
    said = "the run is short, so it is not compiled if "
    eager, compiled = peak("--eager"), peak("--no-eager")
    assert float(eager) > float(compiled) and peak() == compiled
    assert f"{said}{eager} GB fit" in dry("--epochs", "16")                 # 32 steps
    for flags in (["17"], ["16", "--no-eager"], ["16", "--eager"], ["16", "--world-size", "2"],
                  ["9", "--max-tokens", "200"]):                            # the last: two micro-batches a step
        assert said not in dry("--epochs", *flags)

    model, batches = small(QWEN, "molf"), [[data.Example([1] * 9, 5, i) for i in range(32)]] * 20
    a = train.parse_args(["--device", "cpu"])
    a.device = "cuda"
    need = memory.eager_peak(model, memory.largest_micro_batch(batches, a), a)
    for total, fits in ((need / memory.USABLE * 1.001, True), (need / memory.USABLE * 0.999, False)):
        card = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        assert memory.better_eager(model, batches, a) == fits


def test_what_fits_is_said_in_words(capsys):
    report.print_what_fits({24: 0, 40: 640, 80: 1984, 141: 9000}, longest=700, most=9000)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "   24 GB  none: not even one token", "   40 GB  none: the longest row has 700 tokens",
        "   80 GB  1,984", "  141 GB  any: no batch has more than 9,000 tokens on a GPU"]


@pytest.mark.parametrize("args, why", [
    (["--world-size", "2"], "--dry-run"),
    (["--world-size", "0", "--dry-run"], "at least 1"),
    (["--world-size", "33", "--dry-run"], "fewer sequences than the 33 ranks"),
    (["--world-size", "43", "--batch-size", "64", "--dry-run"], "43 ranks, but the model has fewer")])
def test_a_number_of_gpus_that_cannot_be_is_refused(args, why, capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--device", "cpu", *args])
    assert why in f"{e.value} {capsys.readouterr().err}"
