"""A large model that is moved and not trained, and a Flower app as a user of Flower writes one.

"Training" adds a number to every weight, another on each node and in each round, so that the time
is that of carrying and averaging.
"""

import json
import time
from pathlib import Path

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from mlx_fed.training.trainer import Trainer, ClientUpdate

ARRAYS = 20


class Large(nn.Module):
    """A model of 20 float32 arrays."""

    def __init__(self, megabytes: int):
        super().__init__()
        size = megabytes * 1_000_000 // 4 // ARRAYS
        self.tables = [mx.random.uniform(shape=(size,)) for _ in range(ARRAYS)]


def task(config: dict) -> fed.Task:
    """The task of a model of ``megabytes``."""
    return fed.Task(
        model=lambda: Large(int(config["megabytes"])),
        loss=lambda model, x: (model.tables[0][:1] * x).mean(),
        optimizer=lambda config: optim.SGD(0.1),
        data=lambda partition_id, num_partitions: fed.Data(train=(mx.ones((1, 1)),)),
    )


def step(partition: int, number: int) -> float:
    """What a node adds to each weight in a round."""
    return 1e-3 * (partition + 1) + 1e-5 * number


class Still(Trainer):
    """A trainer whose training takes no time to speak of."""

    def train(self, parameters, statistics, data, config, *, client=0, client_state=None):
        added = step(client, int(config["server-round"]))
        moved = {name: array + added for name, array in parameters.items()}
        mx.eval(moved)
        return ClientUpdate(moved, {}, {"num-examples": client + 1, "loss": 0.0})

    def warm_up(self, data, config):
        pass


# -- the same on Flower alone ----------------------------------------------------------------

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    added = step(partition, int(message.content["config"]["server-round"]))
    arrays = {
        name: Array(array.numpy() + np.float32(added))
        for name, array in message.content["arrays"].items()
    }
    metrics = MetricRecord({"num-examples": partition + 1})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )


class Clocked(FedAvg):
    """FedAvg that notes when each training phase begins and ends."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.phases: list[tuple[float, float]] = []
        self.began = 0.0

    def configure_train(self, *arguments):
        self.began = time.perf_counter()
        return super().configure_train(*arguments)

    def aggregate_train(self, *arguments):
        result = super().aggregate_train(*arguments)
        self.phases.append((self.began, time.perf_counter()))
        return result


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Clocked()
    size = int(context.run_config["megabytes"]) * 1_000_000 // 4 // ARRAYS
    rng = np.random.default_rng(0)
    arrays = {f"tables.{n}": Array(rng.random(size, dtype=np.float32)) for n in range(ARRAYS)}
    strategy.start(
        grid, ArrayRecord(arrays), num_rounds=int(context.run_config["num-rounds"]), timeout=1200
    )
    path = Path(context.run_config["timings"], "server")
    path.with_suffix(".part").write_text(json.dumps(strategy.phases))
    path.with_suffix(".part").rename(path)
