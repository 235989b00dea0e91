"""Master weights: float32 copies of a model's parameters, which strategies compute with.

Strategies compute in NumPy and many of them pair arrays by position, so they get float32 arrays in
the order of the server's model. Their results are cast to each parameter's dtype when they are
sent. The masters stay float32 from round to round, so that updates smaller than a bfloat16 step add
up (mixed-precision training, Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord

from .flower_records import SegmentedArray, array_values
from .named_arrays import (
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
from .spool import Spool

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def to_masters(arrays: Mapping[str, mx.array], spool: Spool | None = None) -> ArrayRecord:
    """Master weights of a model's arrays, by name and in the same order; on disk with a spool.

    Raises:
        WeightsError: If float32 cannot represent a dtype (complex64, float64).
    """
    spool = spool or Spool()

    def master(name: str, array: mx.array) -> Array:
        if array.dtype not in _DTYPES:
            raise WeightsError(
                f"parameter {name!r} is {dtype_name(array.dtype)}, which strategies cannot "
                "average: make it float32, or two arrays of real numbers, or freeze it"
            )
        return spool.put_values(np.asarray(array.astype(mx.float32)))

    return spool.put_record((name, master(name, array)) for name, array in arrays.items())


def from_strategy(record: ArrayRecord, model_spec: Spec, spool: Spool | None = None) -> ArrayRecord:
    """Master weights from the result of a strategy, checked, as float32 and in the model's order.

    FedAdam and QFedAvg return float64.

    Args:
        record (ArrayRecord): The arrays that ``aggregate_train`` returned.
        model_spec (dict): The model's names, shapes and dtypes.
        spool (Spool, optional): Where large arrays are put on disk.

    Raises:
        WeightsError: If a parameter is missing, unknown, of another shape, not finite or too
            large for the parameter's dtype.
    """
    _check_shapes(record, model_spec)

    def master(name: str, dtype: str) -> Array:
        array = record[name]
        is_segmented = isinstance(array, SegmentedArray)
        values = array_values(array) if is_segmented else array.numpy()
        values = np.asarray(values, np.float32, order="C")
        if not is_finite(values):
            raise WeightsError(f"parameter {name!r} is not finite after aggregation")
        if dtype == "float16" and not is_finite(to_float32(mx.array(values).astype(mx.float16))):
            raise WeightsError(
                f"parameter {name!r} is too large for float16 after aggregation, which ends at "
                "65504: make it bfloat16 or float32, or take smaller steps"
            )
        return array if is_segmented else Array(values)

    masters = ((name, master(name, dtype)) for name, (_, dtype) in model_spec.items())
    return (spool or Spool()).put_record(masters)


def cast(arrays: Arrays, model_spec: Spec) -> Arrays:
    """Arrays in the model's order and dtypes; float32 masters are rounded.

    Raises:
        WeightsError: If a name, a shape, or a dtype other than float32 differs.
    """
    check(
        model_spec,
        {name: _model_dtype(name, *entry, model_spec) for name, entry in spec(arrays).items()},
    )
    return {n: arrays[n].astype(getattr(mx, dtype)) for n, (_, dtype) in model_spec.items()}


def check_array(name: str, shape: tuple[int, ...], dtype: str, model_spec: Spec) -> None:
    """Checks one array as :func:`cast` checks all.

    Raises:
        WeightsError: If the model has no such array, or its shape or dtype differs.
    """
    entry = {name: model_spec[name]} if name in model_spec else {}
    check(entry, {name: _model_dtype(name, shape, dtype, model_spec)})


def _model_dtype(
    name: str, shape: tuple[int, ...], dtype: str, model_spec: Spec
) -> tuple[tuple[int, ...], str]:
    """The shape and dtype of an array, with the model's dtype in place of the masters' float32."""
    is_master = name in model_spec and dtype == "float32"
    return shape, model_spec[name][1] if is_master else dtype


def _check_shapes(record: ArrayRecord, model_spec: Spec) -> None:
    shapes = {name: (tuple(array.shape), "float32") for name, array in record.items()}
    check({name: (shape, "float32") for name, (shape, _) in model_spec.items()}, shapes)


def lazy_masters(record: ArrayRecord, model_spec: Spec) -> LazyArrays:
    """Master weights as lazy MLX arrays of the model's dtypes.

    Raises:
        WeightsError: If a name or a shape differs.
    """
    _check_shapes(record, model_spec)

    def read(name: str) -> mx.array:
        return mx.array(array_values(record[name])).astype(getattr(mx, model_spec[name][1]))

    def pieces(name: str) -> Iterator[np.ndarray]:
        is_float32 = model_spec[name][1] == "float32"
        return cut(array_values(record[name]) if is_float32 else to_float32(read(name)))

    return LazyArrays(model_spec, read, pieces)


def masters_to_arrays(record: ArrayRecord, model_spec: Spec) -> Arrays:
    """Master weights as MLX arrays of the model's dtypes, in memory."""
    return dict(lazy_masters(record, model_spec))
