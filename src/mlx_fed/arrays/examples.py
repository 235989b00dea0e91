"""Examples as a tree of arrays: a tuple, a dictionary, or these nested.

The leading axis of every array is the examples. A batch has the structure of its examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..errors import FedError
from ..system import calls

Examples = Any
"""``mx.array`` leaves in tuples and dictionaries, shape (examples, ...) each."""


class ExamplesError(FedError, ValueError):
    """Examples that are no arrays of numbers of one length."""


def paths(examples: Examples) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their paths, in order."""
    flat: Any = tree_flatten(examples)
    return flat


def leaves(examples: Examples) -> list[mx.array]:
    """The arrays of a tree, in order."""
    return [array for _, array in paths(examples)]


def count(examples: Examples) -> int:
    """The number of examples."""
    return len(leaves(examples)[0])


def take(examples: Examples, index: mx.array) -> Examples:
    """The rows of an index array, shape (batch,), of each array."""
    return tree_map(lambda array: mx.take(array, index, axis=0), examples)


def first(examples: Any, size: int) -> Any:
    """The first examples, at most ``size``."""
    return tree_map(lambda array: array[:size], examples)


def replace_leaves(examples: Examples, arrays: Sequence[mx.array]) -> Examples:
    """A tree of the structure of ``examples`` with other arrays."""
    if type(examples) is tuple and all(isinstance(leaf, mx.array) for leaf in examples):
        return tuple(arrays)
    iterator = iter(arrays)
    return tree_map(lambda _: next(iterator), examples)


def kind(examples: Examples) -> Any:
    """The structure of a tree, and the shape of an example and dtype of each array."""
    return tuple((path, a.shape[1:], str(a.dtype)) for path, a in paths(examples))


def call(
    function: Callable[..., Any],
    model: Any,
    batch: Examples,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """``function(model, *batch)`` for a tuple, ``function(model, batch)`` for a dictionary.

    A function that has a parameter ``config`` gets the settings by that name.
    """
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    settings = {"config": config} if config is not None and takes_config(function) else {}
    name = getattr(function, "__name__", "function")
    what = f"a loss or metric is called with the model and a batch of {len(arguments)}: {name}"
    return calls.call(what, function, model, *arguments, **settings)


def takes_config(function: Callable[..., Any]) -> bool:
    """Whether a loss or metric has a parameter ``config``, not bound by ``functools.partial``."""
    if isinstance(function, partial) and "config" in function.keywords:
        return False
    try:
        return "config" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in function
        return False


def as_arrays(examples: Any, split: str = "train") -> Examples:
    """Examples as evaluated MLX arrays: the only copy of a split.

    Args:
        examples: Arrays of MLX, NumPy, pandas or PyTorch and lists of numbers, in a tuple, a
            dictionary or these nested.
        split (str): ``"train"`` or ``"test"``, for messages.

    Raises:
        ExamplesError: If an entry has no numbers (texts, objects), is ragged, or has another
            length than the first.
    """
    if isinstance(examples, list):
        examples = tuple(examples)
    tree = _to_mlx(examples, f"Data.{split}")
    mx.eval(tree)
    lengths = [len(array) if array.ndim else None for array in leaves(tree)]
    if not lengths or len(set(lengths)) != 1 or lengths[0] is None:
        raise ExamplesError(
            f"Data.{split} takes arrays of one length, the number of examples; "
            f"these have {lengths}."
        )
    return tree


def as_batch(batch: Any) -> Examples:
    """A batch of a stream as MLX arrays; the leading axis of its first array is the examples."""
    if isinstance(batch, list):
        batch = tuple(batch)
    return _to_mlx(batch, "A batch of Data")


def _to_mlx(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_mlx(child, f"{name}[{key!r}]") for key, child in value.items()}
    if isinstance(value, tuple):
        return tuple(_to_mlx(child, f"{name}[{index}]") for index, child in enumerate(value))
    if isinstance(value, mx.array):
        return value
    try:
        array = np.asarray(value)
    except Exception as error:
        raise ExamplesError(
            f"{name} is a {type(value).__name__} that is no array of numbers: {error}. Rows of "
            "different lengths are padded by the task, or given as a stream of batches."
        ) from error
    if array.dtype.kind not in "biufc":
        raise ExamplesError(
            f"{name} has the dtype {array.dtype}, which MLX lacks: a task's data are numbers. Turn "
            "texts into tokens, labels into integers and dates into numbers, in Task.data."
        )
    # MLX takes no other order of bytes, and no negative strides.
    return mx.array(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
