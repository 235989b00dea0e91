"""Check of labels against the number of a model's outputs.

MLX checks no index: with a label outside of a classifier's outputs, ``mx.take_along_axis``, and so
``nn.losses.cross_entropy``, reads other memory, and its gradient writes there. So a loss is called
with the examples that have the least and the largest label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import examples
from ..arrays.examples import Examples, ExamplesError
from ..arrays.named_arrays import dtype_name

Ranges = dict[str, tuple[int, int]]
"""Least and largest value of arrays of integers, by their paths."""


def ranges(batch: Examples) -> Ranges:
    """Least and largest value of each array of integers, by its path."""
    return {
        path: (int(values.min()), int(values.max()))
        for path, values in _integers(batch)
        if values.size
    }


def within(inner: Ranges, outer: Ranges) -> bool:
    """Whether all values are within other ranges."""
    return union(inner, outer) == outer


def union(a: Ranges, b: Ranges) -> Ranges:
    """Union of ranges, by path."""
    common = {
        path: (min(low, b[path][0]), max(high, b[path][1]))
        for path, (low, high) in a.items()
        if path in b
    }
    return {**b, **a, **common}


def extreme_rows(batch: Examples) -> list[int]:
    """Indices of the examples with the least and the largest value of each array of integers."""
    rows: list[int] = []
    for _, values in _integers(batch):
        size = values[0].size if len(values) else 0
        rows += [int(index) // size for index in (values.argmin(), values.argmax()) if size]
    return rows


def _integers(batch: Examples) -> Iterator[tuple[str, np.ndarray]]:
    for path, array in examples.paths(batch):
        is_label = array.ndim == 1 or (array.ndim == 2 and array.dtype.size > 1)  # no images
        if mx.issubdtype(array.dtype, mx.integer) and is_label:
            yield path, np.asarray(array)


@contextmanager
def check_indices() -> Iterator[None]:
    """Context in which ``mx.take_along_axis`` raises for an index out of range, unless traced.

    Not for two threads at once.
    """
    original = mx.take_along_axis
    mx.take_along_axis = _with_check(original)
    try:
        yield
    finally:
        mx.take_along_axis = original


@contextmanager
def check_all_indices() -> Iterator[None]:
    """:func:`check_indices`, and of ``mx.take`` and of arrays in brackets, as of an embedding.

    For examples that are drawn at random: an index out of range reads other memory.
    """
    get, take = mx.array.__getitem__, mx.take

    def get_with_check(array: mx.array, index: Any) -> mx.array:
        entries = index if isinstance(index, tuple) else (index,)
        size = min(array.shape[: len(entries)], default=0)
        for entry in entries:
            _check_within(entry, size)
        return get(array, index)

    def take_with_check(a: mx.array, indices: Any, axis: int | None = None, **options: Any) -> Any:
        _check_within(indices, a.size if axis is None else a.shape[axis])
        return take(a, indices, axis, **options)

    mx.array.__getitem__, mx.take = get_with_check, take_with_check  # type: ignore
    try:
        with check_indices():
            yield
    finally:
        mx.array.__getitem__, mx.take = get, take  # type: ignore


def _check_within(index: Any, size: int) -> None:
    if not isinstance(index, mx.array) or not mx.issubdtype(index.dtype, mx.integer):
        return
    if not index.size:
        return
    bounds: Any = mx.stack([index.min(), index.max()]).tolist()
    low, high = bounds
    if not -size <= low <= high < size:
        raise ExamplesError(f"An index is not within 0 to {size - 1}.")


def _with_check(take: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def take_with_check(a: Any, indices: Any, axis: int | None = None, **options: Any) -> mx.array:
        if isinstance(indices, mx.array) and not mx.issubdtype(indices.dtype, mx.integer):
            kind = dtype_name(indices.dtype)
            raise ExamplesError(
                f"Task.loss takes labels of dtype {kind}, where they are integers that count the "
                "classes from 0: return labels.astype(numpy.int32) from Task.data."
            )
        result = take(a, indices, axis, **options)
        size = a.size if axis is None else a.shape[axis]
        try:
            low, high = indices.min().item(), indices.max().item()
        except Exception:  # while it is traced there are no values
            return result
        if not -size <= low <= high < size:
            raise ExamplesError(
                f"Task.loss takes entry {high if high >= size else low} of {size}, where they are "
                f"0 to {size - 1}: the data has a label that the model has no output for. Labels "
                "count from 0."
            )
        return result

    return take_with_check
