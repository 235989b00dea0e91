"""Gaussian noise from the operating system's random numbers, for privacy.

A floating-point sample of a normal distribution has gaps in its low bits, from which noise can be
told from what it hides (Mironov 2012, https://doi.org/10.1145/2382196.2382264). So a value is the
sum of four samples, which makes the search for them infeasible (Holohan and Braghin 2021,
https://arxiv.org/abs/2107.10138), and the noisy value is rounded to a grid that is coarse beside
float64 and fine beside the noise.
"""

from __future__ import annotations

import math
import os

import numpy as np

from ..arrays.named_arrays import cut

_SAMPLES = 4
_GRID_BITS = 20
"""The noise's standard deviation is that many binary digits above the grid."""


def normal(size: int) -> np.ndarray:
    """Standard normal values, float64 of shape (size,), from the operating system.

    Each is the sum of four values of the Box-Muller transform, divided by 2. All are finite.
    """
    total = np.zeros(size)
    for _ in range(_SAMPLES):
        bits = np.frombuffer(os.urandom(16 * size), np.uint64).reshape(2, size) >> np.uint64(11)
        radius_uniform = (bits[0] + 1) * 2.0**-53  # above 0, at most 1
        angle_uniform = bits[1] * 2.0**-53
        total += np.sqrt(-2 * np.log(radius_uniform)) * np.cos(2 * math.pi * angle_uniform)
    return total / math.sqrt(_SAMPLES)


def add_noise(values: np.ndarray, std: float) -> np.ndarray:
    """Values with independent normal noise, rounded to a grid of about a millionth of the noise.

    Args:
        values (numpy.ndarray): Of any shape; not changed.
        std (float): Standard deviation of the noise; with 0 there is none.

    Returns:
        numpy.ndarray: float64, of the same shape.
    """
    noisy = np.array(values, np.float64)
    if std == 0:
        return noisy
    grid = 2.0 ** (math.floor(math.log2(std)) - _GRID_BITS)
    for piece in cut(noisy):
        piece += std * normal(piece.size)
        np.rint(piece / grid, out=piece)
        piece *= grid
    return noisy
