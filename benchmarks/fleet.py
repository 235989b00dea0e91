"""Milliseconds of a federated round beyond the training itself, on three carriers.

    python benchmarks/fleet.py [--rounds 30] [--flower-rounds 4] [--json]

Two nodes on the loopback train and evaluate the quickstart's MLP (784-32-32-10, 0.1 MB) on 600
examples each, batch 32; weights change every round. Every peer trains with our trainer, timed
around its call, and the slowest node's seconds of each phase are taken off the round's. Building
a model, loading data and converting arrays is not training, wherever it is done.

- ``mlx-fed``: ``mlx_fed.serve`` in one process, ``mlx_fed.join`` in two; and the same with TLS and
  node keys, as beyond the loopback.
- ``start_server``: Flower's deprecated server and clients, a NumPyClient in each of two processes.
- ``flwr run``: a stock SuperLink with two stock SuperNodes, on ``flower_app``, which is written
  as a user of Flower writes one: a ClientApp, and ``FedAvg().start``.

Medians over the rounds after the first few. The targets: 80 ms at most (30 is the goal), and a
hundred times less than ``flwr run``.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import numpy as np
import superlink
from federation import free_port, together
from flower_app.app import Timed, task

Seconds = dict[str, list[float]]
"""What each call took in training and in evaluation, as a node remembers it."""


# -- mlx-fed -------------------------------------------------------------------------------


def our_server(port: int, rounds: int, federation: str | None = None) -> list[float]:
    """When the first round began, and when each round ended."""
    ticks: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) or (
            isinstance(event, events.PhaseStarted) and not ticks
        ):
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as runs:
        where = {"port": port, "announce": "127.0.0.1", "federation": federation or runs}
        secure = federation is not None
        fed.serve(task, num_rounds=rounds, secure=secure, runs=runs, listeners=(listen,), **where)
    return ticks


def our_node(port: int, partition: int, token: str | None = None) -> Seconds:
    from mlx_fed import clientapp

    trainers = []

    def timed(*arguments) -> Timed:
        trainers.append(Timed(*arguments))
        return trainers[-1]

    clientapp.Trainer = timed
    fed.join(
        task,
        f"127.0.0.1:{port}",
        token=token,
        partition_id=partition,
        device="cpu",
        listener=lambda event: None,
    )
    return trainers[-1].seconds


def run_ours(rounds: int) -> tuple[list[float], list[Seconds]]:
    port = free_port()
    ticks, *nodes = together(
        partial(our_server, port, rounds), *(partial(our_node, port, p) for p in range(2))
    )
    return ticks, nodes


def run_ours_encrypted(rounds: int) -> tuple[list[float], list[Seconds]]:
    from mlx_fed.fleet.federation import Federation

    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_FED_HOME"] = folder  # of the processes below
        federation = Federation(Path(folder, "federation"), f"127.0.0.1:{port}")
        tokens = [federation.invite(f"node-{p}") for p in range(2)]
        ticks, *nodes = together(
            partial(our_server, port, rounds, str(federation.folder)),
            *(partial(our_node, port, p, token) for p, token in enumerate(tokens)),
        )
    return ticks, nodes


# -- Flower's deprecated start_server and start_client -------------------------------------


def old_server(port: int, rounds: int) -> list[float]:
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    logging.getLogger("flwr").setLevel(logging.ERROR)
    ticks: list[float] = []

    class Clocked(FedAvg):
        def configure_fit(self, *arguments, **settings):
            ticks.append(time.perf_counter())
            return super().configure_fit(*arguments, **settings)

        def aggregate_evaluate(self, server_round, *arguments, **settings):
            result = super().aggregate_evaluate(server_round, *arguments, **settings)
            if server_round == rounds:
                ticks.append(time.perf_counter())
            return result

    start_server(
        server_address=f"127.0.0.1:{port}",
        config=ServerConfig(num_rounds=rounds),
        strategy=Clocked(),
    )
    return ticks


def old_node(port: int, partition: int) -> Seconds:
    from flwr.client import NumPyClient, start_client

    logging.getLogger("flwr").setLevel(logging.ERROR)
    trainer, data = Timed(task), task.data(partition, None)
    trainer.warm_up(data, task.config)

    class Client(NumPyClient):
        def get_parameters(self, config):
            return [np.array(array) for array in trainer.parameters().values()]

        def fit(self, parameters, config):
            update = trainer.train(self.named(parameters), {}, data, task.config)
            arrays = [np.array(array) for array in update.parameters.values()]
            return arrays, update.metrics["num-examples"], {}

        def evaluate(self, parameters, config):
            metrics = trainer.evaluate(self.named(parameters), {}, data.test).metrics
            return metrics["loss"], metrics["num-examples"], {"accuracy": metrics["accuracy"]}

        def named(self, parameters):
            return {n: mx.array(a) for n, a in zip(trainer.spec, parameters, strict=True)}

    start_client(server_address=f"127.0.0.1:{port}", client=Client().to_client())
    return trainer.seconds


def run_deprecated(rounds: int) -> tuple[list[float], list[Seconds]]:
    port = free_port()
    ticks, *nodes = together(
        partial(old_server, port, rounds), *(partial(old_node, port, p) for p in range(2))
    )
    return ticks, nodes


# -- a stock SuperLink and stock SuperNodes ------------------------------------------------


def run_flower(rounds: int) -> tuple[list[float], list[Seconds]]:
    app = Path(__file__).parent / "flower_app"
    with tempfile.TemporaryDirectory() as name, superlink.federation(Path(name), 2) as run:
        ticks = run(app, {"num-rounds": rounds}, 60 + 30 * rounds)
        return ticks, [_node_seconds(Path(name, f"node-{p}")) for p in range(2)]


def _node_seconds(path: Path) -> Seconds:
    seconds: Seconds = {"train": [], "evaluate": []}
    for line in path.read_text().splitlines():
        kind, second = json.loads(line)
        seconds[kind].append(second)
    return seconds


# -- the comparison ------------------------------------------------------------------------


def summary(
    peer: str, ticks: list[float], nodes: list[Seconds], rounds: int, warm_up: int
) -> dict[str, float | int | str]:
    """Medians in milliseconds over the rounds after the first ``warm_up``."""
    walls = [end - begin for begin, end in pairwise(ticks)]
    assert len(walls) == rounds, f"{peer}: {len(walls)} rounds instead of {rounds}"
    # A node that warms up makes more calls than there are rounds: the last ones count.
    training = [
        sum(max(node[kind][number - rounds] for node in nodes) for kind in ("train", "evaluate"))
        for number in range(rounds)
    ]
    kept = list(zip(walls, training, strict=True))[warm_up:]
    medians = {
        "round": statistics.median(wall for wall, _ in kept),
        "training": statistics.median(trained for _, trained in kept),
        "beyond": statistics.median(wall - trained for wall, trained in kept),
    }
    return {
        "peer": peer,
        "rounds": len(kept),
        **{name: round(1000 * value, 1) for name, value in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds that count, default 30")
    parser.add_argument(
        "--flower-rounds", type=int, default=4, help="the same by flwr run, default 4; 0: without"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    warm_up = 5
    peers = [
        ("mlx-fed", run_ours, arguments.rounds, warm_up),
        ("with TLS, keys", run_ours_encrypted, arguments.rounds, warm_up),
        ("start_server", run_deprecated, arguments.rounds, warm_up),
    ]
    if arguments.flower_rounds:
        peers.append(("flwr run", run_flower, arguments.flower_rounds, 1))
    rows = []
    for peer, run, counted, before in peers:
        ticks, nodes = run(counted + before)
        rows.append(summary(peer, ticks, nodes, counted + before, before))
    times = {row["peer"]: row["beyond"] / rows[0]["beyond"] for row in rows}
    if arguments.json:
        print(json.dumps({"milliseconds": rows, "times_ours": times}, indent=2))
        return
    print("Milliseconds a train + evaluate round, two nodes on the loopback\n")
    print(f"{'':16}{'rounds':>7}{'round':>10}{'training':>10}{'beyond':>10}{'x ours':>9}")
    for row in rows:
        print(
            f"{row['peer']:16}{row['rounds']:7}{row['round']:10.1f}{row['training']:10.1f}"
            f"{row['beyond']:10.1f}{times[row['peer']]:9.1f}"
        )


if __name__ == "__main__":
    main()
