"""Compression of updates: fewer bits for each value, or fewer values.

Arrays of fewer than 64 values are sent as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..arrays.named_arrays import Arrays
from ..errors import SettingsError
from .update_transform import Transform, array_transform, chain, with_error_feedback

GROUP = 64
"""Values that share a scale."""
BLOCK = 4096
"""Values of which the largest are kept, and counted by 16 bits."""
_INDEX_BITS = 12  # of BLOCK
_MIN_SIZE = 64
_STEP_OF_MEAN = {1: 2.0, 2: 1.248}
"""Distance of two levels, in mean sizes of a value, by the number of bits."""


def quantize(bits: int) -> Transform:
    """Whole numbers of 8 or 4 bits with a bfloat16 scale for each 64 values, rounded at random.

    The decoded value is the right one on average (QSGD, Alistarh et al. 2017,
    https://arxiv.org/abs/1610.02132). A zero stays a zero.

    Args:
        bits (int): 8 or 4.
    """
    maximum = 2 ** (bits - 1) - 1

    def encode(array: mx.array, key: mx.array) -> Arrays:
        groups = _rows(array, GROUP)
        scale = _round_up(mx.max(mx.abs(groups), axis=1, keepdims=True))
        levels = groups / mx.where(scale == 0, 1.0, scale) * maximum
        levels = mx.floor(levels + mx.random.uniform(shape=levels.shape, key=key))
        levels = mx.clip(levels, -maximum, maximum)
        codes = _pack((levels + maximum).astype(mx.uint32), bits)
        return {"codes": codes, "scales": scale.reshape(-1).astype(mx.bfloat16)}

    def decode(components: Arrays, shape: tuple[int, ...]) -> mx.array:
        levels = _unpack(components["codes"], bits).astype(mx.float32) - maximum
        return _array(_scaled(levels / maximum, components["scales"]), shape)

    return array_transform(encode, decode, f"{bits} bits a value", _MIN_SIZE)


def quantize_coarsely(bits: int) -> Transform:
    """1 or 2 bits a value, rounded to the nearest level, with a bfloat16 scale for each 64 values.

    The levels are those of the least squared error for normally distributed values (Max 1960,
    https://doi.org/10.1109/TIT.1960.1057548); with 1 bit, the sign and the mean size. It is biased,
    and needs :func:`~mlx_fed.transforms.update_transform.with_error_feedback` (Karimireddy et al.
    2019, https://arxiv.org/abs/1901.09847).

    Args:
        bits (int): 1 or 2.
    """
    half = 2 ** (bits - 1)

    def encode(array: mx.array, key: mx.array) -> Arrays:
        groups = _rows(array, GROUP)
        steps = mx.mean(mx.abs(groups), axis=1, keepdims=True) * _STEP_OF_MEAN[bits]
        steps = steps.astype(mx.bfloat16).astype(mx.float32)
        levels = mx.floor(groups / mx.where(steps == 0, 1.0, steps)) + half
        codes = _pack(mx.clip(levels, 0, 2 * half - 1).astype(mx.uint32), bits)
        return {"codes": codes, "scales": steps.reshape(-1).astype(mx.bfloat16)}

    def decode(components: Arrays, shape: tuple[int, ...]) -> mx.array:
        levels = _unpack(components["codes"], bits).astype(mx.float32) - (half - 0.5)
        return _array(_scaled(levels, components["scales"]), shape)

    return array_transform(encode, decode, f"{bits} bits a value", _MIN_SIZE)


def top_k(fraction: float) -> Transform:
    """The largest values of each 4,096, with their positions; the others are taken as 0.

    It is biased, and needs :func:`~mlx_fed.transforms.update_transform.with_error_feedback`
    (Stich et al. 2018, https://arxiv.org/abs/1809.07599).

    Args:
        fraction (float): How many values are kept, above 0 and at most 1.
    """

    def encode(array: mx.array, key: mx.array) -> Arrays:
        blocks = _rows(array, min(BLOCK, array.size))
        count = _count(fraction, blocks.shape[1])
        positions = mx.argpartition(-mx.abs(blocks), count - 1, axis=1)[:, :count]
        values = mx.take_along_axis(blocks, positions, axis=1)
        # The message of an update that is not finite is not finite either.
        values = mx.where(mx.all(mx.isfinite(blocks)), values, mx.nan)
        return {"values": values, "positions": positions.astype(mx.uint16)}

    def decode(components: Arrays, shape: tuple[int, ...]) -> mx.array:
        width = min(BLOCK, math.prod(shape))
        positions = mx.minimum(components["positions"].astype(mx.uint32), width - 1)
        return _scatter(components["values"], positions, width, shape)

    return array_transform(encode, decode, f"the largest {fraction:.3g} of the values", _MIN_SIZE)


def random_k(fraction: float, unbiased: bool = True) -> Transform:
    """Values at random positions; the others are taken as 0.

    The positions follow from a key in the message (Konečný et al. 2016,
    https://arxiv.org/abs/1610.05492).

    Args:
        fraction (float): How many values are kept, above 0 and at most 1.
        unbiased (bool): Divide them by their share, so that the decoded value is the right one on
            average; not with error feedback, which then diverges.
    """

    def draw(key: mx.array, shape: Sequence[int]) -> mx.array:
        # Sorted numbers that are all different, of which the low bits are the positions: any
        # device gives the same.
        high_bits = mx.random.randint(0, 2**20, shape, dtype=mx.uint32, key=key)
        numbers = mx.left_shift(high_bits, _INDEX_BITS) + mx.arange(shape[1], dtype=mx.uint32)
        return mx.bitwise_and(mx.sort(numbers, axis=1), 2**_INDEX_BITS - 1)

    def encode(array: mx.array, key: mx.array) -> Arrays:
        blocks = _rows(array, min(BLOCK, array.size))
        count = _count(fraction, blocks.shape[1])
        positions = draw(key, blocks.shape)[:, :count]
        values = mx.take_along_axis(blocks, positions, axis=1)
        if unbiased:
            values = values * (blocks.shape[1] / count)
        values = mx.where(mx.all(mx.isfinite(blocks)), values, mx.nan)
        return {"values": values, "key": key}

    def decode(components: Arrays, shape: tuple[int, ...]) -> mx.array:
        width = min(BLOCK, math.prod(shape))
        rows, count = components["values"].shape
        positions = draw(components["key"], (rows, width))[:, :count]
        return _scatter(components["values"], positions, width, shape)

    return array_transform(encode, decode, f"a random {fraction:.3g} of the values", _MIN_SIZE)


NAMES = "int8, int4, int2, int1, topk:0.01 or randk:0.01, or two of them as in topk:0.01,int8"


def parse_compression(text: Any) -> Transform | None:
    """The transform that the setting ``compress`` names; None for an empty text.

    ``int2``, ``int1`` and ``topk`` are biased: a client keeps what they lose of an update for its
    next one.

    Raises:
        SettingsError: If it names none.
    """
    names = [name.strip().lower() for name in str(text).split(",") if name.strip()]
    is_biased = any(name.startswith(("int2", "int1", "topk")) for name in names)
    transforms = [_parse(name, text, is_biased) for name in names]
    if not transforms:
        return None
    transform = chain(*transforms)
    return with_error_feedback(transform) if is_biased else transform


def _parse(name: str, text: Any, has_feedback: bool) -> Transform:
    kind, _, argument = name.partition(":")
    if kind in ("int8", "int4") and not argument:
        return quantize(int(kind.removeprefix("int")))
    if kind in ("int2", "int1") and not argument:
        return quantize_coarsely(int(kind.removeprefix("int")))
    if kind in ("topk", "randk"):
        try:
            fraction = float(argument)
        except ValueError:
            fraction = 0.0
        if 0 < fraction <= 1:
            return top_k(fraction) if kind == "topk" else random_k(fraction, not has_feedback)
    raise SettingsError(f"compress is {NAMES}, not {text!r}.")


def _rows(array: mx.array, width: int) -> mx.array:
    """The values in rows, the last of which is filled with zeros."""
    flat = array.reshape(-1)
    return mx.pad(flat, (0, -flat.size % width)).reshape(-1, width)


def _array(rows: mx.array, shape: tuple[int, ...]) -> mx.array:
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def _scaled(levels: mx.array, scales: mx.array) -> mx.array:
    return levels.reshape(-1, GROUP) * scales.astype(mx.float32)[:, None]


def _count(fraction: float, width: int) -> int:
    return max(1, round(fraction * width))


def _scatter(values: mx.array, positions: mx.array, width: int, shape: tuple[int, ...]) -> mx.array:
    rows = mx.zeros((values.shape[0], width))
    return _array(mx.put_along_axis(rows, positions, values, axis=1), shape)


def _round_up(array: mx.array) -> mx.array:
    """Values of 0 or more as bfloat16 would have them, and not smaller than before."""
    return (array * (1 + 2**-7)).astype(mx.bfloat16).astype(mx.float32)


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Numbers of few bits in uint32, the first in the lowest bits."""
    count = 32 // bits
    shifts = mx.arange(count, dtype=mx.uint32) * bits
    return mx.left_shift(codes.reshape(-1, count), shifts).sum(axis=1).astype(mx.uint32)


def _unpack(codes: mx.array, bits: int) -> mx.array:
    shifts = mx.arange(32 // bits, dtype=mx.uint32) * bits
    return mx.bitwise_and(mx.right_shift(codes[:, None], shifts), 2**bits - 1)
