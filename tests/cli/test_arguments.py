"""What commands make of their arguments."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ..conftest import Ended, command

pytestmark = pytest.mark.usefixtures("uncompiled")

OWN = """
from flwr.serverapp.strategy import FedAvg

def make(proximal=0.0):
    return FedAvg(fraction_train=0.5, min_train_nodes=1)

ready = FedAvg(fraction_train=0.5, min_train_nodes=1)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> None:
    """Commands look for modules in the folder that they are run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("own", "my_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def simulate(*arguments: object) -> Ended:
    small = ("--clients", 4, "--rounds", 1, "--workers", 0, "--name", "run")
    return command("simulate", "tests.helpers.simulated:TASK", *small, *arguments)


def record(folder: Path) -> dict:
    return json.loads((folder / "runs" / "run" / "history.jsonl").read_text())


@pytest.mark.parametrize("name", ["make", "ready"])
def test_a_strategy_of_ones_own_is_taken_as_it_is(name: str, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    run = simulate("--strategy", f"own:{name}")
    assert run.code == 0, run.text
    assert len(record(tmp_path)["train"]["nodes"]) == 2


@pytest.mark.parametrize("arguments", [("--fraction", 1.0), ("-s", "fraction-train=1.0")])
def test_a_strategy_that_is_made_already_takes_no_arguments(arguments, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    run = simulate("--strategy", "own:ready", *arguments)
    assert run.code == 1
    assert "'own:ready' is a strategy already" in run.text
    assert "leave out fraction-train" in run.text


def test_the_fraction_is_a_named_strategys(tmp_path: Path):
    run = simulate("--fraction", 0.25, "--fraction-evaluate", 0.5)
    assert run.code == 0, run.text
    phases = ("train", "evaluate")
    assert [len(record(tmp_path)[phase]["nodes"]) for phase in phases] == [1, 2]


def test_what_a_module_does_not_find_is_not_the_module(tmp_path: Path):
    (tmp_path / "my_task.py").write_text("import my\n")
    run = command("simulate", "my_task:task")
    assert run.code == 1
    assert "No module named 'my'" in run.text


FROM_SETTINGS = """
from tests.helpers.simulated import TASK

def make(config):
    config["hidden"]
    return TASK
"""


def test_a_failure_of_the_task_shows_its_own_lines_alone(tmp_path: Path):
    (tmp_path / "my_task.py").write_text(FROM_SETTINGS)
    run = command("simulate", "my_task:make", "--clients", 4)
    assert run.code == 1
    assert "no setting hidden: give it a value" in run.text
    assert 'my_task.py", line 5, in make' in run.text
    assert "mlx_fed/cli/" not in run.text


def test_a_flower_strategy_that_waits_for_no_nodes_is_told_what_it_lacks():
    run = simulate("--strategy", "DifferentialPrivacyServerSideFixedClipping")
    assert run.code == 1
    assert "required positional arguments: 'strategy'" in run.text


def test_faults_of_the_command_line(tmp_path: Path):
    slow = ("--mean-delay", 10, "--round-timeout", 4)
    attack = ("--hostile", 1, "--attack", "scale", "--scale", 0)
    run = simulate("--clients", 20, *slow, *attack)
    assert run.code == 0, run.text
    late = [refused["reason"] for refused in record(tmp_path)["refused"]]
    assert late
    assert all(reason.startswith("no reply within 4 seconds") for reason in late)


def test_which_replies_count_on_the_command_line(tmp_path: Path):
    attack = ("--hostile", 0.2, "--attack", "scale", "--scale", 1e6)
    limits = ("--max-update-norm", 20, "--min-replies", 2, "--max-repeats", 1)
    run = simulate("--clients", 20, *attack, *limits)
    assert run.code == 0, run.text
    large = record(tmp_path)["refused"]
    assert large
    assert all("times the median of" in refused["reason"] for refused in large)
    assert len(record(tmp_path)["train"]["nodes"]) == 20 - len(large)
    settings = json.loads((tmp_path / "runs" / "run" / "settings.json").read_text())
    assert (settings["min_replies"], settings["max_repeats"]) == (2, 1)
    run = simulate("--max-examples", 1, "--min-replies", 0)
    assert run.code == 2
    assert "--min-replies" in run.text
