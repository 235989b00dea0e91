"""Pickling of MLX's dtypes, functions and compiled functions, by their names in ``mlx``.

A task may hold them, as in ``partial(MLP, activation=nn.relu, dtype=mx.bfloat16)``, and is pickled
for the worker processes of a simulation: this package's, and Ray's under ``flwr run``. MLX defines
it for none of them. Importing this module registers it with :mod:`copyreg`.
"""

from __future__ import annotations

import copyreg
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .named_arrays import dtype_name


def _dtype(dtype: mx.Dtype) -> tuple[Any, ...]:
    return _dtype_of, (dtype_name(dtype),)  # an array's is not the same object as mx.float32


def _dtype_of(name: str) -> mx.Dtype:
    dtype: mx.Dtype = getattr(mx, name)
    return dtype


def _limits(limits: Any) -> tuple[Any, ...]:
    return type(limits), (limits.dtype,)


def _qualified_name(function: Any) -> str:
    return str(function.__qualname__)


_REDUCERS: dict[Any, Any] = {
    mx.Dtype: _dtype,
    type(mx.finfo(mx.float32)): _limits,
    type(mx.iinfo(mx.int32)): _limits,
    type(mx.tanh): _qualified_name,
    type(nn.relu): _qualified_name,  # a compiled function
}
for _kind, _reducer in _REDUCERS.items():
    copyreg.pickle(_kind, _reducer)
