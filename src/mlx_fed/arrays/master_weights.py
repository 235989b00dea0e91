"""Between a model's dtypes and what strategies compute in: float32 masters, by name, in order.

Strategies do their arithmetic in NumPy and many of them pair arrays by position, so they get
float32 arrays in the order of the server's model, and what they return is cast back to each
parameter's dtype when it is sent. The masters stay float32 from round to round: updates smaller
than a bfloat16 step add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord

from .spool import Spool, WaitingArray, values_of
from .weights import (
    Arrays,
    LazyArrays,
    Spec,
    WeightsError,
    check,
    cut,
    dtype_name,
    is_finite,
    spec,
    to_float32,
)

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def to_masters(arrays: Mapping[str, mx.array], spool: Spool | None = None) -> ArrayRecord:
    """Arrays as float32 NumPy arrays, by name and in the same order; on disk in a spool.

    Raises:
        WeightsError: If float32 does not hold what an array holds (complex64, float64).
    """

    def master(name: str, array: mx.array) -> Array:
        if array.dtype not in _DTYPES:
            raise WeightsError(
                f"parameter {name!r} is {dtype_name(array.dtype)}, which strategies cannot "
                "average: make it float32, or two arrays of real numbers, or freeze it"
            )
        return place.values(np.asarray(array.astype(mx.float32)))

    place = spool or Spool()
    return place.record((name, master(name, array)) for name, array in arrays.items())


def from_strategy(record: ArrayRecord, expected: Spec, spool: Spool | None = None) -> ArrayRecord:
    """What a strategy returned, checked and as float32 in the server's order; on disk in a spool.

    FedAdam and QFedAvg return float64.

    Raises:
        WeightsError: If a parameter is missing, unknown, of another shape, not finite or too
            large for the parameter's dtype.
    """
    got = {name: (tuple(array.shape), "float32") for name, array in record.items()}
    check({name: (shape, "float32") for name, (shape, _) in expected.items()}, got)

    def master(name: str, dtype: str) -> Array:
        array = record[name]
        ours = isinstance(array, WaitingArray)
        values = np.asarray(values_of(array) if ours else array.numpy(), np.float32, order="C")
        if not is_finite(values):
            raise WeightsError(f"parameter {name!r} is not finite after aggregation")
        if dtype == "float16" and not is_finite(to_float32(mx.array(values).astype(mx.float16))):
            raise WeightsError(
                f"parameter {name!r} is too large for float16 after aggregation, which ends at "
                "65504: make it bfloat16 or float32, or take smaller steps"
            )
        return array if ours else Array(values)

    masters = ((name, master(name, dtype)) for name, (_, dtype) in expected.items())
    return (spool or Spool()).record(masters)


def cast(arrays: Arrays, expected: Spec) -> Arrays:
    """Arrays in the model's order and dtypes; float32 masters are rounded to them.

    Raises:
        WeightsError: If a name, a shape, or a dtype other than float32 differs.
    """
    got = spec(arrays)
    check(expected, {name: _but_for_float32(got[name], expected.get(name)) for name in got})
    return {n: arrays[n].astype(getattr(mx, dtype)) for n, (_, dtype) in expected.items()}


def check_one(name: str, got: tuple[tuple[int, ...], str], expected: Spec) -> None:
    """Checks one array as :func:`cast` checks all.

    Raises:
        WeightsError: If it is not among the expected, or its shape or dtype differs.
    """
    known = {name: expected[name]} if name in expected else {}
    check(known, {name: _but_for_float32(got, expected.get(name))})


def _but_for_float32(
    got: tuple[tuple[int, ...], str], expected: tuple[tuple[int, ...], str] | None
) -> tuple[tuple[int, ...], str]:
    """An array's shape and dtype, with the model's dtype in place of the masters'."""
    shape, dtype = got
    return (shape, expected[1]) if expected and dtype == "float32" else got


def unread_masters(record: ArrayRecord, expected: Spec) -> LazyArrays:
    """A strategy's masters as MLX arrays of the model's dtypes, made as they are asked for.

    Raises:
        WeightsError: If a name or a shape differs.
    """
    shapes = {name: (tuple(array.shape), "float32") for name, array in record.items()}
    check({name: (shape, "float32") for name, (shape, _) in expected.items()}, shapes)

    def read(name: str) -> mx.array:
        return mx.array(values_of(record[name])).astype(getattr(mx, expected[name][1]))

    def pieces(name: str) -> Iterator[np.ndarray]:
        is_float32 = expected[name][1] == "float32"
        return cut(values_of(record[name]) if is_float32 else to_float32(read(name)))

    return LazyArrays(expected, read, pieces)


def masters_to_arrays(record: ArrayRecord, expected: Spec) -> Arrays:
    """All of them at once."""
    return dict(unread_masters(record, expected))
