"""Several ranks, on the CPU with gloo, against one process: the same losses, winners, weights and metrics."""
import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

import data
import lib.fast
import train
from lib import parallel
from lib import ranks as ranks_
from lib.checkpoints import Saved, checkpoint_files, files_of, write
from lib.fast import FastStep
from lib.files import save_weights
from model import Transformer, add_experts
from molf import MoLFAdamW, param_groups

ROOT = Path(__file__).parents[1]
SMALL = ("--limit", 40, "--eval-limit", 8, "--epochs", 2, "--batch-size", 16, "--log-every", 1,
         "--export-dtype", "fp32", "--lr", 1e-4, "--lora-lr", 1e-4)
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["train"])


def one_rank(r, n, port, args, out, setup):
    """What torchrun starts: a process with these variables. setup(r) is called first."""
    os.environ |= {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    setup(r)
    with open(f"{out}.stdout{r}", "w") as stdout, open(f"{out}.stderr{r}", "w") as stderr:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                train.main(args[r])
            except SystemExit as e:
                if isinstance(e.code, str):
                    print(e.code, file=stderr)
                    sys.exit(1)
                raise


class Ranks:
    """N ranks of train.py --out `out`. args: flags of all; more: {rank: flags of that one}."""

    def __init__(self, n, out, *args, more=None, setup=abs):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.out = out
        out.parent.mkdir(exist_ok=True)
        flags = [[*map(str, ("--device", "cpu", *args, "--out", out, *(more or {}).get(r, ())))]
                 for r in range(n)]
        self.processes = [forks.Process(target=one_rank, args=(r, n, port, flags, out, setup))
                          for r in range(n)]
        for p in self.processes:
            p.start()

    def end(self):
        """-> their exit codes, what they wrote to stdout, and to stderr"""
        for p in self.processes:
            p.join(60)
            p.kill()
        texts = [[Path(f"{self.out}.{stream}{r}").read_text() for r in range(len(self.processes))]
                 for stream in ("stdout", "stderr")]
        return [p.exitcode for p in self.processes], *texts


def ranks(n, out, *args, **more):
    codes, stdout, stderr = Ranks(n, out, *args, **more).end()
    assert codes == [0] * n, stderr
    assert not any(stdout[1:]), "only the first rank prints"


def one(out, *args):
    train.main([*map(str, ("--device", "cpu", *args, "--out", out))])


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b, compared=True):
    """Two runs of the same flags: what they left, but for times and rounding. compared: did the second load
    its export and compare the loss?"""
    for r, s in zip(log_of(a), log_of(b), strict=True):
        assert r.keys() == s.keys() and r["step"] == s["step"] and r.get("lr") == s.get("lr")
        assert s["loss"] == pytest.approx(r["loss"], rel=1e-6)
        assert r.get("held_out", {}) | {"seconds": 0} == s.get("held_out", {}) | {"seconds": 0}
        for key, close in (("grad_norm", 1e-5), ("full_share", 1e-5), ("changed", 1e-3)):
            assert r.get(key) is s.get(key) is None or s[key] == pytest.approx(r[key], rel=close)
    routing, others = (load_file(x / "routing.safetensors") for x in (a, b))
    if routing["gates"].dtype == torch.bool:
        assert torch.equal(routing["gates"], others["gates"])
    torch.testing.assert_close(others["gates"], routing["gates"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(others["scores"], routing["scores"], rtol=1e-3, atol=1e-9)
    exported, others = (dict(Transformer.from_pretrained(x).named_parameters()) for x in (a, b))
    assert exported.keys() == others.keys()
    for name, w in exported.items():
        assert (w - others[name]).abs().max() <= 5e-5 * w.abs().max(), name
    first, second = (json.loads((x / "results.json").read_text()) for x in (a, b))
    for when in ("before", "after"):
        assert first[when] | {"seconds": 0} == second[when] | {"seconds": 0}
    assert second["loss"]["trained"] == pytest.approx(first["loss"]["trained"], rel=1e-5)
    exported = pytest.approx(first["loss"]["exported"], rel=1e-5) if compared else None
    assert second["loss"]["exported"] == exported
    lines = [[json.loads(line)["prediction"] for line in (x / "predictions.jsonl").read_text().splitlines()]
             for x in (a, b)]
    assert lines[0] == lines[1]


def large(r):
    """The toy is too large to stay gathered, and its frozen weights are shared out as well."""
    parallel.SMALL_BYTES = 0


@pytest.mark.parametrize("n, flags", [
    (2, "--method fft"),
    (2, "--method lora"),
    (2, "--method lora --rest train --ranks 3"),
    (3, "--method molf"),
    (2, "--method molf --route softmax --eval-every 3"),
    (2, "--method molf --task sql --epochs 1 --eval-limit 9 --limit 40 --max-tokens 300 --checkpointing"),
    (2, "--method molf-e --score align"),
])
def test_several_ranks_are_one_process(n, flags, tmp_path):
    one(tmp_path / "one", *SMALL, *flags.split())
    ranks(n, tmp_path / "several", *SMALL, *flags.split(), setup=large if n == 2 else abs)
    assert_same_run(tmp_path / "one", tmp_path / "several")
    left = [{str(f.relative_to(x)) for f in x.rglob("*")} for x in (tmp_path / "one", tmp_path / "several")]
    assert left[0] == left[1]


def no_room(r):
    """No GPU has room for the whole model, and a file of an export has not either."""
    parallel.fits = lambda model: False
    save_weights.__defaults__ = (1_000_000,)


def no_room_large(r):
    large(r)
    no_room(r)


@pytest.mark.parametrize("flags, setup", [
    ("--method molf --eval-every 3", no_room),
    ("--method lora --eval-every 3", no_room),
    ("--method molf-e", no_room_large),
    ("--method molf-e --rest train", no_room_large),
    ("--method molf --task sql --epochs 1 --eval-limit 5 --limit 20", no_room_large),
])
def test_a_model_that_is_whole_on_no_gpu_is_evaluated_and_exported_in_step(flags, setup, tmp_path):
    one(tmp_path / "one", *SMALL, *flags.split())
    ranks(2, tmp_path / "several", *SMALL, *flags.split(), setup=setup)
    assert len(list((tmp_path / "several" / "model").glob("model-*.safetensors"))) > 1
    assert_same_run(tmp_path / "one", tmp_path / "several", compared=False)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "several" / "model").state_dict()
    for name, w in Transformer.from_pretrained(tmp_path / "several").named_parameters():
        assert torch.equal(w, reference[name]), name
    if (tmp_path / "one" / "adapter").exists():
        first, second = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors")
                         for x in ("one", "several"))
        assert first.keys() == second.keys()
        for name, w in first.items():       # (where a gradient is all but 0, Adam's step turns on its rounding)
            assert (second[name] - w).norm() <= 1e-2 * w.norm(), name


