import os

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

CENTER = np.array([50, 115, 5.5])
SCALE = np.array([17, 17, 1.2])


def load(partition_id, num_partitions):
    """The rows of this clinic: every fifth one is held out."""
    path = os.environ.get("CLINIC_TABLE", f"clinic-{partition_id}.csv")
    table = np.loadtxt(path, delimiter=",", skiprows=1)
    x = ((table[:, :3] - CENTER) / SCALE).astype(np.float32)
    y = table[:, 3].astype(np.int32)
    held_out = np.arange(len(x)) % 5 == 0
    return fed.Data(train=(x[~held_out], y[~held_out]), test=(x[held_out], y[held_out]))


def loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y)


def accuracy(model, x, y):
    return mx.argmax(model(x), axis=1) == y


task = fed.Task(
    model=lambda: nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)),
    loss=loss,
    metrics={"accuracy": accuracy},
    optimizer=lambda config: optim.Adam(config["learning-rate"]),
    data=load,
    config={"learning-rate": 0.003},
)
