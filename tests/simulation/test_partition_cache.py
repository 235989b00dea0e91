"""The partitions that a worker holds: loaded when they are asked for, as many as fit."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import ConfigRecord, MessageType, RecordDict

from mlx_fed.rounds import messages
from mlx_fed.simulation import worker_pool
from mlx_fed.simulation.faults import Faults
from mlx_fed.simulation.client_states import ClientStateStore
from mlx_fed.simulation.partition_cache import Partitions, size_of
from mlx_fed.simulation.worker import Worker
from mlx_fed.simulation.worker_messages import SampledClient, WorkerConfig, WorkRequest
from mlx_fed.training.python_state import PythonState

from ..helpers.simulated import SEED, TASK, load

SIZE = 4 * 100


def partitions(most_bytes: int) -> tuple[Partitions, list[int]]:
    """Partitions of 400 bytes each, and the numbers of those that were loaded."""
    loaded: list[int] = []

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        loaded.append(partition_id)
        return fed.Data((np.full(100, partition_id, np.float32),))

    return Partitions(replace(TASK, data=load), 10, most_bytes, PythonState()), loaded


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


@pytest.mark.parametrize(("windows_of", "before_training"), [(3, 3), (40, 10)])
def test_no_more_clients_are_at_hand_than_fit(windows_of, before_training, tmp_path: Path):
    """However many would train together, data of more bytes than are kept is not waited for."""
    calls = tmp_path / "calls"

    def write(call: str) -> None:
        with calls.open("a") as file:  # no state of Python's
            file.write(f"{call}\n")

    def load_first(partition_id: int, num_partitions: int | None) -> fed.Data:
        write(str(partition_id))
        return load(0, None)

    def optimizer(config: dict) -> optim.Optimizer:
        write("train")
        return optim.SGD(0.1)

    task = replace(TASK, data=load_first, optimizer=optimizer)
    most_bytes = windows_of * size_of(load(0, None))
    worker = Worker(
        WorkerConfig(
            task,
            {},
            SEED,
            10,
            True,
            10,
            Faults(),
            tmp_path,
            most_bytes,
            ClientStateStore(tmp_path),
            {},
        )
    )
    content = RecordDict(
        {
            "arrays": messages.pack(worker.trainer.parameters()),
            "config": ConfigRecord({"server-round": 1, "seed": SEED}),
        }
    )
    seats = [SampledClient(place, place, 0) for place in range(10)]
    outcome = worker.work(WorkRequest(MessageType.TRAIN, content, 60.0, "num-examples"), seats)
    assert [counted.place for counted in outcome.blocks[0].counted] == list(range(10))
    before, _, _ = calls.read_text().partition("train")
    assert len(set(before.split())) == before_training


def test_workers_keep_an_eighth_of_the_memory_together(monkeypatch, tmp_path: Path):
    machine = worker_pool.data_bytes(1)
    assert machine > 0
    assert worker_pool.data_bytes(4) == machine // 4
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(worker_pool, "_CONTAINER_MEMORY", limit)
    limit.write_text("max\n")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert worker_pool.data_bytes(1) == memory // 8
    limit.write_text(f"{2**30}\n")
    assert worker_pool.data_bytes(2) == 2**26


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_data_that_has_changed_when_it_is_loaded_again(change: str):
    version = [0]

    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        later = partition_id == 1 and version[0]
        size = 101 if later and change == "shape" else 100
        dtype = np.int32 if later and change == "dtype" else np.float32
        value = 7 if later and change == "value" else partition_id
        return fed.Data((np.full(size, value, dtype),))

    held = Partitions(replace(TASK, data=load), 10, SIZE, PythonState())
    for client in (0, 1, 2):
        held.get(client)
    version[0] = 1
    with pytest.raises(fed.FedError, match="gave other examples for partition 1 than before"):
        held.get(1)
