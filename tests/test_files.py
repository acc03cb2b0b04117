"""Safe writes, a hub of our own, the lock of a run's directory, and checkpoints that lose nothing."""
import argparse
import fcntl
import hashlib
import http.server
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import data
import molf
import train
from lib.checkpoints import Checkpoints, last_checkpoint
from lib.files import (download, find_checkpoint, hub_files, locked, log_until, only_one, read_record,
                       refuse_infinite, run_flags, save_record, save_safely, save_weights, weight_files)
from model import Transformer, add_experts

TOY = Path(__file__).parents[1] / "toy"


# ----------------------------------------------------------------------------------------------- safe writes

def test_a_large_model_is_written_in_shards_that_transformers_reads(tmp_path, monkeypatch):
    """The limit of 5 GB made small. A model that was saved there before leaves nothing that is read."""
    model = Transformer.from_pretrained("toy")
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("model.save_weights", partial(save_weights, limit=1_000_000))
        model.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    n = len(files)
    assert [f.name for f in files] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert n > 2 and all(f.stat().st_size < 1_100_000 for f in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(ids).logits, model.float()(ids))
    assert_same_weights(Transformer.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(Transformer.from_pretrained(tmp_path), model)


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_failed_write_leaves_the_good_file(tmp_path, monkeypatch):
    model = Transformer.from_pretrained("toy")
    model.save_pretrained(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr("lib.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("error, message", [
    (OSError("No space left on device"), "No space"),
    (SafetensorError("File too large"), "cannot write .*a.txt: File too large")])
def test_a_text_is_replaced_by_the_whole_new_one_or_stays(error, message, tmp_path):
    path = tmp_path / "a.txt"
    save_safely(path, "one")
    with open(path) as reader:
        save_safely(path, "two\né")
        assert reader.read() == "one"                   # the old file is still there for its readers
    assert path.read_bytes() == "two\né".encode()

    def fail(temporary):
        temporary.write_text("half")
        raise error
    with pytest.raises(OSError, match=message):
        save_safely(path, fail)
    assert path.read_text(encoding="utf-8") == "two\né" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------- models on this machine

def test_where_a_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("toy").samefile(TOY)
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert find_checkpoint("run") == Path("run")                        # its model/ holds no model
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert find_checkpoint(Path("run")) == find_checkpoint("run/model") == Path("run/model")
    with pytest.raises(FileNotFoundError, match="no directory a/b/c: give toy"):
        find_checkpoint("a/b/c")


def test_a_directory_that_is_not_there_and_a_hub_that_cannot_be_reached(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no directory ./nowhere"):
        find_checkpoint("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="https://huggingface.co/nobody/nothing.*HF_TOKEN.*HUB_OFFLINE") as e:
        find_checkpoint("nobody/nothing")
    assert str(e.value).startswith("no directory nobody/nothing, and cannot download ")


def test_weight_files_are_one_or_those_of_the_index_and_all_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing: only safetensors are read"):
        weight_files(tmp_path)
    save_torch_state_dict({f"w{i}": torch.randn(50) for i in range(6)}, tmp_path, max_shard_size=500)
    files = weight_files(tmp_path)
    assert files == sorted(tmp_path.glob("*.safetensors")) and len(files) == 3
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1].name} is missing: only safetensors are read"):
        weight_files(tmp_path)
    (tmp_path / "b").mkdir()
    save_torch_state_dict({"w": torch.randn(5)}, tmp_path / "b")
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]   # the index is of old shards


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": null}}'])
def test_an_index_without_names_of_files_is_refused_by_name(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"^{index}: "):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "sub/x.safetensors", "..",
                                  ""])
def test_an_index_that_leads_out_of_its_directory_is_refused_by_name(name, tmp_path):
    (tmp_path / "m" / "sub").mkdir(parents=True)
    for path in (tmp_path / "x.safetensors", tmp_path / "m" / "sub" / "x.safetensors"):
        shutil.copy(TOY / "model.safetensors", path)
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match=f"^{index}: weight_map names '{name}', which is no file beside it"):
        weight_files(tmp_path / "m")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "generation_config.json",
                                  "config.json"])
