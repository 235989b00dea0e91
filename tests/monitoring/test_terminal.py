"""What a run looks like, in a terminal and in a file."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_fed.runs.history import History, Listener
from mlx_fed.monitoring.json_lines import JsonLines
from mlx_fed.monitoring.server_terminal import ServerTerminal, server_line
from mlx_fed.monitoring.units import format_seconds

from ..conftest import ROOT
from ..helpers.tasks import moons

FAILED = "The output failed and nothing more is shown; the run continues: "


def record(number: int, loss: float, accuracy: float) -> dict:
    return {
        "round": number,
        "train": {"loss": 2 * loss, "nodes": ["node-0"]},
        "evaluate": {"loss": loss, "accuracy": accuracy},
        "seconds": {"train": 0.25, "evaluate": 0.25},
        "bytes": {"down": 3_000_000, "up": 1_000_000},
    }


def test_the_median_stands_beside_a_mean_that_is_far_from_it():
    """One node alone can make a mean what it likes."""
    losses, accuracies = (0.25, 0.5, 0.75, -1e30), (0.5, 0.6, 0.7, 1.0)
    each = {
        f"node-{node}": {"loss": loss, "accuracy": accuracy}
        for node, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True))
    }
    shown = record(1, -2.5e29, 0.7) | {"each": {"evaluate": each}}
    line = server_line(events.RoundFinished(shown))
    assert "   loss -250000000000000" in line
    assert " (median 0.3750)   accuracy 0.7000   0.50 s" in line
    assert "median" not in server_line(events.RoundFinished(record(1, 0.5, 0.7)))


def show(folder: Path, progress: Listener, rounds: int) -> None:
    """A run of one node, in a folder that need not be there."""
    folder.mkdir(exist_ok=True)
    history = History(folder, (progress,))
    history.notify(events.ServerReady(address="127.0.0.1:8080", secure=False))
    history.write_settings({"num_rounds": rounds})
    history.notify(events.NodesAwaited(nodes=0, needed=1))
    history.notify(events.NodeJoined(node="[red]node-0", nodes=1))
    for number in range(len(history.rounds) + 1, rounds + 1):
        begin(history, "train", number, rounds, answered=1)
        begin(history, "evaluate", number, rounds, answered=1)
        history.add_round(record(number, 1 / number, 1 - 0.5 / number))
    history.notify(events.RunFinished(seconds=12.34, model="runs/one/model.safetensors"))


def begin(
    history: History, phase: str, number: int, of: int, nodes: int = 1, answered: int = 0
) -> None:
    moved, seconds_left = history.so_far(of - number + 1)
    now = {"phase": phase, "round": number, "of": of, "nodes": nodes}
    now |= {"bytes": moved, "seconds_left": seconds_left}
    history.notify(events.PhaseStarted(**now, answered=0))
    history.notify(events.RepliesArrived(**now, answered=answered))


def test_a_file_gets_plain_lines_and_a_summary(tmp_path: Path):
    written = io.StringIO()
    console = Console(file=written, highlight=False, width=60)
    show(tmp_path, ServerTerminal(console), rounds=10)
    lines = written.getvalue().splitlines()
    assert lines[:4] == [
        "Server ready on 127.0.0.1:8080",
        "Waiting for nodes: 0 of 1",
        "[red]node-0 joined (1 in all)",
        "round 1    train loss 2.0000   loss 1.0000   accuracy 0.5000   0.50 s",
    ]
    assert lines[-3:] == [
        "round 10   train loss 0.2000   loss 0.1000   accuracy 0.9500   0.50 s",
        "In 10 rounds: train loss 2.0000 -> 0.2000, loss 1.0000 -> 0.1000, "
        "accuracy 0.5000 -> 0.9500",
        "Finished in 12.3 s. The model: runs/one/model.safetensors",
    ]
    assert len(lines) == 15


def test_the_summary_is_of_the_whole_run_that_was_resumed(tmp_path: Path):
    show(tmp_path, ServerTerminal(Console(file=io.StringIO())), rounds=4)
    written = io.StringIO()
    history = History(tmp_path, (ServerTerminal(Console(file=written, highlight=False)),))
    history.write_settings({"num_rounds": 5})
    history.go_on_after(4)
    assert history.so_far(2) == (16_000_000, 1.0)
    history.add_round(record(5, 0.25, 0.75))
    history.notify(events.RunFinished(seconds=1.0, model="model.safetensors"))
    assert "In 5 rounds: train loss 2.0000 -> 0.5000, loss 1.0000 -> 0.2500" in written.getvalue()


def test_of_many_that_are_left_out_a_few_are_named_and_the_others_counted(tmp_path: Path):
    written = io.StringIO()
    history = History(tmp_path, (ServerTerminal(Console(file=written, highlight=False)),))
    refused = []
    for phase, failures in (("train", 12), ("evaluate", 10)):
        begin(history, phase, 1, 1, nodes=100)
        for number in range(failures):
            refused.append({"node": f"node-{number}", "phase": phase, "reason": "no answer"})
            history.notify(events.ReplyRefused(**refused[-1]))
    history.add_round({**record(1, 1, 1), "refused": refused})
    lines = written.getvalue().splitlines()
    assert lines[:10] == [f"node-{k} left out of train: no answer" for k in range(10)]
    assert lines[10:20] == [f"node-{k} left out of evaluate: no answer" for k in range(10)]
    assert lines[20] == "2 more left out of train: the reasons are in history.jsonl"
    assert lines[21].startswith("round 1 ")


def test_one_round_has_nothing_to_compare(tmp_path: Path):
    written = io.StringIO()
    show(tmp_path, ServerTerminal(Console(file=written, highlight=False)), rounds=1)
    assert "In 1 rounds" not in written.getvalue()


def test_a_terminal_has_a_live_line_which_is_gone_in_the_end(tmp_path: Path):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    show(tmp_path, ServerTerminal(console), rounds=2)
    shown = written.getvalue()
    assert "Waiting for nodes: 0 of 1" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back
    assert "The model: runs/one/model.safetensors" in shown.split("\x1b[?25h")[1]


def test_the_live_line_has_bytes_and_the_time_left(tmp_path: Path):
    progress = ServerTerminal(Console(file=io.StringIO(), force_terminal=True, width=120))
    history = History(tmp_path, (progress,))
    for number in (1, 2, 3):
        begin(history, "train", number, 4, nodes=8, answered=3)
        shown = progress.bars.progress.tasks[0].description
        history.add_round(record(number, 1, 1))
    progress.close()
    assert shown == "round 3/4  train  3 of 8 nodes  8.0 MB  about 1 s left"


def test_programs_get_an_object_a_line(tmp_path: Path):
    written = io.StringIO()
    show(tmp_path, JsonLines(written), rounds=2)
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [each["event"] for each in told] == [
        *("serving", "started", "waiting", "joined"),
        *("phase", "phase", "round", "phase", "phase", "round", "finished"),
    ]
    assert told[6]["train"]["loss"] == 2.0


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("-c slow=0.2 | head -1", "BrokenPipeError: "),
        ("-c slow=0.2 --json | head -1", "BrokenPipeError: "),
        ("-c slow=0.2 2>&1 | head -1", ""),
        ("> /dev/full", "OSError: "),
        ("--json > /dev/full", "OSError: "),
    ],
)
def test_a_run_whose_output_fails_goes_on(output: str, said: str, tmp_path: Path):
    if "/dev/full" in output and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    simulate = [sys.executable, "-m", "mlx_fed", "simulate", "tests.helpers.tasks:moons"]
    options = ["--clients", "2", "--workers", "0", "--runs", str(tmp_path), "--name", "run"]
    run = f"set -o pipefail; {shlex.join([*simulate, *options])} {output}"
    done = subprocess.run(
        ["bash", "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == ("head" in output)
    assert done.stderr.startswith(FAILED + said if said else "")
    assert len(done.stderr.splitlines()) == bool(said)
    assert mx.load(str(tmp_path / "run" / "model.safetensors"))
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("option", [(), ("--json",)], ids=["lines", "JSON"])
def test_a_node_whose_output_fails_goes_on(option: tuple[str, ...], tmp_path: Path):
    nodes: list[subprocess.Popen[str]] = []

    def join(event: events.Event) -> None:
        if isinstance(event, events.ServerReady):
            unread, output = os.pipe()
            os.close(unread)
            command = [
                sys.executable,
                "-m",
                "mlx_fed",
                "join",
                "tests.helpers.tasks:moons",
                *option,
            ]
            command += ["--server", event.address]
            streams = {"stdout": output, "stderr": subprocess.PIPE, "text": True}
            nodes.append(subprocess.Popen(command, cwd=ROOT, **streams))
            os.close(output)

    try:
        options = {"min_nodes": 1, "wait": 60, "port": 0, "runs": tmp_path, "listeners": (join,)}
        result = fed.serve(moons, num_rounds=2, **options)
        assert [record["train"]["nodes"] for record in result.rounds] == [["node-0"]] * 2
        _, said = nodes[0].communicate(timeout=60)
        assert nodes[0].returncode == 0
        assert said.startswith(FAILED + "BrokenPipeError: ")
        assert len(said.splitlines()) == 1
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def test_times_are_written_as_people_do():
    assert [format_seconds(seconds) for seconds in (0.4, 59.6, 125, 7260)] == [
        *("0 s", "1 min 0 s", "2 min 5 s", "2 h 1 min"),
    ]


RESIZED = """
import time
from rich.console import Console
from mlx_fed.monitoring.progress_bars import ProgressBars

bars = ProgressBars(Console())
print("line\\n" * 30)
for second in range(100):
    bars.update("run", "round 1/3  train  3 of 8 nodes  8 MB  about 3 s left", second, 100)
    bars.update("loading", f"Downloading a model of a hundred gigabytes {second}", second, 100)
    time.sleep(0.05)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_progress_bars_are_drawn_once_after_the_terminal_was_resized(tmp_path: Path):
    (tmp_path / "bars.py").write_text(RESIZED)
    socket = f"mlx-fed-{os.getpid()}"

    def tmux(*arguments: object) -> str:
        command = ["tmux", "-L", socket, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout

    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    program = f"PYTHONPATH={path} {sys.executable} {tmp_path / 'bars.py'}"
    tmux("new-session", "-d", "-x", 100, "-y", 24, program)
    try:
        for _ in range(300):
            if "Downloading" in tmux("capture-pane", "-p"):
                break
            time.sleep(0.1)
        for width in (60, 45, 100, 80):
            tmux("resize-window", "-x", width, "-y", 24)
            time.sleep(0.6)
        screen = tmux("capture-pane", "-p", "-S", "-")
    finally:
        tmux("kill-server")
    assert (screen.count("round 1/3"), screen.count("Downloading")) == (1, 1), screen
