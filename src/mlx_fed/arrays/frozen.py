"""What a model's frozen arrays are known by, so that all who train with them have the same.

Frozen arrays never travel: each process makes its own, from a seed, files or code. Where one is
not the server's, a client trains another model, and nothing else would say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .weights import PIECE, Arrays, dtype_name, to_float32

WHOLE = 64 * 2**20
"""Bytes of all frozen arrays up to which every value is looked at."""
SAMPLES = 4096
"""Values of each array that are looked at where there are more bytes: the first, the last, and
others at even distances."""
_ROUNDING = 1e-5
"""A difference that devices have by rounding, as a share of an array's norm: a sine, an exponential
or a normal number is not the same to the last bit on a GPU and on a CPU."""
_REMEDY = (
    "read it from the same file on every machine, or draw it from the global generators of MLX, "
    "NumPy or Python, which are seeded while Task.model runs"
)


class Identity(NamedTuple):
    """What one array is known by: a list in JSON.

    Attributes:
        kind (str): Its dtype and shape, ``"float32 [16, 6]"``.
        digest (str): A hash of its values.
        norm (float): The Euclidean norm, and
        projection (float): the product with pseudo-random signs, of floating-point values: by
            them a difference that is only rounding is told from others.
    """

    kind: str
    digest: str
    norm: float = 0.0
    projection: float = 0.0


Identities = dict[str, Identity]


class Difference(NamedTuple):
    """A frozen array that is not the expected one, why, and whether that is only rounding."""

    name: str
    reason: str
    is_rounding: bool = False

    def __str__(self) -> str:
        return f"frozen array {self.name!r} {self.reason}"


def identities(arrays: Arrays) -> Identities:
    """What each of a model's frozen arrays is known by.

    Args:
        arrays (dict): All of them. Each is taken out of the dictionary when it is looked at, so
            that one that nobody else holds is in memory by itself.
    """
    is_whole = sum(array.nbytes for array in arrays.values()) <= WHOLE
    return {name: _identity(arrays.pop(name), is_whole) for name in list(arrays)}


def difference(
    expected: Mapping[str, Sequence[Any]], others: Mapping[str, Sequence[Any]]
) -> Difference | None:
    """The first array, in the expected order, that is not the same in ``others``.

    One that differs by more than rounding comes before those that differ by that alone. Either may
    come out of JSON, where an identity is a list.
    """
    rounding = None
    for name, identity in expected.items():
        found = _compare(name, identity, others.get(name))
        if found is not None and not found.is_rounding:
            return found
        rounding = rounding or found
    for name in others:
        if name not in expected:
            return Difference(name[:200], "is not one of the expected")
    return rounding


def _compare(name: str, identity: Sequence[Any], other: Sequence[Any] | None) -> Difference | None:
    if other is None:
        return Difference(name, "is missing")
    identity, other = Identity(*identity), Identity(*other)
    if other.kind != identity.kind:
        return Difference(name, f"is {other.kind[:100]}, expected {identity.kind}")
    if other.digest == identity.digest:
        return None
    most = _ROUNDING * identity.norm
    sketches = zip(identity[2:], other[2:], strict=True)
    if 0 < most < math.inf and all(abs(a - b) <= most for a, b in sketches):
        return Difference(name, "differs by rounding", is_rounding=True)
    return Difference(name, f"has other values: {_REMEDY}")


def _identity(array: mx.array, is_whole: bool) -> Identity:
    is_bfloat16 = array.dtype == mx.bfloat16
    values = np.asarray(array.view(mx.uint16) if is_bfloat16 else array).reshape(-1)
    if not is_whole and values.size > SAMPLES:
        values = values[np.arange(SAMPLES) * (values.size - 1) // (SAMPLES - 1)]
    values = np.ascontiguousarray(values)
    kind = f"{dtype_name(array.dtype)} {list(array.shape)}"
    digest = blake2b(values.view(np.uint8).data, digest_size=8).hexdigest()
    if not mx.issubdtype(array.dtype, mx.inexact):
        return Identity(kind, digest)
    if is_bfloat16:
        values = to_float32(mx.array(values).view(mx.bfloat16))
    if array.dtype == mx.complex64:
        values = values.view(np.float32)
    return Identity(kind, digest, *_sketch(values))


def _sketch(values: np.ndarray) -> tuple[float, float]:
    """The norm, and the product with signs that are the same on every machine."""
    signs = np.random.RandomState(0).choice([-1.0, 1.0], min(PIECE, values.size))
    squares = projection = 0.0
    for number, start in enumerate(range(0, values.size, PIECE)):
        piece = values[start : start + PIECE].astype(np.float64)
        with np.errstate(all="ignore"):
            squares += float(piece @ piece)
            # No two pieces have one factor: arrays with pieces in another order differ.
            projection += float(piece @ signs[: piece.size]) / (1 + number / 64)
    return float(np.sqrt(squares)), projection