def test_ranks_whose_loss_is_not_finite_leave_the_model_as_it_was_before(tmp_path):
    flags = *SMALL, "--lr", 1e15, "--lora-lr", 1e15
    with pytest.raises(SystemExit, match="stopped at step 2"):
        one(tmp_path / "one", *flags)
    codes, _, stderr = Ranks(2, tmp_path / "several", *flags).end()
    assert codes == [1, 1]
    assert stderr[0].startswith("error: stopped at step 2: loss nan") and not stderr[1]
    before, after = (load_file(tmp_path / x / "last-good" / "model.safetensors") for x in ("one", "several"))
    for name, w in before.items():
        assert w.isfinite().all() and (after[name] - w).abs().max() <= 0.05 * w.abs().max(), name


def torchrun(n, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
               ROOT / "train.py", "--device", "cpu", *args]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_torchrun_starts_two_ranks_and_one_is_bit_identical_to_none(tmp_path):
    started = [torchrun(n, *SMALL, "--limit", 16, "--out", tmp_path / str(n)) for n in (1, 2)]
    one(tmp_path / "none", *SMALL, "--limit", 16)
    for process in started:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert stdout.count("step    1/2") == 1
    assert_same_run(tmp_path / "none", tmp_path / "2")
    for name in ("model/model.safetensors", "routing.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "none" / name).read_bytes()


def saved_in(out, n):
    """-> what the one checkpoint of a run of n ranks holds: its step, and {name: tensor}"""
    folder = out / "checkpoints"
    file, = checkpoint_files(out)
    assert set(folder.iterdir()) == set(files_of(file, n))
    for part in files_of(file, n):
        names = load_file(part).keys()
        assert any(name.endswith(".exp_avg") for name in names)             # each rank keeps a part
        assert ("rng.cpu" in names) == (part == file)
    saved = Saved(files_of(file, n))
    assert saved.header["ranks"] == str(n)
    return int(saved.header["step"]), {name: saved.read(name) for name in saved.where}


def save_again(model, optimizer, examples, a, log, held_out, checkpoints, start):
    """In the place of train.train: save what was loaded, and leave."""
    checkpoints.save(*start)
    sys.exit(0)


def only_save(r):
    train.train = save_again


@pytest.mark.parametrize("method, numbers", [("molf", (3, 1, 4)), ("lora", (1, 3))])
def test_any_number_of_ranks_goes_on_with_what_another_number_saved(method, numbers, tmp_path):
    """A signal to one rank stops all. Who loads a checkpoint holds, to the bit, what was saved."""
    flags = *SMALL, "--epochs", 3, "--method", method
    one(tmp_path / "one", *flags)
    out = tmp_path / "several"
    started = Ranks(2, out, *flags)
    wait_for(lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) >= 2)
    os.kill(started.processes[1].pid, signal.SIGTERM)
    codes, stdout, stderr = started.end()
    assert codes == [143, 143], stderr
    assert stdout[0].count("stopped after step") == 1 and not stdout[1] and stderr == ["", ""]
    step, tensors = saved_in(out, 2)
    assert 2 <= step < 9
    assert tensors.keys() == saved_by_one(tmp_path, flags).keys()
    shutil.copytree(out, tmp_path / "by-one")
    for n in numbers:
        codes, _, stderr = Ranks(n, out, "--resume", setup=only_save).end()
        assert codes == [0] * n, stderr
        _, again = saved_in(out, n)
        assert again.keys() == tensors.keys()
        for name, t in tensors.items():
            assert t.dtype == again[name].dtype and torch.equal(t, again[name]), name

    # two ranks -> one process -> the run that one process makes, and likewise from the last number to two
    one(tmp_path / "by-one", "--resume")
    assert_same_run(tmp_path / "one", tmp_path / "by-one")
    ranks(2, out, "--resume")
    assert_same_run(tmp_path / "one", out)


