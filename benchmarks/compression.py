"""Accuracy and bytes of a simulated federation with compressed updates.

    python benchmarks/compression.py [--dataset digits] [--rounds 30] [--seeds 3] [--json]

The convolutional network of examples/images, ten clients with Dirichlet labels (0.5), one local
epoch a round. Bytes up are those of all clients in a round, with the running statistics, which are
not compressed. Accuracy is that on the clients' held-out images after the last round: the mean over
the seeds, and the mean of its differences from the run of the same seed without compression.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx_fed as fed  # noqa: E402
from examples.images import task  # noqa: E402

COMPRESSIONS = ["", "int8", "int4", "int2", "int1", "topk:0.05", "topk:0.02,int8", "randk:0.1"]


def measure(compress: str, dataset: str, num_rounds: int, seed: int) -> dict[str, float]:
    config = {"dataset": dataset, "partitioner": "dirichlet", "alpha": 0.5, "compress": compress}
    with tempfile.TemporaryDirectory() as folder:
        result = fed.simulate(
            task,
            num_clients=10,
            num_rounds=num_rounds,
            config=config,
            seed=seed,
            runs=folder,
            listeners=(),
        )
    last = result.rounds[-1]
    return {"up": last["bytes"]["up"], "accuracy": last["evaluate"]["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    plain: list[dict[str, float]] = []
    for compress in COMPRESSIONS:
        runs = [
            measure(compress, arguments.dataset, arguments.rounds, seed)
            for seed in range(arguments.seeds)
        ]
        plain = plain or runs
        changes = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, plain, strict=True)]
        row = {
            "compress": compress or "none",
            "kilobytes up": round(runs[0]["up"] / 1000, 1),
            "times fewer": round(plain[0]["up"] / runs[0]["up"], 1),
            "accuracy": round(100 * statistics.mean(run["accuracy"] for run in runs), 2),
            "points": round(statistics.mean(changes), 2),
        }
        print(json.dumps(row) if arguments.json else row, flush=True)


if __name__ == "__main__":
    main()
