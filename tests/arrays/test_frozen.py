"""Frozen arrays never travel, and are the same wherever a model is trained."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from mlx.utils import tree_flatten

from mlx_fed.arrays import frozen, weights
from mlx_fed.rounds.checkpoint import CheckpointError
from mlx_fed.errors import SimulationError
from mlx_fed.arrays.frozen import difference, digest_arrays
from mlx_fed.training.trainer import Trainer

from ..helpers.simulated import simulate
from ..helpers.federated import SEED, TASK, federate

pytestmark = pytest.mark.usefixtures("uncompiled")


class Net(nn.Module):
    """A head on a frozen backbone with ``values`` as its weight."""

    def __init__(self, values: np.ndarray | mx.array):
        super().__init__()
        self.back, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.back.weight = mx.array(values)
        self.back.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(nn.tanh(self.back(x)))


VALUES = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def task(values: np.ndarray = VALUES) -> fed.Task:
    return replace(TASK, model=lambda: Net(values))


def changed(at: tuple[int, int] = (7, 4), by: float = 0.01) -> np.ndarray:
    values = VALUES.copy()
    values[at] += by
    return values


# -- what an array is known by -------------------------------------------------------------

ARRAYS = {
    "float32": mx.array(VALUES),
    "bfloat16": mx.array(VALUES).astype(mx.bfloat16),
    "float16": mx.array(VALUES).astype(mx.float16),
    "complex64": mx.array(VALUES + 1j),
    "uint32": mx.arange(40).astype(mx.uint32).reshape(8, 5),
    "bool": mx.array(VALUES > 0),
    "scalar": mx.array(1.5),
    "empty": mx.zeros((0, 3)),
    "infinite": mx.array([-np.inf, 0.0]),
}


@pytest.mark.parametrize("whole", [frozen.WHOLE, 0], ids=["whole", "sampled"])
def test_the_first_array_that_differs_is_named(whole: int, monkeypatch):
    monkeypatch.setattr(frozen, "WHOLE", whole)
    expected = digest_arrays(dict(ARRAYS))
    assert difference(expected, digest_arrays(dict(ARRAYS))) is None
    for name, array in ARRAYS.items():
        if array.size:
            for at in (0, array.size - 1):
                flat = array.reshape(-1)
                step = ~flat[at] if array.dtype == mx.bool_ else flat[at] + 1
                flat[at] = 7 if mx.isinf(flat[at]).item() else step
                other = {**ARRAYS, name: flat.reshape(array.shape)}
                found = difference(expected, digest_arrays(other))
                assert found.name == name
                assert "other values" in found.reason
    other = {**ARRAYS, "float32": mx.zeros((5, 8)), "bool": mx.zeros((1,))}
    found = difference(expected, digest_arrays(other))
    assert str(found) == "frozen array 'float32' is float32 [5, 8], expected float32 [8, 5]"
    fewer = {name: array for name, array in ARRAYS.items() if name != "uint32"}
    assert str(difference(expected, digest_arrays(fewer))) == "frozen array 'uint32' is missing"
    found = difference(expected, digest_arrays({**ARRAYS, "more": mx.zeros(1)}))
    assert str(found) == "frozen array 'more' is not one of the expected"


@pytest.mark.parametrize("at", [0, 2**19 + 3, 2**20 - 1])
def test_every_value_of_small_models_is_looked_at(at: int):
    values = np.random.default_rng(1).normal(size=2**20).astype(np.float32)
    expected = digest_arrays({"w": mx.array(values)})
    values[at] += 0.5
    assert not difference(expected, digest_arrays({"w": mx.array(values)})).is_rounding


def test_of_large_models_samples_are_looked_at(monkeypatch):
    monkeypatch.setattr(frozen, "WHOLE", 0)
    values = np.zeros(10**6, np.float32)
    expected = digest_arrays({"w": mx.array(values)})
    between = np.zeros(10**6, np.float32)
    between[1] = 1.0
    assert difference(expected, digest_arrays({"w": mx.array(between)})) is None
    assert difference(expected, digest_arrays({"w": mx.array(values + 1)})) is not None


def test_what_differs_by_rounding_is_told_from_what_differs():
    values = np.random.default_rng(1).normal(size=10**5)
    expected = digest_arrays({"w": mx.array(values.astype(np.float32))})
    rounded = values.astype(np.float32)
    rounded[::3] = np.nextafter(rounded[::3], np.float32(9))
    assert difference(expected, digest_arrays({"w": mx.array(rounded)})).is_rounding
    tuned = values * (1 + 1e-3 * np.random.default_rng(2).normal(size=10**5))
    found = difference(expected, digest_arrays({"w": mx.array(tuned.astype(np.float32))}))
    assert not found.is_rounding
    moved = digest_arrays({"w": mx.array(np.roll(values, 1).astype(np.float32))})
    assert not difference(expected, moved).is_rounding


def test_frozen_arrays_of_a_large_model_do_not_stay_in_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(frozen, "WHOLE", 0)
    mx.save_safetensors(str(tmp_path / "base.safetensors"), {"w": mx.ones((2**20, 5))})

    class Read(Net):
        def __init__(self):
            super().__init__(VALUES)
            self.back.weight = mx.load(str(tmp_path / "base.safetensors"))["w"]

    trainer = Trainer(replace(TASK, model=Read), SEED)
    before = mx.get_active_memory()
    assert trainer.frozen["back.weight"].kind == "float32 [1048576, 5]"
    assert mx.get_active_memory() - before < 2**20


# -- initial values ------------------------------------------------------------------------


def test_a_model_is_the_same_whichever_global_generator_it_is_drawn_from():
    def model() -> nn.Module:
        net = Net(np.random.normal(size=(8, 5)).astype(np.float32))
        net.head.bias = net.head.bias + random.random()
        return net

    random.seed(1)
    np.random.seed(1)
    one = weights.build_model(model, SEED)
    drawn = random.random(), np.random.random()
    random.seed(2)
    np.random.seed(2)
    other = weights.build_model(model, SEED)
    third = weights.build_model(model, SEED + 1)
    for (name, a), (_, b) in zip(
        *(tree_flatten(m.parameters()) for m in (one, other)), strict=True
    ):
        assert mx.array_equal(a, b), name
    assert not mx.array_equal(one.back.weight, third.back.weight)
    random.seed(1)
    np.random.seed(1)
    assert drawn == (random.random(), np.random.random())  # what the caller draws stays the same


# -- in a federation -----------------------------------------------------------------------


def test_a_node_with_another_frozen_array_is_turned_away(tmp_path: Path):
    told: list[events.Event] = []
    head = replace(TASK, model=lambda: trained_otherwise(Net(VALUES)))
    apps = [fed.client_app(each) for each in (task(), head, task(changed()), task())]
    result = federate(
        FedAvg(),
        tmp_path,
        apps,
        task=task(),
        num_rounds=1,
        listener=told.append,
    )
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1", "node-3"]
    (refused,) = (event for event in told if isinstance(event, events.NodeRefused))
    assert refused.node == "node-2"
    assert (
        "frozen array 'back.weight' has other values: read it from the same file" in refused.reason
    )


def trained_otherwise(net: Net) -> Net:
    net.head.weight = net.head.weight + 1
    return net


def test_a_node_with_other_rounding_takes_part_and_that_is_said(tmp_path: Path):
    notes: list[str] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    apps = [fed.client_app(task()), fed.client_app(task(np.nextafter(VALUES, np.float32(9))))]
    result = federate(FedAvg(), tmp_path, apps, task=task(), num_rounds=1, listener=listener)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]
    assert notes == [
        "node-1: its frozen array 'back.weight' differs by rounding, as devices differ"
    ]


def test_a_node_that_says_nothing_of_its_frozen_arrays_is_turned_away(tmp_path: Path):
    def silent(message, context):
        reply = app(message, context)
        if "node" in reply.content:
            del reply.content["node"]["frozen"]
        return reply

    app = fed.client_app(task())
    told: list[events.Event] = []
    federate(
        FedAvg(min_available_nodes=1),
        tmp_path,
        [app, app, silent],
        task=task(),
        num_rounds=1,
        listener=lambda event: (
            told.append(event) if isinstance(event, events.NodeRefused) else None
        ),
    )
    told = [event for event in told if isinstance(event, events.NodeRefused)]
    assert [event.node for event in told] == ["node-2"]
    assert "frozen array 'back.weight' is missing" in told[0].reason


def test_what_the_fingerprint_covers_is_not_read(tmp_path: Path):
    covered = replace(task(), fingerprint_covers=lambda name: name == "back.weight")
    assert list(Trainer(covered, SEED).frozen) == ["back.bias"]


def test_a_run_goes_on_with_the_frozen_arrays_that_it_had(tmp_path: Path):
    def apps(each: fed.Task) -> list:
        return [fed.client_app(each)] * 2

    federate(FedAvg(), tmp_path, apps(task()), task=task(), num_rounds=1)
    other = task(changed())
    with pytest.raises(CheckpointError, match=r"frozen array 'back.weight' has other values"):
        federate(FedAvg(), tmp_path, apps(other), task=other, num_rounds=2, resume=True)
    resumed = federate(FedAvg(), tmp_path, apps(task()), task=task(), num_rounds=2, resume=True)
    assert len(resumed.rounds) == 2


def test_a_simulation_with_other_frozen_arrays_in_its_workers_is_refused(tmp_path: Path):
    def model() -> nn.Module:
        return Net(np.random.default_rng().normal(size=(8, 5)).astype(np.float32))

    drawn = replace(TASK, model=model)
    refused = r"not the main process's: frozen array 'back.weight' has other values"
    with pytest.raises(SimulationError, match=refused):
        simulate(FedAvg(), tmp_path, drawn, num_clients=2, num_rounds=1, workers=1)
