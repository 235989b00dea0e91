"""A server that waits costs its machine nothing, whoever came and went before."""

from __future__ import annotations

import time
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from .running import Running, roll_call_answer


@pytest.mark.parametrize(
    "how",
    [
        "left",
        pytest.param("died", marks=pytest.mark.slow),
        pytest.param("was refused", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_waits_for_nodes_sleeps(start, tmp_path, how):
    running = Running(start, tmp_path, secure=False, nodes=0, arguments=("--min-nodes", 2))
    if how == "died":
        node = running.join(0)
        running.server.line("node-0 joined")
        node.end()
        running.server.line("node-0 left")
    else:
        node = running.hostile()
        name = "" if how == "was refused" else "short"
        node.send(roll_call_answer(node.asked(), name, 0), 0.0)
        running.server.line("short joined" if name else "1 to 64 printable")
        node.leave()
    time.sleep(0.5)
    before = seconds_of(running.server.process.pid)
    time.sleep(2)
    assert seconds_of(running.server.process.pid) - before < 0.5


def seconds_of(process: int) -> float:
    """Seconds that a process has computed."""
    numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / 100
