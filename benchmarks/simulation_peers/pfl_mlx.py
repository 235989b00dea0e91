"""pfl-research: federated averaging of an ``MLXModel`` by its ``SimulatedBackend``.

In one process, as ``pip install`` leaves it: its data-parallel mode needs an MPI of one's own.
pfl slices each user's batches once and does not shuffle them.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import models
import numpy as np
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.mlx import MLXModel
from workload import Clock, Workload


class PflModel(nn.Module):
    """The model with the two methods that pfl asks of one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __call__(self, x: mx.array) -> mx.array:
        return self.module(x)

    def loss(self, x: mx.array, y: mx.array) -> mx.array:
        return models.loss(self.module, x, y).mean()

    def metrics(self, x: mx.array, y: mx.array) -> dict[str, Weighted]:
        correct = mx.sum(mx.argmax(self(x), axis=-1) == y).item()
        return {"accuracy": Weighted(correct, y.size)}


class Ticking(TrainingProcessCallback):
    """Notes each round's end, and ends the training when the target is reached."""

    def __init__(self, workload: Workload, clock: Clock):
        self.clock = clock
        self.test = None if workload.target is None else list(map(mx.array, workload.test()))

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        accuracy = self.test and models.accuracy(model.mlx_model, *self.test)
        mx.eval(model.mlx_model.parameters())
        return self.clock.round_ended(accuracy), Metrics()


def main() -> None:
    workload = Workload.from_command_line()
    clock = Clock(workload.target)
    mx.random.seed(workload.seed)
    np.random.seed(workload.seed)
    users = [
        Dataset(tuple(map(mx.array, workload.client(number))), user_id=str(number))
        for number in range(workload.num_clients)
    ]
    cohort: list[int] = []

    def next_user() -> int:
        """Each round's users without repetition: pfl's own samplers repeat or go in order."""
        if not cohort:
            cohort.extend(np.random.permutation(len(users))[: workload.per_round])
        return cohort.pop()

    data = FederatedDataset(users.__getitem__, next_user)
    model = MLXModel(
        PflModel(models.MODELS[workload.model]()),
        local_optimizer=optim.SGD(workload.learning_rate),
        central_optimizer=optim.SGD(1.0),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=workload.num_rounds,
            evaluation_frequency=workload.num_rounds + 1,  # after the first, never
            train_cohort_size=workload.per_round,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.learning_rate,
            local_batch_size=workload.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Ticking(workload, clock)],
        send_metrics_to_platform=False,
    )
    clock.report()


if __name__ == "__main__":
    main()
