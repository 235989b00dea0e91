"""The image example: convolutions, BatchNorm, dropout and augmentation, on real digits."""

from __future__ import annotations

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest

from examples.images.images import SHIFT, arrays, shifted, task
from mlx_fed import data


def test_images_are_moved_and_stay_whole():
    images = np.zeros((40, 28, 28, 1), np.float32)
    images[:, 10:18, 10:18] = 1.0  # far enough from the border to stay in sight
    moved, labels = shifted(mx.random.key(1), mx.array(images), mx.arange(40))
    moved = np.array(moved)
    assert moved.shape == images.shape
    assert labels.tolist() == list(range(40))
    assert moved.sum(axis=(1, 2, 3)).tolist() == [64.0] * 40
    corners = {tuple(np.argwhere(image[..., 0])[0]) for image in moved}
    assert len(corners) > 10
    assert all(abs(row - 10) <= SHIFT and abs(column - 10) <= SHIFT for row, column in corners)


def test_digits_come_as_images():
    train, _ = data.load_partition("digits", 0, 50)
    images, labels = arrays(train)
    assert images.shape[1:] == (28, 28, 1)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert 0.9 < images.max() <= 1.0
    assert set(labels) <= set(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["average", "local"])
def test_it_learns_digits(statistics: str, tmp_path):
    told = []
    result = fed.simulate(
        task,
        num_clients=3,
        num_rounds=3,
        config={"statistics": statistics},
        runs=tmp_path,
        listeners=(told.append,),
    )
    assert result.rounds[-1]["evaluate"]["accuracy"] > 0.85
    (note,) = [event.text for event in told if isinstance(event, events.Notice)]
    assert "one after another" in note
