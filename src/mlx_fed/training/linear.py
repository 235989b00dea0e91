"""Linear layers whose gradients come in the order of their weights.

A linear layer multiplies by its weight's transpose, so MLX gives the weight's gradient as the
transpose of a product. An optimizer then goes through the two in different orders, element by
element, which takes long on a CPU. Here the product is made the other way round: the same sums,
laid out as the weight is, and the same bits where the BLAS adds up rows and columns alike, as it
does on some CPUs and for some shapes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arrays.weights import Slots


def layers(slots: Slots) -> list[nn.Linear]:
    """The plain linear layers among those that are trained: a subclass may do as it likes."""
    owners = [owner for owner, key in slots.parameters.values() if key == "weight"]
    return [owner for owner in owners if type(owner) is nn.Linear]


@contextmanager
def in_order(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """While a program is traced: what the layers compute has its gradient in the weights' order.

    The layers keep their class, which models may ask for. ``nn.Linear`` is another only while a
    thread is in here, and only for the layers that this thread has named.
    """
    global _users
    before, _traced.layers = _layers(), {id(layer) for layer in layers}
    with _LOCK:
        if not _users and nn.Linear.__call__ is _PLAIN:  # not one that somebody has put there
            nn.Linear.__call__ = _call  # type: ignore[method-assign]
        _users += 1
    try:
        yield
    finally:
        _traced.layers = before
        with _LOCK:
            _users -= 1
            if not _users and nn.Linear.__call__ is _call:
                nn.Linear.__call__ = _PLAIN  # type: ignore[method-assign]


_PLAIN = nn.Linear.__call__
_LOCK = threading.Lock()
_users = 0
_traced = threading.local()


def _layers() -> set[int]:
    """The layers, by identity, that this thread computes in their weights' order."""
    return getattr(_traced, "layers", set())


def _call(self: nn.Linear, x: mx.array) -> Any:
    operands = [x, *(self[name] for name in ("weight", "bias") if name in self)]
    is_complex = any(operand.dtype == mx.complex64 for operand in operands)
    if id(self) not in _layers() or is_complex:
        return _PLAIN(self, x)
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
