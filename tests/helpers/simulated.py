"""A task for the tests of simulations: small, and with much that clients can differ in."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flwr.serverapp.strategy import Strategy

SAME_BITS = sys.platform == "linux" and platform.machine() == "x86_64"
"""Elsewhere a matrix product of many may be another program than one of its own."""
SEED = 5
CLIENTS = 40


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    """Points of three classes; clients differ in how many they hold and where these lie."""
    rng = np.random.default_rng(partition_id)
    labels = rng.integers(0, 3, 15 + partition_id * 7 % 31).astype(np.int32)
    points = rng.normal(0.03 * partition_id, 1.0, (len(labels), 5)) + 2 * np.eye(3, 5)[labels]
    points = points.astype(np.float32)
    return fed.Data((points[10:], labels[10:]), (points[:10], labels[:10]))


def model(norm: bool = False) -> nn.Module:
    layers = [nn.Linear(5, 8), nn.BatchNorm(8) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(8, 3))


def loss(module: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(module(x), y)


TASK = fed.Task(
    model=model,
    loss=loss,
    metrics={"accuracy": lambda module, x, y: mx.argmax(module(x), axis=1) == y},
    optimizer=lambda config: optim.SGD(config["learning-rate"]),
    data=load,
    batch_size=8,
    config={"learning-rate": 0.2},
)
NORMALIZED = replace(TASK, model=lambda: model(norm=True))
LOCAL = replace(NORMALIZED, statistics="local")


def simulate(
    strategy: Strategy | None, folder: Path, task: Any = TASK, num_clients: int = CLIENTS, **options
) -> fed.Result:
    """Three rounds without a display, by default in this process."""
    options = {"num_rounds": 3, "workers": 0, "seed": SEED, "listeners": (), **options}
    return fed.simulate(task, strategy, num_clients, runs=folder, **options)


def raising_for(partitions: set[int], error: Exception) -> Callable[[int, int | None], fed.Data]:
    """A data function that raises for some partitions."""

    def load_or_raise(partition_id: int, num_partitions: int | None) -> fed.Data:
        if partition_id in partitions:
            raise error
        return load(partition_id, num_partitions)

    return load_or_raise


def assert_same(one: fed.Result, other: fed.Result) -> None:
    """The same bits, and the same record of each round, but for when and how long it was."""
    for got, expected in ((one.parameters, other.parameters), (one.statistics, other.statistics)):
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert got[name].dtype == array.dtype
            tolerance = {} if SAME_BITS else {"atol": 1e-5, "rtol": 1e-4}
            compare = np.testing.assert_array_equal if SAME_BITS else np.testing.assert_allclose
            compare(values(got[name]), values(array), err_msg=name, **tolerance)
    if SAME_BITS:
        assert list(map(without_time, one.rounds)) == list(map(without_time, other.rounds))


def values(array: mx.array) -> np.ndarray:
    return np.asarray(array.astype(mx.float32))


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in ("seconds", "time")}
    refused = sorted((each["phase"], each["node"]) for each in record["refused"])
    # A fleet counts the bytes that its nodes were really sent, and not what they had already.
    return {**kept, "refused": refused, "bytes": record["bytes"].get("up")}


def slow(config: dict[str, Any]) -> fed.Task:
    """The task with rounds that take half a second."""

    def load_slowly(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = load(partition_id, num_partitions)

        def stream(key: mx.array):
            time.sleep(0.025)
            yield tuple(map(mx.array, data.train))

        return fed.Data(stream, data.test)

    return replace(TASK, data=load_slowly)
