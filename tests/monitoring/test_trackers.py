"""Trackers: what they are told, and that none ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_fed.errors import FedError
from mlx_fed.monitoring.trackers import Tracking, find_tracker

from ..helpers.simulated import simulate
from ..helpers.run_folders import command_output

told: list[tuple[Any, ...]] = []


class Own:
    """A tracker of a user's own, in ten lines."""

    def start(self, name, folder, settings):
        told.append(("start", name, settings["num_rounds"]))

    def log(self, number, figures):
        told.append(("log", number, figures["train/loss"], figures["evaluate/accuracy"]))

    def finish(self):
        told.append(("finish",))


class Failing(Own):
    def log(self, number, figures):
        raise RuntimeError("no \x1b[31mroute to host")


@pytest.fixture(autouse=True)
def nothing_told():
    told.clear()


def run(tmp_path: Path, name: str, tracker: Any, **options: Any):
    tracking = Tracking(name, tracker)
    result = simulate(None, tmp_path, num_clients=4, name="run", listeners=(tracking,), **options)
    tracking.close()
    return result


def test_a_tracker_is_told_of_the_run(tmp_path: Path):
    result = run(tmp_path, "own", Own())
    assert told[0] == ("start", "run", 3)
    assert [each[1] for each in told[1:-1]] == [1, 2, 3]
    assert told[2][2] == result.rounds[1]["train"]["loss"]
    assert told[-1] == ("finish",)


def test_a_tracker_that_fails_ends_no_run_and_says_so_once(tmp_path: Path, capsys):
    result = run(tmp_path, "failing", Failing())
    assert len(result.rounds) == 3
    assert told == [("start", "run", 3)]
    said = capsys.readouterr().err
    assert (
        said.count("The tracker 'failing' failed; the run continues without it: RuntimeError: no")
        == 1
    )
    assert "\x1b" not in said


def test_a_command_tracks_with_a_users_own(tmp_path: Path):
    shared = (
        "simulate",
        "tests.helpers.simulated:TASK",
        "--clients",
        4,
        "--workers",
        0,
        "--rounds",
        1,
    )
    command_output(
        *shared, "--runs", tmp_path, "--quiet", "--track", "tests.monitoring.test_trackers:Own"
    )
    assert [each[0] for each in told] == ["start", "log", "finish"]


def test_tensorboard_gets_event_files(tmp_path: Path):
    run(tmp_path, "tensorboard", find_tracker("tensorboard"))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train/loss", b"evaluate/accuracy", b"bytes/up", b"num_rounds"):
        assert name in content


@pytest.mark.slow
def test_wandb_works_offline(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb, which is not a part of the tests' set-up")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tmp_path, "wandb", find_tracker("wandb"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mlflow", "There is no tracker 'mlflow': choose tensorboard, wandb"),
        ("no_such_module:Own", "cannot be imported"),
        ("tests.monitoring.test_trackers:No", "Cannot create the tracker"),
    ],
)
def test_a_tracker_that_is_not_there(name: str, what: str):
    with pytest.raises(FedError, match=what):
        find_tracker(name)


def test_a_tracker_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(FedError, match=r'pip install -e "\.\[wandb\]"'):
        find_tracker("wandb")
