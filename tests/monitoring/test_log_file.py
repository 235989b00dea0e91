"""``--log-file``: what happened with time and level, for whoever was not at the terminal."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from mlx_fed import events
from mlx_fed.errors import FedError
from mlx_fed.monitoring.log_file import log_lines
from mlx_fed.monitoring.server_terminal import server_line

from ..conftest import command
from ..helpers.fleet_commands import join, serve

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
EVENTS = (
    events.NodeInvited("hospital", "mlxfed-secret", "mlx-fed join"),
    events.NodeJoined("hospital", 1),
    events.ReplyRefused("hospital", "train", "it is late\nFAKE LINE"),
    events.RunAborted("no nodes"),
)


def written(path: Path) -> list[str]:
    with log_lines(path, server_line) as listener:
        for event in EVENTS:
            listener(event)
    return path.read_text().splitlines()


def test_lines_have_a_time_and_a_level(tmp_path):
    lines = written(tmp_path / "logs" / "server.log")
    assert [re.fullmatch(rf"{TIME} (\w+) +(.*)", line).groups() for line in lines] == [
        ("INFO", "hospital is invited"),
        ("INFO", "hospital joined (1 in all)"),
        ("WARNING", "hospital left out of train: it is late FAKE LINE"),
        ("ERROR", "The run ends: no nodes"),
    ]


def test_json_has_the_events_fields_but_no_token(tmp_path):
    lines = [json.loads(line) for line in written(tmp_path / "server.jsonl")]
    assert [line["level"] for line in lines] == ["INFO", "INFO", "WARNING", "ERROR"]
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)
    assert lines[1] | {"time": 0} == {
        "time": 0,
        "level": "INFO",
        "event": "joined",
        "node": "hospital",
        "nodes": 1,
    }
    assert "secret" not in (tmp_path / "server.jsonl").read_text()


def test_it_is_appended_to_and_may_be_rotated(tmp_path):
    path = tmp_path / "server.log"
    assert len(written(path)) == 4
    assert len(written(path)) == 8
    with log_lines(path, server_line) as listener:
        path.rename(tmp_path / "server.log.1")
        listener(EVENTS[1])
    assert len(path.read_text().splitlines()) == 1


def test_what_ends_a_run_is_the_last_line(tmp_path):
    path = tmp_path / "server.log"
    with pytest.raises(KeyboardInterrupt), log_lines(path, server_line):
        raise KeyboardInterrupt
    with pytest.raises(FedError), log_lines(path, server_line):
        raise FedError("no server")
    ends = [line.split(" ", 1)[1] for line in path.read_text().splitlines()]
    assert ends == ["ERROR   Ended by KeyboardInterrupt", "ERROR   Ended by FedError: no server"]


def test_a_file_that_cannot_be_written_is_said_at_once():
    run = command("simulate", "tests.helpers.tasks:moons", "--log-file", "/proc/no/file.log")
    assert run.code == 1
    assert "Cannot write the log file /proc/no/file.log" in run.text


def test_server_and_nodes_write_theirs(start, tmp_path):
    options = ("--rounds", 1, "--min-nodes", 1)
    server, address = serve(start, tmp_path, *options, "--log-file", tmp_path / "server.jsonl")
    node = join(start, address, 0, "--log-file", tmp_path / "node.log", "--quiet")
    assert (server.ends(), node.ends()) == (0, 0)
    names = [json.loads(line)["event"] for line in (tmp_path / "server.jsonl").open()]
    assert names[0] == "serving"
    assert names[-1] == "finished"
    assert {"started", "joined", "round"} <= set(names)
    text = (tmp_path / "node.log").read_text()
    assert re.search(rf"(?m)^{TIME} INFO    Joined ", text)
    assert "The run is over." in text
    assert node.text == ""
