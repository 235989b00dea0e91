"""Clients that fail, straggle and attack in a simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)

from mlx_fed.training.trainer import Trainer

from ..helpers.simulated import CLIENTS, SEED, TASK, assert_same, load, simulate

TEST = tuple(
    np.concatenate(arrays)
    for arrays in zip(*(load(k, CLIENTS).test for k in range(CLIENTS)), strict=True)
)


def silent(result: fed.Result, phase: str) -> list[list[str]]:
    """Who did not answer, round by round."""
    return [
        sorted(each["node"] for each in record["refused"] if each["phase"] == phase)
        for record in result.rounds
    ]


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_failures_follow_from_the_seed(strategy: Callable[[], Strategy], tmp_path: Path):
    faults = fed.Faults(failure_rate=0.3)
    one = simulate(strategy(), tmp_path, name="one", faults=faults)
    assert_same(one, simulate(strategy(), tmp_path, name="again", faults=faults, workers=2))
    first, second, third = silent(one, "train")
    assert first != second != third
    assert 15 < len(first) + len(second) + len(third) < 60  # 36 of 120 are expected
    assert silent(one, "evaluate") != silent(one, "train")
    for record in one.rounds:
        asked = {each["node"] for each in record["refused"] if each["phase"] == "train"}
        assert asked | set(record["train"]["nodes"]) == {f"node-{k}" for k in range(CLIENTS)}
        assert not asked & set(record["train"]["nodes"])
        assert record["refused"][0]["reason"] == "it did not answer (an injected failure)"
        assert all(each["missing"] for each in record["refused"])
    other = simulate(strategy(), tmp_path, name="other", faults=faults, seed=9)
    assert silent(other, "train") != silent(one, "train")


def test_who_is_late_is_dropped_and_nobody_waits(tmp_path: Path):
    """Delays are exponential: a mean of 10 s leaves e**-2 of them above 20 s."""
    faults = fed.Faults(mean_delay=10.0)
    one = simulate(FedAvg(), tmp_path, faults=faults, round_timeout=20.0)
    late = silent(one, "train")
    assert 0 < sum(map(len, late)) < 3 * CLIENTS / 3
    reasons = {each["reason"].partition("(")[0] for each in one.rounds[0]["refused"]}
    assert reasons == {"no reply within 20 seconds "}
    patient = simulate(FedAvg(), tmp_path, name="patient", faults=faults, round_timeout=1e6)
    assert silent(patient, "train") == [[], [], []]


def test_a_phase_may_take_longer_here_than_its_timeout(tmp_path: Path):
    one = simulate(FedMedian(), tmp_path, round_timeout=1e-6)
    assert silent(one, "train") == silent(one, "evaluate") == [[], [], []]


def test_a_round_in_which_nobody_answers_ends_the_run(tmp_path: Path):
    with pytest.raises(fed.FedError, match="Round 1: none of 40 nodes gave a train reply"):
        simulate(FedAvg(), tmp_path, name="run", faults=fed.Faults(failure_rate=1.0))
    assert (tmp_path / "run" / "model.safetensors").exists()


# -- clients that attack -------------------------------------------------------------------

ROBUST: dict[str, Callable[[], Strategy]] = {
    "FedMedian": FedMedian,
    "FedTrimmedAvg": partial(FedTrimmedAvg, beta=0.3),
    "Krum": partial(Krum, num_malicious_nodes=10),
    "MultiKrum": partial(MultiKrum, num_malicious_nodes=10, num_nodes_to_select=10),
    "Bulyan": partial(Bulyan, num_malicious_nodes=9),
}
ATTACKS = {
    "sign-flip": fed.Faults(hostile=0.25, attack="sign-flip", scale=5.0),
    "scale": fed.Faults(hostile=0.25, attack="scale", scale=-20.0),
}


def accuracy(strategy: Strategy, folder: Path, faults: fed.Faults | None, task=TASK) -> float:
    options = {"faults": faults, "test": TEST, "num_rounds": 6}
    return simulate(strategy, folder, task, **options).rounds[-1]["central"]["accuracy"]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_mean_falls_to_an_attack(attack, tmp_path: Path):
    assert accuracy(FedAvg(), tmp_path / "none", None) > 0.8
    assert accuracy(FedAvg(), tmp_path / "attacked", attack) < 0.4


@pytest.mark.parametrize(
    ("strategy", "attack"),
    # Bulyan takes Flower a second a round.
    [pytest.param("Bulyan", "sign-flip", marks=pytest.mark.slow)]
    + [(strategy, attack) for strategy in ROBUST for attack in ATTACKS if strategy != "Bulyan"],
)
def test_robust_strategies_hold(strategy: str, attack: str, tmp_path: Path):
    assert accuracy(ROBUST[strategy](), tmp_path, ATTACKS[attack]) > 0.7


@pytest.mark.parametrize("attack", ["sign-flip", "scale"])
def test_an_update_that_is_multiplied_by_zero_is_none(attack: str, tmp_path: Path):
    faults = fed.Faults(hostile=1.0, attack=attack, scale=0.0)
    one = simulate(FedAvg(), tmp_path, num_clients=4, num_rounds=1, faults=faults)
    for name, array in Trainer(TASK, SEED).parameters().items():
        assert np.allclose(one.parameters[name], array, atol=1e-7), name


def test_labels_are_flipped_for_those_who_attack(tmp_path: Path):
    """Where all do, the model learns classes 2, 1, 0 for 0, 1, 2; the examples stay."""
    before = [array.copy() for array in load(0, CLIENTS).train]
    flip = fed.Faults(hostile=1.0, attack="label-flip", num_classes=3)
    flipped = accuracy(FedAvg(), tmp_path / "flipped", flip)
    assert flipped < 0.45
    data = fed.Data(load(0, CLIENTS).train)
    assert all(np.array_equal(one, other) for one, other in zip(before, data.train, strict=True))


def test_labels_of_a_stream_are_flipped_too(tmp_path: Path):
    def stream(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = load(partition_id, num_partitions)
        batch = tuple(map(mx.array, data.train))
        return fed.Data(lambda key: iter([batch]), data.test)

    task = replace(TASK, data=stream)
    flip = fed.Faults(hostile=1.0, attack="label-flip", num_classes=3)
    one = simulate(FedAvg(), tmp_path, task, 4, name="one", faults=flip, num_rounds=1)
    other = simulate(FedAvg(), tmp_path, task, 4, name="other", num_rounds=1)
    assert one.rounds[0]["train"]["loss"] != other.rounds[0]["train"]["loss"]


def test_the_same_clients_attack_all_the_run_and_by_the_seed():
    faults = fed.Faults(hostile=0.25)
    chosen = [k for k in range(400) if faults.is_hostile(1, k)]
    assert 70 < len(chosen) < 130
    assert chosen != [k for k in range(400) if faults.is_hostile(2, k)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"failure_rate": 1.5}, "Faults.failure_rate is a share between 0 and 1, not 1.5"),
        ({"hostile": -0.1}, "Faults.hostile is a share between 0 and 1"),
        ({"mean_delay": -1.0}, "Faults.mean_delay is in seconds, 0 or more"),
        ({"attack": "noise"}, 'Faults.attack is "label-flip", "sign-flip" or "scale"'),
        ({"hostile": 0.1, "attack": "label-flip"}, "needs num_classes"),
    ],
)
def test_faults_that_cannot_be_are_refused(arguments, message: str):
    with pytest.raises(fed.FedError, match=message):
        fed.Faults(**arguments)
