"""The update transform of a run, the same on the server and on each client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..arrays import named_arrays, randomness
from ..arrays.named_arrays import Arrays, Spec
from ..errors import SettingsError
from ..system import calls
from ..task import Config, Task
from .clipping import SETTING as CLIP
from .clipping import clip
from .compression import parse_compression
from .update_transform import State, UpdateTransform, chain, update_of

SETTING = "compress"


def run_transform(task: Task, config: Config, spec: Spec) -> UpdateTransform | None:
    """The chain of ``Task.update_transforms`` and the settings ``dp-clip`` or ``compress``.

    Args:
        task (Task): The task.
        config (dict): The run's settings.
        spec (dict): Shape and dtype of each parameter that is averaged, by name.

    Returns:
        UpdateTransform: None if updates are sent as they are.

    Raises:
        SettingsError: If ``compress`` names no transform or would undo the clipping, or the task
            gives something else.
    """
    transforms: list[Any] = []
    if task.update_transforms is not None:
        transforms += calls.call("Task.update_transforms", task.update_transforms, config)
    if CLIP in config:
        transforms.append(clip(float(config[CLIP])))
    if (compress := parse_compression(config.get(SETTING, ""))) is not None:
        if CLIP in config:
            raise SettingsError(
                "compress changes the norm of a clipped update, which differential privacy counts "
                "on: leave out compress, or the privacy."
            )
        transforms.append(compress)
    if not transforms:
        return None
    if not all(map(callable, transforms)):
        raise SettingsError("Task.update_transforms returns a list of transforms.")
    updates_spec = {name: (shape, "float32") for name, (shape, _) in spec.items()}
    return chain(*transforms)(updates_spec)


class UpdateEncoder:
    """Encoder of clients' updates, compiled once for all clients and rounds.

    Args:
        transform (UpdateTransform): The run's.
    """

    def __init__(self, transform: UpdateTransform):
        self.transform = transform
        self.has_state = bool(transform.init())
        self._encode = mx.compile(transform.encode)

    def encode(
        self,
        after: Mapping[str, mx.array],
        before: Arrays,
        state: State | None,
        seed: randomness.RoundSeed,
    ) -> tuple[Arrays, State]:
        """Message of an update, and the client's new state.

        The state is empty where it is not finite: the one before stays valid.

        Args:
            after (dict): Parameters after training.
            before (dict): The global parameters.
            state (dict, optional): The client's state. Default: the first one.
            seed (tuple): Seed, round and partition.
        """
        key = randomness.key(*seed, "transform")
        message, state = self._encode(update_of(after, before), state or self.transform.init(), key)
        mx.eval(message, state)
        return message, state if named_arrays.are_finite(state.values()) else {}
