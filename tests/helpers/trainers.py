"""Models, losses and optimizers for trainers, and their data."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

import mlx_fed as fed
from mlx_fed.training.trainer import Trainer


class MLP(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: bool = False):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.layers = [nn.Linear(8, 8), nn.Linear(8, 3)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.dropout(nn.relu(self.norm(self.first(x))))
        return self.layers[1](nn.tanh(self.layers[0](x)))


def vector(model, x, y):
    return nn.losses.cross_entropy(model(x), y)


def mean(model, x, y):
    return vector(model, x, y).mean()


def weighted(model, x, y):
    """A mean over some of the examples and their number, as mlx-lm's over tokens."""
    chosen = (y > 0).astype(mx.float32)
    weight = chosen.sum()
    return (vector(model, x, y) * chosen).sum() / mx.maximum(weight, 1), weight


def divided(model, x, y):
    """The same with their number as it comes, a whole one, which also divides the sum."""
    chosen = y > 0
    weight = chosen.sum()
    return (vector(model, x, y) * chosen).sum() / weight, weight


def accuracy(model, x, y):
    return mx.argmax(model(x), axis=1) == y


def noisy(key, x, y):
    return x + mx.random.normal(x.shape, key=key), y


def examples(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, 4)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0)


def sgd(config: dict) -> optim.Optimizer:
    return optim.SGD(config.get("learning-rate", 0.1), momentum=config.get("momentum", 0.0))


def trainer(model: Callable = MLP, loss=vector, optimizer=sgd, **settings) -> Trainer:
    settings.setdefault("batch_size", 8)
    if loss in (weighted, divided):
        settings.setdefault("weight_unit", "words")
    unused = {"data": lambda *_: fed.Data(examples(1))}
    return Trainer(fed.Task(model=model, loss=loss, optimizer=optimizer, **unused, **settings))


OPTIMIZERS = {
    "sgd": lambda config: optim.SGD(0.1),
    "momentum": lambda config: optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda config: optim.Adam(0.01, bias_correction=True),
    "adamw": lambda config: optim.AdamW(0.01, weight_decay=0.1),
    "schedule": lambda config: optim.Adam(optim.cosine_decay(0.05, 5)),
    "several": lambda config: optim.MultiOptimizer(
        [optim.SGD(optim.linear_schedule(0.1, 0.01, 4), momentum=0.5), optim.Adam(0.01)],
        [lambda name, _: name.startswith("layers.1")],
    ),
}

OTHERS = {
    "rmsprop": lambda config: optim.RMSprop(0.01),
    "adagrad": lambda config: optim.Adagrad(0.1),
    "adadelta": lambda config: optim.AdaDelta(1.0),
    "adamax": lambda config: optim.Adamax(0.01),
    "lion": lambda config: optim.Lion(0.01),
    "adafactor": lambda config: optim.Adafactor(0.01),
    "muon": lambda config: optim.MultiOptimizer(
        [optim.Muon(0.01), optim.SGD(0.1)], [lambda _, weight: weight.ndim == 2]
    ),
}
