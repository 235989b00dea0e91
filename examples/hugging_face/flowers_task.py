import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_fed import data

INPUTS = ("sepal-length", "sepal-width", "petal-length", "petal-width")


def arrays(examples):
    *inputs, label = data.columns(examples, *INPUTS, "label")
    return np.stack(inputs, axis=1).astype(np.float32), label.astype(np.int32)


def task(config):
    dataset = config.get("dataset", "flowers")
    partitions = data.partition_settings(config)

    def load(partition_id, num_partitions):
        train, test = data.load_partition(dataset, partition_id, num_partitions, **partitions)
        return fed.Data(train=arrays(train), test=arrays(test))

    return fed.Task(
        model=lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
        loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
        metrics={"accuracy": lambda model, x, y: mx.argmax(model(x), axis=1) == y},
        optimizer=lambda config: optim.Adam(config["learning-rate"]),
        data=load,
        config={"learning-rate": 0.02},
    )
