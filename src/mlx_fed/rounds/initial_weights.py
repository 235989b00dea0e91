"""Initial weights of a run from a file or arrays, in place of those that the seed draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import named_arrays, weights
from ..arrays.named_arrays import Arrays
from ..errors import SettingsError
from ..runs.model_file import read_arrays
from ..training.trainer import Trainer

InitialWeights = Path | str | Mapping[str, Any]
"""A safetensors file, or arrays of MLX or NumPy by name."""


def load_initial_weights(trainer: Trainer, initial: InitialWeights) -> list[str]:
    """Loads initial weights into a trainer's model, after a check of all of them.

    Every averaged parameter and running statistic has to be there, with the model's shape and
    dtype. What nodes do not receive has to be as in their model, which the task builds (frozen
    arrays), or is not used (personal parameters, local statistics).

    Args:
        trainer (Trainer): Gets the weights.
        initial (Path, str or dict): The weights, such as the ``model.safetensors`` of a run, or
            ``{**result.parameters, **result.statistics}``.

    Returns:
        list: Notes for the log.

    Raises:
        SettingsError: If they do not fit the model, with the differences.
        ModelFileError: If the file cannot be read.
    """
    if isinstance(initial, Mapping):
        source, arrays = "initial", {name: _array(name, value) for name, value in initial.items()}
    elif isinstance(initial, (str, Path)):
        source, arrays = str(initial), read_arrays(Path(initial))
    else:
        raise SettingsError(
            "initial is a safetensors file or a dictionary of arrays by name, not a "
            f"{type(initial).__name__}."
        )
    sent = {**trainer.parameters(), **trainer.statistics()}
    kept = {**weights.get(trainer.slots.parameters), **weights.get(trainer.slots.statistics)}
    kept = {name: array for name, array in kept.items() if name not in sent}
    frozen = trainer.slots.frozen
    expected_arrays = {n: a for n, a in sent.items() if n in arrays or not weights.is_private(n)}
    expected_arrays |= {name: array for name, array in kept.items() if name in arrays}
    expected_arrays |= {name: slot.get() for name, slot in frozen.items() if name in arrays}
    problems = named_arrays.differences(
        named_arrays.spec(expected_arrays), named_arrays.spec(arrays)
    )
    problems += [f"{name!r} has values that are not finite" for name in _not_finite(arrays)]
    if problems:
        raise SettingsError(f"{source} does not fit the task's model: {'; '.join(problems)}.")
    for name in frozen:
        if name in arrays and not mx.array_equal(arrays[name], frozen[name].get()).item():
            raise SettingsError(
                f"{source} has other values for {name!r}, which is frozen and not sent to nodes: "
                "let Task.model load it on every machine, or leave it out."
            )
    slots = {**trainer.slots.parameters, **trainer.slots.statistics}
    weights.put(slots, {name: array for name, array in arrays.items() if name in sent})
    absent = [name for name in sent if name not in arrays]
    unused = [name for name in kept if name in arrays]
    notes = []
    if absent:
        notes.append(f"{source} has no private buffers: {absent[0]} has its initial values")
    if unused:
        notes.append(f"{unused[0]} of {source} is not used: each client has values of its own")
    return notes


def _array(name: str, value: Any) -> mx.array:
    """An array of MLX, NumPy or another library, as it is: NumPy's float64 stays an error."""
    if isinstance(value, mx.array):
        return value
    values = np.asarray(value)
    if values.dtype.kind not in "biufc" or values.dtype == np.float64:
        raise SettingsError(
            f"initial: {name!r} has dtype {values.dtype}: convert it to the model's, such as "
            "values.astype(numpy.float32)."
        )
    return mx.array(values)


def _not_finite(arrays: Arrays) -> Iterator[str]:
    return (name for name, array in arrays.items() if not named_arrays.are_finite([array]))
