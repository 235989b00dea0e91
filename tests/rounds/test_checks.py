"""Replies that do not count are refused by name, and the run goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.serverapp.strategy import FedAvg, FedMedian

from mlx_fed.rounds import messages, loop
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import App
from ..helpers.run_folders import read_history
from ..helpers.federated import (
    CLIENT,
    NORMALIZED,
    SEED,
    SIZES,
    TASK,
    WEIGHT,
    as_record,
    difference,
    federate,
    float32,
    load,
    on_train,
)
from ..helpers.replies import with_arrays, with_metrics, with_weight

pytestmark = pytest.mark.usefixtures("uncompiled")

VARIANCE = "layers.1.running_var"


def in_numpy(reply: Message) -> None:
    """NaN in a reply of plain arrays, as Flower's mods leave it."""
    arrays = messages.unpack(reply.content["arrays"])
    reply.content["arrays"] = as_record({**arrays, WEIGHT: arrays[WEIGHT] * mx.nan})


def raises(reply: Message) -> None:
    raise RuntimeError("the disk of this node is full")


def not_safetensors(reply: Message) -> None:
    garbage = Array("uint8", (8,), "safetensors", b"\xff" * 8)
    reply.content["arrays"] = ArrayRecord({"shard-1": garbage})


def renamed(reply: Message) -> None:
    reply.content["weights"] = reply.content.pop("arrays")


UNFIT = {
    "NaN": (with_weight(lambda w: w * mx.nan), f"{WEIGHT!r} has values that are not finite"),
    "infinite": (with_weight(lambda w: w / 0), f"{WEIGHT!r} has values that are not finite"),
    "huge": (with_weight(lambda w: w * 0 + 1e37), f"{WEIGHT!r} has values that are too large"),
    "NaN in NumPy": (in_numpy, f"{WEIGHT!r} has values that are not finite"),
    "shape": (with_weight(lambda w: w[:1]), f"{WEIGHT!r} has shape (1, 5), expected (8, 5)"),
    "dtype": (
        with_weight(lambda w: w.astype(mx.float16)),
        f"{WEIGHT!r} has dtype float16, expected float32",
    ),
    "missing": (with_arrays(lambda arrays: arrays.pop(WEIGHT)), f"{WEIGHT!r} is missing"),
    "unknown": (
        with_arrays(lambda arrays: arrays.update(extra=mx.zeros(2))),
        "'extra' is not one of the model's",
    ),
    "zero examples": (with_metrics(num_examples=0), "num-examples must be a positive number"),
    "negative examples": (with_metrics(num_examples=-3), "num-examples must be a positive number"),
    "NaN examples": (
        with_metrics(num_examples=float("nan")),
        "num-examples must be a positive number",
    ),
    "list of examples": (
        with_metrics(num_examples=[1, 2]),
        "num-examples must be a positive number",
    ),
    "no examples": (
        lambda reply: reply.content["metrics"].pop("num-examples"),
        "num-examples must be a positive number",
    ),
    "NaN loss": (with_metrics(loss=float("nan")), "metric 'loss' is not finite"),
    "no metrics": (lambda reply: reply.content.pop("metrics"), "one record of metrics"),
    "no arrays": (lambda reply: reply.content.pop("arrays"), "one record of parameters"),
    "renamed": (renamed, "'arrays'"),
    "other metrics": (with_metrics(mood=1.0), "'mood'"),
    "list of a loss": (
        with_metrics(loss=[1.0]),
        "metric 'loss' is a list of 1, and a number in the other replies",
    ),
    "not safetensors": (not_safetensors, "'shard-1'"),
    "error": (raises, "the disk of this node is full"),
}


