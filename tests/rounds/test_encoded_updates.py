"""Runs with encoded updates: the same on every engine; what does not decode is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from mlx_fed import transforms
from mlx_fed.arrays import named_arrays
from mlx_fed.arrays.named_arrays import Arrays, Spec
from mlx_fed.errors import RunError, SettingsError
from mlx_fed.rounds import messages
from mlx_fed.transforms.update_transform import UpdateTransform

from ..helpers.federated import CLIENT, NORMALIZED, TASK, difference, federate, on_train
from ..helpers.simulated import without_time

WIDE = replace(
    NORMALIZED,
    model=lambda: nn.Sequential(nn.Linear(5, 30), nn.BatchNorm(30), nn.ReLU(), nn.Linear(30, 3)),
)
APPS = (fed.client_app(WIDE),) * 7
COMPRESSIONS = ["int8", "int4", "int2", "int1", "topk:0.1", "randk:0.5", "topk:0.2,int8"]


def half() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 3))
    model.set_dtype(mx.bfloat16)
    return model


def simulate(folder: Path, task: Any = WIDE, strategy: Any = None, **options: Any) -> fed.Result:
    options = {"num_rounds": 3, "workers": 0, "seed": 7, "listeners": (), **options}
    return fed.simulate(task, strategy, num_clients=7, runs=folder, **options)


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_every_engine_has_the_same_bits(compress, tmp_path):
    settings = {"compress": compress, "min_nodes": 7}
    fleet = federate(FedAvg(min_train_nodes=7), tmp_path / "fleet", APPS, task=WIDE, **settings)
    together = simulate(tmp_path / "together", compress=compress)
    alone = simulate(tmp_path / "alone", compress=compress, batched=False)
    plain = simulate(tmp_path / "plain")
    for other in (together, alone):
        assert difference(fleet.parameters, other.parameters) == 0
        assert difference(fleet.statistics, other.statistics) == 0
        assert [*map(without_time, fleet.rounds)] == [*map(without_time, other.rounds)]
    assert difference(fleet.parameters, plain.parameters) > 0
    assert fleet.rounds[0]["bytes"]["up"] < plain.rounds[0]["bytes"]["up"]


def test_in_workers_it_is_the_same(tmp_path):
    one = simulate(tmp_path / "one", TASK, compress="topk:0.2,int4")
    two = simulate(tmp_path / "two", TASK, compress="topk:0.2,int4", workers=2)
    assert difference(one.parameters, two.parameters) == 0


@pytest.mark.parametrize("strategy", [FedMedian, FedAdam])
@pytest.mark.parametrize("model", [WIDE.model, half])
def test_every_strategy_gets_parameters(strategy, model, tmp_path):
    task = replace(WIDE, model=model)
    apps = (fed.client_app(task),) * 7
    runs = [
        simulate(tmp_path / "simulated", task, strategy.__name__, compress="int8"),
        federate(strategy(), tmp_path / "fleet", apps, task=task, compress="int8", min_nodes=7),
    ]
    assert difference(runs[0].parameters, runs[1].parameters) == 0


def test_a_resumed_run_has_what_was_lost_before(tmp_path):
    whole = simulate(tmp_path / "whole", num_rounds=4, compress="int1")
    simulate(tmp_path / "part", name="run", num_rounds=2, compress="int1")
    resumed = simulate(tmp_path / "part", resume="run", num_rounds=4, compress="int1")
    assert difference(whole.parameters, resumed.parameters) == 0


def test_a_round_that_is_repeated_starts_from_the_state_before_it(tmp_path):
    """Six of seven replies count in the second round, at first; then it is repeated with all."""
    failures = iter([RuntimeError("the disk is full")])

    def app(message: Message, context: Context) -> Message:
        is_last = context.node_config["partition-id"] == 6
        config = dict(messages.config_of(message.content)[1])
        reply = APPS[0](message, context)
        if message.metadata.message_type == "train" and config["server-round"] == 2 and is_last:
            for failure in failures:
                raise failure
        return reply

    settings = {"compress": "int2", "task": WIDE, "min_nodes": 7, "min_replies": 7}
    strategy = {"min_train_nodes": 7}
    repeated = federate(FedAvg(**strategy), tmp_path / "repeated", (app,) * 7, **settings)
    whole = federate(FedAvg(**strategy), tmp_path / "whole", APPS, **settings)
    assert repeated.rounds[1]["repeats"] == 1
    assert difference(repeated.parameters, whole.parameters) == 0


def test_mods_of_flower_see_parameters_and_not_messages(tmp_path):
    seen = []

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        _, record = messages.parameters_of(reply.content)
        seen.append({name: array.dtype for name, array in record.items()})
        return reply

    apps = (fed.client_app(TASK, mods=[mod]),) * 7
    result = federate(FedAvg(), tmp_path / "run", apps, compress="int8", num_rounds=1)
    assert not result.rounds[0]["refused"]
    assert all({*dtypes.values()} == {"float32"} for dtypes in seen)


def spoil(change: Any) -> Any:
    def changed(reply: Message) -> None:
        name, record = messages.parameters_of(reply.content)
        arrays = messages.unpack(record)
        change(arrays)
        reply.content[name] = messages.pack(arrays)

    return on_train(changed, APPS[0])


CODES, SCALES = "layers.0.weight/codes", "layers.0.weight/scales"


def decoded(reply: Message) -> None:
    name, _ = messages.parameters_of(reply.content)
    arrays = {name: mx.zeros(shape) for name, (shape, _) in PLAIN_SPEC.items()}
    reply.content[name] = messages.pack(arrays)


PLAIN_SPEC = named_arrays.spec(
    {
        "layers.0.weight": mx.zeros((30, 5)),
        "layers.0.bias": mx.zeros(30),
        "layers.1.weight": mx.zeros(30),
        "layers.1.bias": mx.zeros(30),
        "layers.3.weight": mx.zeros((3, 30)),
        "layers.3.bias": mx.zeros(3),
    }
)
SPOILT = {
    "not finite": (
        spoil(lambda arrays: arrays.update({SCALES: mx.full(3, math.nan, mx.bfloat16)})),
        "not finite",
    ),
    "too large": (
        spoil(lambda arrays: arrays.update({SCALES: mx.full(3, 3e38, mx.bfloat16)})),
        "too large to be averaged",
    ),
    "fewer codes": (
        spoil(lambda arrays: arrays.update({CODES: arrays[CODES][:-1]})),
        "'layers.0.weight/codes' has shape",
    ),
    "another dtype": (
        spoil(lambda arrays: arrays.update({CODES: arrays[CODES].astype(mx.int32)})),
        "has dtype int32, expected uint32",
    ),
    "a part missing": (spoil(lambda arrays: arrays.pop(SCALES)), "scales' is missing"),
    "one too many": (
        spoil(lambda arrays: arrays.update(extra=mx.zeros(2))),
        "'extra' is not one of the model's",
    ),
    "not encoded": (on_train(decoded, APPS[0]), "is not one of the model's"),
    "no arrays": (
        on_train(lambda reply: reply.content.update(arrays=ArrayRecord()), APPS[0]),
        "is missing",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_message_that_does_not_decode_is_refused_and_the_others_count(case, tmp_path):
    app, reason = SPOILT[case]
    result = federate(
        FedAvg(), tmp_path / "run", (*APPS[:6], app), task=WIDE, num_rounds=1, compress="int8"
    )
    (refusal,) = result.rounds[0]["refused"]
    assert refusal["node"] == "node-6"
    assert reason in refusal["reason"]
    assert len(result.rounds[0]["train"]["nodes"]) == 6


def test_positions_beyond_an_array_reach_nothing(tmp_path):
    def move(arrays: dict[str, mx.array]) -> None:
        name = "layers.0.weight/positions"
        arrays[name] = mx.full(arrays[name].shape, 65535, mx.uint16)

    result = federate(
        FedAvg(), tmp_path / "run", (*APPS[:6], spoil(move)), task=WIDE, compress="topk:0.1"
    )
    assert all(map(named_arrays.are_finite, [result.parameters.values()]))


def halve(spec: Spec) -> UpdateTransform:
    """A user's transform with a state: half of each update now, the rest with the next."""

    def encode(update: Arrays, state: Arrays, key: mx.array) -> tuple[Arrays, Arrays]:
        total = {name: update[name] + state[name] for name in update}
        part = {name: array / 2 for name, array in total.items()}
        return part, part

    zeros = {name: mx.zeros(shape) for name, (shape, _) in spec.items()}
    parts = {name: (name,) for name in spec}
    return UpdateTransform(spec, parts, lambda: zeros, encode, dict, ("half of each",))


