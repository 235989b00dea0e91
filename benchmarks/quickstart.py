"""Flower's MLX quickstart, three rounds on the full MNIST: by us, and by its own loop.

    python benchmarks/quickstart.py [--data ../shared/data/mnist] [--repeats 5] [--json]

Two of three partitions train the MLP for an epoch a round, batch 256, SGD 0.1; each holds 16,000
images to train on and 4,000 held out. Seconds from the moment both nodes have joined to the final
model (data is loaded and connections are made before), medians of the repeats. Our seed is the
number of the repeat; the quickstart has none. Accuracy and loss, after the third round and the
mean over both nodes, depend on the random start: their range is shown beside the median.

- ``mlx-fed``: ``mlx_fed.serve`` and two ``mlx_fed.join``, on examples/mnist.
- ``quickstart``: the loop of Flower's quickstart as its users run it: ``start_server``, and a
  NumPyClient with ``get_params``/``set_params`` over lists and an uncompiled
  ``nn.value_and_grad``; MLX as installed, and once more with OpenBLAS.

The targets: ours within 1 s, and at least 6 times faster than the quickstart with MLX as
installed; a median accuracy of 0.855 and loss of 0.514, give or take 0.02.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from federation import free_port, together

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.mnist import mnist  # noqa: E402 - from the repository's root

ROUNDS, BATCH_SIZE, LEARNING_RATE = 3, 256, 0.1


# -- mlx-fed -------------------------------------------------------------------------------


def our_server(port: int, data: str, seed: int) -> dict[str, Any]:
    times: dict[str, float] = {}

    def listen(event: events.Event) -> None:
        if isinstance(event, (events.NodeJoined, events.RunFinished)):
            times[event] = time.perf_counter()  # of the last node that joined

    with tempfile.TemporaryDirectory() as runs:
        result = fed.serve(
            mnist.task,
            num_rounds=ROUNDS,
            config={"dataset": data},
            seed=seed,
            port=port,
            runs=runs,
            listeners=(listen,),
        )
    rounds = [
        (record["evaluate"]["accuracy"], record["evaluate"]["loss"]) for record in result.rounds
    ]
    return {"seconds": times["finished"] - times["joined"], "rounds": rounds}


def our_node(port: int, data: str, partition: int) -> None:
    fed.join(
        mnist.task,
        f"127.0.0.1:{port}",
        partition_id=partition,
        num_partitions=3,
        device="cpu",
        config={"dataset": data},
        listener=lambda event: None,
    )


# -- the quickstart's own loop -------------------------------------------------------------


def loss_fn(model, images, labels):
    return mx.mean(nn.losses.cross_entropy(model(images), labels))


def eval_fn(model, images, labels):
    return mx.mean(mx.argmax(model(images), axis=1) == labels)


def batch_iterate(batch_size, images, labels):
    permutation = mx.array(np.random.permutation(labels.size))
    for start in range(0, labels.size, batch_size):
        ids = permutation[start : start + batch_size]
        yield images[ids], labels[ids]


def get_params(model):
    layers = model.parameters()["layers"]
    return [np.array(value) for layer in layers for _, value in layer.items()]


def set_params(model, parameters):
    layers = [
        {"weight": mx.array(parameters[i]), "bias": mx.array(parameters[i + 1])}
        for i in range(0, len(parameters), 2)
    ]
    model.update({"layers": layers})


def old_server(port: int) -> dict[str, Any]:
    from flwr.server import ServerConfig, SimpleClientManager, start_server
    from flwr.server.strategy import FedAvg

    logging.getLogger("flwr").setLevel(logging.ERROR)
    joined: list[float] = []
    ended: list[float] = []

    class Clocked(SimpleClientManager):
        def register(self, client):
            joined.append(time.perf_counter())
            return super().register(client)

    class Ending(FedAvg):
        def aggregate_evaluate(self, *arguments, **settings):
            result = super().aggregate_evaluate(*arguments, **settings)
            ended.append(time.perf_counter())
            return result

    def average(metrics):
        total = sum(examples for examples, _ in metrics)
        return {"accuracy": sum(n * m["accuracy"] for n, m in metrics) / total}

    history = start_server(
        server_address=f"127.0.0.1:{port}",
        config=ServerConfig(num_rounds=ROUNDS),
        strategy=Ending(evaluate_metrics_aggregation_fn=average),
        client_manager=Clocked(),
    )
    accuracies = [value for _, value in history.metrics_distributed["accuracy"]]
    losses = [value for _, value in history.losses_distributed]
    return {
        "seconds": ended[-1] - joined[1],
        "rounds": list(zip(accuracies, losses, strict=True)),
    }


def old_node(port: int, data: str, partition: int) -> None:
    from flwr.client import NumPyClient, start_client

    logging.getLogger("flwr").setLevel(logging.ERROR)
    split = mnist.task({"dataset": data}).data(partition, 3)
    train_images, train_labels = map(mx.array, split.train)
    test_images, test_labels = map(mx.array, split.test)
    mx.eval(train_images, train_labels, test_images, test_labels)
    model = mnist.MLP(num_layers=2, input_dim=784, hidden_dim=32, output_dim=10)
    optimizer = optim.SGD(learning_rate=LEARNING_RATE)
    loss_and_grad_fn = nn.value_and_grad(model, loss_fn)

    class Client(NumPyClient):
        def get_parameters(self, config):
            return get_params(model)

        def fit(self, parameters, config):
            set_params(model, parameters)
            for images, labels in batch_iterate(BATCH_SIZE, train_images, train_labels):
                _, grads = loss_and_grad_fn(model, images, labels)
                optimizer.update(model, grads)
                mx.eval(model.parameters(), optimizer.state)
            return get_params(model), len(train_images), {}

        def evaluate(self, parameters, config):
            set_params(model, parameters)
            accuracy = eval_fn(model, test_images, test_labels)
            loss = loss_fn(model, test_images, test_labels)
            return loss.item(), len(test_images), {"accuracy": accuracy.item()}

    start_client(server_address=f"127.0.0.1:{port}", client=Client().to_client())


# -- the comparison ------------------------------------------------------------------------


def run_ours(data: str, repeat: int) -> dict[str, Any]:
    port = free_port()
    nodes = [partial(our_node, port, data, partition) for partition in range(2)]
    return together(partial(our_server, port, data, repeat), *nodes)[0]


def run_quickstart(data: str, blas: str | None, repeat: int) -> dict[str, Any]:
    port = free_port()
    before = os.environ.pop("MLX_FED_BLAS", None)
    if blas is not None:
        os.environ["MLX_FED_BLAS"] = blas  # which the new processes read
    try:
        nodes = [partial(old_node, port, data, partition) for partition in range(2)]
        return together(partial(old_server, port), *nodes)[0]
    finally:
        os.environ.pop("MLX_FED_BLAS", None)
        if before is not None:
            os.environ["MLX_FED_BLAS"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "mnist"
    parser.add_argument("--data", default=str(default), help="MNIST's folder of parquet files")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, default 5")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not Path(arguments.data).is_dir():
        parser.error(f"no folder {arguments.data}: name MNIST's parquet files with --data")
    peers = {
        "mlx-fed": partial(run_ours, arguments.data),
        "quickstart, MLX as installed": partial(run_quickstart, arguments.data, "off"),
        "quickstart, OpenBLAS": partial(run_quickstart, arguments.data, None),
    }
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for repeat in range(arguments.repeats):
        for peer, run in peers.items():
            runs[peer].append(run(repeat))
    rows = []
    for peer, results in runs.items():
        row: dict[str, Any] = {
            "peer": peer,
            "seconds": statistics.median(result["seconds"] for result in results),
        }
        for place, metric in enumerate(("accuracy", "loss")):
            last = [result["rounds"][-1][place] for result in results]
            row[metric] = statistics.median(last)
            row[f"{metric}_range"] = [min(last), max(last)]
        rows.append(row)
    for row in rows:
        row["times_ours"] = row["seconds"] / rows[0]["seconds"]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("Three rounds of the quickstart on the full MNIST, from both nodes joined\n")
    print(
        f"{'':30}{'seconds':>9}{'x ours':>8}{'accuracy':>10}{'range':>16}{'loss':>8}{'range':>16}"
    )
    for row in rows:
        metrics = [
            f"{row[metric]:{width}.3f}{'{:.3f} to {:.3f}'.format(*row[f'{metric}_range']):>16}"
            for metric, width in (("accuracy", 10), ("loss", 8))
        ]
        print(f"{row['peer']:30}{row['seconds']:9.2f}{row['times_ours']:8.1f}", *metrics, sep="")


if __name__ == "__main__":
    main()
