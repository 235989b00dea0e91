"""Time to accuracy: how long a simulated federation takes to read 95 % of MNIST's test set.

    python benchmarks/accuracy.py [--data FOLDER] [--peers NAME ...] [--repeats 3] [--json]

The quickstart's MLP on the full MNIST, 100 clients with Dirichlet labels (0.3), 10 a round for
one epoch, batch 32, SGD at 0.1, averaged by examples, and the accuracy on the 10,000 test images
after every round. All read one partition. The simulators draw initial weights, clients and
batches themselves, so the number of rounds varies with the seed: medians over seeds. Seconds
are from the process's start, which the first round's end divides in start-up and training.
Bytes are what the models weigh that a federation would move: down and up for each client.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import partition
from peers import PEERS, NotAvailable, Run, run
from simulation_peers.workload import Workload

SIMULATORS = [name for name in PEERS if name not in ("bare", "gemm")]
MODEL_BYTES = 4 * (784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10)


def summary(runs: list[Run], workload: Workload) -> dict[str, float | list[int] | str]:
    reached = [each for each in runs if each.accuracies[-1] >= workload.target]
    if len(reached) < len(runs):
        best = max(max(each.accuracies) for each in runs)
        return {"not_available": f"{best:.4f} at best in {workload.num_rounds} rounds"}
    rounds = [len(each.accuracies) for each in runs]
    return {
        "seconds": statistics.median(each.start_up + sum(each.rounds) for each in runs),
        "start_up": statistics.median(each.start_up for each in runs),
        "ms_a_round": 1000 * statistics.median(s for each in runs for s in each.rounds),
        "rounds": statistics.median(rounds),
        "range": [min(rounds), max(rounds)],
        "megabytes": statistics.median(rounds) * workload.per_round * 2 * MODEL_BYTES / 1e6,
    }


def measure(names: list[str], workload: Workload, repeats: int) -> list[dict]:
    runs: dict[str, list[Run]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    for seed in range(repeats):
        for name in names:
            if name in reasons:
                continue
            try:
                runs[name].append(run(PEERS[name], replace(workload, seed=seed)))
            except NotAvailable as error:
                reasons[name] = str(error)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [
        {
            "peer": name,
            **(
                {"not_available": reasons[name]}
                if name in reasons
                else summary(runs[name], workload)
            ),
        }
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(partition.MNIST), help="MNIST's parquet files")
    parser.add_argument("--peers", nargs="+", choices=SIMULATORS, default=SIMULATORS)
    parser.add_argument("--repeats", type=int, default=3, help="seeds of each, default 3")
    parser.add_argument("--target", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--max-rounds", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not Path(arguments.data).is_dir():
        parser.error(f"no folder {arguments.data}: name MNIST's parquet files with --data")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "mnist.npz")
        partition.write(arguments.data, "dirichlet", data)
        workload = Workload(
            "mlp",
            batch_size=arguments.batch_size,
            num_rounds=arguments.max_rounds,
            per_round=10,
            learning_rate=arguments.learning_rate,
            data=str(data),
            target=arguments.target,
        )
        rows = measure(arguments.peers, workload, arguments.repeats)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"MNIST to an accuracy of {arguments.target}: 100 clients, Dirichlet 0.3, 10 a round\n")
    heads = {"seconds": 9, "start-up": 10, "ms a round": 12, "rounds": 8, "range": 12, "MB": 8}
    print(f"{'':28}" + "".join(f"{head:>{width}}" for head, width in heads.items()))
    for row in rows:
        label = PEERS[row["peer"]].label
        if "not_available" in row:
            print(f"{label:28}  not available: {row['not_available']}")
            continue
        span = "{} to {}".format(*row["range"])
        print(
            f"{label:28}{row['seconds']:9.1f}{row['start_up']:10.1f}{row['ms_a_round']:12.1f}"
            f"{row['rounds']:8.0f}{span:>12}{row['megabytes']:8.1f}"
        )


if __name__ == "__main__":
    main()
