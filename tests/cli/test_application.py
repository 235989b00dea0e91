"""Help, errors and Ctrl-C of commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fed.cli.application import resume_command

from ..conftest import ROOT, command


def test_help_of_all_commands_fits_80_columns():
    for name in ("", "simulate", "serve", "join", "runs list", "runs show", "lora join", "init"):
        code, text = command(*name.split(), "--help", columns=80)
        assert code == 0
        assert max(map(len, text.splitlines())) <= 80, name
        assert not re.search(r"[a-z]\.\.\.", text)  # no line of a command is cut
        assert "\\[" not in text


def test_help_lists_options_by_group():
    text = command("simulate", "--help", columns=80).text
    groups = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups[:4] == ["Arguments:", "Options:", "Simulated faults:", "Run:"]
    assert groups[-1] == "Output:"
    assert "The task, such as examples.mnist:task." in text


@pytest.mark.parametrize("line", ["simulat", "runs lst"])
def test_a_misspelled_command_is_corrected_once(line: str):
    code, text = command(*line.split())
    assert code == 2
    assert text.count("Did you mean") == 1


def test_the_command_that_resumes_a_run(monkeypatch):
    monkeypatch.delenv("MLX_FED_COMMAND", raising=False)
    start = ["/usr/lib/mlx_fed/__main__.py", "simulate", "my:task", "--name=a b", "--rounds", "5"]
    assert resume_command("runs/a", start) == (
        "mlx-fed simulate my:task --rounds 5 --resume runs/a"
    )
    again = ["/usr/bin/mlx-fed", "serve", "my:task", "--resume", "a", "--name", "b"]
    assert resume_command("runs/a b", again) == "mlx-fed serve my:task --resume 'runs/a b'"
    assert resume_command("runs/a", ["server.py"]) == "python3 server.py --resume runs/a"
    monkeypatch.setenv("MLX_FED_COMMAND", "./run.sh --rounds 9")
    assert resume_command("runs/a", ["server.py"]) == "./run.sh --rounds 9 --resume runs/a"


def start(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_fed", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "MLX_DISABLE_COMPILE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_prints_the_command_that_resumes_it(number: int, tmp_path: Path):
    options = ("--clients", 2, "--workers", 0, "--runs", tmp_path, "--name", "run", "--rounds")
    task = ("simulate", "tests.helpers.tasks:moons", "-c", "slow=0.05", *options)
    process = start(*task, 200)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline()[:7] for _ in "123"] == ["round 1", "round 2", "round 3"]
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    before, _, arguments = error.strip().partition(" mlx-fed ")
    word = "Interrupted" if number == signal.SIGINT else "Stopped"
    assert before == f"{word}. To resume:"
    assert arguments.endswith(f"--resume {tmp_path / 'run'}")
    num_rounds = len((tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert "\n" not in error.strip()
    resumed = command(*arguments.replace("--rounds 200", f"--rounds {num_rounds + 1}").split())
    assert resumed.code == 0, resumed.text
    assert re.search("Resuming after round [2-9]", resumed.text)


INTERRUPTED_IMPORT = """
import os, signal, sys
from mlx_fed.__main__ import main

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == "mlx_fed.cli.options":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
main()
"""


def test_ctrl_c_during_imports_leaves_no_traceback():
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == -signal.SIGINT
    assert process.stdout + process.stderr == ""
