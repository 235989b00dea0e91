"""The mistakes of a newcomer's first hour: one message each, with what, where and what to do.

Others are where their subject is: settings and their names in tests/test_task_settings.py, names
on the command line in tests/cli/test_arguments.py, MLX that was imported first in
tests/system/test_blas.py, a node's partition in tests/data/test_partitions.py, tracebacks in
tests/test_tracebacks.py, on nodes of a fleet in tests/fleet/test_fleet_mistakes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from typer.testing import CliRunner

from mlx_fed import events
from mlx_fed.cli.main import app

X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
Y = (np.arange(40) % 4).astype(np.int32)
HERE = "test_mistakes.py, line "


def data_of(x: Any, y: Any) -> Callable[..., fed.Data]:
    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        return fed.Data(train=(x, y), test=(x, y))

    return load


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y)


def accuracy(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return model(x).argmax(-1) == y


FIELDS: dict[str, Any] = {
    "model": lambda: nn.Linear(8, 4),
    "loss": loss,
    "metrics": {"accuracy": accuracy},
    "optimizer": lambda config: optim.SGD(0.1),
    "data": data_of(X, Y),
}


def run(folder: Path, strategy: Any = None, listen: Any = None, **arguments: Any) -> fed.Result:
    """A simulation with some fields of the task or arguments changed."""
    names = {name for name in arguments if name in fed.Task.__dataclass_fields__}
    fields = {name: arguments.pop(name) for name in names - {"config"}}
    options = {"num_rounds": 1, "workers": 0, "listeners": (listen,) if listen else ()}
    options |= {"runs": folder, **arguments}
    return fed.simulate(fed.Task(**{**FIELDS, **fields}), strategy, 4, **options)


def return_nothing(model: nn.Module, x: mx.array, y: mx.array) -> None:
    loss(model, x, y)


def raise_file_not_found(partition_id: int, num_partitions: int | None) -> fed.Data:
    return fed.Data(train=(np.load("patients.npy"), Y))


def squared_error(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return (model(x)[:, 0] - y) ** 2


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an optimizer": ({"optimizer": optim.SGD(0.1)}, ("optimizer=lambda config: optim.SGD(0.1)",)),
    "a model": ({"model": nn.Linear(8, 4)}, ("Task.model is a function", "model=lambda: ")),
    "a loss without return": ({"loss": return_nothing}, ("Task.loss", "NoneType", HERE)),
    "a loss of NumPy": (
        {"loss": lambda model, x, y: np.float32(1)},
        ("Task.loss", "float32", "mx.array", HERE),
    ),
    "a loss of a matrix": (
        {"loss": lambda model, x, y: model(x) ** 2},
        ("Task.loss", "(32, 4)", HERE, "their mean"),
    ),
    "labels of text": (
        {"data": data_of(X, np.array(["cat", "dog"] * 20))},
        ("Data.test[1]", "labels into integers"),
    ),
    "labels of floats": (
        {"data": data_of(X, Y.astype(float))},
        ("labels of dtype float32", "labels.astype(numpy.int32)", HERE),
    ),
    "labels from 1": ({"data": data_of(X, Y + 1)}, ("entry 4 of 4", "Labels count from 0", HERE)),
    "too few outputs": (
        {"model": lambda: nn.Linear(8, 2)},
        ("entry 3 of 2", "a label that the model has no output for", HERE),
    ),
    "another number of inputs": ({"model": lambda: nn.Linear(7, 4)}, ("(10,8)", "(7,4)", HERE)),
    "a learning rate that is too high": (
        {
            "model": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)),
            "loss": squared_error,
            "metrics": {},
            "optimizer": lambda config: optim.SGD(1e6),
            "local_epochs": 5,
        },
        ("node-0", "not finite", "A smaller learning rate"),
    ),
    "a setting that is not declared": (
        {"optimizer": lambda config: optim.SGD(config["lr"])},
        ("no setting lr", "Task.config", "-c lr=...", HERE),
    ),
    "data without Data": (
        {"data": lambda partition_id, num_partitions: (X, Y)},
        ("Task.data must return mlx_fed.Data", "Data(train=(x, y)"),
    ),
    "arrays of unequal lengths": ({"data": data_of(X, Y[:30])}, ("[40, 30]", HERE)),
    "no examples": ({"data": data_of(X[:0], Y[:0])}, ("Partition 0 has no training examples",)),
    "no training examples": (
        {"data": lambda partition_id, num_partitions: fed.Data(train=None)},  # type: ignore[arg-type]
        ("Data.train is None", HERE),
    ),
    "a file that is not there": (
        {"data": raise_file_not_found},
        ("FileNotFoundError", "patients.npy", HERE),
    ),
    "a metric's evaluate_fn of old Flower": (
        {"evaluate_fn": lambda server_round, parameters, config: (0.5, {"accuracy": 1.0})},
        ("evaluate_fn", HERE, "a tuple", "metrics by name"),
    ),
    "an evaluate_fn of the model": (
        {"evaluate_fn": lambda model: {}},
        ("evaluate_fn(round, parameters, statistics)", HERE),
    ),
    "an unknown argument": ({"num_round": 3}, ("'num_round'", "Did you mean num_rounds?")),
    "no steps": ({"config": {"local-epochs": 0}}, ("local-epochs is a whole number, 1 or more",)),
    "a size in words": ({"config": {"batch-size": "big"}}, ("batch-size", "not 'big'")),
    "a strategy in small letters": ({"strategy": "fedadam"}, ("Did you mean FedAdam?",)),
    "a slip in a strategy's name": ({"strategy": "FedAdm"}, ("Did you mean FedAdam?",)),
    "a run to resume that is not there": ({"resume": "yesterday"}, ("no run 'yesterday'",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_has_one_message_that_says_where(mistake: str, tmp_path: Path):
    arguments, texts = MISTAKES[mistake]
    with pytest.raises(fed.FedError) as error:
        run(tmp_path, **arguments)
    message = str(error.value)
    for text in texts:
        assert text in message
    assert "\n" not in message
    assert "mlx_fed/" not in message  # no frames of ours


def test_a_task_that_is_a_function_takes_the_settings(tmp_path: Path):
    with pytest.raises(fed.FedError, match=rf"def task\(config\).*{HERE}"):
        fed.simulate(lambda: fed.Task(**FIELDS), num_clients=2, runs=tmp_path, listeners=())  # type: ignore


def test_a_strategy_of_older_flower_code_is_named_with_its_successor(tmp_path: Path):
    strategies = pytest.importorskip("flwr.server.strategy")
    with pytest.raises(fed.FedError, match=r"from flwr\.serverapp\.strategy import FedAvg"):
        run(tmp_path, strategies.FedAvg())


class Tensor:
    """A tensor as PyTorch's, for NumPy to convert."""

    def __init__(self, values: np.ndarray):
        self.values, self.shape = values, values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)


