"""What one node of eight costs that is online and never replies, or that is killed.

    python benchmarks/silent.py [--rounds 400] [--seconds 1.0]

Eight nodes and a server on the loopback. A node's training takes so many seconds, in which it
sleeps: little depends on the number of cores. The silent node answers the roll call, sends
heartbeats, and does no more; the killed one ends after the first rounds. The targets: with the
silent node at most 1.1 times as long as with eight that reply, and less than a second for each
round after the other is killed.
"""

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from dataclasses import replace

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

from federation import free_port
from flwr.serverapp.strategy import FedAvg
from load import task

NODES = 8
KILLED_AFTER = 3


def server(port: int, rounds: int, pid_to_kill: int | None) -> list[float]:
    """The seconds of each round's training and evaluation."""

    def listen(event: events.Event) -> None:
        is_round = isinstance(event, events.RoundFinished)
        if pid_to_kill and is_round and event.record["round"] == KILLED_AFTER:
            os.kill(pid_to_kill, signal.SIGKILL)

    with tempfile.TemporaryDirectory() as runs:
        result = fed.serve(
            replace(task, metrics={}),
            FedAvg(min_available_nodes=NODES - 1),
            num_rounds=rounds,
            port=port,
            runs=runs,
            min_nodes=NODES - 1 if pid_to_kill else NODES,
            listeners=(listen,),
        )
    return [sum(record["seconds"].values()) for record in result.rounds]


def nodes(port: int, partitions: range, seconds: float, is_silent: bool = False) -> None:
    """Nodes in one process, a thread each."""

    def delay(message, context, call_next):
        time.sleep(10**6 if is_silent else seconds)
        return call_next(message, context)

    app = replace(task, metrics={})

    def join(partition: int) -> None:
        fed.join(
            app,
            f"127.0.0.1:{port}",
            partition_id=partition,
            device="cpu",
            mods=[delay],
            listener=lambda event: None,
        )

    threads = [threading.Thread(target=join, args=(p,), daemon=True) for p in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(kind: str, rounds: int, seconds: float) -> list[float]:
    """The seconds of each round."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    last = context.Process(
        target=nodes, args=(port, range(NODES - 1, NODES), seconds, kind == "silent"), daemon=True
    )
    others = context.Process(target=nodes, args=(port, range(NODES - 1), seconds), daemon=True)
    last.start()
    others.start()
    seconds_of_rounds = server(port, rounds, last.pid if kind == "killed" else None)
    last.kill()
    others.kill()
    return seconds_of_rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    whole = {}
    for kind in ("all reply", "silent", "killed"):
        number = arguments.rounds if kind != "killed" else 20
        rounds = measure(kind, number, arguments.seconds)
        whole[kind] = sum(rounds)
        print(
            f"{kind:>10}{len(rounds):6} rounds {sum(rounds):9.1f} s, median "
            f"{statistics.median(rounds):.2f} s, longest {max(rounds):.2f} s",
            flush=True,
        )
    print(f"silent / all reply: {whole['silent'] / whole['all reply']:.3f}")


if __name__ == "__main__":
    main()