@pytest.fixture(scope="module")
def without_node_0() -> dict[str, mx.array]:
    """What node-1 and node-2 reach alone, averaged by examples."""
    trainer = Trainer(TASK, SEED)
    mean = trainer.parameters()
    total = SIZES[1] + SIZES[2]
    for number in (1, 2):
        config = {**TASK.config, "seed": SEED, "server-round": number}
        one, two = (
            trainer.train(mean, {}, load(client, 3), config, client=client).parameters
            for client in (1, 2)
        )
        mean = {k: one[k] * (SIZES[1] / total) + two[k] * (SIZES[2] / total) for k in mean}
    return mean


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_reply_is_refused_and_the_run_goes_on(case: str, tmp_path: Path, without_node_0):
    change, reason = UNFIT[case]
    told: list[events.ReplyRefused] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.ReplyRefused):
            told.append(event)

    # The first reply, whose names and metrics a strategy may take for everybody's.
    apps = [on_train(change), CLIENT, CLIENT]
    result = federate(FedAvg(), tmp_path, apps, num_rounds=2, listener=listener)

    for record in result.rounds:
        (refused,) = record["refused"]
        assert (refused["node"], refused["phase"]) == ("node-0", "train")
        assert reason in refused["reason"]
        assert record["train"]["nodes"] == ["node-1", "node-2"]
        assert record["evaluate"]["nodes"] == ["node-0", "node-1", "node-2"]
    assert [event.node for event in told] == ["node-0", "node-0"]
    assert reason in told[0].reason
    assert difference(result.parameters, without_node_0) < 3e-7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_metrics(num_examples=0), "num-examples must be a positive number"),
        (
            with_metrics(num_examples=10**17, loss=0.0),
            "num-examples is 1e+17, and more than 1e+12 is not believed",
        ),
        (with_metrics(mood=1.0), "'mood'"),
        (
            with_metrics(accuracy=[0.5, 0.5]),
            "metric 'accuracy' is a list of 2, and a number in the other replies",
        ),
        (raises, "the disk of this node is full"),
    ],
    ids=["zero examples", "endless examples", "other metrics", "list", "error"],
)
def test_an_unfit_evaluation_is_refused(change, reason: str, tmp_path: Path):
    def app(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        reply = CLIENT(message, context)
        if kind == "evaluate":
            change(reply)
        return reply

    result = federate(FedAvg(), tmp_path, [app, CLIENT, CLIENT], num_rounds=1)
    (record,) = result.rounds
    (refused,) = record["refused"]
    assert (refused["node"], refused["phase"]) == ("node-0", "evaluate")
    assert reason in refused["reason"]
    assert record["train"]["nodes"] == ["node-0", "node-1", "node-2"]
    assert record["evaluate"]["nodes"] == ["node-1", "node-2"]
    assert np.isfinite(record["evaluate"]["loss"])
    assert record["evaluate"]["loss"] > 0


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_lists_of_most_nodes_are_averaged_and_one_of_another_length_refused(
    strategy: type[FedAvg], tmp_path: Path
):
    """Also where the odd one is the first, whose reply is summed before the others come."""

    def reporting(*values: float) -> App:
        def app(message: Message, context: Context) -> Message:
            reply = CLIENT(message, context)
            if message.metadata.message_type in ("train", "evaluate"):
                with_metrics(recall=[*values])(reply)
            return reply

        return app

    apps = [reporting(1.0), reporting(0.5, 1.0), reporting(0.5, 1.0)]
    (record,) = federate(strategy(), tmp_path, apps, num_rounds=1).rounds
    reason = "metric 'recall' is a list of 1, and a list of 2 in the other replies"
    assert [(each["node"], each["reason"]) for each in record["refused"]] == [
        ("node-0", reason),
        ("node-0", reason),
    ]
    for phase in ("train", "evaluate"):
        assert record[phase]["nodes"] == ["node-1", "node-2"]
        assert record[phase]["recall"] == pytest.approx([0.5, 1.0])


def test_a_round_without_a_reply_that_counts_ends_the_run(tmp_path: Path):
    """What the rounds before it reached is kept."""

    def from_round_2(reply: Message) -> None:
        if reply.metadata.group_id == "2":
            with_weight(lambda w: w * mx.nan)(reply)

    expected = federate(FedAvg(), tmp_path / "one", (CLIENT,) * 3, num_rounds=1)
    with pytest.raises(loop.RunError, match="Round 2: none of 3 nodes gave a train reply"):
        federate(FedAvg(), tmp_path / "three", [on_train(from_round_2)] * 3, num_rounds=3)
    assert [record["round"] for record in read_history(tmp_path / "three")] == [1]
    saved = mx.load(str(tmp_path / "three" / "model.safetensors"))
    assert difference({k: saved[k] for k in expected.parameters}, expected.parameters) == 0


# -- running statistics --------------------------------------------------------------------


def with_variance(change: Callable[[mx.array], mx.array]) -> Callable[[Message], None]:
    def changed(reply: Message) -> None:
        statistics = messages.unpack(reply.content["statistics"])
        statistics[VARIANCE] = change(statistics[VARIANCE])
        reply.content["statistics"] = messages.pack(statistics)

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_variance(lambda v: v * mx.nan), f"{VARIANCE!r} has values that are not finite"),
        (with_variance(lambda v: v - 100), f"{VARIANCE!r} has negative values"),
        (with_variance(lambda v: v[1:]), f"{VARIANCE!r} has shape (7,), expected (8,)"),
        (lambda reply: reply.content.pop("statistics"), "it has no running statistics"),
    ],
    ids=["NaN", "negative", "shape", "missing"],
)
def test_unfit_statistics_are_refused(change, reason: str, tmp_path: Path):
    app = fed.client_app(NORMALIZED)
    apps = [app, on_train(change, app), app]
    result = federate(FedAvg(), tmp_path, apps, task=NORMALIZED, num_rounds=1)
    (refused,) = result.rounds[0]["refused"]
    assert refused["node"] == "node-1"
    assert reason in refused["reason"]
    assert all(np.isfinite(float32(array)).all() for array in result.statistics.values())


def test_statistics_are_not_looked_at_where_they_stay_with_clients(tmp_path: Path):
    """A node whose own task averages them takes part nevertheless."""
    task = replace(NORMALIZED, statistics="local")
    app = fed.client_app(NORMALIZED)
    apps = [fed.client_app(task), on_train(with_variance(lambda v: v * mx.nan), app)]
    result = federate(FedAvg(), tmp_path, apps, task=task, num_rounds=1)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]
    assert not result.statistics