def frames() -> Callable[..., fed.Data]:
    pandas = pytest.importorskip("pandas")
    return data_of(pandas.DataFrame(X), pandas.Series(Y))


@pytest.mark.parametrize(
    "data",
    [
        frames,
        lambda: data_of(X.tolist(), Y.tolist()),
        lambda: data_of(Tensor(X), Tensor(Y)),
        lambda: data_of(mx.array(X), mx.array(Y)),
    ],
    ids=["pandas", "lists", "tensors", "MLX"],
)
def test_arrays_of_other_libraries_train_to_the_same_model(data, tmp_path: Path):
    expected = run(tmp_path).parameters
    result = run(tmp_path, "FedAvg", data=data()).parameters
    for name, array in expected.items():
        assert np.array_equal(np.asarray(array), np.asarray(result[name]))


def raise_error(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    raise RuntimeError("no such metric")


@pytest.mark.parametrize(
    ("metric", "value", "reason"),
    [
        (raise_error, math.nan, f"RuntimeError: no such metric ({HERE}"),
        (lambda model, x, y: None, math.nan, "NoneType"),
        (lambda model, x, y: 0.5, 0.5, None),
    ],
)
def test_a_metric_that_fails_costs_itself_and_not_the_loss(metric, value, reason, tmp_path: Path):
    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notices.append(event.text)

    record = run(tmp_path, listen=listen, metrics={"m": metric}).rounds[0]
    assert record["evaluate"]["m"] == pytest.approx(value, nan_ok=True)
    assert math.isfinite(record["evaluate"]["loss"])
    told = [text for text in notices if "metric 'm' is undefined" in text]
    assert len(told) == (reason is not None)
    assert all(str(reason) in text for text in told)


def test_labels_of_one_hot_train_and_the_metric_says_what_is_wrong(tmp_path: Path):
    record = run(tmp_path, data=data_of(X, np.eye(4, dtype=np.float32)[Y])).rounds[0]
    expected = run(tmp_path).rounds[0]
    assert record["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-5)
    assert record["undefined"] == {"evaluate": {"accuracy": 4}}


@pytest.mark.parametrize("batched", [True, False])
def test_the_step_at_which_the_loss_diverges_is_told_once(batched, tmp_path: Path):
    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notices.append(event.text)

    arguments, _ = MISTAKES["a learning rate that is too high"]
    with pytest.raises(fed.FedError):
        run(tmp_path, listen=listen, batched=batched, max_repeats=0, **arguments)
    (notice,) = [text for text in notices if "the loss is " in text]
    assert " at step " in notice
    assert " of 10: a smaller learning rate" in notice


def test_an_evaluate_fn_as_flower_calls_it(tmp_path: Path):
    seen: list[Any] = []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append({name: array.numpy() for name, array in arrays.items()})
        return MetricRecord({"round": server_round})

    result = run(tmp_path, evaluate_fn=evaluate_fn)
    assert result.rounds[0]["central"] == {"round": 1}
    for name, array in result.parameters.items():
        assert np.array_equal(seen[0][name], np.asarray(array))


@pytest.mark.parametrize(("options", "is_told"), [({}, True), ({"proximal_mu": 0.1}, False)])
def test_fedprox_without_its_factor_says_that_it_is_fedavg(options, is_told, tmp_path: Path):
    from flwr.serverapp.strategy import FedProx

    notices: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notices.append(event.text)

    strategy = FedProx(min_train_nodes=1, min_evaluate_nodes=1, **options)
    run(tmp_path, strategy, listen)
    assert any("FedProx without proximal-mu is FedAvg" in text for text in notices) == is_told


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("simulate", "tests/helpers/simulated.py:TASK"), "write the module, tests.helpers.simul"),
        (("simulate", "tests.helpers.simulated:TSAK"), "Did you mean TASK?"),
        (("simulate", "tests.helpers.simulated:TASK", "-s", "fraction_train=1.5"), "0 to 1, not"),
        (("simulate", "tests.helpers.simulated:TASK", "--resume", "nope"), "no run 'nope'"),
        (("runs", "show", "nope"), "no run 'nope'"),
    ],
)
def test_a_mistake_on_the_command_line(arguments, text, tmp_path: Path):
    ended = CliRunner().invoke(app, [*arguments, "--runs", str(tmp_path)])
    assert ended.exit_code == 1
    lines = [line for line in ended.output.splitlines() if line.strip()]
    assert len(lines) == 1
    assert text in lines[0]
