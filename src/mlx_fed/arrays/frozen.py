"""Digests of frozen arrays, by which the server checks that each client has the same.

Frozen arrays never travel: each process builds its own, from a seed, files or code. A client with
another array would train another model without any other sign of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .named_arrays import PIECE, Arrays, dtype_name, to_float32

WHOLE = 64 * 2**20
"""Bytes of all frozen arrays up to which the digests are of every value."""
SAMPLES = 4096
"""Values of each array in a digest where there are more bytes: the first, the last, and others at
even distances."""
_ROUNDING = 1e-5
"""Tolerance of rounding on another device, relative to an array's norm: a sine, an exponential or a
normal number differs in the last bits between a GPU and a CPU."""
_REMEDY = (
    "read it from the same file on every machine, or draw it from the global generators of MLX, "
    "NumPy or Python, which are seeded while Task.model runs"
)


class ArrayDigest(NamedTuple):
    """The digest of one array; a list in JSON.

    Attributes:
        kind (str): The dtype and shape, ``"float32 [16, 6]"``.
        digest (str): BLAKE2b of the values.
        norm (float): The Euclidean norm of floating-point values, and
        projection (float): their product with pseudo-random signs: the two tell a difference by
            rounding from others.
    """

    kind: str
    digest: str
    norm: float = 0.0
    projection: float = 0.0


Digests = dict[str, ArrayDigest]


class Difference(NamedTuple):
    """A frozen array that differs from the expected one, why, and whether only by rounding."""

    name: str
    reason: str
    is_rounding: bool = False

    def __str__(self) -> str:
        return f"frozen array {self.name!r} {self.reason}"


def digest_arrays(arrays: Arrays) -> Digests:
    """The digest of each frozen array of a model, by name.

    Args:
        arrays (dict): All frozen arrays. Each is removed from the dictionary when it is read, so
            that only one at a time is in memory.
    """
    is_whole = sum(array.nbytes for array in arrays.values()) <= WHOLE
    return {name: _digest(arrays.pop(name), is_whole) for name in list(arrays)}


def difference(
    server_digests: Mapping[str, Sequence[Any]], client_digests: Mapping[str, Sequence[Any]]
) -> Difference | None:
    """The first difference, in the server's order, between the digests of a server and a client.

    A difference by more than rounding has priority. Digests that were JSON are lists.
    """
    rounding = None
    for name, digest in server_digests.items():
        result = _compare(name, digest, client_digests.get(name))
        if result is not None and not result.is_rounding:
            return result
        rounding = rounding or result
    for name in client_digests:
        if name not in server_digests:
            return Difference(name[:200], "is not one of the expected")
    return rounding


def _compare(name: str, server: Sequence[Any], client: Sequence[Any] | None) -> Difference | None:
    if client is None:
        return Difference(name, "is missing")
    server, client = ArrayDigest(*server), ArrayDigest(*client)
    if client.kind != server.kind:
        return Difference(name, f"is {client.kind[:100]}, expected {server.kind}")
    if client.digest == server.digest:
        return None
    tolerance = _ROUNDING * server.norm
    sketches = zip(server[2:], client[2:], strict=True)
    if 0 < tolerance < math.inf and all(abs(a - b) <= tolerance for a, b in sketches):
        return Difference(name, "differs by rounding", is_rounding=True)
    return Difference(name, f"has other values: {_REMEDY}")


def _digest(array: mx.array, is_whole: bool) -> ArrayDigest:
    is_bfloat16 = array.dtype == mx.bfloat16
    values = np.asarray(array.view(mx.uint16) if is_bfloat16 else array).reshape(-1)
    if not is_whole and values.size > SAMPLES:
        values = values[np.arange(SAMPLES) * (values.size - 1) // (SAMPLES - 1)]
    values = np.ascontiguousarray(values)
    kind = f"{dtype_name(array.dtype)} {list(array.shape)}"
    digest = blake2b(values.view(np.uint8).data, digest_size=8).hexdigest()
    if not mx.issubdtype(array.dtype, mx.inexact):
        return ArrayDigest(kind, digest)
    if is_bfloat16:
        values = to_float32(mx.array(values).view(mx.bfloat16))
    if array.dtype == mx.complex64:
        values = values.view(np.float32)
    return ArrayDigest(kind, digest, *_sketch(values))


def _sketch(values: np.ndarray) -> tuple[float, float]:
    """The norm, and the projection on pseudo-random signs, which are the same on every machine."""
    signs = np.random.RandomState(0).choice([-1.0, 1.0], min(PIECE, values.size))
    squares = projection = 0.0
    for number, start in enumerate(range(0, values.size, PIECE)):
        piece = values[start : start + PIECE].astype(np.float64)
        with np.errstate(all="ignore"):
            squares += float(piece @ piece)
            # Each piece has its own factor: arrays with pieces in another order differ.
            projection += float(piece @ signs[: piece.size]) / (1 + number / 64)
    return float(np.sqrt(squares)), projection
