"""The bare loop with its batches laid out in memory beforehand: no shuffling, nothing gathered."""

from collections.abc import Callable

import mlx_fed  # noqa: F401 - before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
from bare import Batches, main
from workload import Workload


def laid_out(workload: Workload, number: int) -> Callable[[], Batches]:
    x, y = map(mx.array, workload.client(number))
    order = mx.random.permutation(len(x))
    x, y = x[order], y[order]
    size = workload.batch_size
    batches = [(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]
    mx.eval(batches)
    return lambda: batches


if __name__ == "__main__":
    main(laid_out)
