"""Small tasks for the tests of whole processes: ``mlx-fed serve tests.tasks:moons``."""

from __future__ import annotations

import time

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def moons(config: dict) -> fed.Task:
    """Two classes of points, by a small network.

    The settings ``hidden`` (size of the model), ``raise-in`` (a round), ``slow`` (seconds a
    step's trace takes) and ``missing`` (no data) make it misbehave.
    """

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        if config.get("missing"):
            raise fed.FedError("There is no folder '/data/patients'.")
        rng = np.random.default_rng(partition_id)
        labels = rng.integers(0, 2, 200)
        points = rng.normal(0, 0.4, (200, 2)) + np.stack([labels, 1 - labels], axis=1)
        points, labels = points.astype(np.float32), labels.astype(np.int32)
        return fed.Data((points[:160], labels[:160]), (points[160:], labels[160:]))

    def optimizer(settings: dict) -> optim.Optimizer:
        if settings.get("server-round") == config.get("raise-in", -1):
            raise RuntimeError("the disk of this node is full")
        time.sleep(config.get("slow", 0) if settings.get("server-round") else 0)
        return optim.SGD(settings["learning-rate"])

    hidden = config.get("hidden", 16)
    return fed.Task(
        model=lambda: nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2)),
        loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
        metrics={"accuracy": lambda model, x, y: mx.argmax(model(x), axis=1) == y},
        optimizer=optimizer,
        data=load,
        config={"learning-rate": 0.1, "num-rounds": 3},
    )
