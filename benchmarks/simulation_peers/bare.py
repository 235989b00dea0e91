"""One client after another by a bare compiled MLX loop, on one core, and their plain average.

The batches lie in memory as MLX arrays, shuffled beforehand.
"""

import mlx_fed  # noqa: F401 - before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
from mlx.utils import tree_map
from models import MODELS, Loop
from workload import Clock, Workload


def batches_of(workload: Workload, number: int) -> list[tuple[mx.array, mx.array]]:
    x, y = map(mx.array, workload.client(number))
    order = mx.random.permutation(len(x))
    x, y = x[order], y[order]
    size = workload.batch_size
    batches = [(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]
    mx.eval(batches)
    return batches


def main() -> None:
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
            loop.train(batches)
            total = tree_map(mx.add, total, module.trainable_parameters())
            mx.async_eval(total)
        start = tree_map(lambda array: array / len(clients), total)
        mx.eval(start)
        clock.round_ended()
    clock.report()


if __name__ == "__main__":
    main()
