"""Arrays as safetensors, written from where they lie and read to where they are used.

MLX's own way copies them more than once, and trusts what it reads.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from flwr.app import Array

from .spool import Part, values_of
from .weights import PIECE, dtype_name, to_float32

Values = mx.array | np.ndarray | Array

_BITS = (8, 16, 32, 64)
_DTYPES = {
    "bool": "BOOL",
    "complex64": "C64",
    "bfloat16": "BF16",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in _BITS},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32)},
}
_NAMES = {code: name for name, code in _DTYPES.items()}
_METADATA = "__metadata__"
"""What no array is called: no module has an array with such a name."""
_MOSTLY_HEADER = 1024
"""Bytes in which the header of a few arrays ends."""
_LONGEST_AXIS = 2**31 - 1  # MLX's


def parts(
    arrays: Mapping[str, Values], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header, and then the arrays, one after another.

    Args:
        arrays (dict): MLX's, NumPy's, or Flower's of NumPy's, which are in memory one at a time
            if they wait on disk.
        metadata (dict, optional): Text by name.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
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


class Stored(NamedTuple):
    """An array in the bytes of a file, which are read when they are asked for."""

    parts: Sequence[Part]
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, dtype: str | None = None) -> mx.array:
        """The array, in its own dtype or another."""
        return self._array(self._between(0, self._size).reshape(self.shape), dtype)

    def pieces(self, dtype: str | None = None) -> Iterator[np.ndarray]:
        """The values that :meth:`read` gives, as :func:`.weights.pieces` has them."""
        is_float32 = self.dtype == "float32" == (dtype or self.dtype)
        for start in range(0, self._size, PIECE):
            values = self._between(start, min(start + PIECE, self._size))
            yield values if is_float32 else to_float32(self._array(values, dtype))

    def _between(self, start: int, end: int) -> np.ndarray:
        """The values from one number to another, flat, where they lie if that is in one part."""
        width = self._kept.itemsize
        return _bytes(self.parts, self.start + start * width, (end - start) * width).view(
            self._kept
        )

    @property
    def _size(self) -> int:
        return math.prod(self.shape)

    @property
    def _kept(self) -> np.dtype:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def _array(self, values: np.ndarray, dtype: str | None) -> mx.array:
        array = mx.array(values)
        if self.dtype == "bfloat16":
            array = array.view(mx.bfloat16)
        return array.astype(getattr(mx, dtype)) if dtype else array


def find(parts: Sequence[Part]) -> dict[str, Stored]:
    """The arrays in the bytes of a file, by name.

    Args:
        parts (sequence): The bytes, one part after another.

    Raises:
        ValueError: If the bytes are no such file, or leave a hole between arrays or share bytes
            among them, which the format does not allow. (Or another error: they may be anyone's.)
    """
    whole = sum(map(len, parts))
    begin = _bytes(parts, 0, min(whole, _MOSTLY_HEADER)).tobytes()
    length = int.from_bytes(begin[:8], "little")
    if length > whole - 8:
        raise ValueError("the header is longer than the file")
    text = begin[8 : 8 + length] if 8 + length <= len(begin) else _bytes(parts, 8, length).tobytes()
    header = json.loads(text)
    header.pop(_METADATA, None)
    arrays: dict[str, Stored] = {}
    end = 0
    for name, about in header.items():
        dtype, shape = _NAMES[about["dtype"]], tuple(map(operator.index, about["shape"]))
        if not all(0 <= axis <= _LONGEST_AXIS for axis in shape):
            raise ValueError(f"parameter {name!r} has a shape that no array can have")
        stored = Stored(parts, 8 + length + end, dtype, shape)
        start, end = end, end + stored._kept.itemsize * math.prod(shape)
        if about["data_offsets"] != [start, end] or end > whole - 8 - length:
            raise ValueError(f"the bytes of parameter {name!r} are not where they belong")
        arrays[name] = stored
    if end != whole - 8 - length:
        raise ValueError("there are bytes of no parameter")
    return arrays


def _bytes(parts: Sequence[Part], start: int, count: int) -> np.ndarray:
    """So many bytes from ``start`` on: a view where one part has them all, or a copy.

    Raises:
        ValueError: If there are fewer.
    """
    joined, filled = None, 0
    for part in parts:
        if start < len(part) and filled < count:
            found = np.frombuffer(part.view(start, start + count - filled), np.uint8)
            if len(found) == count:
                return found
            if joined is None:
                joined = np.empty(count, np.uint8)
            joined[filled : filled + len(found)] = found
            filled += len(found)
        start = max(0, start - len(part))
    if filled < count:
        raise ValueError("the file ends early")
    return np.empty(0, np.uint8) if joined is None else joined


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
