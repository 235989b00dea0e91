"""Float32 masters: what strategies compute with, and back to a model's dtypes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.arrays import master_weights, named_arrays
from mlx_fed.arrays.named_arrays import WeightsError

from ..helpers.random_arrays import FLOATS, bits, noise


def numpy_record(**arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(array)) for name, array in arrays.items()})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32))
def test_masters_hold_every_value_of_a_models_dtypes(dtype, shape, seed):
    array = noise(mx.zeros(shape, dtype), seed)
    array = mx.where(mx.isnan(array), mx.array(1, dtype), array)
    arrays = {"b": array, "a": mx.ones(2, dtype)}
    masters = master_weights.to_masters(arrays)
    assert list(masters) == ["b", "a"]
    assert {master.numpy().dtype for master in masters.values()} == {np.dtype(np.float32)}
    back = master_weights.masters_to_arrays(masters, named_arrays.spec(arrays))
    assert {n: bits(a) for n, a in back.items()} == {n: bits(a) for n, a in arrays.items()}


@pytest.mark.parametrize("array", [mx.array([1j]), mx.array([1]), mx.array([True])])
def test_what_float32_cannot_hold_is_refused(array):
    with pytest.raises(WeightsError, match=r"parameter 'w' is \w+, which strategies cannot"):
        master_weights.to_masters({"w": array})


def test_a_strategys_result_is_float32_in_the_models_order():
    expected = {"b": ((2,), "bfloat16"), "a": ((), "float32")}
    record = master_weights.from_strategy(numpy_record(a=np.float64(0.1), b=[1.0, 2.0]), expected)
    assert list(record) == ["b", "a"]
    assert all(array.numpy().dtype == np.float32 for array in record.values())
    assert record["a"].numpy() == np.float32(0.1)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"w": [1.0, 2.0]}, "parameter 'v' is missing"),
        ({"w": [1.0, 2.0], "v": 1.0, "u": 1.0}, "parameter 'u' is not one of the model's"),
        ({"w": [1.0], "v": 1.0}, r"parameter 'w' has shape \(1,\), expected \(2,\)"),
        ({"w": [1.0, np.nan], "v": 1.0}, "parameter 'w' is not finite"),
        ({"w": [1.0, 2.0], "v": np.inf}, "parameter 'v' is not finite"),
        ({"w": [1.0, 1e300], "v": 1.0}, "parameter 'w' is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_strategys_result_that_does_not_fit_is_refused(arrays, complaint):
    expected = {"w": ((2,), "float32"), "v": ((), "float32")}
    with pytest.raises(WeightsError, match=complaint):
        master_weights.from_strategy(numpy_record(**arrays), expected)


@pytest.mark.parametrize(("value", "fits"), [(65519, True), (65520, False), (-1e5, False)])
def test_float16_is_not_made_infinite(value, fits):
    expected = {"w": ((2,), "float16"), "v": ((), "bfloat16")}
    record = numpy_record(w=[1.0, value], v=1e5)
    if fits:
        masters = master_weights.from_strategy(record, expected)
        assert master_weights.masters_to_arrays(masters, expected)["w"].tolist() == [1.0, 65504.0]
    else:
        with pytest.raises(WeightsError, match="parameter 'w' is too large for float16"):
            master_weights.from_strategy(record, expected)


def test_cast_rounds_masters_and_puts_them_in_order():
    expected = {"b": ((2,), "bfloat16"), "a": ((1,), "float16")}
    got = {"a": mx.array([1], mx.float16), "b": mx.array([1.0, 1.0039])}
    cast = master_weights.cast(got, expected)
    assert list(cast) == ["b", "a"]
    assert named_arrays.spec(cast) == expected
    assert cast["b"].tolist() == [1.0, 1.0]  # to bfloat16's nearest


@pytest.mark.parametrize("dtype", [mx.float16, mx.int32, mx.complex64])
def test_cast_takes_no_other_dtype(dtype):
    with pytest.raises(WeightsError, match=r"parameter 'w' has dtype \w+, expected bfloat16"):
        master_weights.cast({"w": mx.zeros(1, dtype)}, {"w": ((1,), "bfloat16")})


def test_updates_smaller_than_a_bfloat16_step_add_up():
    expected = {"w": ((1,), "bfloat16")}
    masters = master_weights.to_masters({"w": mx.ones(1, mx.bfloat16)})
    for _ in range(10):
        masters = master_weights.from_strategy(
            numpy_record(w=masters["w"].numpy() + 0.001), expected
        )
    assert master_weights.masters_to_arrays(masters, expected)["w"].item() == 1.0078125
