"""The Flower app of ``flower_ray.py``: a training ClientApp with the model in MLX, and FedAvg.

A module of its own, so that an actor keeps its model, its compiled step and the data that it has
loaded. The workload comes by the environment, which actors inherit.
"""

import os
from contextlib import suppress
from functools import cache

import mlx.core as mx
import models
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from mlx.utils import tree_flatten, tree_unflatten
from workload import Clock, Reached, Workload

workload = Workload.from_json(os.environ["WORKLOAD"])
clock = Clock(workload.target)


def to_record(module) -> ArrayRecord:
    parameters = tree_flatten(module.trainable_parameters())
    return ArrayRecord({name: Array(np.array(array)) for name, array in parameters})


def put(module, record: ArrayRecord) -> None:
    arrays = [(name, mx.array(array.numpy())) for name, array in record.items()]
    module.update(tree_unflatten(arrays))


@cache
def set_up():
    """A process's model and its compiled training loop."""
    mx.random.seed(workload.seed)
    module = models.MODELS[workload.model]()
    return module, models.Loop(module, workload.learning_rate)


@cache
def load(number: int) -> tuple[mx.array, mx.array]:
    x, y = map(mx.array, workload.client(number))
    mx.eval(x, y)
    return x, y


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    module, loop = set_up()
    put(module, message.content["arrays"])
    x, y = load(int(context.node_config["partition-id"]))
    order, size = mx.random.permutation(len(x)), workload.batch_size
    batches = (order[at : at + size] for at in range(0, len(x), size))
    loop.train((x[rows], y[rows]) for rows in batches)
    metrics = MetricRecord({"num-examples": len(x)})
    content = RecordDict({"arrays": to_record(module), "metrics": metrics})
    return Message(content, reply_to=message)


class Complete(FedAvg):
    """FedAvg that does not go on without a client: Flower's own passes over failures."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) != workload.per_round:
            raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[:1]}")
        return super().aggregate_train(server_round, replies)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    module, _ = set_up()
    test = None if workload.target is None else list(map(mx.array, workload.test()))

    def evaluate(number: int, arrays: ArrayRecord) -> None:
        if number == 0:
            return
        accuracy = None
        if test is not None:
            put(module, arrays)
            accuracy = models.accuracy(module, *test)
        if clock.round_ended(accuracy):
            raise Reached

    strategy = Complete(
        fraction_train=workload.per_round / workload.num_clients,
        fraction_evaluate=0.0,
        # The fraction is of the nodes that are there when the first round begins: not yet all.
        min_train_nodes=workload.per_round,
        min_available_nodes=workload.num_clients,
    )
    with suppress(Reached):
        strategy.start(
            grid, to_record(module), num_rounds=workload.num_rounds, evaluate_fn=evaluate
        )
