"""What functions of a task read of Python's variables is what it is at the time, on every path."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from mlx_fed import events

from .. import oracle

SETTINGS: dict[str, Any] = {"factor": 1.0}
CLIENTS, ROUNDS = 3, 5


class Counter:
    """A number of calls, as an attribute and as one of the class."""

    calls = 0

    def __init__(self) -> None:
        self.calls = 0


def load(partition: int, num_partitions: int | None) -> fed.Data:
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(12, 4)).astype(np.float32)
    return fed.Data((x, x @ np.float32([[1], [2], [-1], [0.5]])), (x[:5], x[:5, :1]))


def squares(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.mse_loss(model(x), y, reduction="none").mean(axis=1)


def task(**fields: Any) -> fed.Task:
    fields = {
        "model": lambda: nn.Linear(4, 1),
        "loss": squares,
        "optimizer": lambda config: optim.SGD(0.05),
        "data": load,
        "batch_size": 5,
        **fields,
    }
    return fed.Task(**fields)


class Run(NamedTuple):
    parameters: dict[str, np.ndarray]
    metrics: list[float]
    notes: list[str]


def simulate(make: Callable[[], fed.Task], folder, name: str, **options: Any) -> Run:
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(str(event.text))

    reset()
    options = {"workers": 0, "listeners": (listen,), "runs": folder, "name": name, **options}
    result = fed.simulate(make(), FedAvg(), CLIENTS, ROUNDS, **options)
    metrics = [record["evaluate"]["loss"] for record in result.rounds]
    return Run({n: np.array(a) for n, a in result.parameters.items()}, metrics, notes)


def plain(make: Callable[[], fed.Task]) -> tuple[dict[str, np.ndarray], list[float]]:
    """The plain algorithm, one client after another."""
    reset()
    everyone = list(range(CLIENTS))
    of = make()
    nodes = [(everyone, everyone)] * ROUNDS
    _, model, rounds = oracle.run(of, "FedAvg", {}, CLIENTS, 0, nodes, {})
    parameters = {name: np.array(array) for name, array in model.parameters().items()}
    return parameters, [record["mean"]["all"]["loss"] for record in rounds]


def reset() -> None:
    SETTINGS["factor"], Counter.calls = 1.0, 0


def assert_as_plain(make: Callable[[], fed.Task], folder, noted: str | None) -> None:
    parameters, losses = plain(make)
    for batched in (True, False):
        run = simulate(make, folder, f"batched-{batched}", batched=batched)
        for name, array in parameters.items():
            np.testing.assert_allclose(run.parameters[name], array, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(run.metrics, losses, rtol=1e-4)
        if noted is not None and batched:
            assert any(noted in note for note in run.notes), run.notes


def of_a_closure() -> fed.Task:
    state = {"rate": 0.0}

    def optimizer(config):
        state["rate"] = 0.1 / config["server-round"]
        return optim.SGD(lambda step: mx.array(state["rate"]))

    return task(optimizer=optimizer)


def of_a_global() -> fed.Task:
    def optimizer(config):
        SETTINGS["factor"] = 0.1 / config["server-round"]
        return optim.SGD(lambda step: mx.array(SETTINGS["factor"]))

    return task(optimizer=optimizer)


def of_an_attribute() -> fed.Task:
    state = SimpleNamespace(rate=0.0)

    def optimizer(config):
        state.rate = 0.1 / config["server-round"]
        return optim.SGD(lambda step: mx.array(state.rate))

    return task(optimizer=optimizer)


def of_a_count_of_calls() -> fed.Task:
    counter = Counter()

    def optimizer(config):
        counter.calls += 1
        return optim.SGD(lambda step: mx.array(0.2 / counter.calls))

    return task(optimizer=optimizer)


def of_a_class() -> fed.Task:
    def optimizer(config):
        Counter.calls += 1
        return optim.SGD(0.2 / Counter.calls)

    return task(optimizer=optimizer)


@pytest.mark.parametrize(
    "make", [of_a_closure, of_a_global, of_an_attribute, of_a_count_of_calls, of_a_class]
)
def test_an_optimizer_function_that_changes_what_it_reads_is_called_for_each_client(make, tmp_path):
    assert_as_plain(make, tmp_path, "Task.optimizer changes")


def test_an_optimizer_function_that_draws_is_called_for_each_client(tmp_path):
    def make() -> fed.Task:
        rng = np.random.default_rng(3)
        return task(optimizer=lambda config: optim.SGD(float(rng.uniform(0.01, 0.1))))

    assert_as_plain(make, tmp_path, "Task.optimizer changes")


def loss_of_a_global() -> fed.Task:
    def optimizer(config):
        SETTINGS["factor"] = float(config["server-round"])
        return optim.SGD(0.02)

    return task(optimizer=optimizer, loss=lambda m, x, y: SETTINGS["factor"] * squares(m, x, y))


def loss_of_an_object() -> fed.Task:
    counter = Counter()

    def augment(key, x, y):
        return x * counter.calls, y

    def optimizer(config):
        counter.calls = config["server-round"]
        return optim.SGD(0.02)

    return task(optimizer=optimizer, augment=augment)


def loss_that_counts() -> fed.Task:
    """Whose value is the same to the comparison of single steps."""
    counter = Counter()

    def loss(model, x, y):
        counter.calls += 1
        return squares(model, x, y) * (1.0 + 1e-9 * counter.calls)

    return task(loss=loss)


@pytest.mark.parametrize("make", [loss_of_a_global, loss_of_an_object])
def test_a_loss_reads_a_variable_as_it_is_in_each_round(make, tmp_path):
    assert_as_plain(make, tmp_path, None)


def test_a_loss_that_changes_what_it_reads_is_not_compiled(tmp_path):
    for batched, noted in ((True, "one after another"), (False, "not compiled")):
        run = simulate(loss_that_counts, tmp_path, f"counts-{batched}", batched=batched)
        assert any(noted in note for note in run.notes), run.notes


class MovingMean:
    """A loss in units of its moving mean, which is an array in an attribute."""

    def __init__(self) -> None:
        self.mean = mx.array(1.0)

    def __call__(self, model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        values = squares(model, x, y)
        self.mean = mx.stop_gradient(0.9 * self.mean + 0.1 * values.mean())
        return values / self.mean


def loss_of_a_moving_mean() -> fed.Task:
    return task(loss=MovingMean())


def augment_of_a_last_batch() -> fed.Task:
    last: dict[str, mx.array] = {}

    def augment(key, x, y):
        mixed = 0.9 * x + 0.1 * last.get("x", x).mean(axis=0)
        last["x"] = x
        return mixed, y

    return task(augment=augment)


def loss_of_a_history() -> fed.Task:
    history: list[mx.array] = []

    def loss(model, x, y):
        history.append(mx.stop_gradient(squares(model, x, y).mean()))
        return squares(model, x, y) + 0.1 * history[-1] * squares(model, x, y)

    return task(loss=loss)


@pytest.mark.parametrize(
    "make", [loss_of_a_moving_mean, augment_of_a_last_batch, loss_of_a_history]
)
def test_arrays_that_a_step_keeps_in_python_variables_are_those_of_the_plain_loop(make, tmp_path):
    """To what the calls that look at a loss at first leave in a moving mean."""
    parameters, _ = plain(make)
    for batched in (True, False):
        run = simulate(make, tmp_path, f"batched-{batched}", batched=batched)
        assert any("not compiled" in note for note in run.notes), run.notes
        for name, array in parameters.items():
            np.testing.assert_allclose(run.parameters[name], array, atol=0.05, err_msg=name)


def one_optimizer() -> fed.Task:
    optimizer = optim.Adam(0.01)
    return task(optimizer=lambda config: optimizer)


def one_of_several() -> fed.Task:
    first = optim.SGD(0.01, momentum=0.9)

    def train_step(model, optimizers, batch, key, config):
        loss, gradients = nn.value_and_grad(model, lambda: squares(model, *batch).mean())()
        optimizers["first"].update(model, gradients)
        return loss

    return task(
        optimizer=lambda config: {"first": first, "second": optim.SGD(0.1)}, train_step=train_step
    )


def one_of_a_default() -> fed.Task:
    def optimizer(config, made=optim.SGD(0.01)):  # noqa: B008
        return made

    return task(optimizer=optimizer)


@pytest.mark.parametrize("make", [one_optimizer, one_of_several, one_of_a_default])
def test_an_optimizer_that_is_returned_again_is_refused(make, tmp_path):
    with pytest.raises(fed.FedError, match="make a new one in each call"):
        simulate(make, tmp_path, "run")


class Weighed:
    """Scales the loss by a mean of the client that was loaded last."""

    def __init__(self) -> None:
        self.scale = 1.0

    def load(self, partition: int, num_partitions: int | None) -> fed.Data:
        data = load(partition, num_partitions)
        self.scale = 1.0 + partition
        return data

    def loss(self, model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return self.scale * squares(model, x, y)


def data_of_an_object() -> fed.Task:
    weighed = Weighed()
    return task(data=weighed.load, loss=weighed.loss, optimizer=lambda config: optim.SGD(0.01))


def data_of_a_global() -> fed.Task:
    def load_and_set(partition: int, num_partitions: int | None) -> fed.Data:
        SETTINGS["factor"] = 0.01 * (1 + partition)
        return load(partition, num_partitions)

    return task(data=load_and_set, optimizer=lambda config: optim.SGD(SETTINGS["factor"]))


def data_of_a_closure() -> fed.Task:
    shift = np.zeros(1, np.float32)

    def load_and_set(partition: int, num_partitions: int | None) -> fed.Data:
        shift[0] = partition
        return load(partition, num_partitions)

    return task(
        data=load_and_set, loss=lambda model, x, y: squares(model, x, y + mx.array(shift)[0])
    )


@pytest.mark.parametrize("make", [data_of_an_object, data_of_a_global, data_of_a_closure])
def test_data_that_changes_what_others_read_is_loaded_before_each_client(make, tmp_path):
    assert_as_plain(make, tmp_path, "Task.data changes")


class Decaying(optim.SGD):
    """Counts its steps in an attribute."""

    def __init__(self, rate: float):
        super().__init__(rate)
        self.count = 0

    def apply_gradients(self, gradients, parameters):
        self.count += 1
        factor = 1.0 / self.count
        return super().apply_gradients({n: factor * g for n, g in gradients.items()}, parameters)


class Averaging(optim.SGD):
    """Averages gradients in a dictionary."""

    def __init__(self, rate: float):
        super().__init__(rate)
        self.means: dict[str, mx.array] = {}

    def apply_gradients(self, gradients, parameters):
        for name, gradient in gradients.items():
            self.means[name] = 0.5 * self.means.get(name, gradient) + 0.5 * gradient
        return super().apply_gradients(dict(self.means), parameters)


class InPlace(optim.SGD):
    """Adds gradients up in an array of its own, in place."""

    def __init__(self, rate: float):
        super().__init__(rate)
        self.total = mx.zeros((1, 4))

    def apply_single(self, gradient, parameter, state):
        if gradient.ndim == 2:
            self.total += gradient
            return parameter - 0.02 * self.total
        return super().apply_single(gradient, parameter, state)


@pytest.mark.parametrize("kind", [Decaying, Averaging, InPlace])
def test_each_client_has_an_optimizer_with_attributes_of_its_own(kind, tmp_path):
    make = lambda: task(optimizer=lambda config: kind(0.05))  # noqa: E731
    assert_as_plain(make, tmp_path, "changes attributes of its own")


def test_a_schedule_may_call_itself(tmp_path):
    def make() -> fed.Task:
        def optimizer(config):
            def rate(step, depth=3):
                return mx.array(0.05) if depth == 0 else 0.9 * rate(step, depth - 1)

            return optim.SGD(rate)

        return task(optimizer=optimizer)

    assert_as_plain(make, tmp_path, None)
    run = simulate(make, tmp_path, "workers", workers=1)
    for name, array in plain(make)[0].items():
        np.testing.assert_allclose(run.parameters[name], array, atol=1e-5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(mx.random.normal()),
        lambda: float(np.random.random()),
        lambda: random.random(),
    ],
    ids=["mlx", "numpy", "python"],
)
def test_a_simulation_leaves_the_random_generators_as_they_were(draw, tmp_path):
    def make() -> fed.Task:
        def augment(key, x, y):
            return x + float(np.random.normal()) + random.random() + mx.random.normal(), y

        return task(augment=augment)

    def seed() -> None:
        mx.random.seed(7)
        np.random.seed(7)
        random.seed(7)
        mx.random.normal()

    seed()
    expected = draw()
    seed()
    simulate(make, tmp_path, "run")
    assert draw() == expected
