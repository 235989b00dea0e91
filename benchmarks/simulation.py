"""Milliseconds of a simulated client-round, beside other simulators and the machine's limit.

    python benchmarks/simulation.py [--models mlp cnn text] [--peers NAME ...] [--repeats 3]
                                    [--quick] [--json]

A hundred clients train in each round, one epoch each, SGD at 0.1, and are averaged:

- ``mlp``: the quickstart's 784-32-32-10 on 600 examples of random float32 a client;
- ``cnn``: two convolutions and a linear layer on 600 images of 28 x 28;
- ``text``: two transformer blocks (dimension 64, 2 heads) on 64 texts of 64 characters.

Each peer runs in processes of its own, from an environment of its own (``environments.py``), by
its file in ``simulation_peers/``; it holds every client's data in memory before it begins. What
counts is the wall clock from the end of one round to the end of the next, so a peer may use as
many cores as it can. Medians over rounds, the first ones excluded; start-up is a process's start
to the end of its first round. Peers take turns, once in every repeat. The GEMM limit is the
epoch's matrix products alone, and ``ratio`` is to the bare loop of the same run. Where the fastest
round lies far below the median, the machine was busy with something else: repeat.

The targets: at most 0.4 of the bare loop at batch 32 and 0.55 at 256 for the MLP; the goal is
0.3 and 0.4.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace

from peers import PEERS, NotAvailable, Run, run
from simulation_peers.workload import Workload

BATCHES = {"mlp": (32, 256), "cnn": (32, 256), "text": (8, 32)}
SAMPLES = {"mlp": 600, "cnn": 600, "text": 64}
ROUNDS = {"mlp": 6, "cnn": 2, "text": 2}
WARM_UP = {"mlp": 3, "cnn": 1, "text": 1}
"""Rounds that do not count, the first included."""


def measure(
    model: str, names: list[str], repeats: int, quick: bool
) -> dict[str, dict[int, list[Run] | str]]:
    """The runs of each peer by batch size, or why there are none."""
    results: dict[str, dict[int, list[Run] | str]] = {name: {} for name in names}
    rounds = WARM_UP[model] + (2 if quick else ROUNDS[model])
    work = Workload(model, batch_size=0, num_rounds=rounds, samples=SAMPLES[model])
    for batch in BATCHES[model]:
        for _ in range(repeats):
            for name in names:
                runs = results[name].setdefault(batch, [])
                if isinstance(runs, str):
                    continue
                try:
                    runs.append(run(PEERS[name], replace(work, batch_size=batch)))
                except NotAvailable as error:
                    results[name][batch] = str(error)
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def summary(runs: list[Run], warm_up: int, clients: int = 100) -> dict[str, float]:
    """Milliseconds a client-round: the median of all rounds that count, and the fastest."""
    counted = [1000 * seconds / clients for each in runs for seconds in each.rounds[warm_up - 1 :]]
    return {
        "ms": statistics.median(counted),
        "fastest": min(counted),
        "start_up": statistics.median(each.start_up for each in runs),
    }


def rows_of(model: str, results: dict[str, dict[int, list[Run] | str]]) -> list[dict]:
    rows = []
    for name, by_batch in results.items():
        for batch, runs in by_batch.items():
            row = {"model": model, "peer": name, "batch": batch}
            if isinstance(runs, str):
                rows.append({**row, "not_available": runs})
            else:
                rows.append({**row, **summary(runs, WARM_UP[model])})
    bare = {row["batch"]: row["ms"] for row in rows if row["peer"] == "bare" and "ms" in row}
    for row in rows:
        if "ms" in row and row["batch"] in bare:
            row["ratio"] = row["ms"] / bare[row["batch"]]
    return rows


def show(model: str, rows: list[dict]) -> None:
    first, second = BATCHES[model]
    print(f"\n{model}: ms a client-round, 100 a round\n")
    heads = f"{'ms':>8}{'fastest':>9}{'ratio':>7}{'start-up s':>12}"
    print(f"{'':34}{f'batch {first}':>24}{f'batch {second}':>36}")
    print(f"{'':34}{heads}{heads}")
    for name in dict.fromkeys(row["peer"] for row in rows):
        cells = ""
        for row in (row for row in rows if row["peer"] == name):
            if "not_available" in row:
                cells = f"  not available: {row['not_available']}"
                break
            ratio = f"{row['ratio']:7.2f}" if "ratio" in row else f"{'':7}"
            cells += f"{row['ms']:8.2f}{row['fastest']:9.2f}{ratio}{row['start_up']:12.1f}"
        print(f"{PEERS[name].label:34}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=1, help="processes of each, default 1")
    parser.add_argument("--quick", action="store_true", help="only two rounds that count")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = [name for name in PEERS if name == "bare" or name in arguments.peers]
    tables = {}
    for model in arguments.models:
        results = measure(model, names, arguments.repeats, arguments.quick)
        tables[model] = rows_of(model, results)
        if not arguments.json:
            show(model, tables[model])
    if arguments.json:
        print(json.dumps([row for rows in tables.values() for row in rows], indent=2))


if __name__ == "__main__":
    main()
