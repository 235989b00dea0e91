"""How a run is led: how many rounds, by whose settings, and what cannot be."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAvg

from mlx_fed import events
from mlx_fed.rounds.settings import RunSettings

from ..helpers.ids import stable_id
from ..helpers.loopback import LoopbackGrid
from ..helpers.simulated import LOCAL, TASK, load, simulate
from ..helpers.federated import CLIENT, federate

TWO_ROUNDS = replace(TASK, config={**TASK.config, "num-rounds": 2})
TEST = load(99, None).test


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "settings.json").read_text())


# -- how many rounds -----------------------------------------------------------------------


def serve(runs: Path, **arguments: Any) -> None:
    """A server that nobody joins: it has written how it would have led."""
    with pytest.raises(fed.FedError, match="0 of 1 nodes came"):
        fed.serve(
            arguments.pop("task", TWO_ROUNDS),
            runs=runs,
            port=0,
            wait=0.0,
            min_nodes=1,
            listeners=(),
            **arguments,
        )


def simulate_two(runs: Path, **arguments: Any) -> None:
    task = arguments.pop("task", TWO_ROUNDS)
    simulate(None, runs, task, 2, **{"num_rounds": None, **arguments})


def lead_an_app(runs: Path, **arguments: Any) -> None:
    name, task = arguments.pop("name"), arguments.pop("task", TWO_ROUNDS)
    app = fed.server_app(task, runs=runs, wait=0.0, **arguments)
    with suppress(fed.FedError):
        app(LoopbackGrid([]), Context(1, 0, {}, RecordDict(), {"num-rounds": 0, "name": name}))


@pytest.mark.parametrize("lead", [serve, simulate_two, lead_an_app])
@pytest.mark.parametrize(
    ("arguments", "rounds"),
    [
        ({"task": TASK}, 3),
        ({}, 2),
        ({"config": {"num-rounds": 1}}, 1),
        ({"config": {"num-rounds": 1}, "num_rounds": 4}, 4),
    ],
    ids=["none says", "the task", "the config", "the argument"],
)
def test_who_says_how_many_rounds(lead: Callable, arguments: dict, rounds: int, tmp_path: Path):
    lead(tmp_path, name="run", **arguments)
    settings = settings_of(tmp_path / "run")
    assert settings["num_rounds"] == settings["config"]["num-rounds"] == rounds


def test_clients_are_sent_the_rounds_that_there_are(tmp_path: Path):
    seen: set[int] = set()

    def optimizer(config: dict) -> Any:
        seen.add(config["num-rounds"])
        return TASK.optimizer(config)

    simulate(None, tmp_path, replace(TWO_ROUNDS, optimizer=optimizer), 2, num_rounds=3)
    assert seen == {3}


def test_a_resumed_run_has_the_rounds_that_it_was_asked_for(tmp_path: Path):
    simulate_two(tmp_path, name="run", num_rounds=4)
    simulate_two(tmp_path, resume="run")
    assert settings_of(tmp_path / "run")["num_rounds"] == 4
    simulate_two(tmp_path, resume="run", num_rounds=5)
    assert settings_of(tmp_path / "run")["num_rounds"] == 5


@pytest.mark.parametrize("lead", [partial(fed.serve, port=0, wait=0.0), fed.simulate])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rounds": 0},
        {"config": {"num-rounds": -1}},
        {"config": {"num-rounds": "five"}},
        {"task": replace(TASK, config={"num-rounds": 0})},
    ],
)
def test_no_rounds_are_refused(lead: Callable, arguments: dict, tmp_path: Path):
    with pytest.raises(fed.FedError, match=r"num.rounds is a whole number, 1 or more, not"):
        lead(**{"task": TASK, "runs": tmp_path, **arguments})
    assert list(tmp_path.iterdir()) == []


# -- flwr run ------------------------------------------------------------------------------


def test_the_settings_of_flwr_run_stand_over_those_of_the_app(tmp_path: Path):
    made_of: list[dict] = []

    def make(config: dict) -> fed.Task:
        made_of.append(dict(config))
        return TWO_ROUNDS

    own = {"learning-rate": 0.3, "batch-size": 4, "num-rounds": 5}
    app = fed.server_app(make, FedAvg(), runs=tmp_path, config=own, wait=10.0)
    run_config = {"learning-rate": 0.05, "num-rounds": 1, "name": "run"}
    clients = [fed.client_app(TWO_ROUNDS)] * 2
    app(LoopbackGrid(clients), Context(1, 0, {}, RecordDict(), run_config))
    settings = settings_of(tmp_path / "run")
    assert settings["num_rounds"] == settings["config"]["num-rounds"] == 1
    assert settings["config"]["learning-rate"] == made_of[0]["learning-rate"] == 0.05
    assert settings["config"]["batch-size"] == made_of[0]["batch-size"] == 4
    assert own == {"learning-rate": 0.3, "batch-size": 4, "num-rounds": 5}


# -- what cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, "3", 1.5])
def test_a_number_of_rounds_is_checked_where_another_stands_over_it(value: Any, tmp_path: Path):
    with pytest.raises(fed.FedError, match="config: num-rounds is a whole number, 1 or more"):
        simulate(None, tmp_path, TASK, 2, num_rounds=1, config={"num-rounds": value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": TASK.model()}, "Task.model is a function that returns a new model, .* Sequenti"),
        (
            {"optimizer": optim.SGD(0.1)},
            "Task.optimizer is a function of the settings .* class SGD",
        ),
        ({"loss": "mse"}, "Task.loss is a function, not an object of the class str"),
        ({"data": TEST}, "Task.data is a function, not an object of the class tuple"),
        ({"metrics": [TASK.loss]}, "Task.metrics is a dictionary of functions .* this is a list"),
        (
            {"loss": nn.losses.cross_entropy},
            r"Task.loss is called with the model and a batch, .* write lambda model, x, y: "
            r"nn.losses.cross_entropy\(model\(x\), y\)",
        ),
        (
            {"metrics": {"mse": nn.losses.mse_loss}},
            r"Task.metrics\['mse'\] is called with the model",
        ),
        (
            {"train_step": lambda model, batch: None},
            r"called as train_step\(model, optimizer, batch, key, config\), and the function "
            r"\(test_settings.py, line \d+\) does not take that: too many positional arguments",
        ),
        ({"train_step": 5}, "Task.train_step is a function, not an object of the class int"),
        ({"save": lambda model: None}, r"called as save\(model, folder\), and .*test_settings.py"),
        (
            {"data": lambda: TEST},
            r"called as data\(partition_id, num_partitions\), and .*\.py, line",
        ),
        (
            {"derived": lambda loss, accuracy: {}},
            r"called as derived\(metrics\), and .*test_settings",
        ),
    ],
    ids=stable_id,
)
def test_a_task_is_made_of_functions(fields: dict[str, Any], message: str):
    with pytest.raises(fed.FedError, match=message):
        replace(TASK, **fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds is a whole number, 1 or more, not 0"),
        ({"min_nodes": 0}, "min_nodes is a whole number, 1 or more, not 0"),
        ({"keep": -1}, "keep is a whole number, 0 or more, not -1"),
        ({"wait": float("nan")}, "wait is a number, 0 or more, not nan"),
        ({"round_timeout": -0.5}, "round_timeout is a number, 0 or more, not -0.5"),
        ({"min_replies": 0}, "min_replies is a whole number, 1 or more, not 0"),
        ({"max_repeats": -1}, "max_repeats is a whole number, 0 or more, not -1"),
        ({"max_examples": float("nan")}, "max_examples is a number, 1 or more, not nan"),
        ({"max_update_norm": 0.5}, "max_update_norm is a number, 1 or more, not 0.5"),
        ({"test": lambda key: iter(())}, "test is a tuple of arrays .*, not a stream"),
        ({"test": np.zeros(3)}, "test is a tuple of arrays .*, not ndarray"),
        ({"test": (np.zeros(3), np.zeros(2))}, r"arrays of one length; these have \[3, 2\]"),
        ({"test": (1, 2)}, r"arrays of one length; these have \[None, None\]"),
        ({"test": (np.zeros((0, 3)), np.zeros(0))}, "test has no examples"),
        ({"seed": None}, "seed is a whole number, not None"),
        ({"stop": 5}, "stop is a function, not 5"),
        ({"evaluate_fn": {"loss": 1}}, "evaluate_fn is a function, not"),
    ],
    ids=stable_id,
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(fed.FedError, match=message):
        RunSettings(**settings)


@pytest.mark.parametrize(
    ("function", "absent"),
    [
        (fed.serve, set()),
        (fed.server_app, {"change"}),
        (fed.simulate, {"wait", "min_nodes", "grace"}),
    ],
)
def test_the_settings_of_a_run_are_in_the_signatures(function: Callable, absent: set):
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(RunSettings):
        if field.name in absent:
            assert field.name not in parameters
        elif field.name not in ("num_rounds", "config"):
            assert parameters[field.name].default == field.default
            assert parameters[field.name].annotation == field.type
    # What serve() documents the others refer to.
    documented, of_serve = (
        set(re.findall(r"^ {8}(\w+) \(", documented_function.__doc__ or "", re.M))
        for documented_function in (function, fed.serve)
    )
    assert documented <= set(parameters) <= documented | of_serve
    with pytest.raises(fed.FedError, match=r"no argument 'round_timout'. Did you mean round_timeo"):
        function(None, round_timout=3)


@pytest.mark.parametrize(
    ("task", "kept"),
    [
        (LOCAL, r"running statistics of its own \(Task.statistics or Task.buffers"),
        (
            replace(TASK, personal=lambda name: name.startswith("layers.4")),
            r"parameters of its own \(Task.personal\)",
        ),
    ],
    ids=["statistics", "parameters"],
)
def test_the_server_cannot_evaluate_what_never_travels(task: fed.Task, kept: str, tmp_path: Path):
    with pytest.raises(fed.FedError, match=f"cannot evaluate on test: each client keeps {kept}"):
        simulate(None, tmp_path, task, 2, test=TEST)
    assert simulate(None, tmp_path, replace(TASK, statistics="local"), 2, test=TEST).rounds


def test_a_model_that_is_saved_without_a_path_is_in_the_runs_folder(tmp_path: Path):
    def save(model: nn.Module, folder: Path) -> None:
        model.save_weights(str(folder / "weights.npz"))

    result = simulate(None, tmp_path, replace(TASK, save=save), 2, num_rounds=1)
    assert result.model == result.folder
    assert (result.model / "weights.npz").exists()


@pytest.mark.parametrize(
    ("derived", "reason"),
    [
        (lambda metrics: {"x": 1 / 0}, r"ZeroDivisionError: .* \(test_settings.py, line \d+\)"),
        (lambda metrics: None, r"it returned a NoneType, .* \(test_settings.py, line \d+\)"),
        (lambda metrics: {"x": "a"}, "ValueError: could not convert string to float"),
    ],
    ids=["raises", "none", "text"],
)
def test_derived_metrics_that_fail_name_the_line(derived: Any, reason: str, tmp_path: Path):
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        notes.extend([event.text] if isinstance(event, events.Notice) else [])

    task = replace(TASK, derived=derived)
    simulate(None, tmp_path, task, 2, num_rounds=1, listeners=(listen,))
    assert any(re.search(f"undefined .* Task.derived failed: {reason}", note) for note in notes)


def test_scalar_arrays_are_metrics(tmp_path: Path):
    def evaluate(number: int, parameters: dict, statistics: dict) -> dict[str, Any]:
        return {"norm": mx.array(0.5), "sample": "a text"}

    result = federate(FedAvg(), tmp_path, [CLIENT] * 3, num_rounds=1, evaluate_fn=evaluate)
    assert result.rounds[0]["central"] == {"norm": 0.5, "sample": "a text"}
