"""Arrays of a model that are averaged over clients, and those that stay with each client."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..arrays import named_arrays, weights
from ..arrays.named_arrays import Arrays, arrays_of_kind, name_by_kind
from ..task import Task
from .steps import TrainState


class ClientArrays:
    """Division of a model's arrays by ``Task.personal``, ``Task.buffers`` and ``Task.statistics``.

    A client state is a dictionary of arrays by paths: ``parameters/NAME`` for personal parameters,
    ``statistics/NAME`` for local statistics, and with ``Task.keep_optimizer`` ``counters/PATH`` and
    ``state/PATH`` of the optimizer.

    Args:
        task (Task): The task.
        slots (Slots): Where the model's arrays are held.

    Attributes:
        shared (list): Names of the parameters that are averaged.
        personal (list): Names of the parameters that stay with each client.
        averaged_statistics (list): Names of the statistics that are averaged.
        local_statistics (list): Names of the statistics that stay with each client.
        has_client_state (bool): Whether clients have a state from round to round.

    Raises:
        WeightsError: If no parameter is shared, ``Task.buffers`` returns an unknown word, or would
            average whole numbers.
    """

    def __init__(self, task: Task, slots: weights.Slots):
        self.slots, self.keep_optimizer = slots, task.keep_optimizer
        is_personal = task.personal or (lambda name: False)
        self.personal = [
            name
            for name in slots.parameters
            if any(map(is_personal, (name, *slots.aliases.get(name, ()))))  # of tied weights
        ]
        self.shared = [name for name in slots.parameters if name not in set(self.personal)]
        if not self.shared:
            raise named_arrays.WeightsError(
                "Every parameter is personal (Task.personal): nothing to federate."
            )
        kind_of_buffer = task.buffers or (lambda name: None)
        kinds = {name: (kind_of_buffer(name) or task.statistics) for name in slots.statistics}
        _check_statistics(slots, kinds)
        self.local_statistics = [name for name, kind in kinds.items() if kind == "local"]
        self.averaged_statistics = [name for name, kind in kinds.items() if kind == "average"]
        self.has_client_state = bool(self.personal or self.local_statistics) or task.keep_optimizer

    def combine(
        self,
        parameters: Arrays,
        statistics: Arrays,
        client_state: Mapping[str, mx.array] | None,
    ) -> tuple[Arrays, Arrays]:
        """All parameters and statistics in the model's order: the global ones and a client's.

        Before a client has a state, its personal parameters and local statistics are the model's
        initial ones.
        """
        if not self.has_client_state:
            return parameters, statistics
        personal = {name: self.slots.parameters[name].get() for name in self.personal}
        local = {name: self.slots.statistics[name].get() for name in self.local_statistics}
        parameters = {**parameters, **personal, **arrays_of_kind(client_state, "parameters")}
        statistics = {**statistics, **local, **arrays_of_kind(client_state, "statistics")}
        return (
            {name: parameters[name] for name in self.slots.parameters},
            {name: statistics[name] for name in self.slots.statistics},
        )

    def client_state(self, state: TrainState, counters: Arrays) -> Arrays:
        """Client state after training."""
        arrays = {f"parameters/{name}": state.parameters[name] for name in self.personal}
        arrays |= {f"statistics/{name}": state.statistics[name] for name in self.local_statistics}
        if self.keep_optimizer:
            arrays |= name_by_kind(counters, "counters")
            arrays |= name_by_kind(state.optimizer_state, "state")
            mx.eval(arrays)
        return arrays


def restore_counters(counters: Arrays, client_state: Mapping[str, mx.array] | None) -> Arrays:
    """Counters of a new optimizer with those of a client state, such as the number of steps.

    The learning rate, which MLX has among them, stays the new one's: settings and tasks may give
    each round another, and a schedule computes it from the steps.
    """
    items = arrays_of_kind(client_state, "counters").items()
    return counters | {k: v for k, v in items if k.rpartition(".")[2] != "learning_rate"}


def _check_statistics(slots: weights.Slots, kinds: Mapping[str, str]) -> None:
    for name, kind in kinds.items():
        if kind not in ("average", "local"):
            raise named_arrays.WeightsError(
                f'Task.buffers gives {kind!r} for {name!r}: it gives "average", "local" or None.'
            )
        array = slots.statistics[name].get()
        if kind == "average" and not mx.issubdtype(array.dtype, mx.floating):
            dtype = named_arrays.dtype_name(array.dtype)
            raise named_arrays.WeightsError(
                f"The buffer {name!r} is {dtype}, which has no average: let "
                'Task.buffers give "local" for it, so that each client keeps its own.'
            )