def saved_by_one(tmp_path, flags):
    """-> {name: tensor} of a checkpoint of one process"""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train", lambda *args: save_again(*args[:-1], (2, {"gates": torch.zeros(2, 2, 1),
                                                                               "scores": torch.zeros(2)})))
        one(tmp_path / "saved", *flags)
    return saved_in(tmp_path / "saved", 1)[1]


def test_a_checkpoint_without_the_file_of_a_rank_is_refused(tmp_path):
    out = tmp_path / "run"
    flags = *SMALL, "--limit", 16, "--epochs", 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train", lambda *args: save_again(*args[:-1], (1, {"gates": torch.zeros(1)})))
        one(out, *flags)
    file, = checkpoint_files(out)
    with safe_open(file, "pt") as f:
        header = dict(f.metadata())
    header.pop("checksum")
    write(file, header | {"ranks": "2"}, load_file(file))
    before = sorted(out.rglob("*"))
    message = f"error: {files_of(file, 2)[1]} is missing, one of the 2 files of a checkpoint"
    with pytest.raises(SystemExit, match=re.escape(message)):
        one(out, "--resume")
    codes, stdout, stderr = Ranks(2, out, "--resume").end()
    assert codes == [1, 1] and stderr[0].splitlines()[-1].startswith(message) and not stderr[1]
    assert sorted(out.rglob("*")) == before


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_batch_is_shared_among_the_ranks_disjoint_complete_and_in_equal_numbers(monkeypatch):
    lengths = [5, 90, 3, 3, 40, 8, 60, 2, 2, 31]
    batch = [data.Example(list(range(n)), 1, i) for i, n in enumerate(lengths)]
    monkeypatch.setattr(parallel, "to_device", lambda examples, device, size: examples)
    for n in (1, 2, 3, 12):
        monkeypatch.setattr(ranks_, "n_ranks", lambda: n)
        found = []
        for r in range(n):
            monkeypatch.setattr(ranks_, "rank", lambda: r)
            monkeypatch.setattr(parallel, "rank", lambda: r)
            found.append(parallel.micros_here(batch, 100, "cpu"))
        assert len({len(micros) for micros in found}) == 1
        rows = [e.row for micros in found for micro in micros for e in micro]
        assert sorted(rows) == list(range(10))
        tokens = [sum(map(data.count_tokens, micros)) for micros in found]
        assert max(tokens) <= max(90, sum(lengths) / n + 5)
        assert n > 1 or found[0] == list(data.micro_batches(batch, 100))
        parts = []
        for r in range(n):
            monkeypatch.setattr(ranks_, "rank", lambda: r)
            parts.append(ranks_.part_of(lengths, None))
        monkeypatch.setattr(ranks_, "of_all", lambda part: parts)
        assert ranks_.gathered(None, None) == lengths


