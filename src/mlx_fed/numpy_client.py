"""NumPyClient of an MLX task, for programs on Flower's deprecated API.

``start_client(client=MLXClient(task, data).to_client())`` runs as with any NumPyClient. New
programs use :func:`mlx_fed.join` or :func:`mlx_fed.client_app`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from .arrays import master_weights, named_arrays, weights
from .flower.numpy_client_base import NumPyClient
from .task import Data, Task
from .task_settings import kebab_case
from .training.trainer import Trainer


class MLXClient(NumPyClient):
    """Client of Flower's ``start_server``.

    Parameters travel as a list in the model's order, without their names, and as float32 where
    NumPy has no such dtype (bfloat16). Running statistics follow them, so that a strategy
    averages them too; a strategy with a server optimizer, such as FedAdam, should not have a model
    with running statistics. Personal parameters and local statistics are not sent.

    Args:
        task (Task): The task.
        data (Data): This client's examples.
        client (int): The client's number, for its random keys. Default: ``0``.
        seed (int): The run's seed, for initial weights and random keys. Default: ``0``.

    Example:
        >>> client = MLXClient(task, task.data(0, 3))
        >>> start_client(server_address="127.0.0.1:8080", client=client.to_client())
    """

    def __init__(self, task: Task, data: Data, *, client: int = 0, seed: int = 0):
        super().__init__()
        self.trainer = Trainer(task, seed)
        self.data = data
        self.client = client
        self.seed = seed
        self.round = 0
        self.client_state: Mapping[str, mx.array] = {}

    def get_parameters(self, config: Mapping[str, Any]) -> list[np.ndarray]:
        """Parameters and running statistics that are averaged, in the model's order."""
        return [_to_numpy(array) for array in weights.get(self._averaged_slots()).values()]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        """Loads averaged arrays into the model.

        Raises:
            WeightsError: If their number or a shape differs; the message names the parameter.
        """
        slots = self._averaged_slots()
        spec = named_arrays.spec(weights.get(slots))
        if len(parameters) != len(spec):
            raise named_arrays.WeightsError(
                f"got {len(parameters)} arrays for the model's {len(spec)} ({', '.join(spec)})"
            )
        arrays = {name: mx.array(a) for name, a in zip(spec, parameters, strict=True)}
        weights.load(slots, master_weights.cast(arrays, spec))

    def _averaged_slots(self) -> dict[str, weights.Slot]:
        """Slots of the arrays that are averaged over clients."""
        slots = self.trainer.slots
        parameters = {name: slots.parameters[name] for name in self.trainer.spec}
        return parameters | {n: slots.statistics[n] for n in self.trainer.statistics_spec}

    def fit(
        self, parameters: list[np.ndarray], config: Mapping[str, Any]
    ) -> tuple[list[np.ndarray], int, dict[str, Any]]:
        """Local training from global parameters; settings may be in snake_case."""
        self.set_parameters(parameters)
        self.round += 1
        settings = {
            **self.trainer.task.config,
            "server-round": self.round,
            "seed": self.seed,
            **kebab_case(config),
        }
        update = self.trainer.train(
            self.trainer.parameters(),
            self.trainer.statistics(),
            self.data,
            settings,
            client=self.client,
            client_state=self.client_state,
        )
        self.client_state = update.client_state or self.client_state
        weights.put(self.trainer.slots.parameters, update.parameters)
        weights.put(self.trainer.slots.statistics, update.statistics)
        metrics = dict(update.metrics)
        return self.get_parameters({}), int(metrics.pop("num-examples")), metrics

    def evaluate(
        self, parameters: list[np.ndarray], config: Mapping[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluation on ``Data.test``: loss, number of examples and metrics."""
        self.set_parameters(parameters)
        if self.data.test is None:
            raise ValueError("This client has no test examples: Data.test is None.")
        evaluation = self.trainer.evaluate(
            self.trainer.parameters(), self.trainer.statistics(), self.data.test, self.client_state
        )
        metrics = evaluation.metrics
        if "loss" in evaluation.undefined:  # Flower's mean would be NaN for all clients
            raise ValueError(f"The loss is undefined: {evaluation.undefined['loss']}.")
        return float(metrics.pop("loss")), int(metrics.pop("num-examples")), metrics


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
