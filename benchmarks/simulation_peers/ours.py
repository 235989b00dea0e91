"""mlx-fed: ``fed.simulate``."""

import tempfile

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import mlx.optimizers as optim
import models
from flwr.serverapp.strategy import FedAvg
from mlx.utils import tree_unflatten
from workload import Clock, Reached, Workload


def make_task(workload: Workload) -> fed.Task:
    return fed.Task(
        model=models.MODELS[workload.model],
        loss=models.loss,
        optimizer=lambda config: optim.SGD(config["learning-rate"]),
        data=lambda partition_id, num_partitions: fed.Data(train=workload.client(partition_id)),
        batch_size=workload.batch_size,
        config={"learning-rate": workload.learning_rate},
    )


def main() -> None:
    workload = Workload.from_command_line()
    clock = Clock(workload.target)
    settings = {"seed": workload.seed}
    if workload.target is None:

        def listen(event: str, fields: dict) -> None:
            if event == "round":
                clock.round_ended()

    else:
        module, test = models.MODELS[workload.model](), list(map(mx.array, workload.test()))

        def evaluate(number: int, parameters: dict, statistics: dict) -> dict[str, float]:
            module.update(tree_unflatten(list(parameters.items())))
            accuracy = models.accuracy(module, *test)
            if clock.round_ended(accuracy):
                raise Reached
            return {"accuracy": accuracy}

        def listen(event: str, fields: dict) -> None:
            pass

        settings["evaluate_fn"] = evaluate
    strategy = FedAvg(
        fraction_train=workload.per_round / workload.num_clients, fraction_evaluate=0.0
    )
    with tempfile.TemporaryDirectory() as runs:
        try:
            fed.simulate(
                make_task(workload),
                strategy,
                num_clients=workload.num_clients,
                num_rounds=workload.num_rounds,
                runs=runs,
                listeners=(listen,),
                **settings,
            )
        except Reached:
            pass
    clock.report()


if __name__ == "__main__":
    main()
