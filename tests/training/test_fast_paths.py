"""Padding and training many at once, where the examples that they are tried on show nothing.

Found by tests/generated; each task is small enough to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("uncompiled")


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def task(model: Callable, loss: Callable, data: Callable, **settings: Any) -> fed.Task:
    settings = {"batch_size": 32, **settings}
    return fed.Task(
        model=model, loss=loss, optimizer=lambda _: optim.SGD(0.1), data=data, **settings
    )


def hold_equal(
    one: fed.Task, other: fed.Task, folder: Path, num_clients: int, **options: Any
) -> None:
    """Runs one as it comes and the other client after client; compares what they end with."""
    common = {"num_rounds": 1, "workers": 0, "runs": folder, "listeners": ()}
    first = fed.simulate(one, num_clients=num_clients, name="one", **common, **options)
    second = fed.simulate(other, num_clients=num_clients, name="other", batched=False, **common)
    for name, array in second.parameters.items():
        np.testing.assert_allclose(first.parameters[name], array, atol=1e-5, err_msg=name)
    for phase, each in second.rounds[0]["each"].items():
        for node, metrics in each.items():
            got = first.rounds[0]["each"][phase][node]["loss"]
            assert got == pytest.approx(metrics["loss"], rel=1e-5), (phase, node)


def hold_to_its_mean(of: fed.Task, folder: Path, num_clients: int = 2) -> None:
    """A loss that is a mean is never padded."""
    hold_equal(of, replace(of, loss=lambda *args: of.loss(*args).mean()), folder, num_clients)


class Normalized(nn.Module):
    """A batch normalization by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.first(x)
        return self.last((h - h.mean(axis=0)) / mx.sqrt(h.var(axis=0) + 0.1))[:, 0]


def test_the_first_client_has_one_example_of_zeros(tmp_path):
    def data(client: int, _: int | None) -> fed.Data:
        x = np.zeros((1, 4), np.float32) if client == 0 else rows(client, 11, 4)
        return fed.Data((x,), (x,))

    of = task(Normalized, lambda model, x: mx.square(model(x) - 1), data)
    hold_to_its_mean(of, tmp_path)


def test_the_first_and_the_last_example_are_zeros(tmp_path):
    def data(client: int, _: int | None) -> fed.Data:
        x = rows(client, 11, 4)
        x[[0, 10]] = 0
        return fed.Data((x,))

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        h = model(x)
        return nn.losses.cross_entropy(h @ h.T, mx.arange(len(h)))

    hold_to_its_mean(task(lambda: nn.Linear(4, 2), loss, data), tmp_path)


def test_the_first_client_has_one_label(tmp_path):
    def data(client: int, _: int | None) -> fed.Data:
        labels = np.arange(11, dtype=np.int32) % 3 * (client > 0)
        return fed.Data((rows(client, 11, 4), labels))

    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        h = model(x)
        differ = (y[:, None] != y[None]).astype(mx.float32)
        near = mx.exp(-mx.square(h[:, None] - h[None]).mean(axis=-1))
        return mx.square(h).mean(axis=-1) + (differ * near).sum(axis=1)

    hold_to_its_mean(task(lambda: nn.Linear(4, 2), loss, data), tmp_path)


def test_the_last_layer_begins_at_zero(tmp_path):
    def model() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        module.layers[1].weight = mx.zeros((4, 4))
        return module

    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x) @ y.T, mx.arange(len(x)))

    def data(client: int, _: int | None) -> fed.Data:
        return fed.Data((rows(client, 11, 4), rows(client + 9, 11, 4)))

    hold_to_its_mean(task(model, loss, data), tmp_path)


def test_a_tuple_of_one_array_in_a_tuple_of_two(tmp_path):
    def data(client: int, _: int | None) -> fed.Data:
        return fed.Data(((rows(client, 8, 4),), rows(client + 9, 8, 2)))

    def loss(model: nn.Module, inputs: tuple[mx.array], y: mx.array) -> mx.array:
        return mx.square(model(inputs[0]) - y).mean()

    of = task(lambda: nn.Linear(4, 2), loss, data)
    hold_equal(of, of, tmp_path, 8)


def test_a_slice_holds_the_constant_where_it_is_looked_at(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def __call__(self, x: mx.array) -> mx.array:
            x = x * 1.0
            x[:, 0] = 0
            return self.linear(x)

    def data(client: int, _: int | None) -> fed.Data:
        x = rows(client, 8, 4)
        x[:, 0] *= client >= 4  # a feature that the first clients lack
        return fed.Data((x,))

    of = task(Model, lambda model, x: mx.square(model(x) - 1).mean(), data)
    hold_equal(of, of, tmp_path, 8, chunk_size=4)
