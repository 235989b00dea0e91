"""Central differential privacy: clipped, noisy, counted, in every engine and over a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from mlx.utils import tree_flatten
from scipy import stats

from mlx_fed.errors import SettingsError
from mlx_fed.privacy import Gaussian, accountant
from mlx_fed.privacy.accountant import Release
from mlx_fed.rounds import messages
from mlx_fed.rounds.coverage import PrivacyError

from ..conftest import command
from ..helpers.federated import NORMALIZED, TASK, federate, on_train
from ..helpers.run_folders import read_history

SEED = 7
WIDE = replace(
    TASK,
    model=lambda: nn.Sequential(nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 3)),
    batch_size=100,
)
"""One step of all examples: a client's update is its gradient, times the learning rate."""
RATE = 0.2
APPS = (fed.client_app(WIDE),) * 7


def simulate(folder: Path, strategy: Any, task: Any = WIDE, **options: Any) -> fed.Result:
    options = {"num_clients": 7, "num_rounds": 2, "workers": 0, "seed": SEED, **options}
    return fed.simulate(task, strategy, runs=folder, **{"listeners": (), **options})


def values(parameters: dict[str, mx.array]) -> np.ndarray:
    return np.concatenate([np.asarray(array).reshape(-1) for array in parameters.values()])


def model(folder: Path) -> nn.Module:
    """The initial model of the seed."""
    module = WIDE.model()
    result = simulate(folder, FedAvg(), num_rounds=1, config={"learning-rate": 0.0})
    module.load_weights([*result.parameters.items()])
    return module


def plain_mean(module: nn.Module, clip: float) -> np.ndarray:
    """The new model without noise, from clipped updates that are computed one by one."""
    start = values(dict(tree_flatten(module.trainable_parameters())))
    total = np.zeros(start.size)
    for client in range(7):
        x, y = map(mx.array, WIDE.data(client, 7).train)
        _, gradients = nn.value_and_grad(module, lambda m, x, y: WIDE.loss(m, x, y).mean())(
            module, x, y
        )
        update = -RATE * values(dict(tree_flatten(gradients))).astype(np.float64)
        total += update * min(1, clip / np.linalg.norm(update))
    return start + total / 7


@pytest.mark.parametrize("clip", [0.02, 100.0])
@pytest.mark.parametrize("engine", ["simulation", "workers", "fleet"])
def test_the_model_is_the_mean_of_clipped_updates_with_normal_noise(engine, clip, tmp_path):
    strategy = Gaussian(FedAvg(), clip, 2.0)
    if engine == "fleet":
        result = federate(strategy, tmp_path / "run", APPS, task=WIDE, num_rounds=1, min_nodes=7)
    else:
        workers = 2 if engine == "workers" else 0
        result = simulate(tmp_path, strategy, num_rounds=1, workers=workers)
    noise = (values(result.parameters) - plain_mean(model(tmp_path), clip)) / (2.0 * clip / 7)
    assert stats.kstest(noise, "norm").pvalue > 1e-6, (noise.mean(), noise.std())
    assert result.rounds[0]["train"]["epsilon"] == pytest.approx(
        accountant.epsilon({Release(2.0, 1.0): 1}, 1e-5)
    )


