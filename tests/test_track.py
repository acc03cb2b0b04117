"""What TensorBoard shows of a run is what log.jsonl has."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from lib import track
from lib.track import scalars

ROOT = Path(__file__).parents[1]
SHORT = ["--device", "cpu", "--limit", "40", "--batch-size", "8", "--epochs", "1", "--log-every", "1",
         "--eval-limit", "4"]


def test_the_scalars_of_a_record_by_hand():
    record = {"step": 3, "loss": 2.5, "lr": {"full": 0.1, "lora": 0.2}, "share": {"q_proj": 0.5},
              "changed": None}
    assert scalars(record) == {"loss": 2.5, "lr/full": 0.1, "lr/lora": 0.2, "share/q_proj": 0.5}
    held_out = {"ES": {"value": 0.25, "n": 4, "low": 0.0, "high": 1.0}, "# late": 3, "seconds": 9.0}
    record = {"step": 3, "held_out": held_out, "loss": 1.5}
    assert scalars(record) == {"held out/loss": 1.5, "held out/ES": 0.25}


def test_a_run_and_its_continuation_are_shown_once_with_the_numbers_of_the_log(tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = [*SHORT, "--eval-every", "2", "--save-every", "2", "--tensorboard", "--out", str(out)]
    step, do = train.make_step, []

    def stops(*made):
        steps = step(*made)

        def run(batch):
            do.append(1)
            if len(do) == 4:
                raise KeyboardInterrupt
            return steps(batch)
        return run
    monkeypatch.setattr(train, "make_step", stops)
    with pytest.raises(SystemExit):
        train.main(args)
    train.main(["--device", "cpu", "--resume", "--out", str(out)])      # it tracks as before
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(do) == 4 + 3 and len(log) == 5 + 2
    steps = {}
    for record in log:
        for name, value in scalars(record).items():
            steps.setdefault(name, []).append((record["step"], value))
    assert {"loss", "lr/full", "share/q_proj", "held out/ES", "held out/loss"} <= steps.keys()
    assert set(shown.Tags()["scalars"]) == steps.keys()
    for name, wanted in steps.items():
        got = [(e.step, e.value) for e in shown.Scalars(name)]
        assert got == [(i, pytest.approx(value, rel=1e-6)) for i, value in wanted]


def test_shares_in_the_log_are_those_of_the_steps_since_the_last_record(tmp_path):
    from safetensors import safe_open
    out = tmp_path / "run"
    train.main([*SHORT, "--epochs", "2", "--log-every", "3", "--score", "random", "--out", str(out)])
    with safe_open(out / "routing.safetensors", "pt") as f:
        gates, names = f.get_tensor("gates").float(), json.loads(f.metadata()["modules"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    begin = 0
    for record in log:
        part = gates[begin:record["step"]]
        for kind, share in record["share"].items():
            these = [i for i, name in enumerate(names) if name.endswith(kind)]
            torch.testing.assert_close(torch.tensor(share), part[:, these, 0].mean(), rtol=1e-6, atol=1e-6)
        begin = record["step"]
    assert len(log[1]["share"]) == 7 and begin == len(gates)


def test_without_the_flag_nothing_is_imported_and_without_the_package_one_line_says_what_to_install(
        tmp_path, monkeypatch, capsys):
    program = ("import sys, train; train.main(sys.argv[1:]); "
               "sys.exit(any(name.split('.')[0] == 'tensorboard' for name in sys.modules))")
    subprocess.run([sys.executable, "-c", program, *SHORT, "--out", tmp_path / "run"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    monkeypatch.setattr(track, "summary_writer", lambda: None)
    with pytest.raises(SystemExit) as e:
        train.main([*SHORT, "--tensorboard"])
    assert e.value.code == 2
    assert "--tensorboard wants TensorBoard: pip install tensorboard" in capsys.readouterr().err
