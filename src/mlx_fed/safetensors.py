"""Arrays as safetensors, written from where they lie: MLX's own way copies them more than once.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from flwr.app import Array

from .spool import values_of
from .weights import dtype_name

Values = mx.array | np.ndarray | Array

_BITS = (8, 16, 32, 64)
_DTYPES = {
    "bool": "BOOL",
    "complex64": "C64",
    "bfloat16": "BF16",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in _BITS},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32)},
}


def parts(
    arrays: Mapping[str, Values], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header, and then the arrays, one after another.

    Args:
        arrays (dict): MLX's, NumPy's, or Flower's of NumPy's, which are in memory one at a time
            if they wait on disk.
        metadata (dict, optional): Text by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + _size(array)
        header[name] = {
            "dtype": _dtype(array),
            "shape": tuple(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for array in arrays.values():
        yield np.ascontiguousarray(_values(array).reshape(-1)).view(np.uint8).data


def _size(array: Values) -> int:
    if isinstance(array, Array):
        return np.dtype(array.dtype).itemsize * math.prod(array.shape)
    return array.nbytes


def _dtype(array: Values) -> str:
    """What safetensors call an array's dtype."""
    name = dtype_name(array.dtype) if isinstance(array, mx.array) else str(array.dtype)
    return _DTYPES[name.removesuffix("_")]


def _values(array: Values) -> np.ndarray:
    """An array's values, as NumPy has them."""
    if isinstance(array, Array):
        return values_of(array)
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array)
