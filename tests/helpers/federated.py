"""Runs of the round loop, in this process, with seven clients of one small task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.serverapp.strategy import Strategy

import mlx_fed as fed
from mlx_fed import events
from mlx_fed.rounds import loop
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.runs.history import History
from mlx_fed.training.trainer import Trainer

from .loopback import App, LoopbackGrid

SEED = 7
SIZES = (24, 40, 31, 16, 50, 22, 35)
WEIGHT = "layers.0.weight"


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    """Points of three classes; clients differ in how many they hold and where these lie."""
    rng = np.random.default_rng(partition_id)
    labels = rng.integers(0, 3, SIZES[partition_id] + 10).astype(np.int32)
    points = rng.normal(0.1 * partition_id, 1.0, (len(labels), 5)) + np.eye(3, 5)[labels]
    points = points.astype(np.float32)
    return fed.Data((points[10:], labels[10:]), (points[:10], labels[:10]))


def bfloat16_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    model.set_dtype(mx.bfloat16)
    return model


TASK = fed.Task(
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
    loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
    metrics={"accuracy": lambda model, x, y: mx.argmax(model(x), axis=1) == y},
    optimizer=lambda config: optim.SGD(config["learning-rate"]),
    data=load,
    batch_size=16,
    config={"learning-rate": 0.2},
)

NORMALIZED = replace(
    TASK,
    model=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm(8), nn.ReLU(), nn.Linear(8, 3)),
)

BFLOAT16 = replace(TASK, model=bfloat16_model)
CLIENT = fed.client_app(TASK)


def federate(
    strategy: Strategy,
    folder: Path,
    apps: Sequence[App] = (CLIENT,) * 7,
    *,
    task: fed.Task = TASK,
    num_rounds: int = 3,
    seed: int = SEED,
    node_ids: Sequence[int] | None = None,
    listener: events.Listener | None = None,
    resume: bool = False,
    **settings: Any,
) -> loop.Result:
    """Our loop. Its nodes are listed, and reply, in another order than that of partitions."""
    folder.mkdir(exist_ok=True)
    return loop.run(
        LoopbackGrid(apps, node_ids=node_ids, backwards=True),
        strategy,
        Trainer(task, seed),
        RunSettings(num_rounds=num_rounds, seed=seed, **settings),
        History(folder, (listener,) if listener else ()),
        resume=resume,
    )


def as_record(arrays: dict[str, mx.array]) -> ArrayRecord:
    return ArrayRecord({k: Array(np.array(a.astype(mx.float32))) for k, a in arrays.items()})


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between arrays in float32; 0 only if they are equal."""
    assert one.keys() == other.keys()
    return max(float(abs(float32(one[name]) - float32(other[name])).max()) for name in one)


def float32(array: Any) -> np.ndarray:
    if isinstance(array, mx.array):
        return np.array(array.astype(mx.float32))
    return np.asarray(array.numpy() if isinstance(array, Array) else array, dtype=np.float32)


def on_train(change: Callable[[Message], None], app: App = CLIENT) -> App:
    """A client whose replies to training messages are changed on their way."""

    def changed(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        reply = app(message, context)
        if kind == "train":
            change(reply)
        return reply

    return changed
