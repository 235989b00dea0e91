"""Settings that are changed on purpose when a run is resumed."""

import json
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_fed.cli.main import app
from tests.helpers.fleet_commands import FED, assert_same_bits, join, serve
from tests.helpers.simulated import TASK, simulate, values


def settings_of(result: fed.Result) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((result.folder / "settings.json").read_text())
    return settings


def test_a_change_holds_from_the_next_round_and_in_later_resumptions(tmp_path: Path):
    start = simulate(None, tmp_path, TASK, 4, num_rounds=1, config={"learning-rate": 0.2})
    options: dict[str, Any] = {"resume": start.folder, "config": {"learning-rate": 0.2}}
    result = simulate(None, tmp_path, TASK, 4, num_rounds=2, change={"learning_rate": 0}, **options)
    for name, array in start.parameters.items():
        assert values(result.parameters[name]).tobytes() == values(array).tobytes()
    record = {"name": "learning-rate", "value": 0, "before": 0.2, "from": 2}
    assert settings_of(result)["changes"] == [record]
    # The command that started it resumes it, with the change.
    result = simulate(None, tmp_path, TASK, 4, num_rounds=3, **options)
    for name, array in start.parameters.items():
        assert values(result.parameters[name]).tobytes() == values(array).tobytes()
    assert settings_of(result)["changes"] == [record]
    assert settings_of(result)["config"]["learning-rate"] == 0


def test_a_change_of_the_same_value_changes_nothing(tmp_path: Path):
    expected = simulate(None, tmp_path, TASK, 4, num_rounds=2)
    start = simulate(None, tmp_path, TASK, 4, num_rounds=1)
    change = {"learning-rate": 0.2}
    result = simulate(None, tmp_path, TASK, 4, num_rounds=2, resume=start.folder, change=change)
    for name, array in expected.parameters.items():
        assert values(result.parameters[name]).tobytes() == values(array).tobytes()
    assert "changes" not in settings_of(result)


def test_other_differences_are_refused_as_before(tmp_path: Path):
    start = simulate(None, tmp_path, TASK, 4, num_rounds=1)
    options: dict[str, Any] = {"num_rounds": 2, "resume": start.folder}
    with pytest.raises(fed.FedError, match=r"setting learning-rate was 0\.2 and is 0\.1"):
        simulate(None, tmp_path, TASK, 4, config={"learning-rate": 0.1}, **options)
    change = {"learning-rate": 0.1}
    with pytest.raises(fed.FedError, match="setting batch-size was absent and is 4"):
        simulate(None, tmp_path, TASK, 4, config={"batch-size": 4}, change=change, **options)
    simulate(None, tmp_path, TASK, 4, change=change, **options)
    with pytest.raises(fed.FedError, match=r"0.1 in this run.*write --change learning-rate=0.3"):
        simulate(None, tmp_path, TASK, 4, config={"learning-rate": 0.3}, **options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num-rounds": 5}, "Use --rounds"),
        ({"seed": 5}, "seed cannot be changed"),
        ({"learning-rat": 0.1}, "Did you mean learning-rate"),
        ({"learning-rate": "small"}, "learning-rate is a finite number"),
    ],
)
def test_what_cannot_be_changed_is_named(change, text, tmp_path: Path):
    start = simulate(None, tmp_path, TASK, 4, num_rounds=1)
    with pytest.raises(fed.FedError, match=text):
        simulate(None, tmp_path, TASK, 4, num_rounds=2, resume=start.folder, change=change)


def test_a_new_run_has_nothing_to_change(tmp_path: Path):
    with pytest.raises(fed.FedError, match="for a run that is resumed"):
        simulate(None, tmp_path, TASK, 4, change={"learning-rate": 0.1})


def test_a_change_on_the_command_line(tmp_path: Path):
    line = ("simulate", "tests.helpers.simulated:TASK", "--clients", "2", "-q", "--workers", "0")
    line += ("--runs", str(tmp_path))
    assert CliRunner().invoke(app, [*line, "--rounds", "1", "--name", "r"]).exit_code == 0
    change = ("--rounds", "2", "--resume", "r", "--change", "learning-rate=0.05")
    ended = CliRunner().invoke(app, [*line, *change])
    assert ended.exit_code == 0, ended.output
    settings = json.loads((tmp_path / "r" / "settings.json").read_text())
    assert settings["config"]["learning-rate"] == 0.05


@pytest.mark.slow
def test_nodes_of_a_fleet_get_weights_and_a_change_from_the_server(start, tmp_path: Path):
    task = "tests.helpers.simulated:TASK"
    weights = simulate(None, tmp_path, TASK, 4, num_rounds=1, name="first").model
    rate = ("-c", "learning-rate=0")
    server, address = serve(start, tmp_path, "--rounds", 1, *rate, "--weights", weights, task=task)
    nodes = [join(start, address, number, task=task) for number in range(2)]
    assert [process.ends() for process in (server, *nodes)] == [0, 0, 0], server.text
    assert_same_bits(tmp_path / "run", weights.parent)
    resume = ("--resume", "run", "--rounds", 2, *rate, "--change", "learning-rate=0.2")
    server = start(*(*FED, "serve", task, "--port", 0, "--runs", tmp_path, "--wait", 60, *resume))
    address = server.line(r"Server ready on (\S+)").group(1)
    nodes = [join(start, address, number, task=task) for number in range(2)]
    assert [process.ends() for process in (server, *nodes)] == [0, 0, 0], server.text
    model, initial = (
        mx.load(str(path / weights.name)) for path in (tmp_path / "run", weights.parent)
    )
    assert not any(mx.array_equal(model[name], initial[name]) for name in initial)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["initial"] == str(weights)
    (change,) = settings["changes"]
    assert (change["name"], change["value"], change["from"]) == ("learning-rate", 0.2, 2)
