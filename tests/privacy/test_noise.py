"""Noise for privacy is normal, finite, and on a grid."""

from __future__ import annotations

import math

import mlx_fed  # noqa: F401, before mlx.core

import numpy as np
import pytest
from scipy import stats

from mlx_fed.privacy.noise import add_noise, normal


def statistic(values: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic against the standard normal distribution, times sqrt(n): above
    2.2 for one in 10,000 of normal samples."""
    values = np.sort(values)
    expected = stats.norm.cdf(values)
    steps = np.arange(values.size + 1) / values.size
    largest = max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))
    return float(largest * math.sqrt(values.size))


@pytest.mark.parametrize(
    "size", [200_000, pytest.param(10_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_it_is_normal(size):
    values = normal(size)
    assert np.isfinite(values).all()
    assert statistic(values) < 2.2
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(size)


@pytest.mark.parametrize("std", [1e-8, 0.3, 7.0, 1e6])
def test_noise_is_added_on_a_grid(std):
    values = np.random.default_rng(0).normal(size=(300, 500))
    noisy = add_noise(values, std)
    assert noisy.shape == values.shape
    assert statistic((noisy - values).reshape(-1) / std) < 2.2
    grid = 2.0 ** (math.floor(math.log2(std)) - 20)
    assert (noisy == np.rint(noisy / grid) * grid).all()


def test_no_noise_leaves_values_and_two_draws_differ():
    values = np.arange(5.0)
    assert (add_noise(values, 0) == values).all()
    assert (add_noise(values, 1.0) != add_noise(values, 1.0)).all()
    assert (values == np.arange(5.0)).all()
