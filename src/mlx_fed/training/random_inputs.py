"""Random examples and parameters of the shapes and dtypes of others, for probes of functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..arrays import examples, randomness
from ..arrays.examples import Examples
from ..arrays.randomness import Keys


class Draw(NamedTuple):
    """Distribution of random examples with values that few have.

    ``scale`` is the deviation of floating-point numbers, ``limit`` the end of the integers; the
    leaf number ``missing`` has entries of NaN, or of -100, which losses leave out as labels.
    """

    scale: float
    limit: int
    missing: int | None = None


def draw_like(arrays: Examples, size: int, draw: Draw, number: int) -> Examples:
    """Random examples of given shapes and dtypes."""
    generator = np.random.default_rng(randomness.derive(0, "rare examples", number))

    def draw_leaf(array: mx.array, is_missing: bool) -> mx.array:
        shape = (size, *array.shape[1:])
        missing = generator.random(shape) < 0.4
        if mx.issubdtype(array.dtype, mx.inexact):
            values = draw.scale * generator.normal(size=shape)
            values = np.where(missing, np.nan, values) if is_missing else values
            return mx.array(values.astype(np.float32)).astype(array.dtype)
        is_image = array.dtype == mx.uint8 and array.ndim > 1
        integers = generator.integers(0, 256 if is_image else draw.limit, shape)
        if is_missing and mx.issubdtype(array.dtype, mx.signedinteger):
            integers = np.where(missing, -100, integers)
        if array.dtype == mx.bool_:
            integers = integers % 2
        return mx.array(integers).astype(array.dtype)

    leaves = enumerate(examples.leaves(arrays))
    return examples.replace_leaves(
        arrays, [draw_leaf(array, index == draw.missing) for index, array in leaves]
    )


def random_like(arrays: Examples, size: int, number: int, wide: bool = False) -> Examples:
    """Random examples of given shapes and dtypes: positive numbers, integers of 0 and 1.

    Args:
        arrays: Examples, or a batch.
        size (int): How many.
        number (int): Seed.
        wide (bool): Large and negative numbers as well.
    """
    keys = Keys(randomness.key(0, "random examples", number))

    def draw(array: mx.array) -> mx.array:
        shape = (size, *array.shape[1:])
        if mx.issubdtype(array.dtype, mx.inexact):
            if wide:
                return (2 * mx.random.normal(shape, key=keys.next())).astype(array.dtype)
            return mx.random.uniform(0.05, 1.0, shape, key=keys.next()).astype(array.dtype)
        return mx.random.bernoulli(0.5, shape, key=keys.next()).astype(array.dtype)

    return examples.replace_leaves(arrays, [draw(array) for array in examples.leaves(arrays)])


def random_parameters(parameters: Mapping[str, mx.array], number: int = 0) -> dict[str, mx.array]:
    """Random parameters of given shapes and dtypes; weights scaled by their inputs.

    Args:
        parameters (dict): Parameters by name.
        number (int): Seed.
    """
    keys = Keys(randomness.key(0, "random parameters", number))

    def draw(array: mx.array) -> mx.array:
        inputs = math.prod(array.shape[1:]) if array.ndim > 1 else 10
        values = mx.random.normal(array.shape, key=keys.next()) / math.sqrt(max(1, inputs))
        return values.astype(array.dtype)

    return {name: draw(array) for name, array in parameters.items()}
