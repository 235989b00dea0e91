"""The partitions that a worker holds: loaded when they are asked for, as many as fit."""

from __future__ import annotations

from dataclasses import replace

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest

from mlx_fed.simulation.partitions import Partitions

from .simulated import TASK

SIZE = 4 * 100


def partitions(most_bytes: int) -> tuple[Partitions, list[int]]:
    """Partitions of 400 bytes each, and the numbers of those that were loaded."""
    loaded: list[int] = []

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        loaded.append(partition_id)
        return fed.Data((np.full(100, partition_id, np.float32),))

    return Partitions(replace(TASK, data=load), 10, most_bytes), loaded


def test_a_partition_is_loaded_once_while_it_fits():
    held, loaded = partitions(3 * SIZE)
    for client in (0, 1, 2, 0, 1, 2):
        data = held.get(client)
        assert isinstance(data.train[0], mx.array)
        assert data.train[0][0].item() == client
    assert loaded == [0, 0, 1, 2]  # the first one twice, to see whether it is the same


def test_the_last_used_are_kept():
    held, loaded = partitions(3 * SIZE)
    for client in (0, 1, 2, 0, 3, 0, 1):
        held.get(client)
    assert loaded == [0, 0, 1, 2, 3, 1]


def test_what_is_too_large_is_held_alone():
    held, loaded = partitions(SIZE // 2)
    for client in (0, 0, 1, 1, 0):
        held.get(client)
    assert loaded == [0, 0, 1, 0]


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_data_that_has_changed_when_it_is_loaded_again(change: str):
    version = [0]

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        later = partition_id == 1 and version[0]
        size = 101 if later and change == "shape" else 100
        dtype = np.int32 if later and change == "dtype" else np.float32
        value = 7 if later and change == "value" else partition_id
        return fed.Data((np.full(size, value, dtype),))

    held = Partitions(replace(TASK, data=load), 10, SIZE)
    for client in (0, 1, 2):
        held.get(client)
    version[0] = 1
    with pytest.raises(fed.FedError, match="gave other examples for partition 1 than before"):
        held.get(1)
