"""What a simulation costs as it grows: clients in a round, and clients that exist.

    python benchmarks/scale.py [--samples 600] [--batch 32] [--json]

The quickstart's MLP, one epoch of SGD a client. Every client's examples are a stretch of one array
that each process holds, so that what is measured is training and not the making of data. First 100,
1,000 and 10,000 clients train in a round, all that there are; then 100 of 1,000 and 100 of 100,000.
Medians over rounds, the first left out; memory is the peak of the run's own process and of its
largest worker, in MB.

The targets: from 100 to 10,000 clients a round the cost of a client-round rises by less than 15 %;
100,000 clients that exist need no more memory than 1,000.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import pairwise

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from flower_app.app import MLP, loss
from flwr.serverapp.strategy import FedAvg

CASES = [(100, 100, 12), (1000, 1000, 5), (10000, 10000, 3), (1000, 100, 12), (100000, 100, 12)]
"""Clients that exist, clients in a round, rounds."""


@cache
def examples(samples: int) -> tuple[mx.array, mx.array]:
    """Far more than a core's cache holds."""
    rng = np.random.default_rng(0)
    images = mx.array(rng.random((64 * samples, 784), dtype=np.float32))
    labels = mx.array(rng.integers(0, 10, 64 * samples).astype(np.int32))
    mx.eval(images, labels)
    return images, labels


def make_task(samples: int, batch: int) -> fed.Task:
    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        images, labels = examples(samples)
        rows = slice((start := partition_id % 64 * samples), start + samples)
        return fed.Data((images[rows], labels[rows]))

    return fed.Task(
        model=lambda: MLP(2, 784, 32, 10),
        loss=loss,
        optimizer=lambda config: optim.SGD(0.1),
        data=load,
        batch_size=batch,
    )


def run(existing: int, each_round: int, rounds: int, samples: int, batch: int) -> dict:
    """One simulation in this process: seconds of each round, and the peaks of memory."""
    ends: list[float] = []
    strategy = FedAvg(fraction_train=each_round / existing, fraction_evaluate=0.0)
    with tempfile.TemporaryDirectory() as runs:
        fed.simulate(
            make_task(samples, batch),
            strategy,
            num_clients=existing,
            num_rounds=rounds,
            runs=runs,
            listeners=(),
            evaluate_fn=lambda *_: ends.append(time.perf_counter()),
        )
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {
        name: resource.getrusage(who).ru_maxrss * unit / 1e6
        for name, who in (("main", resource.RUSAGE_SELF), ("worker", resource.RUSAGE_CHILDREN))
    }
    taken = [after - before for before, after in pairwise(ends)]
    return {"ms": 1000 * statistics.median(taken) / each_round, **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=600, help="examples a client")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(run(*CASES[arguments.case], arguments.samples, arguments.batch)))
        return
    rows = []
    for number, (existing, each_round, _) in enumerate(CASES):
        # In a process of its own, whose peak of memory is its own.
        command = [sys.executable, __file__, *sys.argv[1:], "--case", str(number)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = {"existing": existing, "a round": each_round, **json.loads(done.stdout)}
        rows.append(row)
        if not arguments.json:
            if number == 0:
                print(f"{'clients':>8}{'a round':>9}{'ms each':>9}{'main MB':>9}{'worker MB':>11}")
            print(
                f"{existing:8}{each_round:9}{row['ms']:9.2f}{row['main']:9.0f}{row['worker']:11.0f}"
            )
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
