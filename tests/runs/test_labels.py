"""Labels by client, as a simulation leaves them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg, FedMedian

from mlx_fed.runs import folders, labels

from ..helpers.simulated import CLIENTS, TASK, load, simulate


def held(client: int) -> list[int]:
    """How many examples of each of the three labels a client has."""
    data = load(client, CLIENTS)
    return [
        int(sum((split[-1] == label).sum() for split in (data.train, data.test)))
        for label in range(3)
    ]


@pytest.mark.parametrize(("strategy", "workers"), [(FedAvg, 0), (FedMedian, 0), (FedAvg, 2)])
def test_the_labels_of_who_took_part_are_counted(strategy: Any, workers: int, tmp_path: Path):
    sampling = strategy(fraction_train=0.2, fraction_evaluate=0.0, min_train_nodes=1)
    result = simulate(sampling, tmp_path, num_rounds=2, workers=workers)
    found = labels.read(result.folder)
    trained = {name for record in result.rounds for name in record["train"]["nodes"]}
    assert 8 < len(trained) <= 16
    assert found is not None
    assert (found["of"], found["classes"]) == (CLIENTS, [0, 1, 2])
    assert {f"node-{client}" for client, _ in found["clients"]} == trained
    for client, counts in found["clients"]:
        assert counts == held(client)
    assert folders.read(result.folder).labels == found


def test_a_resumed_simulation_keeps_what_was_counted(tmp_path: Path):
    sampling = lambda: FedAvg(fraction_train=0.1, fraction_evaluate=0.0, min_train_nodes=1)  # noqa: E731
    first = simulate(sampling(), tmp_path, name="run", num_rounds=1)
    before = labels.read(first.folder)
    simulate(sampling(), tmp_path, resume="run", num_rounds=3)
    after = labels.read(first.folder)
    assert before is not None
    assert after is not None
    assert len(before["clients"]) == 4 < len(after["clients"])
    assert all(row in after["clients"] for row in before["clients"])


def test_of_many_clients_the_first_are_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(labels, "MOST_CLIENTS", 5)
    result = simulate(None, tmp_path, num_rounds=1)
    assert len(json.loads((result.folder / "labels.json").read_text())["clients"]) == 5


@pytest.mark.parametrize(
    "split",
    [
        lambda x, y: (y, x),  # the last are points
        lambda x, y: (x, y.astype(np.float32)),
        lambda x, y: (x, y[:, None]),
        lambda x, y: (x, np.arange(len(y)) + 7 * len(y)),  # numbers of many values
    ],
    ids=["points", "floats", "columns", "numbers"],
)
def test_what_are_no_labels_is_not_counted(split: Any, tmp_path: Path):
    file = labels.LabelsFile(tmp_path, 40)
    for client in range(40):
        examples = split(*load(client, 40).train)
        counts = labels.count(fed.Data(tuple(map(mx.array, examples))))
        file(events.LabelsCounted({client: counts}))
    file(events.RunFinished(tmp_path, 1.0))
    assert labels.read(tmp_path) is None


def test_streams_are_not_read_for_their_labels(tmp_path: Path):
    def load_streams(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = load(partition_id, num_partitions)
        return fed.Data(lambda key: iter([tuple(map(mx.array, data.train))]), None)

    no_evaluation = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    task = replace(TASK, data=load_streams)
    result = simulate(no_evaluation, tmp_path, task, num_clients=4, num_rounds=1)
    assert not (result.folder / "labels.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        "{}",
        '{"classes": [0], "clients": [[1, [2, 3]]]}',
        '{"classes": 3, "clients": [1]}',
    ],
)
def test_a_damaged_file_is_no_file(tmp_path: Path, text: str):
    (tmp_path / "labels.json").write_text(text)
    assert labels.read(tmp_path) is None
    labels.LabelsFile(tmp_path, 3)


def test_a_place_that_cannot_be_written_ends_no_simulation(tmp_path: Path):
    (tmp_path / "labels.json.part").mkdir()
    file = labels.LabelsFile(tmp_path, 1)
    file(events.LabelsCounted({0: {1: 2}}))
    file(events.RunFinished(tmp_path, 1.0))
    assert labels.read(tmp_path) is None


def test_a_file_written_again_in_the_same_moment_has_changed(tmp_path: Path):
    told = labels.LabelsFile(tmp_path, 3)
    states = []
    for client in range(2):
        told(events.LabelsCounted({client: {0: 1}}))
        told(events.RunFinished(tmp_path, 1.0))
        os.utime(tmp_path / "labels.json", ns=(10**18, 10**18))
        states.append(labels.version(tmp_path))
    assert states[0] != states[1]
