"""Malformed inputs for train.py: each must be refused by one line, or run.

    python bench/fuzz.py --n 1000 --seed 0                  # 1,000 of each kind, about 25 minutes on one core
    python bench/fuzz.py --n 50 --kinds config,rows         # fewer, of some kinds

A toy model, rows and an interrupted run are made once. Each input changes something in them: bytes, values
and keys of JSON, headers of safetensors. Then a child process, forked from this one, runs train.main on it,
with 2 GiB of address space beyond what the parent has and 10 s. An input has failed if its child leaves in
another way than with exit code 0, with one line that begins with "error: ", or as argparse does. What has
failed is kept in --keep.
"""
import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # a process with threads cannot be forked safely
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

MEMORY, SECONDS = 2 ** 31, 10
DEEP, HUGE, TWICE = "@deep@", "@huge@", "@twice@"       # what Python cannot write itself, see text_of
HOSTILE = [None, True, False, 0, -1, 1, 3, 2 ** 31, 2 ** 63, 10 ** 30, 10 ** 400, 0.5, -1e308, float("nan"),
           float("inf"), HUGE, DEEP, "", "x", "float16", "\ud800", "\x00\n", "a" * 100_000, [], {}, [[]],
           [1, "a"], {"a": {"b": None}}, {"": []}, ["full_attention"], list(range(1000))]


# ------------------------------------------------------------------------------------------------- mutations

def changed_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        at, n = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 8, 100])
        old = content[at:at + n]
        content[at:at + n] = rng.choice([rng.randbytes(n), b"", old * 3, rng.randbytes(n) + old])
    return bytes(content[:rng.randrange(len(content) + 1)] if rng.random() < 0.1 else content)


