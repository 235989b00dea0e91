"""The machine's limit: a client-round's matrix products and nothing else, on all cores.

Forward, weight gradients and input gradients (the first layer needs none), in a process a core,
with NumPy's own BLAS on one thread each. NumPy goes through a stack of clients in C, so that no
Python lies between the products. A convolution counts as the products of its patches, which are
taken as there already.
"""

import multiprocessing
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy reads it

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from workload import CONTEXT, VOCABULARY, Clock, Workload

STACK = 10
"""Clients that one call goes through, at most."""

Layer = tuple[int, int, int, int]
"""(products a client, rows, inputs, outputs)"""


def layers(model: str, batch: int) -> list[Layer]:
    """The layers' products for one batch, of which the first needs no input gradient."""
    if model == "mlp":
        return [(1, batch, 784, 32), (1, batch, 32, 32), (1, batch, 32, 10)]
    if model == "cnn":
        return [
            (1, batch * 28 * 28, 9, 8),
            (1, batch * 14 * 14, 72, 16),
            (1, batch, 7 * 7 * 16, 10),
        ]
    rows, dim, heads = batch * CONTEXT, 64, 2
    block = [
        *[(1, rows, dim, dim)] * 4,
        (batch * heads, CONTEXT, dim // heads, CONTEXT),
        (batch * heads, CONTEXT, CONTEXT, dim // heads),
        (1, rows, dim, 4 * dim),
        (1, rows, 4 * dim, dim),
    ]
    return [*block, *block, (1, rows, dim, VOCABULARY)]


def products(workload: Workload, stack: int) -> Iterator[Callable[[], Any]]:
    """The calls of an epoch of some clients, batch by batch."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.random(shape, dtype=np.float32)

    buffers: dict[int, list[list[np.ndarray]]] = {}
    for start in range(0, workload.samples, workload.batch_size):
        batch = min(workload.batch_size, workload.samples - start)
        if batch not in buffers:
            shapes = [
                ((stack * count, rows, i), (stack * count, o, i), (stack * count, rows, o))
                for count, rows, i, o in layers(workload.model, batch)
            ]
            buffers[batch] = [[array(*shape) for shape in layer * 2] for layer in shapes]
        for place, (x, w, dy, dx, dw, y) in enumerate(buffers[batch]):
            is_input = place == 0 and workload.model != "text"  # a text's is an embedding
            if is_input:
                x = array(*x.shape)  # every batch has examples of its own
            yield partial(np.matmul, x, w.swapaxes(1, 2), out=y)
            yield partial(np.matmul, dy.swapaxes(1, 2), x, out=dw)
            if not is_input:
                yield partial(np.matmul, dy, w, out=dx)


def multiply(workload: Workload, clients: int, barrier: Any) -> None:
    whole, rest = divmod(clients, STACK)
    calls = list(products(workload, STACK)) * whole
    if rest:
        calls += products(workload, rest)
    for _ in range(workload.num_rounds):
        barrier.wait()
        for call in calls:
            call()
        barrier.wait()


def main() -> None:
    workload, clock = Workload.from_command_line(), Clock()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share, rest = divmod(workload.per_round, cores)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores + 1, timeout=1800)
    for core in range(cores):
        work = (workload, share + (core < rest), barrier)
        context.Process(target=multiply, args=work, daemon=True).start()
    for _ in range(workload.num_rounds):
        barrier.wait()
        barrier.wait()
        clock.round_ended()
    clock.report()


if __name__ == "__main__":
    main()
