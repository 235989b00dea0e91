"""The dashboard's server: what it answers, to whom, and what it keeps to itself."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlx_fed import events
from mlx_fed.monitoring.dashboard import DashboardError, serving
from mlx_fed.runs.history import History

from ..conftest import free_port
from ..helpers.run_folders import command_output, make_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def ask(runs: Path) -> Iterator[Any]:
    """Asks a dashboard of the runs."""
    with serving(runs, port=0) as address, httpx.Client(base_url=address) as client:
        yield client.get


def test_the_page_is_strict(ask):
    page = ask("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in page.headers


def test_runs_appear_and_go(ask, runs: Path):
    assert ask("/api/runs").json() == {"runs": []}
    make_run(runs / "one")
    (listed,) = ask("/api/runs").json()["runs"]
    assert (listed["name"], listed["state"]) == ("one", "finished")
    shutil.rmtree(runs / "one")
    assert ask("/api/runs").json() == {"runs": []}
    assert ask("/api/runs/one").status_code == 404


def test_a_history_is_told_from_where_it_was_left(ask, runs: Path):
    history = History(make_run(runs / "one"))
    first = ask("/api/runs/one").json()
    assert [json.loads(line)["round"] for line in first["lines"]] == [1, 2]
    assert (first["reset"], first["more"]) == (True, False)
    path = f"/api/runs/one?start={first['end']}&file_id={first['file_id']}"
    assert ask(path).json()["lines"] == []
    history.add_round({"round": 3})
    history.notify(events.PhaseStarted(phase="train", round=4, of=4, nodes=1))
    with (runs / "one" / "history.jsonl").open("a") as file:
        file.write('{"round": 4, "tr')
    news = ask(path).json()
    assert [json.loads(line)["round"] for line in news["lines"]] == [3]
    assert news["reset"] is False
    history.go_on_after(1)
    again = ask(f"/api/runs/one?start={news['end']}&file_id={news['file_id']}").json()
    assert [json.loads(line)["round"] for line in again["lines"]] == [1]
    assert again["reset"] is True


def test_runs_are_listed_with_their_last_and_best_metrics(ask, runs: Path):
    history = History(make_run(runs / "one", rounds=0, seed=3))
    for number, (loss, hits) in enumerate(((0.9, 0.1), (0.4, 0.8), (0.6, 0.8)), 1):
        evaluated = {"loss": loss, "accuracy": hits, "top-error": 1 - hits, "nodes": ["a"]}
        bytes_moved = {"down": 10, "up": 5}
        history.add_round(
            {"round": number, "evaluate": evaluated, "seconds": {"a": 2.0}, "bytes": bytes_moved}
        )
    expected = {
        "rounds": 3,
        "seconds": 6.0,
        "bytes": 45,
        "metrics": {
            "evaluate/loss": [0.6, 0.4, 2],
            "evaluate/accuracy": [0.8, 0.8, 2],
            "evaluate/top-error": [pytest.approx(0.2), pytest.approx(0.2), 2],
        },
    }
    (listed,) = ask("/api/runs").json()["runs"]
    assert listed["summary"] == expected
    assert listed["settings"] == {"num_rounds": 0, "strategy": {"name": "FedAvg"}}
    with (runs / "one" / "history.jsonl").open("a") as file:
        file.write('{"round": 4}\n{"rou')  # one is complete, and one damaged or not yet written
    assert ask("/api/runs").json()["runs"][0]["summary"]["rounds"] == 4
    history.go_on_after(1)  # resumed: the history begins anew
    summary = ask("/api/runs").json()["runs"][0]["summary"]
    assert summary["rounds"] == 1
    assert summary["metrics"]["evaluate/loss"] == [0.9, 0.9, 1]


def test_labels_are_told_when_they_have_changed(ask, runs: Path):
    folder = make_run(runs / "one")
    assert ask("/api/runs/one").json().get("labels") is None
    found = {"of": 2, "classes": [0, 1], "clients": [[0, [3, 4]]]}
    (folder / "labels.json").write_text(json.dumps(found))
    first = ask("/api/runs/one").json()
    assert first["labels"] == found
    again = ask(f"/api/runs/one?labels={first['labels_version']}").json()
    assert "labels" not in again
    assert again["labels_version"] == first["labels_version"]


def test_a_long_history_comes_in_parts(ask, runs: Path):
    history = History(make_run(runs / "one", rounds=0))
    for number in range(1, 5):
        history.add_round({"round": number, "central": {"sample": "x" * 700_000}})
    told, start, mark, parts = [], 0, "", 0
    while True:
        news = ask(f"/api/runs/one?start={start}&file_id={mark}").json()
        told += [json.loads(line)["round"] for line in news["lines"]]
        start, mark, parts = news["end"], news["file_id"], parts + 1
        if not news["more"]:
            break
    assert told == [1, 2, 3, 4]
    assert parts > 1


def test_nothing_but_runs_below_the_folder_is_served(ask, runs: Path):
    make_run(runs / "one")
    secret = make_run(runs.parent / "secret")
    (runs / "no-run").mkdir()
    (runs / "link").symlink_to(secret)
    for path in ("..%2fsecret", "%2e%2e%2fsecret", "%2e%2e", "secret", "no-run", "one%00", "link"):
        assert ask(f"/api/runs/{path}").status_code == 404, path
    (listed,) = ask("/api/runs").json()["runs"]
    assert (listed["name"], listed["state"]) == ("one", "finished")


def test_a_start_is_a_number(ask, runs: Path):
    make_run(runs / "one")
    for start in ("-1", "x", "", "1e3", "9" * 30, "²"):
        assert ask(f"/api/runs/one?start={start}").status_code == 400, start
    assert ask("/api/runs/one?start=999999").json()["reset"] is True


def test_another_name_for_this_machine_is_refused(ask):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.org", ""):
        for path in ("/", "/api/runs"):
            answer = ask(path, headers={"Host": host})
            assert answer.status_code == 421, host
            assert "evil" not in answer.text
    for host in ("localhost:1", "127.0.0.1:80", "[::1]:80", "[::1]"):
        assert ask("/api/runs", headers={"Host": host}).status_code == 200, host


def test_a_port_in_use_is_an_error(runs: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        what = f"Port {port} is in use on 127.0.0.1"
        with pytest.raises(DashboardError, match=what), serving(runs, port=port):
            pass
        runs.mkdir()
        assert what in command_output("dashboard", runs, "--port", port, code=1)
        task = ("simulate", "tests.helpers.simulated:TASK", "--runs", runs, "--dashboard")
        assert what in command_output(*task, "--dashboard-port", port, code=1)
        assert list(runs.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.20", "example.org", "::"])
def test_beyond_this_machine_it_has_to_be_told(runs: Path, host: str):
    runs.mkdir()
    message = command_output("dashboard", runs, "--host", host, "--port", free_port(), code=1)
    assert "is not this machine only" in message
    assert "--insecure" in message


def test_no_such_folder(tmp_path: Path):
    assert "There is no folder" in command_output("dashboard", tmp_path / "none", code=1)
