"""Confusion matrices: on a client, over clients, in a history and a table, and scikit-learn's."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, recall_score

from mlx_fed.errors import TaskError
from mlx_fed.runs import matrices, round_record
from mlx_fed.runs.history import History
from mlx_fed.training.confusion_matrix import count_pairs, to_rows

from ..helpers import simulated
from ..helpers.federated import CLIENT, TASK, federate
from ..helpers.run_folders import command_output, make_run, read_history

pytestmark = pytest.mark.usefixtures("uncompiled")

WITH_MATRIX = replace(TASK, metrics={**TASK.metrics, "confusion": fed.ConfusionMatrix(3)})


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    size = draw(st.integers(2, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([(1,), (57,), (400,), (20, 30)]))
    kinds = [np.int8, np.uint8, np.int32, np.uint32, np.int64]
    one, other = (draw(st.sampled_from(kinds)) for _ in range(2))
    labels, predictions = rng.integers(0, size, shape), rng.integers(0, size, shape)
    likely = rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.98]))
    return size, labels.astype(one), np.where(likely, labels, predictions).astype(other)


@settings(deadline=None, max_examples=50)
@given(pairs())
def test_counts_and_accuracies_are_those_of_scikit_learn(drawn):
    size, labels, predictions = drawn
    flat, classes = (labels.reshape(-1), predictions.reshape(-1)), range(size)
    rows = to_rows(count_pairs(labels, predictions, size))
    assert rows == confusion_matrix(*flat, labels=classes).tolist()
    expected = recall_score(*flat, labels=classes, average=None, zero_division=np.nan)
    accuracies = [np.nan if value is None else value for value in matrices.class_accuracies(rows)]
    np.testing.assert_allclose(accuracies, expected)
    np.testing.assert_allclose(matrices.accuracy(rows), np.mean(labels == predictions))


@settings(deadline=None, max_examples=50)
@given(pairs())
def test_a_history_has_the_same_counts_in_little_room(drawn):
    size, labels, predictions = drawn
    rows = to_rows(count_pairs(labels, predictions, size))
    record = {"round": 1, "train": {}, "evaluate": {"confusion": rows}, "central": {"m": rows}}
    line = round_record.to_line(record)
    assert round_record.from_line(line) == record
    cells = sum(map(bool, np.ravel(rows)))
    assert len(line) < 150 + 2 * min(16 * cells, 5 * size**2)
    figures = round_record.figures(record)
    for label, value in enumerate(matrices.class_accuracies(rows)):
        assert figures.get(f"evaluate/confusion/accuracy-of-{label}") == value


@pytest.mark.parametrize(
    "packed",
    [
        {"classes": 10**9, "cells": []},
        {"classes": 3, "cells": [0, 1, 2]},
        {"classes": 3, "cells": [9, 1]},
        {"classes": "three", "cells": []},
        {"classes": 3, "cells": None},
        {"classes": 3, "cells": [{}, 1]},
    ],
    ids=["huge", "odd", "outside", "text", "none", "dictionary"],
)
def test_a_damaged_matrix_is_a_damaged_line(packed):
    with pytest.raises(ValueError):  # noqa: PT011
        round_record.from_line(json.dumps({"round": 1, "evaluate": {"confusion": packed}}))


# -- over clients ------------------------------------------------------------------------------


def pooled(task: fed.Task, parameters: dict[str, mx.array], clients: int) -> list[list[int]]:
    """The matrix of scikit-learn on the examples of all clients together."""
    model = task.model()
    model.load_weights(list(parameters.items()))
    model.eval()
    tests: Any = [task.data(partition, clients).test for partition in range(clients)]
    x, y = (np.concatenate(arrays) for arrays in zip(*tests, strict=True))
    outputs = np.asarray(model(mx.array(x)))
    return confusion_matrix(y, outputs.argmax(axis=1), labels=range(outputs.shape[1])).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_simulation_adds_up_the_counts_of_all_clients(workers: int, tmp_path: Path):
    metrics = {**simulated.TASK.metrics, "confusion": fed.ConfusionMatrix(3)}
    task = replace(simulated.TASK, metrics=metrics)
    result = simulated.simulate(None, tmp_path, task, workers=workers)
    evaluated = result.rounds[-1]["evaluate"]
    assert evaluated["confusion"] == pooled(task, result.parameters, simulated.CLIENTS)
    assert matrices.accuracy(evaluated["confusion"]) == pytest.approx(evaluated["accuracy"])
    table = result.to_pandas()
    expected = matrices.class_accuracies(evaluated["confusion"])
    assert [table[f"evaluate/confusion/accuracy-of-{k}"].iloc[-1] for k in range(3)] == expected
    assert "accuracy-of" not in repr(result) + result._repr_html_()


def test_the_loop_adds_up_counts_and_evaluates_the_servers_own(tmp_path: Path):
    test = TASK.data(3, 7).test
    app = fed.client_app(WITH_MATRIX)
    result = federate(FedAvg(), tmp_path, [app] * 7, task=WITH_MATRIX, num_rounds=2, test=test)
    last = result.rounds[-1]
    assert last["evaluate"]["confusion"] == pooled(TASK, result.parameters, 7)
    alone = replace(TASK, data=lambda partition_id, num_partitions: TASK.data(3, 7))
    assert last["central"]["confusion"] == pooled(alone, result.parameters, 1)
    (kept, again) = (record["evaluate"]["confusion"] for record in read_history(tmp_path))
    assert again == last["evaluate"]["confusion"]
    assert kept != again
    assert "confusion" not in json.dumps(last["each"])


@pytest.mark.parametrize(
    "counts",
    [[1] * 8, [-1] + [1] * 8, [1.0] * 9, ["1"] * 9, [2**62] * 9],
    ids=["size", "negative", "fractions", "texts", "huge"],
)
def test_unfit_counts_are_refused_and_the_others_add_up(counts: list, tmp_path: Path):
    app = fed.client_app(WITH_MATRIX)

    def changed(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["counts"] = ConfigRecord({"confusion": counts})
        return reply

    result = federate(FedAvg(), tmp_path, [app, changed, app], task=WITH_MATRIX, num_rounds=1)
    (record,) = result.rounds
    (refused,) = record["refused"]
    assert (refused["node"], refused["phase"]) == ("node-1", "evaluate")
    assert "metric 'confusion' must have 9 counts from 0, of 3 classes" in refused["reason"]
    assert sum(map(sum, record["evaluate"]["confusion"])) == 20


def test_a_client_that_counts_too_much_is_refused(tmp_path: Path):
    app = fed.client_app(WITH_MATRIX)

    def changed(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["counts"] = ConfigRecord({"confusion": [10**9] * 9})
        return reply

    result = federate(FedAvg(), tmp_path, [app] * 4 + [changed], task=WITH_MATRIX, num_rounds=1)
    (record,) = result.rounds
    assert [refused["node"] for refused in record["refused"]] == ["node-4"]
    assert sum(map(sum, record["evaluate"]["confusion"])) == 40


def test_clients_without_the_matrix_do_not_count_in_it(tmp_path: Path):
    apps = [fed.client_app(WITH_MATRIX), CLIENT, fed.client_app(WITH_MATRIX)]
    result = federate(FedAvg(), tmp_path, apps, task=WITH_MATRIX, num_rounds=1)
    (record,) = result.rounds
    assert len(record["evaluate"]["nodes"]) == 3
    assert sum(map(sum, record["evaluate"]["confusion"])) == 20
    assert record["undefined"] == {"evaluate": {"confusion": 1}}


# -- mistakes ----------------------------------------------------------------------------------


def relabelled(change: Any) -> Any:
    def load(partition_id: int, num_partitions: int | None) -> fed.Data:
        train, (x, y) = (getattr(TASK.data(partition_id, 7), name) for name in ("train", "test"))
        return fed.Data(train, (x, change(y)))

    return load


def count(predict: Any) -> fed.ConfusionMatrix:
    return fed.ConfusionMatrix(3, predict)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        (fed.ConfusionMatrix(4), "the model has 3 outputs, and the confusion matrix 4 classes"),
        (count(lambda model, x, y: (model(x), y)), "labels have the shape (10,) and predicted"),
        (count(lambda model, x, y: (y + 1, y)), "predicted class 3 is not one of 3 classes"),
        (count(lambda model, x, y: (y, y - 1)), "label -1 is not one of 3 classes"),
        (count(lambda model, x, y: (y, y / 2)), "a label is a whole number, and these are float32"),
    ],
    ids=["outputs", "shapes", "prediction", "label", "fractions"],
)
def test_what_no_matrix_can_have_leaves_it_undefined(metric, reason: str, tmp_path: Path):
    told: list[str] = []
    task = replace(TASK, metrics={**TASK.metrics, "confusion": metric})

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            told.append(event.text)

    app = fed.client_app(task)
    result = federate(FedAvg(), tmp_path, [app] * 2, task=task, num_rounds=1, listener=listen)
    (record,) = result.rounds
    assert "confusion" not in record["evaluate"]
    assert record["evaluate"]["accuracy"] >= 0
    assert record["undefined"] == {"evaluate": {"confusion": 2}}
    assert any(reason in text for text in told), told


@pytest.mark.parametrize("num_classes", [1, 101, 2.0, "ten"])
def test_the_number_of_classes_is_checked(num_classes: Any):
    with pytest.raises(TaskError, match="whole number from 2 to 100"):
        fed.ConfusionMatrix(num_classes)


# -- in a table --------------------------------------------------------------------------------


def test_a_run_is_shown_with_its_matrix(tmp_path: Path):
    folder = make_run(tmp_path / "one")
    record = {"round": 3, "train": {"loss": 0.5, "nodes": ["a"]}, "seconds": {}, "refused": []}
    History(folder).add_round(
        {**record, "evaluate": {"confusion": [[8, 2, 0], [1, 9, 0], [0] * 3]}}
    )
    shown = command_output("runs", "show", "one", "--runs", tmp_path)
    table = shown[shown.index("evaluate/confusion after round 3, accuracy 0.8500") :]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["label", "0", "1", "2", "accuracy"],
        ["0", "8", "2", "0", "0.8000"],
        ["1", "1", "9", "0", "0.9000"],
        ["2", "0", "0", "0"],
    ]
    narrow = command_output("runs", "show", "one", "--runs", tmp_path, columns=20)
    assert re.search(r"label +accuracy\n0 +0.8000\n1 +0.9000\n2\n", narrow)
    wanted = command_output(
        "runs", "show", "one", "--runs", tmp_path, "--columns", "evaluate/confusion/*"
    )
    assert "evaluate/confusion/accuracy-of-1" in wanted
