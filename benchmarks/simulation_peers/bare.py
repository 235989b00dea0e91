"""One client after another by a bare compiled MLX loop, on one core, and their plain average.

Each round shuffles a client's examples anew and takes its batches from them, as MLX's own examples
do and as every simulator but pfl does. ``bare_laid_out.py`` leaves that away.
"""

from collections.abc import Callable

import mlx_fed  # noqa: F401 - before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from models import MODELS, Loop
from workload import Clock, Workload

Batches = list[tuple[mx.array, mx.array]]


def shuffled(workload: Workload, number: int) -> Callable[[], Batches]:
    x, y = map(mx.array, workload.client(number))
    size = workload.batch_size
    mx.eval(x, y)

    def batches() -> Batches:
        order = mx.array(np.random.permutation(len(x)).astype(np.uint32))
        rows = [order[at : at + size] for at in range(0, len(x), size)]
        return [(x[row], y[row]) for row in rows]

    return batches


def main(batches_of: Callable[[Workload, int], Callable[[], Batches]] = shuffled) -> None:
    workload, clock = Workload.from_command_line(), Clock()
    mx.random.seed(workload.seed)
    clients = [batches_of(workload, number) for number in range(workload.num_clients)]
    module = MODELS[workload.model]()
    loop = Loop(module, workload.learning_rate)
    start = module.trainable_parameters()
    for _ in range(workload.num_rounds):
        total = tree_map(mx.zeros_like, start)
        for batches in clients:
            module.update(start)
            loop.train(batches())
            total = tree_map(mx.add, total, module.trainable_parameters())
            mx.async_eval(total)
        start = tree_map(lambda array: array / len(clients), total)
        mx.eval(start)
        clock.round_ended()
    clock.report()


if __name__ == "__main__":
    main()