def test_a_compiled_step_cuts_a_batch_of_several_ranks_into_one_size(monkeypatch):
    """Graphs of all ranks gather the weights together, so their micro-batches are as many and of one size."""
    rng = random.Random(0)
    batches = [[data.Example([1] * rng.randint(20, 900), 10, i) for i in range(32)] for _ in range(50)]
    batches[-1] = batches[-1][:2]                           # fewer sequences than ranks
    model = Transformer.from_pretrained("toy")
    add_experts(model, ranks=(2,))
    monkeypatch.setattr(lib.fast, "price_of_a_size", lambda model, tokens: 1)
    for n in (2, 3):
        monkeypatch.setattr(ranks_, "n_ranks", lambda: n)
        step = FastStep(None, model, MoLFAdamW(param_groups(model)), batches, 4096)
        for batch in batches:
            size, of_ranks = step.cut(batch)
            assert len({len(micros) for micros in of_ranks}) == 1 < 1 + len(of_ranks[0])
            assert sorted(e.row for micros in of_ranks for m in micros for e in m) == [e.row for e in batch]
            assert max(data.count_tokens(m) for micros in of_ranks for m in micros) <= size <= 4096
            for r in range(n):
                monkeypatch.setattr(ranks_, "rank", lambda: r)
                micros, n_targets = step.inputs(batch)
                assert {tuple(m[0].shape) for m in micros} == {(size,)}
                assert {tuple(m[1].cu_seqlens.shape) for m in micros} == {(step.sequences + 1,)}
                assert n_targets == data.count_targets(batch)


@pytest.mark.parametrize("flags, more, message", [
    ((), {1: ("--lr", "0.1")}, "error: rank 1 is not like rank 0 in --lr"),
    ((), {1: ("--nonsense",)}, "error: rank 1: unrecognized arguments: --nonsense"),
    (("--batch-size", 1), {}, "--batch-size 1: fewer sequences than the 2 ranks"),
    (("--model", "/no"), {}, "error: no directory /no: give toy, a directory with config.json and "
     "safetensors, or a hub id like Qwen/Qwen2.5-0.5B"),
])
def test_what_cannot_run_is_refused_by_the_first_rank_in_one_line(flags, more, message, tmp_path):
    out = tmp_path / "run"
    codes, stdout, stderr = Ranks(2, out, *flags, more=more).end()
    assert_refused(codes, stdout, stderr, message, out)


