"""Runs that end before their last round, and go on from there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from flwr.serverapp.strategy import FedAvg

from ..helpers.ids import stable_id
from ..conftest import command, free_port
from ..helpers.simulated import TASK
from ..helpers.simulated import simulate as simulated

pytestmark = pytest.mark.usefixtures("uncompiled")


class Losing(FedAvg):
    """A strategy whose evaluations have these losses, and accuracies of one less them."""

    def __init__(self, *losses: float):
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        self.losses = list(losses)

    def aggregate_evaluate(self, server_round, replies):
        metrics = super().aggregate_evaluate(server_round, replies)
        loss = self.losses[min(server_round, len(self.losses)) - 1]
        metrics["loss"], metrics["accuracy"] = loss, 1.0 - loss
        return metrics


LOSSES = (0.9, 0.5, 0.6, 0.55, 0.7, 0.4, 0.8, 0.45, 0.4, 0.41, 0.42, 0.43)


def simulate(runs: Path, strategy: Any = None, **options: Any) -> fed.Result:
    options = {"num_rounds": 12, **options}
    return simulated(strategy or Losing(*LOSSES), runs, TASK, 2, **options)


def settings_of(result: fed.Result) -> dict[str, Any]:
    return json.loads((result.folder / "settings.json").read_text())


def first_two(rounds: list[dict]) -> bool:
    return len(rounds) == 2


class Stops(FedAvg):
    def configure_train(self, server_round, *rest):
        return [] if server_round > 2 else super().configure_train(server_round, *rest)


RULES: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "patience": ({"patience": 3}, 5, "no loss was below 0.5, that of round 2, for 3 rounds"),
    "more patience": ({"patience": 5}, 11, "no loss was below 0.4, that of round 6, for 5 rounds"),
    "no patience": ({"patience": 0}, 12, None),
    "up": ({"target": "accuracy=0.5"}, 2, "accuracy is 0.5, and the target was accuracy >= 0.5"),
    "down": ({"target": {"loss": 0.45}}, 6, "loss is 0.4, and the target was loss <= 0.45"),
    "at least": ({"target": "loss >= 0.9"}, 1, "loss is 0.9, and the target was loss >= 0.9"),
    "at most": ({"target": "accuracy<=0.3"}, 1, "accuracy is 0.1, and the target was accuracy <="),
    "all of them": ({"target": {"loss": 0.55, "accuracy": 0.6}}, 6, "loss is 0.4, accuracy is 0.6"),
    "out of reach": ({"target": "accuracy=0.95"}, 12, None),
    "either": ({"target": "loss=0.55", "patience": 1}, 2, "loss is 0.5"),
    "a reason": ({"stop": lambda rounds: len(rounds) == 4 and "enough"}, 4, "enough"),
    "true": ({"stop": first_two}, 2, "stop returned True"),
    "none": ({"stop": lambda rounds: None}, 12, None),
    "the strategy": ({"strategy": Stops()}, 3, "the strategy asked no node to train"),
}


@pytest.mark.parametrize("name", RULES)
def test_what_ends_a_run(name: str, tmp_path: Path):
    options, rounds, reason = RULES[name]
    told: list[dict] = []

    def listen(event: events.Event) -> None:
        told.extend([event] if isinstance(event, events.RunFinished) else [])

    result = simulate(tmp_path, **options, listeners=(listen,))
    assert len(result.rounds) == rounds
    assert [event.stopped for event in told] == [result.stopped]
    stopped = settings_of(result).get("stopped")
    if reason is None:
        assert result.stopped is stopped is None
    else:
        assert result.stopped is not None
        assert result.stopped.startswith(reason)
        assert stopped == {"round": rounds, "reason": result.stopped}


@pytest.mark.parametrize("name", RULES)
def test_a_run_that_was_killed_ends_as_if_undisturbed(name: str, tmp_path: Path):
    """Wherever it was killed, and also before it could say why it ended."""
    options, rounds, _ = RULES[name]
    whole = simulate(tmp_path, **options)
    for number in sorted({1, rounds - 1, rounds} - {0}):
        simulate(tmp_path, options.get("strategy"), name=f"{number}", num_rounds=number)
        path = tmp_path / f"{number}" / "settings.json"
        settings = {**json.loads(path.read_text()), "num_rounds": 12}
        for key in ("patience", "target"):
            settings[key] = options.get(key)
        path.write_text(json.dumps({**settings, "stopped": None}))
        options_again = {key: options[key] for key in ("strategy", "stop") if key in options}
        result = simulate(tmp_path, **options_again, num_rounds=None, resume=f"{number}")
        assert (len(result.rounds), result.stopped) == (rounds, whole.stopped)


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][2] is not None])
def test_a_run_that_ended_early_is_finished(name: str, tmp_path: Path):
    options, rounds, _ = RULES[name]
    first = simulate(tmp_path, **options, name="run")
    strategy = {key: options[key] for key in ("strategy",) if key in options}
    for options_again in (options, strategy):  # as it was started, and without what is recorded
        again = simulate(tmp_path, **{**options_again, "num_rounds": None}, resume="run")
        assert (len(again.rounds), again.stopped) == (rounds, first.stopped)
        assert settings_of(again)["stopped"] == settings_of(first)["stopped"]
        for key, array in first.parameters.items():
            assert mx.array_equal(again.parameters[key], array)


@pytest.mark.parametrize(
    ("first", "then", "rounds"),
    [
        ({"patience": 3}, {"num_rounds": 14}, 9),  # round 6 has a lower loss
        ({"patience": 1}, {"num_rounds": 14}, 4),
        ({"patience": 3}, {"patience": 4, "num_rounds": None}, 10),
        ({"patience": 3}, {"patience": 0, "num_rounds": None}, 12),
        ({"patience": 3}, {"patience": 2, "num_rounds": None}, 5),
        ({"target": "accuracy=0.5"}, {"num_rounds": 14}, 14),
        ({"target": "accuracy=0.5"}, {"target": "accuracy=0.6", "num_rounds": None}, 6),
        ({"target": "accuracy=0.5"}, {"target": "accuracy=0.4", "num_rounds": None}, 2),
        ({"target": "accuracy=0.5"}, {"target": "", "num_rounds": None}, 12),
        ({"stop": first_two}, {"num_rounds": 14}, 14),
        ({"stop": first_two}, {"stop": first_two, "num_rounds": 14}, 14),
    ],
    ids=stable_id,
)
def test_a_run_that_ended_early_goes_on(first: dict, then: dict, rounds: int, tmp_path: Path):
    ended = simulate(tmp_path, **first, name="run")
    assert ended.stopped
    again = simulate(tmp_path, **then, resume="run")
    assert len(again.rounds) == rounds
    assert bool(again.stopped) == ("stopped" in settings_of(again))


def test_more_rounds_are_kept_over_another_stop(tmp_path: Path):
    """Killed as it went on with more rounds, it goes on with them."""
    simulate(tmp_path, target="accuracy=0.5", name="run")

    class Killed(Exception):
        pass

    def kill(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.round == 4:
            raise Killed

    with pytest.raises(Killed):
        simulate(tmp_path, num_rounds=14, listeners=(kill,), resume="run")
    result = simulate(tmp_path, num_rounds=None, resume="run")
    assert (len(result.rounds), result.stopped) == (14, None)


# -- what it is judged by ------------------------------------------------------------------


def test_the_servers_own_evaluation_comes_first(tmp_path: Path):
    def central(number: int, *_: Any) -> dict[str, float]:
        return {"loss": 1.0 + number, "accuracy": number / 10}

    result = simulate(tmp_path, evaluate_fn=central, patience=2)
    assert result.stopped
    assert "that of round 1, for 2 rounds" in result.stopped
    assert len(simulate(tmp_path, evaluate_fn=central, target="accuracy=0.7").rounds) == 7


def test_an_evaluation_of_ones_own_may_skip_rounds(tmp_path: Path):
    def central(number: int, *_: Any) -> dict[str, float]:
        return {"f1": number / 10} if number % 2 else {}

    assert len(simulate(tmp_path, evaluate_fn=central, target="f1=0.4").rounds) == 5


def test_losses_that_are_not_finite_are_no_better(tmp_path: Path):
    nan = float("nan")
    assert len(simulate(tmp_path, Losing(0.5, nan, nan, 0.4), patience=2).rounds) == 3
    result = simulate(tmp_path, Losing(nan), patience=2)
    assert result.stopped == "no round had a finite loss, and patience was 2"


@pytest.mark.parametrize("rule", [{"patience": 2}, {"target": "accuracy=0.9"}], ids=stable_id)
def test_there_has_to_be_an_evaluation(rule: dict, tmp_path: Path):
    strategy = FedAvg(fraction_evaluate=0.0)
    with pytest.raises(fed.FedError, match="needs an evaluation after each round, and there is no"):
        simulate(tmp_path, strategy, **rule)
    central = {"evaluate_fn": lambda *_: {"loss": 1.0, "accuracy": 0.9}}
    assert simulate(tmp_path, strategy, **rule, **central).stopped


@pytest.mark.parametrize(("fraction", "num_rounds"), [(1.0, 1), (0.6, 3)])
def test_a_target_needs_nodes_with_test_examples(fraction: float, num_rounds: int, tmp_path: Path):
    def load_train(partition_id: int, num_partitions: int | None) -> fed.Data:
        return fed.Data(TASK.data(partition_id, num_partitions).train)

    task, strategy = replace(TASK, data=load_train), FedAvg(fraction_evaluate=fraction)
    message = f"The target accuracy is judged by .*Data.test.*, after {num_rounds} rounds"
    with pytest.raises(fed.FedError, match=message):
        simulated(strategy, tmp_path, task, 2, num_rounds=12, target="accuracy=0.9")
    skipping = EveryFourth()
    result = simulate(tmp_path, skipping, target="accuracy=0.0", num_rounds=5)
    assert len(result.rounds) == 4


class EveryFourth(FedAvg):
    """Nodes evaluate in every fourth round only."""

    def configure_evaluate(self, server_round, arrays, config, grid):
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return [] if server_round % 4 else messages


def test_a_target_that_is_no_metric_is_named(tmp_path: Path):
    with pytest.raises(fed.FedError, match=r"target acuracy is no metric .* Did you mean accuracy"):
        simulate(tmp_path, target="acuracy=0.9", name="run")
    assert (tmp_path / "run" / "model.safetensors").exists()
    again = simulate(tmp_path, target="accuracy=0.5", num_rounds=None, resume="run")
    assert len(again.rounds) == 2


def test_a_function_that_fails_is_named(tmp_path: Path):
    with pytest.raises(fed.FedError, match="Round 1: stop failed: ZeroDivisionError"):
        simulate(tmp_path, stop=lambda rounds: 1 / 0)


# -- commands ------------------------------------------------------------------------------


def test_a_command_ends_early_and_says_why(tmp_path: Path):
    small = ("--clients", 2, "--rounds", 30, "--workers", 0, "--runs", tmp_path, "--name", "run")
    run = command(
        "simulate", "tests.helpers.simulated:TASK", *small, "--target", "loss=100", columns=400
    )
    assert run.code == 0, run.text
    assert "and the target was loss <= 100). The model:" in run.text
    shown = command("runs", "show", "run", "--runs", tmp_path, columns=400).text
    assert "Ended after round 1: loss is " in shown
    assert "finished" in command("runs", "list", "--runs", tmp_path, columns=400).text
    bad = command(
        "simulate", "tests.helpers.simulated:TASK", "--target", "loss", "--runs", tmp_path
    )
    assert (bad.code, "METRIC=VALUE" in bad.text) == (1, True)


def test_nodes_are_told_that_a_run_has_ended_early(start, tmp_path: Path):
    port = free_port()
    task = ("-m", "mlx_fed", "serve", "tests.helpers.tasks:moons", "--port", port, "--rounds", 50)
    server = start(
        *task, "--min-nodes", 1, "--patience", 1, "--runs", tmp_path, "-c", "learning-rate=0.0"
    )
    node = start(
        "-m", "mlx_fed", "join", "tests.helpers.tasks:moons", "--server", f"127.0.0.1:{port}"
    )
    assert server.ends(60) == 0, server.text
    assert node.ends(30) == 0, node.text
    assert "no loss was below" in server.text
    assert "The run is over." in node.text


@pytest.mark.parametrize("target", ["bits>=0.6", "loss<=0.6"])
def test_a_value_that_is_not_finite_reaches_no_target(target: str, tmp_path: Path):
    name, value = ("bits", math.inf) if "bits" in target else ("loss", -math.inf)
    values = (math.nan, value, 0.6, 0.6)
    result = simulate(
        tmp_path, target=target, evaluate_fn=lambda number, *_: {name: values[number - 1]}
    )
    assert len(result.rounds) == 3