def test_a_task_has_transforms_of_its_own_before_compression(tmp_path):
    task = replace(WIDE, update_transforms=lambda config: [halve, transforms.quantize(8)])
    named = replace(WIDE, update_transforms=lambda config: [halve])
    texts: list[str] = []
    one = simulate(tmp_path / "one", task, listeners=[lambda event: texts.append(str(event))])
    two = simulate(tmp_path / "two", named, compress="int8")
    assert difference(one.parameters, two.parameters) < 1e-3  # their codes are drawn apart
    (text,) = (text for text in texts if "updates: " in text)
    assert "half of each, then 8 bits a value; " in text
    first = simulate(tmp_path / "first", named, num_rounds=1)
    plain = simulate(tmp_path / "plain", num_rounds=1)
    start = simulate(tmp_path / "start", num_rounds=1, config={"learning-rate": 0.0})
    for name, array in start.parameters.items():
        half_way = (np.asarray(array) + np.asarray(plain.parameters[name])) / 2
        np.testing.assert_allclose(np.asarray(first.parameters[name]), half_way, atol=1e-6)


def test_a_strategy_that_sends_other_parameters_is_told(tmp_path):
    class Ahead(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            ahead = {name: Array(1.1 * array.numpy()) for name, array in arrays.items()}
            return super().configure_train(server_round, ArrayRecord(ahead), config, grid)

    with pytest.raises(RunError, match=r"sends other parameters .* leave out compress"):
        federate(Ahead(), tmp_path / "run", compress="int8")


@pytest.mark.parametrize("how", [{"compress": "int9"}, {"config": {"compress": "int9"}}])
def test_an_unknown_name_is_refused_before_the_run(how, tmp_path):
    with pytest.raises(SettingsError, match=r"compress is int8, int4.*not 'int9'"):
        simulate(tmp_path / "runs", **how)
    assert not (tmp_path / "runs").exists()


def test_a_list_of_something_else_is_refused(tmp_path):
    task = replace(WIDE, update_transforms=lambda config: ["int8"])
    with pytest.raises(SettingsError, match=r"Task.update_transforms returns a list of transforms"):
        simulate(tmp_path / "run", task)


def test_no_compression_costs_nothing(tmp_path):
    """The reply is that of a client without a transform, bit for bit."""
    one = federate(FedAvg(), tmp_path / "one", num_rounds=1, compress="")
    two = federate(FedAvg(), tmp_path / "two", (CLIENT,) * 7, num_rounds=1)
    assert [*map(without_time, one.rounds)] == [*map(without_time, two.rounds)]
