"""Handwritten digits with an MLP: the model of MLX's own MNIST example, federated.

The data is ``digits`` (5,000 of MNIST's images, from a PyPI package) unless another is named.
"""

import itertools

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_fed import data


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU between its ``num_layers`` hidden layers."""

    def __init__(self, num_layers: int, input_dim: int, hidden_dim: int, output_dim: int):
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * num_layers + [output_dim]
        self.layers = [nn.Linear(i, o) for i, o in itertools.pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = mx.maximum(layer(x), 0.0)
        return self.layers[-1](x)


def loss(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(images), labels)


def accuracy(model: nn.Module, images: mx.array, labels: mx.array) -> mx.array:
    return mx.argmax(model(images), axis=1) == labels


def settings(dataset: str) -> dict:
    """What suits a dataset: three rounds teach 60,000 images well, 5,000 hardly at all."""
    if dataset == "digits":
        return {"num-rounds": 10, "batch-size": 16, "local-epochs": 2, "learning-rate": 0.1}
    return {"num-rounds": 3, "batch-size": 256, "local-epochs": 1, "learning-rate": 0.1}


def arrays(examples) -> tuple[np.ndarray, np.ndarray]:
    """Images as float32 of shape (examples, 784) in 0..1, and labels as int32."""
    images, labels = data.columns(examples, "image", "label")
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int32)


def task(config: dict) -> fed.Task:
    """The task, with the settings ``dataset``, ``partitioner`` and the partitioner's arguments."""
    dataset = config.get("dataset", "digits")
    partitions = data.partition_settings(config)

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        train, test = data.load_partition(dataset, partition_id, num_partitions or 3, **partitions)
        return fed.Data(train=arrays(train), test=arrays(test))

    return fed.Task(
        model=lambda: MLP(num_layers=2, input_dim=784, hidden_dim=32, output_dim=10),
        loss=loss,
        metrics={"accuracy": accuracy, "confusion": fed.ConfusionMatrix(10)},
        optimizer=lambda config: optim.SGD(learning_rate=config["learning-rate"]),
        data=load,
        config=settings(dataset),
    )


def central_test(config: dict) -> tuple[np.ndarray, np.ndarray]:
    """The dataset's test split, which no client holds, for a server to evaluate on: not digits'."""
    return arrays(data.load_test_split(config.get("dataset", "digits")))


client_app = fed.client_app(task)
server_app = fed.server_app(task)
