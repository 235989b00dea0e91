"""Linear layers whose gradients come in the order of their weights.

A linear layer multiplies by its weight's transpose, so MLX gives the weight's gradient as the
transpose of a product. An optimizer then goes through the two in different orders, element by
element, which takes long on a CPU. Here the product is made the other way round: the same sums,
laid out as the weight is, and the same bits where the BLAS adds up rows and columns alike, as it
does on some CPUs and for some shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .weights import Slots


def layers(slots: Slots) -> list[nn.Linear]:
    """The plain linear layers among those that are trained: a subclass may do as it likes."""
    owners = [owner for owner, key in slots.parameters.values() if key == "weight"]
    return [owner for owner in owners if type(owner) is nn.Linear]


@contextmanager
def in_order(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """While a program is traced: what the layers compute has its gradient in the weights' order."""
    for layer in layers:
        layer.__class__ = _InOrder
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


class _InOrder(nn.Linear):
    def __call__(self, x: mx.array) -> Any:
        operands = [x, *(self[name] for name in ("weight", "bias") if name in self)]
        if any(operand.dtype == mx.complex64 for operand in operands):
            return super().__call__(x)
        return (_affine if "bias" in self else _product)(*operands)


def _in_order_gradients(cotangent: mx.array, x: mx.array, weight: mx.array) -> list[mx.array]:
    """Those of ``x`` and ``weight``, each in its own dtype: either may be the wider one."""
    of_weight = _rows(cotangent).T @ _rows(x)
    return [(cotangent @ weight).astype(x.dtype), of_weight.astype(weight.dtype)]


def _rows(array: mx.array) -> mx.array:
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> Any:
    return x @ weight.T


@_product.vjp
def _(primals, cotangent, output):
    return _in_order_gradients(cotangent, *primals)


@_product.jvp
def _(primals, tangents):
    return _tangent(primals, tangents)


@mx.custom_function
def _affine(x: mx.array, weight: mx.array, bias: mx.array) -> Any:
    return mx.addmm(bias, x, weight.T)


@_affine.vjp
def _(primals, cotangent, output):
    x, weight, bias = primals

    def spread(bias: mx.array) -> mx.array:
        return mx.broadcast_to(bias.astype(cotangent.dtype), cotangent.shape)

    _, of_bias = mx.vjp(spread, [bias], [cotangent])
    return _in_order_gradients(cotangent, x, weight) + of_bias


@_affine.jvp
def _(primals, tangents):
    tangent = _tangent(primals[:2], tangents[:2])
    return tangent if tangents[2] is None else tangent + tangents[2]


def _tangent(primals: Any, tangents: Any) -> mx.array:
    """Forward mode. Without it MLX's tangents are right, but their gradients are not."""
    x, weight = primals
    of_x, of_weight = tangents
    tangent = mx.zeros((*x.shape[:-1], weight.shape[0]), mx.result_type(x, weight))
    if of_x is not None:
        tangent = tangent + of_x @ weight.T
    return tangent if of_weight is None else tangent + x @ of_weight.T
