"""How far long work has got is shown on a terminal, and nowhere else."""
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

COMMAND = [sys.executable, "train.py", "--device", "cpu", "--task", "sql", "--limit", "8", "--epochs", "1",
           "--eval-limit", "40"]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_reading_generating_and_writing_are_shown_on_a_terminal_alone(terminal, tmp_path):
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    run = subprocess.Popen([*COMMAND, "--out", str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=side if terminal else subprocess.PIPE, text=True)
    os.close(side)
    stdout, stderr = "", ""
    if terminal:
        while True:
            try:
                stderr += os.read(main, 10_000).decode(errors="replace")
            except OSError:                     # the other side is closed
                break
        stdout = run.stdout.read()
        run.wait()
    else:
        stdout, stderr = run.communicate()
    os.close(main)
    assert run.returncode == 0 and "model:" in stdout and "tokens/s" not in stdout
    if not terminal:
        assert stderr == ""
        return
    for what in ("reading model.safetensors", "generating", r"writing \S+/model"):
        assert re.search(rf"{what}: +\d+%\|.*\[\d\d:\d\d<", stderr), what
    assert re.search(r"\d+tokens/s|\d+ tokens/s", stderr)
    assert stderr.rstrip(" ").endswith("\r")                                # it is wiped out