def changed_json(rng, value):
    """A copy in which one place is replaced, dropped, renamed, swapped with another, or stands twice."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(HOSTILE)
    new = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = rng.choice(keys), rng.choice(keys)
    how = rng.randrange(10)
    if how == 0:
        del new[key]
    elif how == 1:
        new[key], new[other] = new[other], new[key]
    elif how == 2 and isinstance(value, dict):
        moved = new.pop(key) if rng.random() < 0.5 else value[key]
        new[rng.choice([key + "x", key + TWICE, other + TWICE])] = moved
    elif how == 3:
        new[key] = rng.choice(HOSTILE)
    elif how == 4 and type(value[key]) in (int, float):
        new[key] = value[key] * rng.choice([-1, 0, 1.0, 2, 7, 2 ** 40])
    else:
        new[key] = changed_json(rng, value[key])
    return new


def text_of(value):
    text = json.dumps(value).replace(TWICE, "")
    text = text.replace(f'"{HUGE}"', "1e999").replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.encode()


def changed(rng, value):
    """A JSON value -> bytes"""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        value = changed_json(rng, value)
    return changed_bytes(rng, text_of(value)) if rng.random() < 0.2 else text_of(value)


def changed_safetensors(rng, content):
    """Half of the time something in the header, else bytes, most of them in the header."""
    (n,) = struct.unpack("<Q", content[:8])
    header, tensors = content[8:8 + n], content[8 + n:]
    how = rng.randrange(8)
    if how < 4:
        header = changed(rng, json.loads(header))
    elif how < 6:
        header = changed_bytes(rng, header)
    elif how == 6:
        tensors = changed_bytes(rng, tensors)
    n = len(header) if rng.random() < 0.9 else rng.choice([0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1, n + 1, n - 1])
    return struct.pack("<Q", n) + header + tensors


# --------------------------------------------------------------------- kinds: each writes files -> arguments

def model_with(folder, name, content):
    """The toy model with one file of another content."""
    (folder / "model").mkdir()
    for file in (ROOT / "toy").glob("*.*"):
        (folder / "model" / file.name).symlink_to(file)
    (folder / "model" / name).unlink(missing_ok=True)
    (folder / "model" / name).write_bytes(content)
    return ["--model", folder / "model", "--task", "med", "--data", "toy", "--eval-data", "toy", "--limit", 4,
            "--eval-limit", 4, "--ranks", 2, "--epochs", 1, "--out", folder / "out"]


def config(rng, folder, base):
    name = rng.choice(["config.json"] * 4 + ["generation_config.json", "tokenizer_config.json"])
    return model_with(folder, name, changed(rng, json.loads((ROOT / "toy" / name).read_text())))


def tokenizer(rng, folder, base):
    content = (ROOT / "toy" / "tokenizer.json").read_bytes()
    content = changed_bytes(rng, content) if rng.random() < 0.2 else changed(rng, json.loads(content))
    return model_with(folder, "tokenizer.json", content)


def weights(rng, folder, base):
    content = (ROOT / "toy" / "model.safetensors").read_bytes()
    if rng.random() < 0.8:
        return model_with(folder, "model.safetensors", changed_safetensors(rng, content))
    index = {"weight_map": {"model.norm.weight": "toy.safetensors"}}
    args = model_with(folder, "model.safetensors.index.json", changed(rng, index))
    (folder / "model" / "model.safetensors").rename(folder / "model" / "toy.safetensors")
    return args


PAIR = {"prompt": "Who wrote Emma?", "completion": " Jane Austen"}
CHAT = {"messages": [{"role": "user", "content": "Who wrote Emma?"},
                     {"role": "assistant", "content": "Jane Austen."}]}
TEMPLATE = b"""{% for m in messages %}{{ m.role + ': ' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def rows(rng, folder, base):
    task = rng.choice(list(data.TASKS))
    if task == "text":
        table = [rng.choice([PAIR, CHAT]) for _ in range(5)]
        template = changed_bytes(rng, TEMPLATE) if rng.random() < 0.5 else TEMPLATE
        model_with(folder, "tokenizer_config.json", json.dumps({"eos_token": "<|endoftext|>"}).encode())
        (folder / "model" / "chat_template.jinja").write_bytes(template)
    else:
        table = data.load_rows(task, "train", "toy", 5)[0]
    path = folder / rng.choice(["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
    if path.suffix == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(changed_json(rng, table)), path)
        except (TypeError, AttributeError, ValueError, LookupError, OverflowError, pyarrow.ArrowException):
            # what was changed fits no table
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
        content = path.read_bytes()
    elif path.suffix == ".json":
        content = changed(rng, table)
    else:
        content = b"\n".join(changed(rng, row) if rng.random() < 0.3 else text_of(row) for row in table)
        content = gzip.compress(content) if path.suffix == ".gz" else content
    path.write_bytes(changed_bytes(rng, content) if rng.random() < 0.3 else content)
    model = ["--model", folder / "model"] if task == "text" else []
    return ["--task", task, "--data", path, "--eval-data", path, "--ranks", 2, "--epochs", 1,
            "--eval-every", 1, "--out", folder / "out", *model]


def checkpoint(rng, folder, base):
    shutil.copytree(base / "out", folder / "out")
    files = sorted((folder / "out").rglob("*.*"))
    path = rng.choice(files + [file for file in files if file.suffix == ".safetensors"] * 3)
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = changed_safetensors(rng, content)
    elif path.suffix == ".jsonl":
        content = b"\n".join(changed(rng, json.loads(line)) for line in content.splitlines())
    else:
        content = changed(rng, json.loads(content))
    path.write_bytes(content)
    return ["--resume", "--out", folder / "out"]


KINDS = {kind.__name__: kind for kind in (config, tokenizer, weights, rows, checkpoint)}


# ---------------------------------------------------------------------------------------------- the children

def run(args, log):
    """Run train.main in a child -> how it ended ("refused", "ran", or "failed: WHY"), seconds, and the most
    bytes of memory. log: a file for what it prints."""
    begin = time.perf_counter()
    pid = os.fork()
    if not pid:
        os._exit(child(args, log))
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - begin
    memory = 1024 * usage.ru_maxrss
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"failed: {'over 10 s' if number == signal.SIGALRM else f'signal {number}'}", seconds, memory
    ends = {0: "ran", 1: "refused", 3: "failed: a traceback", 4: "failed: another exit"}
    return ends.get(os.WEXITSTATUS(status), "failed: another exit code"), seconds, memory


def child(args, log):
    """-> 0 if the run came to its end, 1 if it left with one line, 3 after a traceback, 4 in another case"""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    limit = in_use("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.alarm(SECONDS)
    try:
        train.main(["--device", "cpu", *map(str, args)])
        code = 0
    except SystemExit as e:
        print(e.code)
        text = str(e.code)
        refused = text.startswith("error: ") and len(text.splitlines()) == 1 and "MemoryError" not in text
        code = 1 if refused or e.code == 2 else 4
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        code = 3
    sys.stdout.flush()
    return code


def in_use(what):
    """Bytes of this process: VmSize, its address space, or VmRSS, its memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def interrupted_run(folder):
    """An unfinished run in folder/out with two checkpoints."""
    def stop(self, step):
        if step == 2:
            os._exit(0)
    pid = os.fork()
    if not pid:
        train.Checkpoints.leave_if_asked = stop
        os._exit(child(["--task", "med", "--limit", 8, "--eval-limit", 4, "--ranks", 2, "--epochs", 1,
                        "--keep", 2, "--batch-size", 2, "--save-every", 1, "--out", folder / "out"],
                       folder / "log"))
    assert os.waitpid(pid, 0)[1] == 0, (folder / "log").read_text()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kinds", default=",".join(KINDS))
    p.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    a = p.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        interrupted_run(base)
        for kind in a.kinds.split(","):
            ends, longest, most = Counter(), 0.0, 0
            for i in range(a.n):
                here = base / f"{kind}-{i}"
                here.mkdir()
                args = KINDS[kind](random.Random(f"{a.seed} {kind} {i}"), here, base)
                end, seconds, memory = run(args, here / "log")
                ends[end] += 1
                longest, most = max(longest, seconds), max(most, memory)
                if end.startswith("failed"):
                    print(f"{kind} {i} {end}: {(here / 'log').read_text(errors='replace').strip()[-200:]!r}")
                    shutil.copytree(here, a.keep / here.name, dirs_exist_ok=True)
                    failed += 1
                shutil.rmtree(here)
            print(f"{kind}: " + ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
                  + f"; longest {longest:.1f} s, most memory {most / 2 ** 20:.0f} MiB", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
