"""A node that is online and does not reply costs its grace time a few times, not in every round."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from ..helpers.run_folders import read_history
from .running import HostileNode, Running, as_it_came, roll_call_answer


@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_silent_node_is_set_aside_until_it_replies(start, tmp_path, secure):
    running = Running(start, tmp_path, secure, nodes=2, arguments=("--grace", 1.0))
    silent = running.hostile()
    silent.send(roll_call_answer(silent.asked(), "hostile", silent.number), 0.0)
    with heartbeats_of(silent):
        question = silent.asked()
        assert question.metadata.message_type == "train"
        running.server.line("hostile left out of train: no reply within 1")
        running.server.line("not asked: it missed 3 messages", timeout=60)
        running.goes_on(3)
        records = read_history(tmp_path / "runs" / "run")
        reasons = [
            refusal["reason"]
            for record in records
            for refusal in record["refused"]
            if refusal["node"] == "hostile"
        ]
        assert all(refusal["missing"] for record in records for refusal in record["refused"])
        assert len([reason for reason in reasons if reason.startswith("no reply")]) < 6
        assert not any("hostile" in record["train"]["nodes"] for record in records)

        silent.send(as_it_came(question), 0.0)  # too late, and a sign of the node
        deadline = time.monotonic() + 60
        while not any("hostile" in each["train"]["nodes"] for each in records):
            assert time.monotonic() < deadline, running.server.text[-3000:]
            question = silent.asked()
            if question.metadata.message_type == "train":
                silent.send(as_it_came(question), 0.0)
            records = read_history(tmp_path / "runs" / "run")


@contextmanager
def heartbeats_of(node: HostileNode) -> Iterator[None]:
    """Heartbeats of a node that does nothing else by itself."""
    end = threading.Event()

    def beat() -> None:
        while not end.wait(2.0):
            node.heartbeat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    yield
    end.set()
    thread.join()