def assert_refused(codes, stdout, stderr, message, out):
    assert all(codes) and not (out / "config.json").exists()
    assert stderr[0].splitlines()[-1].endswith(message) and stderr[0].count("error:") == 1, stderr
    assert "Traceback" not in stderr[0] and not stderr[1] and not stdout[1]


def other_rows(r):
    read = train.read_data
    train.read_data = lambda a, tokenizer: read(argparse.Namespace(**vars(a) | {"limit": 9 - r}), tokenizer)


def no_model(r):
    def find(name):
        raise FileNotFoundError(f"no directory {name}")
    train.find_checkpoint = find if r else train.find_checkpoint


@pytest.mark.parametrize("setup, message", [
    (other_rows, "error: rank 1 is not like rank 0 in training rows"),
    (no_model, "error: rank 1: no directory toy"),
])
def test_ranks_on_machines_with_other_files_are_refused(setup, message, tmp_path):
    out = tmp_path / "run"
    codes, stdout, stderr = Ranks(2, out, "--eval-limit", 8, setup=setup).end()
    assert_refused(codes, stdout, stderr, message, out)


def disk_of(folder, r):
    os.chdir(folder / f"disk{r}")


def test_ranks_that_do_not_see_one_directory_are_refused_also_if_another_run_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for r in (0, 1):
        one(Path(f"disk{r}/run"), "--limit", 8, "--epochs", 1 + r)
        (tmp_path / f"disk{r}" / "run" / "results.json").unlink()
    flags = {r: ("--limit", 8, "--out", "run") for r in (0, 1)}
    codes, _, stderr = Ranks(2, tmp_path / "run", more=flags, setup=partial(disk_of, tmp_path)).end()
    assert codes == [1, 1]
    assert stderr == ["error: rank 1 is not like rank 0 in run/config.json, which all must see\n", ""]


def test_help_is_given_once_and_is_no_failure(tmp_path):
    codes, stdout, stderr = Ranks(2, tmp_path / "run", "--help").end()
    assert codes == [0, 0] and stderr == ["", ""]
    assert stdout[0].startswith("usage:") and not stdout[1]


def long_write(r):
    """PyTorch gives up when a rank waits for 30 minutes; here for 2 seconds."""
    torch.distributed.distributed_c10d._get_default_timeout = lambda backend: timedelta(seconds=2)
    save = train.save_results

    def slow(*args):
        time.sleep(5)
        save(*args)
    train.save_results = slow


def test_ranks_wait_for_the_first_one_while_it_writes(tmp_path):
    ranks(2, tmp_path / "run", "--limit", 8, "--epochs", 1, "--eval-limit", 2, setup=long_write)


def test_weights_that_one_rank_cannot_use_are_refused_before_a_finished_run_is_replaced(tmp_path):
    shutil.copytree(ROOT / "toy", tmp_path / "toy")
    flags = "--model", tmp_path / "toy", "--data", "toy", "--eval-data", "toy", "--limit", 8, "--epochs", 1
    out = tmp_path / "run"
    one(out, *flags)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    file = tmp_path / "toy" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][-1, 3] = torch.inf         # a row of the last rank
    save_file(weights, file)
    codes, stdout, stderr = Ranks(2, out, *flags, "--overwrite").end()
    assert codes == [1, 1] and stderr[1] == ""
    assert stderr[0] == "error: rank 1: model.layers.1.mlp.up_proj.weight holds NaN or infinite numbers\n"
    assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(ranks_, "several", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks_.own_device("cuda") == "cuda:1" and ranks_.own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 ranks on this machine, but 1 GPUs"):
        ranks_.own_device("cuda")


def test_a_rank_that_dies_ends_the_others_in_one_line(tmp_path):
    out = tmp_path / "run"
    started = Ranks(2, out, "--epochs", 50)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text())
    started.processes[0].kill()
    codes, _, stderr = started.end()
    assert codes == [-signal.SIGKILL, 1]
    assert stderr[1] == "rank 1: another rank has left\n"


def test_one_process_has_no_process_group(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    one(tmp_path / "run", "--limit", 4, "--epochs", 1)
