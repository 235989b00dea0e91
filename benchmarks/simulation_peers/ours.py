"""mlx-fed: ``fed.simulate``."""

import tempfile
from contextlib import suppress

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.optimizers as optim
import models
from flwr.serverapp.strategy import FedAvg
from mlx.utils import tree_unflatten
from workload import Clock, Reached, Workload, resident


def make_task(workload: Workload) -> fed.Task:
    return fed.Task(
        model=models.MODELS[workload.model],
        loss=models.loss,
        optimizer=lambda config: optim.SGD(config["learning-rate"]),
        data=lambda partition_id, num_partitions: fed.Data(resident(workload, partition_id)),
        batch_size=workload.batch_size,
        config={"learning-rate": workload.learning_rate},
    )


def main() -> None:
    workload = Workload.from_command_line()
    clock = Clock(workload.target)
    module = models.MODELS[workload.model]()
    test = None if workload.target is None else list(map(mx.array, workload.test()))

    def evaluate(number: int, parameters: dict, statistics: dict) -> None:
        accuracy = None
        if test is not None:
            module.update(tree_unflatten(list(parameters.items())))
            accuracy = models.accuracy(module, *test)
        if clock.round_ended(accuracy):
            raise Reached

    strategy = FedAvg(
        fraction_train=workload.per_round / workload.num_clients, fraction_evaluate=0.0
    )
    with tempfile.TemporaryDirectory() as runs, suppress(Reached):
        fed.simulate(
            make_task(workload),
            strategy,
            num_clients=workload.num_clients,
            num_rounds=workload.num_rounds,
            seed=workload.seed,
            runs=runs,
            listeners=(),
            evaluate_fn=evaluate,
        )
    clock.report()


if __name__ == "__main__":
    main()
