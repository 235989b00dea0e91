"""How a run is led: by what settings, past what goes wrong, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy

from mlx_fed.rounds import loop
from mlx_fed.runs.history import HistoryError
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import LoopbackGrid
from ..helpers.tasks import moons
from ..helpers.federated import CLIENT, NORMALIZED, SEED, TASK, difference, federate, load
from ..helpers.run_folders import read_history

pytestmark = pytest.mark.usefixtures("uncompiled")


# -- how many nodes ------------------------------------------------------------------------


def test_one_node_is_enough_where_one_is_asked_for(start, tmp_path: Path):
    nodes = []

    def join(event: events.Event) -> None:
        if isinstance(event, events.ServerReady):
            arguments = ("join", "tests.helpers.tasks:moons", "--server", event.address)
            nodes.append(start("-m", "mlx_fed", *arguments))

    result = fed.serve(
        moons, num_rounds=1, min_nodes=1, wait=60, port=0, runs=tmp_path, listeners=(join,)
    )
    assert result.rounds[0]["evaluate"]["nodes"] == ["node-0"]
    assert nodes[0].ends() == 0


@pytest.mark.parametrize(("min_nodes", "needed"), [(1, 1), (None, 2)])
def test_the_strategy_of_an_app_waits_for_as_many(min_nodes, needed: int, tmp_path: Path):
    app = fed.server_app(TASK, runs=tmp_path, num_rounds=1, min_nodes=min_nodes, wait=0.1)

    def lead(num_nodes: int, name: str) -> None:
        app(LoopbackGrid([CLIENT] * num_nodes), Context(1, 0, {}, RecordDict(), {"name": name}))

    with pytest.raises(fed.FedError, match=f"{needed - 1} of {needed} nodes came"):
        lead(needed - 1, "fewer")
    lead(needed, "enough")
    assert len(read_history(tmp_path / "enough")[0]["train"]["nodes"]) == needed


def test_too_few_nodes_end_the_run(tmp_path: Path):
    strategy = FedAvg(min_available_nodes=5)
    with pytest.raises(loop.RunError, match="3 of 5 nodes came within"):
        federate(strategy, tmp_path, (CLIENT,) * 3, wait=0.2)


# -- a strategy that fails -----------------------------------------------------------------

HOOKS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")


def failing(hook: str, number: int, error: Exception) -> Strategy:
    """FedAvg with a hook that fails in a round."""

    class Failing(FedAvg):
        pass

    def fail(self, server_round: int, *arguments):
        if server_round == number:
            raise error
        return getattr(super(Failing, self), hook)(server_round, *arguments)

    setattr(Failing, hook, fail)
    return Failing()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_fails_is_named_and_the_last_whole_round_kept(hook: str, tmp_path: Path):
    expected = federate(FedAvg(), tmp_path / "one", (CLIENT,) * 3, num_rounds=1)
    what = rf"Round 2: Failing\.{hook} failed: ValueError: no quorum"
    strategy = failing(hook, 2, ValueError("no quorum"))
    with pytest.raises(loop.RunError, match=what):
        federate(strategy, tmp_path / "failed", (CLIENT,) * 3, num_rounds=3)
    assert [record["round"] for record in read_history(tmp_path / "failed")] == [1]
    saved = mx.load(str(tmp_path / "failed" / "model.safetensors"))
    # A strategy with an aggregate_train of its own takes the mean itself, in another order.
    assert difference({k: saved[k] for k in expected.parameters}, expected.parameters) < 1e-7


def test_a_message_to_a_stranger_is_an_error(tmp_path: Path):
    class Chatty(FedAvg):
        def configure_train(self, *arguments):
            first, *others = super().configure_train(*arguments)
            first.metadata.dst_node_id = 77
            return [first, *others]

    what = r"Round 1: Chatty\.configure_train failed: .* node 77, which has no part in the run"
    with pytest.raises(loop.RunError, match=what):
        federate(Chatty(), tmp_path, (CLIENT,) * 3)


def test_a_float16_model_is_not_made_infinite(tmp_path: Path):
    def model() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 3))
        model.set_dtype(mx.float16)
        return model

    task = replace(TASK, model=model)
    strategy = FedAdam(eta=1e6)
    what = r"Round 1: FedAdam\.aggregate_train failed: .* 'layers\.0\.\w+' is too large for float16"
    with pytest.raises(loop.RunError, match=what):
        federate(strategy, tmp_path, [fed.client_app(task)] * 3, task=task)
    saved = mx.load(str(tmp_path / "model.safetensors"))
    assert difference(saved, Trainer(task, SEED).parameters()) == 0


# -- a folder that cannot be written -------------------------------------------------------


def test_a_run_that_cannot_write_its_history_keeps_its_model(tmp_path: Path):
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(HistoryError, match=r"Cannot write .*history\.jsonl"):
        federate(FedAvg(), tmp_path, (CLIENT,) * 3)
    assert mx.load(str(tmp_path / "model.safetensors")).keys() == Trainer(TASK, SEED).spec.keys()


# -- what a run leaves ---------------------------------------------------------------------


def test_a_run_leaves_its_history_and_the_whole_model(tmp_path: Path):
    app = fed.client_app(NORMALIZED)
    measured: list[int] = []

    def evaluate(number: int, parameters: dict, statistics: dict) -> dict[str, float]:
        measured.append(number)
        assert list(statistics) == ["layers.1.running_mean", "layers.1.running_var"]
        return {"largest": max(float(abs(a).max()) for a in parameters.values())}

    result = federate(
        FedAvg(), tmp_path, [app] * 3, task=NORMALIZED, num_rounds=2, evaluate_fn=evaluate
    )
    history = read_history(tmp_path)
    assert history == result.rounds
    assert [record["round"] for record in history] == measured == [1, 2]
    for record in history:
        assert {"loss", "nodes"} <= record["train"].keys()
        assert {"loss", "accuracy", "nodes"} <= record["evaluate"].keys()
        assert record["central"]["largest"] > 0
        assert record["bytes"]["down"] > record["bytes"]["up"] > 0
        assert record["refused"] == []

    assert result.model == tmp_path / "model.safetensors"
    model = NORMALIZED.model()
    model.load_weights(str(result.model))  # strict: every array of the model, and no other
    arrays = dict(nn.utils.tree_flatten(model.parameters()))
    assert arrays.keys() == result.parameters.keys() | result.statistics.keys()
    expected = {**result.parameters, **result.statistics}
    assert difference({name: arrays[name] for name in expected}, expected) == 0
    trainer = Trainer(NORMALIZED, SEED)
    measured_again = trainer.evaluate(result.parameters, result.statistics, load(0, 3).test).metrics
    assert np.isfinite(measured_again["loss"])


def test_a_server_app_writes_its_settings(tmp_path: Path):
    """The whole of ``flwr run`` but for Flower's grid."""
    app = fed.server_app(TASK, FedAvg(), runs=tmp_path, num_rounds=5, config={"learning-rate": 0.1})
    grid = LoopbackGrid([CLIENT] * 3)
    run_config = {"num-rounds": 2, "seed": 3, "name": "trial"}
    app(grid, Context(1, 0, {}, RecordDict(), run_config))

    folder = tmp_path / "trial"
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["num_rounds"], settings["seed"]) == (2, 3)
    assert settings["strategy"]["name"] == "FedAvg"
    assert settings["config"]["learning-rate"] == 0.1
    assert len(read_history(folder)) == 2
    assert mx.load(str(folder / "model.safetensors")).keys() == Trainer(TASK, 3).spec.keys()