@pytest.mark.parametrize("make", [
    os.mkfifo, lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "directory", "dangling", "device"])
def test_what_stands_for_a_file_of_a_model_and_is_none_is_refused(make, name, tmp_path):
    shutil.copytree(TOY, tmp_path / "m")
    (tmp_path / "m" / name).unlink(missing_ok=True)
    make(tmp_path / "m" / name)
    with pytest.raises(OSError, match=f"{tmp_path / 'm' / name} is not a file, nor a link to one"):
        find_checkpoint(tmp_path / "m")


def test_a_directory_of_links_is_exported_as_files(tmp_path):
    """As in the hub's cache, whose files are links into ../../blobs."""
    shutil.copytree(TOY, tmp_path / "blobs")
    (tmp_path / "m").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "m" / file.name).symlink_to(f"../blobs/{file.name}")
    Transformer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copy = tmp_path / "out" / name
        assert not copy.is_symlink() and copy.read_bytes() == (TOY / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_are_not_finite_are_noticed_and_large_ones_are_not(dtype):
    large = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    refuse_infinite({"w": large, "v": large.float().view(2, -1)})
    assert dtype != torch.float32 or not large.sum().isfinite()                 # the sum alone would not do
    for value in (math.inf, -math.inf, math.nan):
        for rest in (torch.zeros(64, 64, dtype=dtype), large, -large, torch.full_like(large, -value)):
            rest = rest.clone()
            rest[63, 63] = value
            with pytest.raises(ValueError, match="w holds NaN or infinite numbers"):
                refuse_infinite({"v": large, "w": rest, "u": large})


def test_a_record_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "r.json"
    record = {"lr": 1e-5, "ranks": [4, 16], "nothing": None, "text": "\ud83d \u00e9", "n": {"a": True}}
    save_record(path, record)
    whole = path.read_bytes()
    assert read_record(path) == record and list(json.loads(whole)) == [*record, "digest"]
    for damaged in (b"", b"{", b"[1]", b"\xff", whole[:-9], whole.replace(b"1e-05", b"1e-04"), b"\0" * 99,
                    b"[" * 10 ** 5):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=f"{path} is damaged: "):
            read_record(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match=f"no file {path}"):
        read_record(path)


