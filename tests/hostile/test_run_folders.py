"""Run folders that somebody else could write into, as commands and the page read them."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from mlx_fed.monitoring.dashboard import serving

from ..conftest import python
from .acts.run_files import ACTS, ROUND

SECRET = "the words of somebody's letter"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of one round."""
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text('{"num_rounds": 3}')
    (folder / "history.jsonl").write_text(json.dumps(ROUND) + "\n")
    return folder


def get(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def commands(run: Path, *lines: str) -> str:
    """What ``mlx-fed runs`` prints, in a process that has ten seconds and a gigabyte."""
    code = """
import contextlib, resource, signal, sys
from mlx_fed.cli.main import app
signal.alarm(20)
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        app(["runs", *line.split()])
"""
    arguments = [each.format(runs=f"--runs {run.parent}") for each in lines]
    whole = f"import sys; sys.argv[1:] = {arguments!r}\n" + code
    return python(whole).stdout


LISTED = ("list {runs}", "show run {runs}", "export run {runs}", "export run --json {runs}")


@pytest.mark.parametrize("name", ["settings.json", "status.json", "history.jsonl", "labels.json"])
@pytest.mark.parametrize(
    "kind",
    [
        "link",
        pytest.param("pipe", marks=pytest.mark.slow),
        pytest.param("device", marks=pytest.mark.slow),
    ],
)
def test_only_plain_files_are_read(run, tmp_path, name, kind):
    letter = tmp_path / "letter"
    letter.write_text(json.dumps({"state": SECRET, "round": 1, SECRET: [SECRET]}))
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(letter if kind == "link" else "/dev/zero")
    with serving(run.parent, port=0) as page:
        for path in ("api/runs", "api/runs/run"):
            assert SECRET not in get(page + path)
    if kind != "link" or name == "history.jsonl":
        assert SECRET not in commands(run, *LISTED)


@pytest.mark.parametrize("what", [*ACTS, "settings"])
def test_what_was_changed_by_hand_is_passed_over(run, what):
    if what == "settings":
        for name in ("settings.json", "status.json", "labels.json"):
            (run / name).write_text("[" * 100_000)
    else:
        with (run / "history.jsonl").open("a") as file:
            file.write(ACTS[what]() + "\n")
    shown = commands(run, *LISTED)
    assert "train/loss" in shown
    assert "0.5" in shown


@pytest.mark.parametrize("name", ["settings.json", "status.json"])
def test_a_file_of_other_kinds_of_values_is_passed_over(run, name):
    of_no_kind = {
        "num_rounds": [],
        "strategy": 5,
        "refused": 3,
        "failed": [{}, 1],
        "state": "running",
    }
    (run / name).write_text(json.dumps({**of_no_kind, "host": [], "pid": "x"}))
    assert "0.5" in commands(run, *LISTED)


def test_nothing_that_is_printed_steers_a_terminal(run):
    steering = "\x1b[2J\x1b]0;owned\x07"
    record = {**ROUND, "train": {"loss": 0.5, steering: 1.0}}
    (run / "history.jsonl").write_text(json.dumps(record) + "\n")
    (run / "status.json").write_text(json.dumps({"state": steering, "host": "a", "pid": 1}))
    shown = commands(run, *LISTED)
    assert "owned" in shown
    assert "\x1b" not in shown
