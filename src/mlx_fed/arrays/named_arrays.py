"""Named arrays: their shapes and dtypes, and their values in NumPy.

A model's parameters, running statistics and updates travel and are averaged as dictionaries of
arrays by name. Values that are larger than a core's cache are worked on a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import mlx.core as mx
import numpy as np

from ..errors import FedError
from ..task_settings import nearest

Arrays = dict[str, mx.array]
Spec = dict[str, tuple[tuple[int, ...], str]]
"""The shape and dtype of each array, by name and in order."""

PIECE = 2**18
"""Numbers of an array that are worked on at a time, at most."""


_MOST_DIFFERENCES = 5
"""Differences that a message names."""


class WeightsError(FedError, ValueError):
    """Arrays that do not fit the module they were meant for; the message names the first."""


def dtype_name(dtype: mx.Dtype) -> str:
    """``"float32"`` for ``mx.float32``."""
    return str(dtype).removeprefix("mlx.core.")


def spec(arrays: Mapping[str, mx.array]) -> Spec:
    """The shape and dtype of each array, by name."""
    return {name: (tuple(a.shape), dtype_name(a.dtype)) for name, a in arrays.items()}


def size(spec: Spec) -> dict[str, int]:
    """The number of arrays, of parameters (values), and of bytes."""
    sizes = {name: math.prod(shape) for name, (shape, _) in spec.items()}
    num_bytes = sum(size * getattr(mx, spec[name][1]).size for name, size in sizes.items())
    return {"arrays": len(spec), "parameters": sum(sizes.values()), "bytes": num_bytes}


def check(expected_spec: Spec, actual_spec: Spec) -> None:
    """Checks that arrays have the names, shapes and dtypes of a specification, in any order.

    Raises:
        WeightsError: Naming the first parameter that differs, and both shapes or dtypes.
    """
    for name in expected_spec:
        if name not in actual_spec:
            raise WeightsError(f"parameter {name!r} is missing")
    for name in actual_spec:
        if name not in expected_spec:
            raise WeightsError(f"parameter {name!r} is not one of the model's")
    for name, (shape, dtype) in expected_spec.items():
        actual_shape, actual_dtype = actual_spec[name]
        if actual_shape != shape:
            raise WeightsError(f"parameter {name!r} has shape {actual_shape}, expected {shape}")
        if actual_dtype != dtype:
            raise WeightsError(f"parameter {name!r} has dtype {actual_dtype}, expected {dtype}")


def differences(expected_spec: Spec, actual_spec: Spec) -> list[str]:
    """In words, where arrays that a user names differ from a specification: at most five."""
    missing = [name for name in expected_spec if name not in actual_spec]
    problems = []
    for name, (shape, dtype) in actual_spec.items():
        if name not in expected_spec:
            match = nearest(name, missing)
            hint = f" (did you mean {match!r}?)" if match else ""
            problems.append(f"{name!r} is not one of the model's{hint}")
            continue
        expected_shape, expected_dtype = expected_spec[name]
        if shape != expected_shape:
            problems.append(f"{name!r} has shape {shape}, the model's has {expected_shape}")
        if dtype != expected_dtype:
            problems.append(f"{name!r} has dtype {dtype}, the model's has {expected_dtype}")
    problems += [f"{name!r} is missing" for name in missing]
    more = len(problems) - _MOST_DIFFERENCES
    return problems if more <= 0 else [*problems[:_MOST_DIFFERENCES], f"and {more} more"]


def arrays_of_kind(arrays: Mapping[str, mx.array] | None, kind: str) -> Arrays:
    """Those of some arrays whose names are ``kind/NAME``, by ``NAME``; of None there are none."""
    prefix = f"{kind}/"
    return {
        name.removeprefix(prefix): array
        for name, array in (arrays or {}).items()
        if name.startswith(prefix)
    }


def name_by_kind(arrays: Mapping[str, mx.array], kind: str) -> Arrays:
    """The arrays, named ``kind/NAME``."""
    return {f"{kind}/{name}": array for name, array in arrays.items()}


class StackedRow(Mapping[str, mx.array]):
    """One row of stacked arrays, such as one client's of all that trained together; lazy.

    Args:
        stack (dict): Evaluated arrays by name, shape (rows, ...) each.
        host (dict): A cache of their values in NumPy, common to all rows of the stack.
        index (int): The row.
    """

    def __init__(self, stack: Mapping[str, mx.array], host: dict[str, np.ndarray], index: int):
        self._stack, self._host, self._index = stack, host, index

    def __getitem__(self, name: str) -> mx.array:
        return self._stack[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stack)

    def __len__(self) -> int:
        return len(self._stack)

    def float32(self, name: str) -> np.ndarray:
        """The values in NumPy, without a graph for each slice."""
        if name not in self._host:
            self._host[name] = to_float32(self._stack[name])
        return self._host[name][self._index]


class LazyArrays(Mapping[str, mx.array]):
    """Named arrays that are read one at a time, at each access.

    Args:
        spec (dict): The shape and dtype of each array, by name and in order.
        load (callable): ``load(name)`` returns an array.
        pieces (callable, optional): ``pieces(name)`` yields the values of an array as the function
            :func:`pieces` does, without the whole array in memory.
    """

    def __init__(
        self,
        spec: Spec,
        load: Callable[[str], mx.array],
        pieces: Callable[[str], Iterator[np.ndarray]] | None = None,
    ):
        self.spec, self._load = spec, load
        self.pieces = pieces or (lambda name: cut(to_float32(load(name))))

    def __getitem__(self, name: str) -> mx.array:
        if name not in self.spec:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec)

    def __len__(self) -> int:
        return len(self.spec)


def pieces(arrays: Mapping[str, mx.array], name: str) -> Iterator[np.ndarray]:
    """The values of an array as float32, flat and :data:`PIECE` at a time.

    A core's cache holds a piece, so that operations on it cost little beside reading it from memory
    or from disk.
    """
    if isinstance(arrays, LazyArrays):
        return arrays.pieces(name)
    return cut(to_float32(arrays[name]))


def cut(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values of an array in memory, flat and :data:`PIECE` at a time."""
    flat = values.reshape(-1)
    return (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))


def to_float32(array: mx.array) -> np.ndarray:
    """The values of an array as float32 in NumPy, without a copy of a float32 array."""
    return np.asarray(array.astype(mx.float32))


def are_finite(arrays: Iterable[mx.array]) -> bool:
    """Whether no floating-point array has a value that is infinite or not a number."""
    floating = (array for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    return all(is_finite(to_float32(array)) for array in floating)


def is_finite(values: np.ndarray, times: float = 1.0) -> bool:
    """Whether no value is infinite or not a number, nor would be ``times`` as large."""
    flat = np.ravel(values)
    with np.errstate(all="ignore"):
        # One pass at the speed of memory: a finite sum of squares has only finite terms, and they
        # stay finite times any plausible number of examples.
        if np.isfinite(np.dot(flat, flat)):
            return True
        return bool(np.isfinite(flat * np.float32(times)).all())
