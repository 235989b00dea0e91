"""Gradients of linear layers in the memory order of their weights.

A linear layer multiplies by its weight's transpose, so MLX returns the weight's gradient as the
transpose of a product. An optimizer then reads the two arrays in different orders, element by
element, which is slow on a CPU. Here the factors are exchanged: the same sums in the weight's
layout, and the same bits where the BLAS sums rows and columns in one order, which depends on the
CPU and the shapes.
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
    """Trained layers of the class ``nn.Linear`` itself: a subclass may compute something else."""
    owners = [owner for owner, key in slots.parameters.values() if key == "weight"]
    return [owner for owner in owners if type(owner) is nn.Linear]


@contextmanager
def in_weight_order(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Context in which the gradients of these layers have the weights' order, for tracing.

    The layers keep their class, which models may test for. ``nn.Linear.__call__`` is replaced only
    while a thread is in this context, and computes as before for all other layers.
    """
    global _users
    outer_layers, _traced.layers = _layers(), {id(layer) for layer in layers}
    with _LOCK:
        if not _users and nn.Linear.__call__ is _PLAIN:  # unless it is replaced already
            nn.Linear.__call__ = _call  # type: ignore[method-assign]
        _users += 1
    try:
        yield
    finally:
        _traced.layers = outer_layers
        with _LOCK:
            _users -= 1
            if not _users and nn.Linear.__call__ is _call:
                nn.Linear.__call__ = _PLAIN  # type: ignore[method-assign]


_PLAIN = nn.Linear.__call__
_LOCK = threading.Lock()
_users = 0
_traced = threading.local()


def _layers() -> set[int]:
    """Identities of the layers whose gradients this thread computes in the weights' order."""
    return getattr(_traced, "layers", set())


def _call(self: nn.Linear, x: mx.array) -> Any:
    operands = [x, *(self[name] for name in ("weight", "bias") if name in self)]
    is_complex = any(operand.dtype == mx.complex64 for operand in operands)
    if id(self) not in _layers() or is_complex:
        return _PLAIN(self, x)
    return (_affine if "bias" in self else _product)(*operands)


def _gradients(cotangent: mx.array, x: mx.array, weight: mx.array) -> list[mx.array]:
    """Gradients of ``x`` and ``weight``, each in the dtype of its array: either may be wider."""
    gradient = _rows(cotangent).T @ _rows(x)
    return [(cotangent @ weight).astype(x.dtype), gradient.astype(weight.dtype)]


def _rows(array: mx.array) -> mx.array:
    return array if array.ndim == 2 else array.reshape(-1, array.shape[-1])


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> Any:
    return x @ weight.T


@_product.vjp
def _(primals, cotangent, output):
    return _gradients(cotangent, *primals)


@_product.jvp
def _(primals, tangents):
    return _tangent(primals, tangents)


@mx.custom_function
def _affine(x: mx.array, weight: mx.array, bias: mx.array) -> Any:
    return mx.addmm(bias, x, weight.T)


@_affine.vjp
def _(primals, cotangent, output):
    x, weight, bias = primals

    def broadcast(bias: mx.array) -> mx.array:
        return mx.broadcast_to(bias.astype(cotangent.dtype), cotangent.shape)

    _, bias_gradient = mx.vjp(broadcast, [bias], [cotangent])
    return _gradients(cotangent, x, weight) + bias_gradient


@_affine.jvp
def _(primals, tangents):
    tangent = _tangent(primals[:2], tangents[:2])
    return tangent if tangents[2] is None else tangent + tangents[2]


def _tangent(primals: Any, tangents: Any) -> mx.array:
    """Forward-mode derivative. Without it MLX's tangents are right, but not their gradients."""
    x, weight = primals
    x_tangent, weight_tangent = tangents
    tangent = mx.zeros((*x.shape[:-1], weight.shape[0]), mx.result_type(x, weight))
    if x_tangent is not None:
        tangent = tangent + x_tangent @ weight.T
    return tangent if weight_tangent is None else tangent + x @ weight_tangent.T
