"""The benchmark's task, and a Flower app around it as a user of Flower would write it by hand.

The app is what ``flwr run`` packs: a ClientApp and ``FedAvg.start``, arrays by name. Its training
is our trainer's, so that all that differs between the peers is what carries the messages.
"""

import itertools
import json
import time
from pathlib import Path

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from mlx_fed.training.trainer import Trainer


class MLP(nn.Module):
    """The quickstart's multi-layer perceptron."""

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


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    """600 examples to train on and 150 held out, drawn at random: only the traffic matters."""
    rng = np.random.default_rng(partition_id)
    images = rng.random((750, 784), dtype=np.float32)
    labels = rng.integers(0, 10, 750).astype(np.int32)
    return fed.Data(train=(images[:600], labels[:600]), test=(images[600:], labels[600:]))


task = fed.Task(
    model=lambda: MLP(num_layers=2, input_dim=784, hidden_dim=32, output_dim=10),
    loss=loss,
    metrics={"accuracy": accuracy},
    optimizer=lambda config: optim.SGD(config["learning-rate"]),
    data=load,
    batch_size=32,
    config={"learning-rate": 0.1},
)


class Timed(Trainer):
    """A trainer that remembers how long training and evaluation took.

    Attributes:
        seconds (dict): Of each call of ``train`` and of ``evaluate``, in order.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.seconds: dict[str, list[float]] = {"train": [], "evaluate": []}

    def train(self, *arguments, **settings):
        started = time.perf_counter()
        update = super().train(*arguments, **settings)
        self.seconds["train"].append(time.perf_counter() - started)
        return update

    def evaluate(self, *arguments):
        started = time.perf_counter()
        metrics = super().evaluate(*arguments)
        self.seconds["evaluate"].append(time.perf_counter() - started)
        return metrics


def to_record(arrays: dict[str, mx.array]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(array)) for name, array in arrays.items()})


def to_mlx(arrays: ArrayRecord) -> dict[str, mx.array]:
    return {name: mx.array(array.numpy()) for name, array in arrays.items()}


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    trainer, data = _set_out(context)
    parameters = to_mlx(message.content["arrays"])
    update = trainer.train(parameters, {}, data, dict(message.content["config"]))
    _note(trainer, context)
    arrays = to_record(update.parameters)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(update.metrics)})
    return Message(content, reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    trainer, data = _set_out(context)
    metrics = trainer.evaluate(to_mlx(message.content["arrays"]), {}, data.test).metrics
    _note(trainer, context)
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _set_out(context: Context) -> tuple[Timed, fed.Data]:
    return Timed(task), task.data(int(context.node_config["partition-id"]), None)


def _note(trainer: Timed, context: Context) -> None:
    """Appends what the message took to the node's file: its process ends with the message."""
    path = Path(context.run_config["timings"], f"node-{context.node_config['partition-id']}")
    with path.open("a") as file:
        for kind, seconds in trainer.seconds.items():
            for second in seconds:
                file.write(json.dumps([kind, second]) + "\n")


class Clocked(FedAvg):
    """FedAvg that notes when each round begins."""

    def __init__(self):
        super().__init__()
        self.begins: list[float] = []

    def configure_train(self, *arguments):
        self.begins.append(time.perf_counter())
        return super().configure_train(*arguments)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Clocked()
    strategy.start(
        grid,
        to_record(Trainer(task).parameters()),
        num_rounds=int(context.run_config["num-rounds"]),
        train_config=ConfigRecord(dict(task.config)),
    )
    strategy.begins.append(time.perf_counter())
    path = Path(context.run_config["timings"], "server")
    path.with_suffix(".part").write_text(json.dumps(strategy.begins))
    path.with_suffix(".part").rename(path)
