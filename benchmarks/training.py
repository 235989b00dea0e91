"""How close local training comes to a bare compiled MLX loop on the same batches.

    python benchmarks/training.py [--repeats 30] [--json]

The loop is the one in MLX's documentation: ``value_and_grad`` and the optimizer's update in one
``mx.compile``, the examples already on the device. ``eval`` waits for each step, as MLX's
examples do; ``async`` lets the next step be prepared meanwhile and is the one that counts here.
A tail shorter than a batch is trained on by both. The three take turns, in random order, and
medians are compared.

The target is 95 % of the bare loop's speed.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flower_app.app import MLP, loss
from mlx_fed.training.trainer import Trainer

LEARNING_RATE = 0.1


class CNN(nn.Module):
    """Two convolutions and a linear layer, for images of 28 x 28."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1)
        self.out = nn.Linear(7 * 7 * 16, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.first(x.reshape(-1, 28, 28, 1)))
        x = nn.relu(self.second(x))
        return self.out(x.reshape(len(x), -1))


def ours(
    model: Callable[[], nn.Module], images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Callable[[], None]:
    """An epoch by our trainer, from the same start each time."""
    task = fed.Task(
        model=model,
        loss=loss,
        optimizer=lambda config: optim.SGD(config["learning-rate"]),
        data=lambda partition_id, num_partitions: data,
        batch_size=batch_size,
    )
    data = fed.Data(train=(images, labels))
    trainer = Trainer(task)
    start = trainer.parameters()

    def epoch() -> None:
        trainer.train(start, {}, data, {"learning-rate": LEARNING_RATE})

    return epoch


def bare(
    model: Callable[[], nn.Module],
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    evaluate: Callable[..., None],
) -> Callable[[], None]:
    """An epoch by a compiled loop with nothing around it."""
    module = model()
    optimizer = optim.SGD(LEARNING_RATE)
    optimizer.init(module.trainable_parameters())
    images, labels = mx.array(images), mx.array(labels)
    state = [module.state, optimizer.state]
    gradient = nn.value_and_grad(module, lambda model, x, y: loss(model, x, y).mean())
    mx.eval(state, images, labels)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> mx.array:
        value, grads = gradient(module, x, y)
        optimizer.update(module, grads)
        return value

    def epoch() -> None:
        order = mx.array(np.random.permutation(len(labels)).astype(np.uint32))
        for start in range(0, len(labels), batch_size):
            rows = order[start : start + batch_size]
            evaluate(state, step(images[rows], labels[rows]))
        mx.eval(state)

    return epoch


def compare(
    model: Callable[[], nn.Module], num_examples: int, batch_size: int, repeats: int
) -> dict[str, float]:
    """Milliseconds an epoch, the median of each."""
    rng = np.random.default_rng(0)
    images = rng.random((num_examples, 784), dtype=np.float32)
    labels = rng.integers(0, 10, num_examples).astype(np.int32)
    work = (model, images, labels, batch_size)
    epochs = {
        "ours": ours(*work),
        "eval": bare(*work, evaluate=mx.eval),
        "async": bare(*work, evaluate=mx.async_eval),
    }
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for epoch in epochs.values():
        epoch()  # compiles
        epoch()
    for _ in range(repeats):
        for name in random.sample(list(epochs), len(epochs)):
            started = time.perf_counter()
            epochs[name]()
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30, help="epochs of each, default 30")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    models = {"MLP": partial(MLP, 2, 784, 32, 10), "CNN": CNN}
    cases = [("MLP", n, b) for n in (600, 16000) for b in (32, 256)]
    cases += [("CNN", 600, 32), ("CNN", 2000, 256)]
    rows = []
    for name, num_examples, batch_size in cases:
        # Short epochs need more repeats for a steady median.
        repeats = arguments.repeats * (5 if name == "MLP" and num_examples < 1000 else 1)
        times = compare(models[name], num_examples, batch_size, repeats)
        rows.append(
            {
                "model": name,
                "examples": num_examples,
                "batch": batch_size,
                **{key: round(value, 3) for key, value in times.items()},
                "speed": round(times["async"] / times["ours"], 3),
            }
        )
    if arguments.json:
        print(json.dumps({"milliseconds_per_epoch": rows, "target_speed": 0.95}, indent=2))
        return
    print("Milliseconds an epoch, and our speed as a share of bare MLX's (async)\n")
    print(f"{'model':6}{'examples':>9}{'batch':>7}{'ours':>9}{'async':>9}{'eval':>9}{'speed':>8}")
    for row in rows:
        print(
            f"{row['model']:6}{row['examples']:9}{row['batch']:7}{row['ours']:9.2f}"
            f"{row['async']:9.2f}{row['eval']:9.2f}{row['speed']:8.0%}"
        )


if __name__ == "__main__":
    main()
