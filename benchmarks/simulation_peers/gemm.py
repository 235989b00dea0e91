"""The machine's limit: a client-round's matrix products and nothing else, on all cores.

Forward, weight gradients and input gradients (the first layer needs none), in a process a core,
with NumPy's own OpenBLAS on one thread each. NumPy goes through a stack of clients in C, so
that no Python lies between the products. A convolution counts as the products of its patches,
which are taken as there already.
"""

import multiprocessing
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy reads it

from collections.abc import Callable, Iterator
from threading import Barrier

import numpy as np
from workload import CONTEXT, VOCABULARY, Clock, Workload

STACK = 10
"""Clients that one call goes through."""

Layer = tuple[int, int, int, int, bool]
"""(products, rows, inputs, outputs, whether its input needs a gradient)."""


def layers(model: str, batch: int) -> list[Layer]:
    """The layers' products for one batch."""
    if model == "mlp":
        return [
            (1, batch, 784, 32, False),
            (1, batch, 32, 32, True),
            (1, batch, 32, 10, True),
        ]
    if model == "cnn":
        return [
            (1, batch * 28 * 28, 9, 8, False),
            (1, batch * 14 * 14, 72, 16, True),
            (1, batch, 784, 10, True),
        ]
    rows, dim, heads = batch * CONTEXT, 64, 2
    block = [
        *[(1, rows, dim, dim, True)] * 4,
        (batch * heads, CONTEXT, dim // heads, CONTEXT, True),
        (batch * heads, CONTEXT, CONTEXT, dim // heads, True),
        (1, rows, dim, 4 * dim, True),
        (1, rows, 4 * dim, dim, True),
    ]
    return [*block, *block, (1, rows, dim, VOCABULARY, True)]


def products(workload: Workload) -> Iterator[Callable[[], None]]:
    """The calls of an epoch of ``STACK`` clients, batch by batch."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.random(shape, dtype=np.float32)

    size = workload.batch_size
    first: dict[int, np.ndarray] = {}
    for start in range(0, workload.samples, size):
        batch = min(size, workload.samples - start)
        for place, (count, rows, inputs, outputs, input_gradient) in enumerate(
            layers(workload.model, batch)
        ):
            count *= STACK
            # Every batch has data of its own in the first layer; the others reuse buffers.
            x = (
                array(count, rows, inputs)
                if place == 0
                else first.setdefault((place, batch), array(count, rows, inputs))
            )
            w, dy = array(count, outputs, inputs), array(count, rows, outputs)
            y, dw = np.empty_like(dy), np.empty_like(w)
            yield lambda x=x, w=w, y=y: np.matmul(x, w.swapaxes(1, 2), out=y)
            yield lambda x=x, dy=dy, dw=dw: np.matmul(dy.swapaxes(1, 2), x, out=dw)
            if input_gradient:
                dx = np.empty_like(x)
                yield lambda w=w, dy=dy, dx=dx: np.matmul(dy, w, out=dx)


def multiply(workload: Workload, times: int, barrier: Barrier) -> None:
    calls = list(products(workload))
    for _ in range(workload.num_rounds):
        barrier.wait()
        for _ in range(times):
            for call in calls:
                call()
        barrier.wait()


def main() -> None:
    workload, clock = Workload.from_command_line(), Clock()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    times, rest = divmod(workload.per_round, STACK * cores)
    if rest:
        raise SystemExit(f"{cores} cores cannot share {workload.per_round} clients by {STACK}.")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores + 1)
    processes = [
        context.Process(target=multiply, args=(workload, times, barrier), daemon=True)
        for _ in range(cores)
    ]
    for process in processes:
        process.start()
    for _ in range(workload.num_rounds):
        barrier.wait()
        barrier.wait()
        clock.round_ended()
    for process in processes:
        process.join()
    clock.report()


if __name__ == "__main__":
    main()