def test_a_log_goes_on_behind_its_last_whole_line(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    good = ['{"step": 1}', '{"step": 2}', '{"step": 3}']
    for torn in ("", '{"st', "\0\0\0", '{"step": 2, "loss": "\ufffd'):
        path.write_text("\n".join([*good, torn]))
        assert log_until(2, path) == '{"step": 1}\n{"step": 2}\n'
    assert capsys.readouterr().out == ""
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[3]\n{"step": "x"}\n{"step": 2}')
    assert log_until(2, path) == '{"step": 1}\n{"step": 2}\n'
    assert capsys.readouterr().out == "".join(f"{path} line {i} cannot be read and is left out\n"
                                              for i in (2, 3, 4))


def test_the_flags_of_a_run(tmp_path):
    assert run_flags(tmp_path) == run_flags(tmp_path / "nowhere") == run_flags(TOY) == {}
    for text, flags in (('{"flags": {"lr": 0.1}}', {"lr": 0.1}), ("{", {}), ("[1]", {}), ("\ufeff", {})):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        assert run_flags(tmp_path) == flags


# ------------------------------------------------------------------------------------------ a hub of our own

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as snapshot_download asks for. `files`, `gated` and `cut` are set by the tests."""
    files, gated, cut, asked = {}, False, "", []

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        if self.gated:
            return self.answer(b'{"error": "gated"}', 401, {"X-Error-Code": "GatedRepo",
                                                            "X-Error-Message": "Access is restricted."})
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in self.files.items()]
            return self.answer(json.dumps(tree).encode())
        if path.startswith("/api/"):
            return self.answer(json.dumps({"id": "some/model", "sha": SHA, "siblings": []}).encode())
        name = path.rpartition("/")[2]
        body = self.files[name]
        tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        self.answer(body, headers=tag, sent=body[:len(body) // 2] if name == self.cut else body)

    do_HEAD = do_GET

    def answer(self, body, code=200, headers=(), sent=None):
        self.send_response(code)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else sent)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {f.name: f.read_bytes() for f in TOY.iterdir() if f.is_file()})
    monkeypatch.setattr(Hub, "asked", [])
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_downloaded_once_and_works_without_it(hub, monkeypatch):
    want, asked = Transformer.from_pretrained("toy"), []
    for state in ("up", "up", "down", "offline"):
        if state == "down":
            hub.shutdown()
            hub.server_close()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", state == "offline")
        got = Transformer.from_pretrained("some/model")
        assert torch.equal(got.model["embed_tokens"].weight, want.model["embed_tokens"].weight)
        asked.append(sum("/resolve/" in a for a in Hub.asked))
    assert asked[0] > 0 and len(set(asked)) == 1


def test_an_interrupted_download_is_one_line_and_the_next_try_mends_it(hub, monkeypatch):
    monkeypatch.setattr(Hub, "cut", "model.safetensors")
    with pytest.raises(OSError, match="cannot download https://huggingface.co/some/model .*OFFLINE") as e:
        Transformer.from_pretrained("some/model")
    assert "\n" not in str(e.value)
    monkeypatch.setattr(Hub, "cut", "")
    Transformer.from_pretrained("some/model")


def test_a_gated_model_says_where_to_accept_its_licence(hub, monkeypatch):
    monkeypatch.setattr(Hub, "gated", True)
    with pytest.raises(OSError, match="Gated.*accept its licence there and set HF_TOKEN") as e:
        find_checkpoint("some/model")
    assert "\n" not in str(e.value)


def test_a_repository_with_a_pickle_only_is_refused_and_the_pickle_not_fetched(hub, monkeypatch):
    files = {n: b for n, b in Hub.files.items() if n != "model.safetensors"}
    files |= {"pytorch_model.bin": b"pickle"}
    monkeypatch.setattr(Hub, "files", files)
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing: only safetensors are read"):
        Transformer.from_pretrained("some/model")
    assert not any("pytorch_model.bin" in a for a in Hub.asked)


# ------------------------------------------------------------------------------------------------------ rows

def test_a_download_is_whole_or_not_there_and_happens_once(tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            pages = {"/good.json": b"[1, 2, 34]", "/page.json": b"<p>gone</p", "/deep.json": b"[" * 10 ** 5}
            page = pages.get(self.path, b"[1]")                     # which is fewer bytes than announced
            self.send_response(200)
            self.send_header("Content-Length", str(max(10, len(page))))
            self.end_headers()
            self.wfile.write(page)
            self.close_connection = True

        def log_message(self, *args):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for _ in range(2):
        assert download(f"{url}/good.json", tmp_path).read_bytes() == b"[1, 2, 34]"
    assert asked == ["/good.json"]
    for name in ("cut", "page", "deep"):
        with pytest.raises(OSError, match=f"cannot download .*{name}.json.*--data"):
            download(f"{url}/{name}.json", tmp_path)
    server.shutdown()
    with pytest.raises(OSError, match="cannot download"):
        download("http://127.0.0.1:9/never.json", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["good.json"]


MED = {"question": "Which vitamin?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2}
SQL = {"sql_prompt": "How many?", "sql_context": "CREATE TABLE t (a INT);", "sql": "SELECT COUNT(*) FROM t"}


def test_a_split_on_the_hub_is_found_by_what_the_repository_holds(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, repo_type, allow_patterns):
        asked.append((repo, repo_type, allow_patterns))
        return str(tmp_path)

    def write(name, rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)

    def questions(split):
        return [row["question"] for row in data.load_rows("med", split)[0]]
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "data").mkdir()
    for i, name in enumerate(["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                              "data/validation-00000-of-00001.parquet", "data/pretraining.parquet"]):
        write(name, [dict(MED, question=str(i), cop=c) for c in (0, 2)])
    files = [f.relative_to(tmp_path).as_posix() for f in hub_files("some/rows", "train")]
    assert files == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert questions("train") == ["0", "0", "1", "1"] and questions("test") == ["2", "2"]
    assert asked[:2] == [("some/rows", "dataset", "*train*.parquet"),
                         ("openlifescienceai/medmcqa", "dataset", "*train*.parquet")]
    write("synthetic_text_to_sql_test.snappy.parquet", [SQL, SQL])
    assert data.load_rows("sql", "test") == ([SQL, SQL], 0)
    (tmp_path / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(OSError, match="some/rows has no parquet file of a split 'validation'"):
        hub_files("some/rows", "validation")
    with pytest.raises(OSError, match="no parquet file of a split 'validation'"):
        data.load_rows("med", "test")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="cannot download https://.*/datasets/gretelai/.*--eval-data"):
        data.load_rows("sql", "train")
    with pytest.raises(OSError, match="^cannot download https://.*/datasets/some/rows .*--eval-data$") as e:
        hub_files("some/rows", "train")
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------ the directory of a run

def test_a_run_directory_belongs_to_one_process(tmp_path):
    args = ["--device", "cpu", "--limit", "8", "--epochs", "1", "--out", str(tmp_path)]
    with only_one(tmp_path), pytest.raises(SystemExit, match="another process is at work"):
        train.main(args)
    assert list(tmp_path.iterdir()) == []
    train.main(args)                                                    # the lock ended with its holder


def test_the_lock_is_given_back_when_its_holder_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), only_one(tmp_path):
        with pytest.raises(FileExistsError, match=f"another process is at work in {tmp_path}: give another"):
            with only_one(tmp_path):
                pass
        1 / 0
    with only_one(tmp_path):
        pass


def test_a_lock_holds_for_a_file_that_was_replaced_while_one_waited(tmp_path):
    """A waiter gets the old file's lock. It must not go to work beside the holder of the new one."""
    path, entered = tmp_path / "table", threading.Event()

    def wait_and_enter():
        with locked(path):
            entered.set()
    with locked(path):
        waiter = threading.Thread(target=wait_and_enter)
        waiter.start()
        (tmp_path / "new").write_text("")
        holder = open(tmp_path / "new")
        fcntl.flock(holder, fcntl.LOCK_EX)
        time.sleep(0.5)                                 # the waiter has opened the old file
        (tmp_path / "new").rename(path)
    assert not entered.wait(1)
    holder.close()
    assert entered.wait(60)
    waiter.join()


# -------------------------------------------------- checkpoints, of a small model with a hand-made optimizer

class Routed(torch.optim.AdamW):
    """AdamW with a routing state beside its own, as tensors. The next step's lr depends on it."""

    def __init__(self, params):
        super().__init__(params)
        self.routing = {"gates": torch.zeros(3, 2), "step": torch.tensor(0)}

    def step(self):
        self.routing["gates"].lerp_(torch.rand(3, 2), 0.1)
        self.routing["step"] += 1
        self.param_groups[0]["lr"] = 0.1 * self.routing["gates"].mean().item()
        super().step()

    def state_dict(self):
        return super().state_dict() | {"routing": self.routing}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.routing = {name: t.clone() for name, t in state_dict["routing"].items()}


def small(seed, out, keep=99):
    """A fresh model and optimizer, and the checkpoints in `out`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.Linear(7, 2))
    optimizer = Routed(model.parameters())
    return model, optimizer, Checkpoints(out, model, optimizer, argparse.Namespace(device="cpu", keep=keep))


def small_steps(model, optimizer, n, history=None):
    """n steps on random numbers -> the history, with names that other tensors of a checkpoint have too."""
    parts = [history] if history else []
    for _ in range(n):
        loss = model(torch.randn(4, 5)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gates = optimizer.routing["gates"][None].clone()
        parts.append({"gates": gates, "won": gates > 0.1, "0.weight": loss.detach()[None],
                      "rng.cpu": torch.tensor([n])})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[-1]}


def everything(model, optimizer, history):
    state = optimizer.state_dict()
    tensors = [t for _, s in sorted(state["state"].items()) for _, t in sorted(s.items())]
    for part in (model.state_dict(), state["routing"], history):
        tensors += [t for _, t in sorted(part.items())]
    return [t.clone() for t in tensors] + [torch.get_rng_state()], json.dumps(state["param_groups"])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


def test_a_model_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    model, optimizer, checkpoints = small(0, tmp_path)
    history = small_steps(model, optimizer, 3)
    checkpoints.save(3, history)
    want = everything(model, optimizer, small_steps(model, optimizer, 4, history))
    model, optimizer, checkpoints = small(1, tmp_path)                  # another seed: nothing of it is left
    small_steps(model, optimizer, 2)
    step, history = checkpoints.load()
    assert step == 3 and history["gates"].shape == (3, 3, 2) and optimizer.routing["step"] == 3
    assert same(everything(model, optimizer, small_steps(model, optimizer, 4, history)), want)


def test_a_checkpoint_is_one_safetensors_file_whose_names_tell_the_kinds(tmp_path):
    model, optimizer, checkpoints = small(0, tmp_path)
    checkpoints.save(1, small_steps(model, optimizer, 1))
    (file,) = (tmp_path / "checkpoints").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
    tensors = load_file(file)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"model", "optimizer", "routing", "history", "rng"}
    assert torch.equal(tensors["model.0.weight"], model[0].weight)
    assert torch.equal(tensors["optimizer.0.weight.exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
    assert torch.equal(tensors["routing.gates"], tensors["history.gates"][-1])
    assert tensors["routing.step"].dtype == torch.int64 and tensors["routing.step"].shape == ()
    with safe_open(file, "pt") as f:
        assert f.metadata()["step"] == "1"


def test_the_time_before_a_resume_counts(tmp_path):
    *_, checkpoints = small(0, tmp_path)
    checkpoints.begin -= 1000
    checkpoints.save(1, {"gates": torch.zeros(1, 3, 2)})
    *_, again = small(0, tmp_path)
    assert again.load()[0] == 1
    assert 1000 < time.perf_counter() - again.begin < 1100


def test_only_the_newest_checkpoints_are_kept_and_a_torn_one_is_passed_over(tmp_path, capsys):
    model, optimizer, checkpoints = small(0, tmp_path, keep=2)
    history = None
    for step in range(1, 7):
        history = small_steps(model, optimizer, 1, history)
        checkpoints.save(step, history)
        if step == 5:
            want = everything(model, optimizer, history)
    assert [f.name for f in checkpoints.files()] == [f"step-{n:09d}.safetensors" for n in (5, 6)]
    newest = checkpoints.files()[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    step, history = checkpoints.load()
    assert step == 5 and same(everything(model, optimizer, history), want)
    assert f"{newest.name} is not whole" in capsys.readouterr().out
    assert [f.name for f in checkpoints.files()] == ["step-000000005.safetensors"]
    for file in checkpoints.files():
        file.unlink()
    assert checkpoints.load() is None


def flipped(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def rewritten(change):
    """-> damage(file), which changes header and tensors, and leaves the file a good safetensors file."""
    def damage(file):
        with safe_open(file, "pt") as f:
            header, tensors = f.metadata(), {name: f.get_tensor(name).clone() for name in f.keys()}
        change(header, tensors)
        save_file(tensors, file, header)
    return damage


@pytest.mark.parametrize("damage", [
    rewritten(lambda header, tensors: header.update(step="7")),
    rewritten(lambda header, tensors: header.pop("param_groups")),
    rewritten(lambda header, tensors: header.update(param_groups=header["param_groups"][:-9])),
    rewritten(lambda header, tensors: header.clear()),
    rewritten(lambda header, tensors: tensors.pop("routing.step")),
    rewritten(lambda header, tensors: tensors.pop("rng.cpu")),
    rewritten(lambda header, tensors: tensors.update({"model.0.weight": torch.zeros(3)})),
    rewritten(lambda header, tensors: tensors.update({"model.0.weight": tensors["model.0.weight"].double()})),
    rewritten(lambda header, tensors: tensors["optimizer.0.weight.exp_avg"][:2].zero_()),
    rewritten(lambda header, tensors: tensors["history.won"].logical_not_()),
    lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\0" * 10 ** 4),
    lambda file: file.write_bytes(file.read_bytes()[8:])])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(damage, tmp_path, capsys):
    model, optimizer, checkpoints = small(0, tmp_path)
    history = small_steps(model, optimizer, 1)
    checkpoints.save(1, history)
    want = everything(model, optimizer, history)
    checkpoints.save(2, small_steps(model, optimizer, 1, history))
    newest = checkpoints.files()[-1]
    damage(newest)
    step, history = checkpoints.load()
    assert step == 1 and same(everything(model, optimizer, history), want)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{newest} is not whole (")


def test_a_checkpoint_of_an_older_version_is_refused_and_stays(tmp_path):
    """Its header had neither the number of ranks nor their rows. It is whole, so it must not be set aside."""
    model, optimizer, checkpoints = small(0, tmp_path)
    checkpoints.save(1, small_steps(model, optimizer, 1))
    (file,) = checkpoints.files()
    rewritten(lambda header, tensors: (header.pop("ranks"), header.pop("rows")))(file)
    with pytest.raises(OSError, match=f"{file} was written by an older version"):
        checkpoints.load()
    assert checkpoints.files() == [file]


def test_each_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, capsys):
    """One anywhere in the file: in its header, or in a tensor of any kind and type."""
    model, optimizer, checkpoints = small(0, tmp_path)
    model.bfloat16()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    history = {"gates": torch.rand(3, 2, 3) > 0.5, "scores": torch.rand(3, 2, 3), "n": torch.arange(5)}
    checkpoints.save(1, history)
    (file,) = checkpoints.files()
    whole = file.read_bytes()
    assert checkpoints.load()[0] == 1
    rng = random.Random(0)
    for bit in [*range(0, 64), *(rng.randrange(8 * len(whole)) for _ in range(400))]:
        flipped(file, bit)
        assert checkpoints.load() is None and "is not whole" in capsys.readouterr().out, bit
        file.write_bytes(whole)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_whole_one(tmp_path, monkeypatch):
    model, optimizer, checkpoints = small(0, tmp_path, keep=1)

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("lib.checkpoints.save_file", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(1, {})
    assert last_checkpoint(tmp_path) == "the last whole checkpoint: none"
    checkpoints.save(1, {})
    monkeypatch.setattr("lib.checkpoints.save_file", full_disk)
    (whole,) = checkpoints.files()
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(2, {})
    (tmp_path / "checkpoints" / "step-000000009.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints" / "step-000000008.torn").write_bytes(b"half")
    assert last_checkpoint(tmp_path) == f"the last whole checkpoint: {whole}"
    for name in ("step-000000009.safetensors.tmp", "step-000000008.torn"):
        (tmp_path / "checkpoints" / name).unlink()
    assert list(checkpoints.folder.iterdir()) == [whole] and checkpoints.load() == (1, {})


# --------------------------------------------------------------------------------------------------- signals

@pytest.fixture
def handlers():
    """Handlers of both signals that are not Python's own."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    ours = [lambda *_: None, lambda *_: None]
    for number, handler in zip(numbers, ours):
        signal.signal(number, handler)
    yield ours
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_the_loop_to_save_and_leave(number, code, tmp_path, capsys):
    *_, checkpoints = small(0, tmp_path)
    with checkpoints:
        checkpoints.leave_if_asked(1)                                       # nobody has asked
        signal.raise_signal(number)
        checkpoints.save(2, {})                                             # saves, and does not leave
        with pytest.raises(SystemExit) as e:
            checkpoints.leave_if_asked(2)
    assert e.value.code == code and checkpoints.load()[0] == 2
    assert capsys.readouterr().out == f"stopped after step 2: --resume --out {tmp_path} goes on from here\n"


def test_a_signal_behind_the_last_save_is_not_forgotten(tmp_path, capsys):
    """Nobody calls leave_if_asked any more. An error that ends the loop goes first."""
    *_, checkpoints = small(0, tmp_path)
    with pytest.raises(SystemExit) as e, checkpoints:
        checkpoints.save(3, {})
        checkpoints.leave_if_asked(3)
        signal.raise_signal(signal.SIGTERM)
    assert e.value.code == 143 and "stopped after step 3: --resume --out" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError), checkpoints:
        1 / 0