def test_each_round_is_counted_on_disk_and_two_runs_have_other_noise(tmp_path):
    results = [simulate(tmp_path, Gaussian(FedAvg(), 1.0, 4.0), name=name) for name in "ab"]
    for result in results:
        spent = [record["train"]["epsilon"] for record in result.rounds]
        expected = [accountant.epsilon({Release(4.0, 1.0): count}, 1e-5) for count in (1, 2)]
        assert spent == pytest.approx(expected)
        lines = (result.folder / "privacy.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert (values(results[0].parameters) != values(results[1].parameters)).all()


def test_a_fraction_is_drawn_one_by_one_and_amplifies(tmp_path):
    strategy = Gaussian(FedAvg(fraction_train=0.5), 1.0, 1.0)
    task = replace(TASK, data=lambda client, n: TASK.data(client % 7, n))
    result = simulate(tmp_path, strategy, task, num_clients=60, num_rounds=6)
    sampled = [record["train"]["nodes"] for record in result.rounds]
    assert len({len(nodes) for nodes in sampled}) > 1, "as many in each round"
    assert all(10 < len(nodes) < 50 for nodes in sampled)
    assert result.rounds[-1]["train"]["epsilon"] == pytest.approx(
        accountant.epsilon({Release(1.0, 0.5): 6}, 1e-5)
    )


def test_a_fraction_that_may_draw_nobody_is_refused(tmp_path):
    strategy = Gaussian(FedAvg(fraction_train=0.5), 1.0, 1.0)
    with pytest.raises(fed.FedError, match=r"a fraction of 0.5 may be none at all"):
        simulate(tmp_path, strategy)


def test_a_budget_ends_the_run_before_it_is_exceeded(tmp_path):
    limit = accountant.epsilon({Release(4.0, 1.0): 3}, 1e-5) + 1e-3
    result = simulate(tmp_path, Gaussian(FedAvg(), 1.0, 4.0, epsilon=limit), num_rounds=9)
    assert len(result.rounds) == 3
    assert "another round would spend epsilon" in str(result.stopped)
    with pytest.raises(SettingsError, match="Not one round is possible"):
        Gaussian(FedAvg(), 1.0, 4.0, epsilon=0.1)


def test_noise_is_computed_from_the_epsilon_of_all_rounds(tmp_path):
    strategy = Gaussian(FedAvg(), 1.0, epsilon=5.0, num_rounds=2)
    result = simulate(tmp_path, strategy, num_rounds=3)
    assert len(result.rounds) == 2
    assert 4.9 < result.rounds[-1]["train"]["epsilon"] <= 5.0


def test_a_resumed_run_counts_what_was_released_before(tmp_path):
    simulate(tmp_path, Gaussian(FedAdam(eta=0.01), 1.0, 4.0), name="run", num_rounds=2)
    # The server died after the third model was computed, and may have been sent.
    ledger = tmp_path / "run" / "privacy.jsonl"
    with ledger.open("a") as file:
        file.write(json.dumps({"round": 3, "clip": 1.0, "noise": 4.0, "fraction": 1.0}) + "\n")
    result = simulate(tmp_path, Gaussian(FedAdam(eta=0.01), 1.0, 4.0), resume="run", num_rounds=3)
    assert result.rounds[-1]["train"]["epsilon"] == pytest.approx(
        accountant.epsilon({Release(4.0, 1.0): 4}, 1e-5)
    )


def test_a_node_cannot_weigh_more_than_one(tmp_path):
    def claim(reply: Message) -> None:
        record = reply.content.metric_records["metrics"]
        reply.content["metrics"] = MetricRecord({**record, "clients": 50})

    apps = (*APPS[:6], on_train(claim, APPS[0]))
    result = federate(Gaussian(FedAvg(), 1.0, 4.0), tmp_path / "run", apps, task=WIDE, num_rounds=1)
    (refusal,) = result.rounds[0]["refused"]
    assert "clients is 50, and more than 1 is not believed" in refusal["reason"]


def test_an_update_that_is_not_finite_is_refused(tmp_path):
    def data(client: int, num_clients: int | None) -> fed.Data:
        points, labels = TASK.data(client, num_clients).train
        return fed.Data((points * (np.inf if client == 2 else 1), labels))

    task = replace(WIDE, data=data)
    result = simulate(tmp_path, Gaussian(FedAvg(), 1.0, 4.0), task, num_rounds=1)
    assert [refusal["node"] for refusal in result.rounds[0]["refused"]] == ["node-2"]


def test_what_is_not_covered_is_refused_or_named(tmp_path):
    strategy = Gaussian(FedAvg(), 1.0, 4.0)
    with pytest.raises(PrivacyError, match="Gaussian covers the parameters alone"):
        simulate(tmp_path, strategy, NORMALIZED)
    with pytest.raises(SettingsError, match="compress changes the norm of a clipped update"):
        simulate(tmp_path, strategy, compress="int8")
    with pytest.raises(SettingsError, match="FedMedian needs each of them"):
        Gaussian(FedMedian(), 1.0, 4.0)
    texts: list[str] = []
    simulate(tmp_path, strategy, num_rounds=1, listeners=[lambda event: texts.append(str(event))])
    assert any("num-examples, loss, accuracy leave each client exactly" in t for t in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clip": 0.0, "noise": 1.0}, "clip is a number above 0, not 0.0"),
        ({"clip": 1.0, "noise": "1"}, "noise is a number above 0, not '1'"),
        ({"clip": 1.0, "noise": float("inf")}, "noise is a number above 0, not inf"),
        ({"clip": 1.0, "noise": 1.0, "delta": 1}, "delta is a probability"),
        ({"clip": 1.0}, "Give noise, or epsilon and num_rounds"),
        ({"clip": 1.0, "epsilon": 1.0}, "Give noise, or epsilon and num_rounds"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(SettingsError, match=words):
        Gaussian(FedAvg(), **arguments)


def test_messages_hold_updates_of_the_stated_norm(tmp_path):
    """What a node sends is clipped: the server sees no more."""
    norms = []

    def look(reply: Message) -> None:
        _, record = messages.parameters_of(reply.content)
        norms.append(np.linalg.norm(values(messages.unpack(record))))

    apps = (on_train(look, APPS[0]),) * 7
    federate(Gaussian(FedAvg(), 0.01, 4.0), tmp_path / "run", apps, task=WIDE, num_rounds=1)
    assert norms == pytest.approx([0.01] * 7, rel=1e-4)
    assert max(norms) <= 0.01


def test_the_command_states_epsilon(tmp_path):
    options = ("--clients", 4, "--rounds", 2, "--workers", 0, "--runs", tmp_path, "--quiet")
    simulated = ("simulate", "tests.helpers.tasks:moons", *options)
    ended = command(*simulated, "--dp-clip", 1.0, "--dp-epsilon", 3.0, "--name", "run")
    assert ended.code == 0, ended.text
    assert 2.9 < read_history(tmp_path / "run")[-1]["train"]["epsilon"] <= 3.0
    ended = command(*simulated, "--dp-epsilon", 3.0)
    assert ended.code == 1
    assert "--dp-noise and --dp-epsilon need --dp-clip" in ended.text
