"""A simulation ends with the bits of the federation that it simulates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from filecmp import cmp
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    Krum,
    QFedAvg,
    Strategy,
)

from mlx_fed.rounds import loop
from mlx_fed.arrays import weighted_mean
from mlx_fed.runs.history import History
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import LoopbackGrid
from ..helpers.simulated import (
    CLIENTS,
    NORMALIZED,
    SEED,
    TASK,
    assert_same,
    load,
    raising_for,
    simulate,
)

HALF = {"fraction_train": 0.6, "fraction_evaluate": 0.5}


def spread(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    """The least and the largest loss of the clients."""
    losses = [float(str(content["metrics"]["loss"])) for content in contents]
    return MetricRecord({"least": min(losses), "largest": max(losses)})


class OwnRates(FedAvg):
    """Gives each client a learning rate of its own."""

    def configure_train(self, *arguments) -> Iterable[Message]:
        for number, message in enumerate(super().configure_train(*arguments)):
            client_state = ConfigRecord(
                {**message.content["config"], "learning-rate": 0.01 * number}
            )
            message.content = RecordDict({**message.content, "config": client_state})
            yield message


STRATEGIES = {
    "FedAvg": partial(FedAvg, **HALF),
    "FedAdam": partial(FedAdam, **HALF),
    "FedProx": partial(FedProx, **HALF, proximal_mu=0.3),
    "FedMedian": partial(FedMedian, **HALF),
    "Krum": partial(Krum, **HALF, num_malicious_nodes=3),
    "QFedAvg": partial(QFedAvg, **HALF, client_learning_rate=0.2, train_loss_key="train_loss"),
    "metrics of one's own": partial(FedAvg, **HALF, train_metrics_aggr_fn=spread),
    "settings of one's own": partial(OwnRates, **HALF),
    "clipping": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 0.3, CLIENTS),
    "nobody trains": partial(FedAvg, fraction_train=0.0, fraction_evaluate=0.5),
}


UNTIL_LEFT_OUT = 2
"""Rounds: a federation leaves a node out after three refusals running, a simulation does not."""


def federate(
    strategy: Strategy,
    folder: Path,
    task: fed.Task = TASK,
    failing: frozenset[int] = frozenset(),
    num_rounds: int = 3,
) -> fed.Result:
    """A federation of client apps in this process; some fail whatever they are asked."""
    app = fed.client_app(replace(task, data=load))

    def fails(message: Message, context: Context) -> Message:
        if message.metadata.message_type in ("train", "evaluate"):
            raise OSError("the disk is not mounted")
        return app(message, context)

    folder.mkdir()
    return loop.run(
        LoopbackGrid([fails if k in failing else app for k in range(CLIENTS)], backwards=True),
        strategy,
        Trainer(task, SEED),
        RunSettings(num_rounds=num_rounds, seed=SEED),
        History(folder),
    )


# -- as a federation of client apps --------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_simulation_ends_as_a_federation(strategy, tmp_path: Path):
    assert weighted_mean.block_size(int(0.6 * CLIENTS)) < 0.6 * CLIENTS
    assert_same(simulate(strategy(), tmp_path), federate(strategy(), tmp_path / "apps"))


@pytest.mark.parametrize(
    ("strategy", "statistics", "workers"),
    [
        ("FedAvg", "average", 0),
        ("FedAvg", "local", 2),
        ("FedMedian", "average", 2),
        ("FedMedian", "local", 0),
    ],
)
def test_running_statistics_end_as_in_a_federation(strategy, statistics, workers, tmp_path: Path):
    task = replace(NORMALIZED, statistics=statistics)
    make = STRATEGIES[strategy]
    one = simulate(make(), tmp_path, task, workers=workers, num_rounds=UNTIL_LEFT_OUT)
    other = federate(make(), tmp_path / "apps", task, num_rounds=UNTIL_LEFT_OUT)
    assert_same(one, other)


KEEPING = {
    "personal": {"personal": lambda name: name.startswith("layers.4")},
    "optimizer": {"keep_optimizer": True, "optimizer": lambda config: optim.Adam(0.02)},
}


@pytest.mark.parametrize("kept", KEEPING.values(), ids=KEEPING)
def test_what_clients_keep_goes_on_as_in_a_federation(kept: dict, tmp_path: Path):
    task = replace(TASK, **kept)
    make = STRATEGIES["FedAvg"]
    one = simulate(make(), tmp_path, task, workers=2)
    assert_same(one, federate(make(), tmp_path / "apps", task))
    plain = simulate(make(), tmp_path, replace(task, personal=None, keep_optimizer=False))
    assert one.rounds[-1]["evaluate"]["loss"] != plain.rounds[-1]["evaluate"]["loss"]
    assert ("layers.4.weight" in one.parameters) == ("personal" not in kept)


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_clients_that_fail_each_round_are_left_out_as_in_a_federation(strategy, tmp_path: Path):
    make, failing = STRATEGIES[strategy], frozenset({3, 17})
    error = OSError("the disk is not mounted")
    task = replace(TASK, data=raising_for({3, 17}, error))
    one = simulate(make(), tmp_path, task, num_rounds=UNTIL_LEFT_OUT)
    other = federate(make(), tmp_path / "apps", failing=failing, num_rounds=UNTIL_LEFT_OUT)
    assert_same(one, other)
    reasons = {refused["reason"] for record in one.rounds for refused in record["refused"]}
    assert all(reason.startswith("OSError: the disk is not mounted (") for reason in reasons)


def half_precision() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    module.set_dtype(mx.bfloat16)
    return module


@pytest.mark.parametrize(("strategy", "workers"), [("FedAdam", 2), ("FedMedian", 0)])
def test_parameters_of_half_precision_end_as_in_a_federation(strategy, workers, tmp_path: Path):
    make, task = STRATEGIES[strategy], replace(TASK, model=half_precision)
    one = simulate(make(), tmp_path, task, workers=workers)
    assert one.parameters["layers.0.weight"].dtype == mx.bfloat16
    assert_same(one, federate(make(), tmp_path / "apps", task))


def poisoned(partition_id: int, num_partitions: int | None) -> fed.Data:
    data = load(partition_id, num_partitions)
    if partition_id % 9 == 4:
        data.train[0][0] = np.nan
    return data


@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_updates_that_are_not_finite_are_refused_as_in_a_federation(strategy, tmp_path: Path):
    make, task = STRATEGIES[strategy], replace(TASK, data=poisoned)
    app = fed.client_app(task)
    (tmp_path / "apps").mkdir()
    expected = loop.run(
        LoopbackGrid([app] * CLIENTS),
        make(),
        Trainer(task, SEED),
        RunSettings(num_rounds=UNTIL_LEFT_OUT, seed=SEED),
        History(tmp_path / "apps"),
    )
    one = simulate(make(), tmp_path, task, num_rounds=UNTIL_LEFT_OUT)
    for record in (*one.rounds, *expected.rounds):
        del record["bytes"]["up"]  # what is refused is not sent where sums are made
    assert_same(one, expected)
    assert any("not finite" in refused["reason"] for refused in one.rounds[0]["refused"])


def untested(partition_id: int, num_partitions: int | None) -> fed.Data:
    data = load(partition_id, num_partitions)
    return data if partition_id % 3 else fed.Data(data.train)


def test_clients_without_test_examples_train_as_in_a_federation(tmp_path: Path):
    task = replace(TASK, data=untested)
    (tmp_path / "apps").mkdir()
    expected = loop.run(
        LoopbackGrid([fed.client_app(task)] * CLIENTS),
        FedAvg(),
        Trainer(task, SEED),
        RunSettings(num_rounds=3, seed=SEED),
        History(tmp_path / "apps"),
    )
    one = simulate(FedAvg(), tmp_path, task)
    assert_same(one, expected)
    evaluated = one.rounds[-1]["evaluate"]["nodes"]
    assert evaluated == [f"node-{k}" for k in range(CLIENTS) if k % 3]
    assert [record["refused"] for record in one.rounds] == [[], [], []]


# -- however the work is done --------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> fed.Result:
    """Client after client in this process."""
    return simulate(STRATEGIES["FedAvg"](), tmp_path_factory.mktemp("plain"), batched=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_same(workers, plain, tmp_path: Path):
    assert_same(simulate(STRATEGIES["FedAvg"](), tmp_path, workers=workers), plain)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 40])
def test_any_chunk_size_gives_the_same(chunk_size, plain, tmp_path: Path):
    assert_same(simulate(STRATEGIES["FedAvg"](), tmp_path, chunk_size=chunk_size), plain)


def test_workers_that_train_one_after_another_give_the_same(plain, tmp_path: Path):
    assert_same(simulate(STRATEGIES["FedAvg"](), tmp_path, workers=2, batched=False), plain)


@pytest.mark.parametrize("options", [{"workers": 2}, {"batched": False}, {"chunk_size": 3}])
def test_a_strategy_that_gets_every_reply_gets_the_same(options, tmp_path: Path):
    make = STRATEGIES["FedMedian"]
    one = simulate(make(), tmp_path, name="one", **options)
    assert_same(one, simulate(make(), tmp_path, name="other"))


def test_another_seed_gives_another_result(plain, tmp_path: Path):
    other = simulate(STRATEGIES["FedAvg"](), tmp_path, seed=SEED + 1)
    assert not all(
        mx.array_equal(other.parameters[name], array) for name, array in plain.parameters.items()
    )


def test_the_servers_own_examples_are_evaluated(plain, tmp_path: Path):
    told = []

    def listen(event: events.Event) -> None:
        if isinstance(event, (events.PhaseStarted, events.RepliesArrived)):
            told.append((event.phase, event.answered, event.nodes))

    test = load(1000, None).test
    one = simulate(STRATEGIES["FedAvg"](), tmp_path, test=test, listeners=(listen,))
    assert one.rounds[-1]["central"].keys() == {"loss", "accuracy"}
    assert one.rounds[-1]["central"] != one.rounds[0]["central"]
    assert [phase for phase, answered, _ in told if not answered] == 3 * [
        *("train", "evaluate", "central")
    ]
    for phase in ("train", "evaluate"):
        asked = [(answered, nodes) for each, answered, nodes in told if each == phase]
        assert asked[-1] == (asked[-1][1], asked[-1][1]) > (0, 0)


# -- as nodes in processes of their own ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_a_simulation_ends_as_a_fleet(strategy, start, tmp_path: Path):
    """Real nodes over real sockets, of a model with statistics of its own on each."""
    num_clients, nodes = 5, []
    make = {"FedAvg": FedAvg, "FedMedian": FedMedian}[strategy]

    def join(event: events.Event) -> None:
        if isinstance(event, events.ServerReady):
            where = ("--server", event.address, "--num-partitions", num_clients)
            for k in range(num_clients):
                task = "tests.helpers.simulated:LOCAL"
                nodes.append(start("-m", "mlx_fed", "join", task, "--node-id", k, *where))

    from ..helpers.simulated import LOCAL

    expected = fed.serve(
        LOCAL,
        make(fraction_train=0.8),
        num_rounds=3,
        seed=SEED,
        min_nodes=num_clients,
        wait=100,
        port=0,
        runs=tmp_path,
        name="fleet",
        listeners=(join,),
    )
    assert [node.ends() for node in nodes] == [0] * num_clients
    one = simulate(make(fraction_train=0.8), tmp_path, LOCAL, num_clients, workers=2)
    assert_same(one, expected)
    assert cmp(one.model, expected.model, shallow=False)


def test_one_process_has_one_model(tmp_path: Path):
    made = []

    def model() -> nn.Module:
        made.append(1)
        return TASK.model()

    simulate(None, tmp_path, replace(TASK, model=model), num_clients=3, num_rounds=1)
    assert len(made) == 1
