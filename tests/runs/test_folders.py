"""Run folders as they are read afterwards: list, compare, export, remove."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest

from mlx_fed import events
from mlx_fed.runs import folders, status
from mlx_fed.runs.history import History
from ..conftest import command
from ..helpers.run_folders import OLD, command_output, make_run


def test_runs_are_listed_the_newest_first(tmp_path: Path):
    for name in ("one", "two"):
        make_run(tmp_path / name)
    os.utime(tmp_path / "one" / "history.jsonl", (1, 1))
    os.utime(tmp_path / "one" / "settings.json", (1, 1))
    (tmp_path / "no-run").mkdir()
    lines = command_output("runs", "list", "--runs", tmp_path).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["two", "finished", "2", "of"],
        ["one", "finished", "2", "of"],
    ]
    assert lines[0].split() == ["run", "state", "rounds", "train/loss"]
    assert lines[1].split()[-1] == "0.5"


def listed(*options: object) -> list[str]:
    """The names of runs that ``runs list`` prints, in order."""
    lines = command_output("runs", "list", *options).splitlines()
    return [line.split()[0] for line in lines[1:]]


def test_runs_are_sorted_and_filtered(tmp_path: Path):
    for number, rate in ((1, 0.1), (2, 0.02), (3, 0.3)):
        make_run(tmp_path / f"run-{number}", rounds=number, config={"lr": rate})
    History(make_run(tmp_path / "empty", rounds=0))
    runs = ("--runs", tmp_path)
    by_rate = ["run-2", "run-1", "run-3"]
    assert listed(*runs, "--sort", "config.lr") == [*by_rate, "empty"]  # which has no value
    assert listed(*runs, "--sort", "config.lr", "--reverse") == ["empty", *by_rate[::-1]]
    assert listed(*runs, "--where", "config.lr<0.2", "--sort", "run") == ["run-1", "run-2"]
    assert listed(*runs, "--where", "train/loss<=0.5", "--where", "config.lr!=0.3") == ["run-2"]
    assert listed(*runs, "--where", "run=empty") == ["empty"]
    assert listed(*runs, "--where", "strategy.name=FedAdam") == []
    message = command_output("runs", "list", *runs, "--sort", "lr", code=1)
    assert "No run has a column 'lr'" in message
    message = command_output("runs", "list", *runs, "--where", "config.lr", code=1)
    assert "is not a condition, such as" in message


def test_columns_that_fit_are_shown_and_others_named(tmp_path: Path):
    History(make_run(tmp_path / "one")).add_round(
        {"round": 3, "evaluate": {f"a-metric-of-a-long-name-{k}": 0.5 for k in range(5)}}
    )
    show = ("runs", "show", "one", "--runs", tmp_path)
    text = command(*show, columns=80).text
    rows = text[text.index("round  train/loss") :].splitlines()
    assert all(len(line) <= 80 for line in rows[:4])
    assert rows[4].startswith("More with --columns: evaluate/a-metric-of-a-long-name-1")
    text = command(*show, "--columns", "seconds/*,refused").text
    assert "round  seconds/train  refused" in text
    assert "train/loss" not in text


def test_no_runs(tmp_path: Path):
    assert "No runs in" in command_output("runs", "list", "--runs", tmp_path)
    message = command_output("runs", "list", "--runs", tmp_path / "none", code=1)
    assert "There is no folder" in message
    assert "--runs" in message


@pytest.mark.parametrize("what", ["show", "compare", "export", "remove"])
def test_no_such_run(tmp_path: Path, what: str):
    make_run(tmp_path / "one")
    message = command_output("runs", what, "two", "--runs", tmp_path, code=1)
    assert "There is no run 'two'" in message
    assert "The newest there: one." in message


def test_one_run_is_shown(tmp_path: Path):
    make_run(tmp_path / "one", seed=7)
    shown = command_output("runs", "show", "one", "--runs", tmp_path)
    assert "strategy.name" in shown
    assert "seed" in shown
    assert "train/loss" in shown


def test_why_a_run_stopped_and_who_was_kept_out_is_shown(tmp_path: Path):
    history = History(make_run(tmp_path / "one"))
    history.write_settings({"num_rounds": 5})
    history.notify(events.NodeRefused(node="\x1b[2Jnode-3", reason="its model is another"))
    left_out = [
        {"node": f"node-{k}", "phase": "train", "reason": f"no water in {k}"} for k in (1, 2)
    ]
    history.notify(events.ReplyRefused(**left_out[0]))
    history.add_round({"round": 3, "refused": left_out[:1]})
    history.notify(events.ReplyRefused(**left_out[1]))
    with pytest.raises(RuntimeError), history.held():
        raise RuntimeError("Round 4: none of 2 nodes")
    shown = command_output("runs", "show", "one", "--runs", tmp_path).splitlines()
    assert shown[1:4] == [
        "Stopped: Round 4: none of 2 nodes",
        "\N{REPLACEMENT CHARACTER}[2Jnode-3 is not let in: its model is another",
        "node-2 is left out of train: no water in 2",
    ]


def test_what_settings_differ_in_is_compared(tmp_path: Path):
    config = {"lr": 0.1, "run-id": "x"}
    make_run(tmp_path / "one", config=config, seed=1)
    make_run(tmp_path / "two", config={"lr": 0.2, "run-id": "y"}, seed=1)
    found = folders.read_all([tmp_path / "one", tmp_path / "two"])
    assert folders.differences(found) == {"config.lr": [0.1, 0.2]}
    shown = command_output("runs", "compare", "one", "two", "--runs", tmp_path)
    assert "config.lr" in shown
    assert "seed" not in shown


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path):
    make_run(tmp_path / "a" / "run")
    make_run(tmp_path / "b" / "run")
    found = folders.read_all(
        [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "a" / "run"]
    )
    assert [run.name for run in found] == ["a/run", "b/run"]


def test_a_name_that_could_be_two_runs_is_asked_about(tmp_path: Path, monkeypatch):
    make_run(tmp_path / "runs" / "x")
    make_run(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    message = command_output("runs", "show", "x", code=1)
    assert "'x' is a run in runs/ and another one here: write" in message
    assert command_output("runs", "show", tmp_path / "x")


def test_a_half_written_line_is_passed_over_and_said(tmp_path: Path):
    folder = make_run(tmp_path / "one")
    with (folder / "history.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\x00\n[1]\n{"round": 3, "train": {"lo')
    found = folders.read(folder)
    assert [record["round"] for record in found.rounds] == [1, 2]
    assert found.damaged == 3
    assert "3 damaged lines" in command_output("runs", "show", "one", "--runs", tmp_path)


def test_a_run_of_an_older_version_is_read(tmp_path: Path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "history.jsonl").write_text(OLD)
    (folder / "settings.json").write_text("{half")
    found = folders.read(folder)
    assert (found.state, found.settings, found.damaged) == ("", {}, 0)
    assert found.rounds[0]["evaluate"]["loss"] == 1.5
    assert "old" in command_output("runs", "list", "--runs", tmp_path)


def test_figures_are_exported(tmp_path: Path):
    make_run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "history.jsonl").write_text(OLD)
    rows = list(
        csv.DictReader(
            io.StringIO(command_output("runs", "export", "one", "two", "--runs", tmp_path))
        )
    )
    assert [(row["run"], row["round"]) for row in rows] == [
        ("one", "1"),
        ("one", "2"),
        ("two", "1"),
    ]
    assert [row["train/loss"] for row in rows] == ["1.0", "0.5", "2.0"]
    assert [row["evaluate/loss"] for row in rows] == ["", "", "1.5"]
    output = tmp_path / "all.json"
    command_output("runs", "export", "one", "--json", "-o", output, "--runs", tmp_path)
    (exported,) = json.loads(output.read_text())
    assert exported["rounds"][1]["train"]["loss"] == 0.5


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path):
    make_run(tmp_path / "one")
    output = tmp_path / "no" / "where.csv"
    message = command_output("runs", "export", "one", "-o", output, "--runs", tmp_path, code=1)
    assert "Cannot write" in message
    assert "-o" in message


@pytest.mark.parametrize("what", ["simulate", "serve"])
def test_a_place_for_runs_that_takes_no_folder_is_an_error(tmp_path: Path, what: str):
    (tmp_path / "file").write_text("")
    port = ("--port", 0) if what == "serve" else ()
    task = ("tests.helpers.simulated:TASK", "--runs", tmp_path / "file", *port)
    message = command_output(what, *task, code=1)
    assert "Cannot make the run's folder" in message
    assert "Choose another place with --runs." in message


def test_a_name_that_is_taken_is_an_error(tmp_path: Path):
    folder = make_run(tmp_path / "one")
    before = (folder / "settings.json").read_bytes()
    task = ("simulate", "tests.helpers.simulated:TASK", "--runs", tmp_path, "--name", "one")
    assert "There is a run named 'one' in" in command_output(*task, code=1)
    assert (folder / "settings.json").read_bytes() == before


def test_a_run_is_removed_if_it_is_one_and_is_over(tmp_path: Path):
    folder = make_run(tmp_path / "one")
    assert "Aborted" in command_output("runs", "remove", "one", "--runs", tmp_path, code=1)
    with History(folder).held():
        message = command_output("runs", "remove", "one", "-y", "--runs", tmp_path, code=1)
    assert "is running: end it first" in message
    assert folder.is_dir()
    command_output("runs", "remove", "one", "-y", "--runs", tmp_path)
    assert not folder.exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(folders.RunsError, match="no run's folder"):
        folders.remove(tmp_path / "mine")


# -- what a run is doing now ---------------------------------------------------------------


def test_a_run_says_what_it_is_doing(tmp_path: Path):
    history = History(tmp_path)
    history.notify(events.NodeInvited(node="a", token="secret", command="join"))
    history.notify(events.NodeJoined(node="a", nodes=1))
    history.notify(events.PhaseStarted(phase="train", round=1, of=3, nodes=2, answered=0))
    history.write_settings({})
    now = status.read(tmp_path)
    assert (now["state"], now["round"], now["of"], now["answered"]) == ("running", 1, 3, 0)
    assert [(notice["event"], notice["node"]) for notice in now["notices"]] == [("joined", "a")]
    assert "secret" not in (tmp_path / "status.json").read_text()
    with pytest.raises(RuntimeError), history.held():
        raise RuntimeError("none came")
    assert status.read(tmp_path)["state"] == "stopped"
    assert status.read(tmp_path)["reason"] == "none came"


@pytest.mark.parametrize(("glance", "seen"), [(3600.0, (1, "train")), (0.0, (9, "evaluate"))])
def test_phases_that_nobody_sees_are_not_written(
    tmp_path: Path, monkeypatch, glance: float, seen: tuple[int, str]
):
    monkeypatch.setattr(status, "_GLANCE", glance)
    history = History(tmp_path)
    history.write_settings({})
    for number in range(1, 10):
        for phase in ("train", "evaluate"):
            history.notify(events.PhaseStarted(phase=phase, round=number, of=9, nodes=1))
    now = status.read(tmp_path)
    assert (now["round"], now["phase"]) == seen
    history.notify(events.RunFinished(model=tmp_path, seconds=1.0))
    now = status.read(tmp_path)
    assert (now["state"], now["round"], now["phase"]) == ("finished", 9, "evaluate")


def test_who_is_not_let_in_is_remembered_until_it_is(tmp_path: Path):
    history = History(tmp_path)
    history.write_settings({})
    for number in range(150):
        history.notify(events.NodeRefused(node=f"node-{number}", reason="its model is another"))
    assert len(status.read(tmp_path)["refused"]) == 100
    history.notify(events.NodeRefused(node="node-1", reason="its name is taken"))
    history.notify(events.NodeJoined(node="node-0", nodes=1))
    history.notify(events.Notice(text="written at once"))
    refused = status.read(tmp_path)["refused"]
    assert "node-0" not in refused
    assert refused["node-1"] == "its name is taken"


def test_a_run_whose_process_is_gone_has_stopped(tmp_path: Path):
    History(tmp_path).write_settings({})
    path = tmp_path / "status.json"
    assert status.read(tmp_path)["state"] == "waiting"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": 2**30}))
    assert status.read(tmp_path)["state"] == "stopped"
    path.write_text("[")
    assert status.read(tmp_path) == {}


@pytest.mark.parametrize("newest", ["a", "b", "c"])
def test_runs_that_changed_within_a_microsecond_are_in_order(newest: str, tmp_path: Path):
    """As a float of seconds their times would be equal."""
    time = 1_700_000_000_000_000_000
    for name in ("a", "b", "c"):
        path = tmp_path / name / "settings.json"
        path.parent.mkdir()
        path.touch()
        os.utime(path, ns=(time, time + 100 * (name == newest)))
    assert folders.list_runs(tmp_path)[0].name == newest