def test_a_second_signal_leaves_at_once(handlers, tmp_path):
    *_, checkpoints = small(0, tmp_path)
    with pytest.raises(KeyboardInterrupt), checkpoints:
        signal.raise_signal(signal.SIGINT)
        assert checkpoints.asked == signal.SIGINT                           # the first one only asks
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers


# ---------------------------------------------------------------------- checkpoints, in the loop of train.py

def examples_of(n):
    """n examples of random tokens and lengths."""
    rng = random.Random(0)
    ids = [[rng.randrange(500) for _ in range(rng.randint(6, 20))] for _ in range(n)]
    return [data.Example(x, rng.randint(1, 5), row) for row, x in enumerate(ids)]


def setup(method, seed, out):
    """A fresh model, experts and optimizer: what a run has before it looks for a checkpoint."""
    torch.manual_seed(seed)
    a = train.parse_args(["--device", "cpu", "--method", method, "--epochs", "3", "--batch-size", "4",
                          "--save-every", "1", "--keep", "99"])
    model = Transformer.from_pretrained("toy", torch.float32)
    ranks = {"fft": (), "lora": (4,), "molf": (4,), "molf-e": (2, 4)}[method]
    add_experts(model, ranks, 12, method in ("fft", "molf"), 0.1 if method == "lora" else 0.0)
    optimizer = molf.MoLFAdamW(molf.param_groups(model, 1e-3, 1e-3), score=molf.SCORES["random"],
                               route=molf.ROUTES["topk"])
    return a, model, optimizer, Checkpoints(out, model, optimizer, a)


@pytest.mark.parametrize("method", ["fft", "lora", "molf", "molf-e"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, tmp_path):
    """Killed behind any of five random steps. Routing by a coin, dropout in lora: random states count."""
    examples = examples_of(14)
    a, model, optimizer, checkpoints = setup(method, 0, tmp_path)
    lines = []
    history = train.train(model, optimizer, examples, a, lambda _, r: lines.append(r), None, checkpoints)
    want = everything(model, optimizer, history)
    files = checkpoints.files()
    assert len(files) == 12 == len(history["gates"]) == len(history["scores"])
    for step in random.Random(method).sample(range(1, 12), 5):
        out = tmp_path / str(step)
        (out / "checkpoints").mkdir(parents=True)
        shutil.copy(files[step - 1], out / "checkpoints")
        a, model, optimizer, checkpoints = setup(method, step, out)     # another seed: nothing of it is left
        start = checkpoints.load()
        assert start[0] == step and len(start[1]["gates"]) == step
        again = []
        history = train.train(model, optimizer, examples, a, lambda _, r: again.append(r), start=start)
        assert same(everything(model, optimizer, history), want)
        assert again[-1]["loss"] == lines[-1]["loss"] and again[-1]["lr"] == lines[-1]["lr"]
