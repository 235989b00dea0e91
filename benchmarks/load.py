"""One server with many resident nodes: is any lost, does memory grow, how long is a round.

    python benchmarks/load.py [--nodes 20 200] [--rounds 20] [--processes 4] [--json]

Each node is a ``mlx_fed.join`` that trains the quickstart's MLP (784-32-32-10, 0.1 MB) on 64
examples of its own, two steps a round; 5 or 50 of them are threads of one process, on the loopback.
All train and evaluate in every round. The server is a ``mlx_fed.serve`` in a process of its own,
with checkpoints, and its memory is what is resident after rounds 2 and the last. Seconds are the
median of rounds, the first left out. On few cores most of them are the nodes' own.

The targets: no node is lost, and memory is the same after 20 rounds as after 2.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import flower_app.app
from federation import free_port, together
from flwr.serverapp.strategy import FedAvg

EARLY = 2
"""The round whose memory the last one's is compared with."""


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    """A few examples, so that nodes are small and traffic counts."""
    data = flower_app.app.load(partition_id, num_partitions)
    return fed.Data(*(tuple(a[:64].copy() for a in part) for part in (data.train, data.test)))


task = replace(flower_app.app.task, data=load)


def server(port: int, nodes: int, rounds: int) -> dict:
    """When each round ended, the memory after two of them, and who was missing or left."""
    ends: list[float] = []
    memory: dict[int, int] = {}
    left: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            ends.append(time.perf_counter())
            if event.record["round"] in (EARLY, rounds):
                memory[event.record["round"]] = resident(os.getpid())
        elif isinstance(event, (events.NodeLeft, events.NodeRefused)) and len(ends) < rounds:
            left.append(event.record["node"])

    with tempfile.TemporaryDirectory() as runs:
        result = fed.serve(
            task,
            FedAvg(min_available_nodes=nodes, min_train_nodes=nodes, min_evaluate_nodes=nodes),
            num_rounds=rounds,
            port=port,
            runs=runs,
            min_nodes=nodes,
            listeners=(listen,),
        )
    missing = [entry["node"] for record in result.rounds for entry in record["refused"]]
    trained = min(len(record["train"]["nodes"]) for record in result.rounds)
    return {
        "lost": max(nodes - trained, len({*left, *missing})),
        "seconds": statistics.median(end - begin for begin, end in pairwise(ends)),
        "early": memory[EARLY],
        "last": memory[rounds],
    }


def crowd(port: int, partitions: range) -> None:
    """Many nodes in one process, a thread each."""

    def join(partition: int) -> None:
        fed.join(
            task,
            f"127.0.0.1:{port}",
            partition_id=partition,
            device="cpu",
            listener=lambda event: None,
        )

    nodes = [threading.Thread(target=join, args=(partition,)) for partition in partitions]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()


def resident(pid: int) -> int:
    """The memory that a process has, in bytes."""
    kilobytes = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    ).stdout
    return 1024 * int(kilobytes)


def measure(nodes: int, rounds: int, processes: int) -> dict:
    port = free_port()
    served, *_ = together(
        partial(server, port, nodes, rounds),
        *(partial(crowd, port, range(first, nodes, processes)) for first in range(processes)),
    )
    return {"nodes": nodes, **served}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4, help="that the nodes share")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(n, arguments.rounds, arguments.processes) for n in arguments.nodes]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    last = f"MB, round {arguments.rounds}"
    print(f"{'nodes':>7}{'lost':>7}{'s a round':>12}{f'MB, round {EARLY}':>14}{last:>14}")
    for row in rows:
        megabytes = f"{row['early'] / 1e6:14.1f}{row['last'] / 1e6:14.1f}"
        print(f"{row['nodes']:7}{row['lost']:7}{row['seconds']:12.3f}{megabytes}")


if __name__ == "__main__":
    main()
