"""A federated task. Put your own model, data and loss where these are."""

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    """This client's examples: here two moons, drawn anew for each client."""
    rng = np.random.default_rng(partition_id)
    labels = rng.integers(0, 2, 1000)
    angles = rng.uniform(0, np.pi, 1000)
    x = np.where(labels, 1 - np.cos(angles), np.cos(angles))
    y = np.where(labels, 0.5 - np.sin(angles), np.sin(angles))
    points = np.stack([x, y], axis=1) + rng.normal(0, 0.1, (1000, 2))
    points, labels = points.astype(np.float32), labels.astype(np.int32)
    return fed.Data(train=(points[:800], labels[:800]), test=(points[800:], labels[800:]))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def loss(model: nn.Module, points: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(points), labels)


def accuracy(model: nn.Module, points: mx.array, labels: mx.array) -> mx.array:
    return mx.argmax(model(points), axis=1) == labels


task = fed.Task(
    model=model,
    loss=loss,
    metrics={"accuracy": accuracy},
    optimizer=lambda config: optim.Adam(learning_rate=config["learning-rate"]),
    data=load,
    batch_size=32,
    config={"learning-rate": 0.01},
)

client_app = fed.client_app(task)
server_app = fed.server_app(task)
