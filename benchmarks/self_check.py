"""What a simulation's comparisons with the plain path cost, of the CPU time of a run.

    python benchmarks/self_check.py [--rounds 20] [--clients 100]

Counts the CPU time in comparisons of compiled and batched steps and in snapshots of Python state,
in one process. The target is 2 % of 20 rounds, without the first compilation of kernels, which is
on disk afterwards.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from flower_app.app import MLP, loss
from flwr.serverapp.strategy import FedAvg
from mlx_fed.simulation import batched_trainer
from mlx_fed.training.programs import Program
from mlx_fed.training.python_state import PythonState
from training import CNN


class Stopwatch:
    """CPU time in functions that it wraps, calls within calls counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrap(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - start

        setattr(owner, name, timed)


def load(partition: int, num_partitions: int | None) -> fed.Data:
    rng = np.random.default_rng(partition)
    images = rng.normal(size=(600, 784)).astype(np.float32)
    return fed.Data((images, rng.integers(0, 10, 600).astype(np.int32)))


def run(model: Callable[[], nn.Module], rounds: int, clients: int) -> float:
    """CPU seconds of a simulation."""
    task = fed.Task(model, loss, lambda config: optim.SGD(0.1), load, batch_size=32)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"workers": 0, "runs": folder, "listeners": ()}
        fed.simulate(task, FedAvg(fraction_evaluate=0.0), clients, rounds, **options)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clients", type=int, default=100)
    options = parser.parse_args()
    stopwatch = Stopwatch()
    stopwatch.wrap(batched_trainer, "check_step")
    stopwatch.wrap(Program, "_run_uncompiled")
    stopwatch.wrap(PythonState, "snapshot")
    for name, model in (("MLP", lambda: MLP(2, 784, 32, 10)), ("CNN", CNN)):
        run(model, 1, 2)  # kernels are compiled
        stopwatch.seconds = 0.0
        seconds = run(model, options.rounds, options.clients)
        share = 100 * stopwatch.seconds / seconds
        print(f"{name}: {stopwatch.seconds:.2f} of {seconds:.1f} s CPU, {share:.2f} %", flush=True)


if __name__ == "__main__":
    main()
