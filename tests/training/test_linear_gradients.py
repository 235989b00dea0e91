"""Gradients of linear layers in the weights' order are MLX's own, laid out another way."""

from __future__ import annotations

import mlx_fed  # noqa: F401 - before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.training import linear_gradients
from mlx_fed.arrays import weights

from ..helpers.simulated import SAME_BITS

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def gradients(layer: nn.Linear, x: mx.array, cotangent: mx.array, in_order: bool) -> list[mx.array]:
    """What the layer gives, and the gradients of its parameters and its input."""
    parameters = layer.parameters()

    def call(*arrays: mx.array) -> mx.array:
        layer.update(dict(zip(parameters, arrays, strict=False)))
        return layer(arrays[-1])

    with linear_gradients.in_weight_order([layer] if in_order else []):
        outputs, grads = mx.vjp(call, [*parameters.values(), x], [cotangent])
    layer.update(parameters)
    return [*outputs, *grads]


def assert_same(ours: list[mx.array], mlx: list[mx.array], bits: bool = False) -> None:
    for one, other in zip(ours, mlx, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        values = [np.array(array.astype(mx.float32)) for array in (one, other)]
        if bits and SAME_BITS:
            np.testing.assert_array_equal(*values)
        else:
            # Sums of up to 1,600 products, whose roundings add up.
            close = 3e-4 if SAME_BITS and one.dtype == mx.float32 else 1e-2
            np.testing.assert_allclose(*values, rtol=close, atol=close)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 40), max_size=2),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    bias=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
)
def test_gradients_are_those_of_mlx(lead, inputs, outputs, bias, dtypes):
    mx.random.seed(0)
    layer = nn.Linear(inputs, outputs, bias)
    layer.set_dtype(dtypes[0])
    x = mx.random.normal((*lead, inputs)).astype(dtypes[1])
    cotangent = mx.random.normal((*lead, outputs)).astype(layer(x).dtype)
    ours, mlx = (gradients(layer, x, cotangent, in_order) for in_order in (True, False))
    assert_same(ours, mlx)
    mx.eval(ours)
    assert memoryview(ours[1]).c_contiguous, "of the weight"


def test_gradients_of_many_layers_at_once_are_those_of_each():
    mx.random.seed(0)
    layer = nn.Linear(50, 12)
    many = {"weight": mx.random.normal((5, 12, 50)), "bias": mx.random.normal((5, 12))}
    x, cotangent = mx.random.normal((5, 9, 50)), mx.random.normal((5, 9, 12))

    def grads(parameters, x, cotangent):
        layer.update(parameters)
        return gradients(layer, x, cotangent, in_order=True)

    together = mx.compile(mx.vmap(grads))(many, x, cotangent)
    for k in range(5):
        alone = grads({name: array[k] for name, array in many.items()}, x[k], cotangent[k])
        assert_same([array[k] for array in together], alone, bits=True)


class Scaled(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(x)


def test_only_plain_linear_layers_that_are_trained_are_changed_and_only_for_a_while():
    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    model.layers[2].freeze()
    chosen = linear_gradients.layers(weights.find_slots(model))
    assert chosen == [model.layers[0]]
    plain = nn.Linear.__call__
    with linear_gradients.in_weight_order(chosen):
        assert nn.Linear.__call__ is not plain
        assert [type(layer) for layer in model.layers] == [
            nn.Linear,
            Scaled,
            nn.Linear,
            nn.LayerNorm,
        ]
        with linear_gradients.in_weight_order([]):
            pass
        assert nn.Linear.__call__ is not plain
    assert nn.Linear.__call__ is plain
