"""The model of a run, ready to predict: from its arrays, or from its file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..arrays import weights
from ..arrays.named_arrays import Arrays, differences, spec
from ..errors import FedError
from ..task import Task, TaskSource, make_task
from . import round_record

if TYPE_CHECKING:
    import mlx.nn as nn


class ModelFileError(FedError):
    """A model file that does not exist, or that is not one of the task's model."""


def load_model(
    task: TaskSource, path: Path | str, *, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """The task's model with the arrays of a model file, in evaluation mode.

    Personal parameters and local statistics have their initial values: each client's stay with the
    client.

    Args:
        task (Task or callable): The task, or the function of ``config`` that makes it.
        path (Path): A run's ``model.safetensors`` or ``best.safetensors``, or its folder, for the
            model after the last round.
        config (dict, optional): The settings for a function that makes the task. Default: the
            run's, if its ``settings.json`` lies beside the file.

    Raises:
        ModelFileError: If there is no such file, or it does not fit the model.

    Example:
        >>> model = load_model(task, "runs/2026-11-24-101500")
        >>> labels = model(images).argmax(axis=1)
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    arrays = read_arrays(path)
    settings: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        settings = round_record.read_settings(path.parent)
    task = make_task(task, settings.get("config", {}) if config is None else config)
    module, slots = _build(task, settings.get("seed", 0))
    file_slots = {**slots.parameters, **slots.statistics, **slots.frozen}
    if private := [name for name in slots.statistics if weights.is_private(name)]:
        raise ModelFileError(
            f"The buffer {private[0]!r} is private, and model files have no private arrays: use "
            "result.load() after the run, or give the buffer a name without '_'."
        )
    file_slots = {n: slot for n, slot in file_slots.items() if not weights.is_private(n)}
    if problems := differences(spec(weights.get(file_slots)), spec(arrays)):
        raise ModelFileError(f"{path} is not a file of the task's model: {'; '.join(problems)}.")
    weights.put(file_slots, arrays)
    return module


def model_with(task: Task, seed: int, parameters: Arrays, statistics: Arrays) -> nn.Module:
    """The task's model with these parameters and running statistics, in evaluation mode."""
    module, slots = _build(task, seed)
    weights.put({**slots.parameters, **slots.statistics}, {**parameters, **statistics})
    return module


def read_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file, by name.

    Raises:
        ModelFileError: If there is no such file, or it is not a safetensors file.
    """
    if path.is_dir():
        raise ModelFileError(
            f"{path} is a folder: name the file, such as {path}/model.safetensors."
        )
    if not path.is_file():
        raise ModelFileError(f"There is no model file {path}.")
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFileError(f"{path} is not a safetensors file: {error}") from error
    loaded: Arrays = arrays
    return loaded


def _build(task: Task, seed: int) -> tuple[nn.Module, weights.Slots]:
    module = weights.build_model(task.model, seed)
    buffer_kind = task.buffers or (lambda name: None)
    slots = weights.find_slots(module, lambda name: bool(buffer_kind(name)))
    module.eval()
    return module, slots
