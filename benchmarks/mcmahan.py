"""A published figure: McMahan et al. 2017, table 1, MNIST 2NN, by ``fed.simulate``.

    python benchmarks/mcmahan.py [--data FOLDER] [--learning-rates 0.05 0.1] [--seeds 0] [--json]

Two hidden layers of 200 with ReLU, 100 clients of 600 examples, E=1, B=10, C=0.1, on the IID
split and on the one where a client has two shards of 300 from the images sorted by digit. The
paper (https://arxiv.org/abs/1602.05629) counts the rounds to 97 % test accuracy as here: the
learning curve is made monotonic by taking the best accuracy so far, and the crossing is
interpolated between rounds; the learning rate is the best of a grid. It has 87 rounds on the IID
split and 664 on the other; within 20 % is the target.
"""

import argparse
import json
import sys
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import partition
from peers import PEERS, NotAvailable, run
from simulation_peers.workload import Workload

PAPER = {"iid": 87, "two-digits": 664}
TARGET = 0.97


def crossing(accuracies: list[float], target: float) -> float | None:
    """The round, interpolated, where the best accuracy so far reaches the target; from round 1."""
    best = list(accumulate(accuracies, max))
    if best and best[0] >= target:
        return 1.0
    for number, (before, after) in enumerate(pairwise(best), start=1):
        if after >= target:
            return number + (target - before) / (after - before)
    return None


def measure(workload: Workload, split: str) -> dict:
    row = {"split": split, "learning_rate": workload.learning_rate, "seed": workload.seed}
    try:
        result = run(PEERS["mlx-fed"], workload, limit=24 * 3600)
    except NotAvailable as error:
        return {**row, "not_available": str(error)}
    return {
        **row,
        "rounds": crossing(result.accuracies, TARGET),
        "paper": PAPER[split],
        "best": max(result.accuracies),
        "seconds": result.start_up + sum(result.rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(partition.MNIST), help="MNIST's parquet files")
    parser.add_argument("--splits", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max-rounds", type=int, default=1500)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not Path(arguments.data).is_dir():
        parser.error(f"no folder {arguments.data}: name MNIST's parquet files with --data")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for split in arguments.splits:
            data = Path(folder, f"{split}.npz")
            partition.write(arguments.data, split, data)
            for learning_rate in arguments.learning_rates:
                for seed in arguments.seeds:
                    workload = Workload(
                        "2nn",
                        batch_size=10,
                        num_rounds=arguments.max_rounds,
                        per_round=10,
                        learning_rate=learning_rate,
                        seed=seed,
                        data=str(data),
                        target=TARGET,
                    )
                    rows.append(measure(workload, split))
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("Rounds to 97 % on MNIST, 2NN, 100 clients, E=1, B=10, C=0.1\n")
    print(f"{'':12}{'rate':>7}{'seed':>6}{'rounds':>9}{'paper':>7}{'best':>9}{'seconds':>9}")
    for row in rows:
        start = f"{row['split']:12}{row['learning_rate']:7g}{row['seed']:6}"
        if "not_available" in row:
            print(f"{start}  not available: {row['not_available']}")
            continue
        rounds = "-" if row["rounds"] is None else f"{row['rounds']:.1f}"
        print(f"{start}{rounds:>9}{row['paper']:7}{row['best']:9.4f}{row['seconds']:9.1f}")


if __name__ == "__main__":
    main()
