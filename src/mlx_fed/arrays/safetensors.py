"""Safetensors without copies: written from where arrays lie, and read lazily from segments.

MLX's own functions copy the arrays more than once, and trust the header.

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

from .flower_records import Segment, array_values
from .named_arrays import PIECE, dtype_name, to_float32

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
"""The header's key of the metadata; no module has an array of such a name."""
_HEADER_GUESS = 1024
"""Bytes in which the header of a few arrays ends."""
_MAX_AXIS = 2**31 - 1  # MLX's


def serialize(
    arrays: Mapping[str, Values], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file: its header, and then each array without a copy.

    Args:
        arrays (dict): Arrays of MLX, NumPy or Flower by name. Those on disk are in memory one at a
            time.
        metadata (dict, optional): Text by name.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + _num_bytes(array)
        header[name] = {
            "dtype": _dtype_code(array),
            "shape": tuple(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for array in arrays.values():
        yield np.ascontiguousarray(_values(array).reshape(-1)).view(np.uint8).data


class TensorView(NamedTuple):
    """A lazy array in the bytes of a file.

    Attributes:
        segments (sequence): The bytes of the whole file.
        start (int): The offset of the array in the file.
        dtype (str): Its dtype in MLX.
        shape (tuple): Its shape.
    """

    segments: Sequence[Segment]
    start: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, dtype: str | None = None) -> mx.array:
        """The array, in its own dtype or another."""
        return self._to_mlx(self._slice(0, self._size).reshape(self.shape), dtype)

    def pieces(self, dtype: str | None = None) -> Iterator[np.ndarray]:
        """The values that :meth:`read` gives, as :func:`.named_arrays.pieces` does."""
        is_float32 = self.dtype == "float32" == (dtype or self.dtype)
        for start in range(0, self._size, PIECE):
            values = self._slice(start, min(start + PIECE, self._size))
            yield values if is_float32 else to_float32(self._to_mlx(values, dtype))

    def _slice(self, start: int, end: int) -> np.ndarray:
        """The values from ``start`` up to ``end``, flat; without a copy within one segment."""
        width = self._numpy_dtype.itemsize
        data = _read(self.segments, self.start + start * width, (end - start) * width)
        return data.view(self._numpy_dtype)

    @property
    def _size(self) -> int:
        return math.prod(self.shape)

    @property
    def _numpy_dtype(self) -> np.dtype:
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    def _to_mlx(self, values: np.ndarray, dtype: str | None) -> mx.array:
        array = mx.array(values)
        if self.dtype == "bfloat16":
            array = array.view(mx.bfloat16)
        return array.astype(getattr(mx, dtype)) if dtype else array


def parse(segments: Sequence[Segment]) -> dict[str, TensorView]:
    """The arrays of a file by name, from its bytes in segments.

    Raises:
        ValueError: If the bytes are not in the format, which allows neither a hole between arrays
            nor an overlap. Bytes of a stranger may bring about other errors as well.
    """
    file_size = sum(map(len, segments))
    begin = _read(segments, 0, min(file_size, _HEADER_GUESS)).tobytes()
    length = int.from_bytes(begin[:8], "little")
    if length > file_size - 8:
        raise ValueError("the header is longer than the file")
    is_in_begin = 8 + length <= len(begin)
    text = begin[8 : 8 + length] if is_in_begin else _read(segments, 8, length).tobytes()
    header = json.loads(text)
    header.pop(_METADATA, None)
    views: dict[str, TensorView] = {}
    end = 0
    for name, fields in header.items():
        dtype, shape = _NAMES[fields["dtype"]], tuple(map(operator.index, fields["shape"]))
        if not all(0 <= axis <= _MAX_AXIS for axis in shape):
            raise ValueError(f"parameter {name!r} has a shape that no array can have")
        view = TensorView(segments, 8 + length + end, dtype, shape)
        start, end = end, end + view._numpy_dtype.itemsize * math.prod(shape)
        if fields["data_offsets"] != [start, end] or end > file_size - 8 - length:
            raise ValueError(f"the offsets of parameter {name!r} are wrong")
        views[name] = view
    if end != file_size - 8 - length:
        raise ValueError("there are bytes that belong to no parameter")
    return views


def _read(segments: Sequence[Segment], start: int, size: int) -> np.ndarray:
    """``size`` bytes from the offset ``start`` on: a view within one segment, otherwise a copy.

    Raises:
        ValueError: If there are fewer.
    """
    buffer, position = None, 0
    for segment in segments:
        if start < len(segment) and position < size:
            data = np.frombuffer(segment.view(start, start + size - position), np.uint8)
            if len(data) == size:
                return data
            if buffer is None:
                buffer = np.empty(size, np.uint8)
            buffer[position : position + len(data)] = data
            position += len(data)
        start = max(0, start - len(segment))
    if position < size:
        raise ValueError("the file ends early")
    return np.empty(0, np.uint8) if buffer is None else buffer


def _num_bytes(array: Values) -> int:
    if isinstance(array, Array):
        return np.dtype(array.dtype).itemsize * math.prod(array.shape)
    return array.nbytes


def _dtype_code(array: Values) -> str:
    """The name of an array's dtype in safetensors."""
    name = dtype_name(array.dtype) if isinstance(array, mx.array) else str(array.dtype)
    return _DTYPES[name.removesuffix("_")]


def _values(array: Values) -> np.ndarray:
    """The values of an array in NumPy, without a copy; of bfloat16 the bits, as uint16."""
    if isinstance(array, Array):
        return array_values(array)
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array)
