"""Between a model's dtypes and what strategies compute in: float32 masters, by name, in order.

Strategies do their arithmetic in NumPy and many of them pair arrays by position, so they get
float32 arrays in the order of the server's model, and what they return is cast back to each
parameter's dtype when it is sent. The masters stay float32 from round to round: updates smaller
than a bfloat16 step add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord

from .weights import Arrays, Spec, WeightsError, check, dtype_name, spec

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def to_masters(arrays: Mapping[str, mx.array]) -> ArrayRecord:
    """Arrays as float32 NumPy arrays, by name and in the same order.

    Raises:
        WeightsError: If float32 does not hold what an array holds (complex64, float64).
    """
    for name, array in arrays.items():
        if array.dtype not in _DTYPES:
            raise WeightsError(
                f"parameter {name!r} is {dtype_name(array.dtype)}, which strategies cannot "
                "average: make it float32, or two arrays of real numbers, or freeze it"
            )
    return ArrayRecord(
        {name: Array(np.array(array.astype(mx.float32))) for name, array in arrays.items()}
    )


def from_strategy(record: ArrayRecord, expected: Spec) -> ArrayRecord:
    """What a strategy returned, checked and as float32 in the server's order.

    FedAdam and QFedAvg return float64.

    Raises:
        WeightsError: If a parameter is missing, unknown, of another shape, not finite or too
            large for the parameter's dtype.
    """
    arrays = {name: array.numpy() for name, array in record.items()}
    got = {name: (array.shape, "float32") for name, array in arrays.items()}
    check({name: (shape, "float32") for name, (shape, _) in expected.items()}, got)
    masters = {name: np.asarray(arrays[name], np.float32, order="C") for name in expected}
    for name, (_, dtype) in expected.items():
        if not np.isfinite(masters[name]).all():
            raise WeightsError(f"parameter {name!r} is not finite after aggregation")
        if (
            dtype == "float16"
            and not mx.isfinite(mx.array(masters[name]).astype(mx.float16)).all().item()
        ):
            raise WeightsError(
                f"parameter {name!r} is too large for float16 after aggregation, which ends at "
                "65504: make it bfloat16 or float32, or take smaller steps"
            )
    return ArrayRecord({name: Array(master) for name, master in masters.items()})


def cast(arrays: Arrays, expected: Spec) -> Arrays:
    """Arrays in the model's order and dtypes; float32 masters are rounded to them.

    Raises:
        WeightsError: If a name, a shape, or a dtype other than float32 differs.
    """
    got = {
        name: (shape, expected[name][1] if dtype == "float32" and name in expected else dtype)
        for name, (shape, dtype) in spec(arrays).items()
    }
    check(expected, got)
    return {name: arrays[name].astype(getattr(mx, dtype)) for name, (_, dtype) in expected.items()}


def masters_to_arrays(record: ArrayRecord, expected: Spec) -> Arrays:
    """A strategy's masters as MLX arrays of the model's dtypes."""
    return cast({name: mx.array(array.numpy()) for name, array in record.items()}, expected)
