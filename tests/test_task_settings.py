"""A task's settings: how they are spelled, which there are, and what they may be."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAvg

from mlx_fed.rounds.checkpoint import Checkpoints, read
from mlx_fed.lm.config import load_config
from mlx_fed.settings_check import KINDS, check_config
from mlx_fed.task_settings import TracedConfig

from .helpers.ids import stable_id
from .conftest import command
from .helpers.loopback import LoopbackGrid
from .helpers.simulated import SEED, TASK, load, simulate
from .helpers.federated import federate

pytestmark = pytest.mark.usefixtures("uncompiled")


def check(config: dict, task: fed.Task = TASK, source: Any = None, **options: Any) -> None:
    """What a run does with its settings, before it begins."""
    traced = TracedConfig(config)
    task = source(traced) if source else task
    check_config(traced, task, [source] if source else [], **options)


# -- names ---------------------------------------------------------------------------------

MOST = (
    "batch-size, compress, gradient-accumulation, learning-rate, local-epochs, local-steps, "
    "max-grad-norm, num-rounds"
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning-rat": 1}, "config: there is no setting learning-rat. Did you mean learning-ra"),
        ({"Learning-Rate": 1}, "no setting Learning-Rate. Did you mean learning-rate?"),
        ({"local_epoch": 1}, "no setting local-epoch. Did you mean local-epochs?"),
        ({"lr": 1}, f"no setting lr. There are {MOST}, .* declares its settings, .* Task.config"),
        ({"seed": 3}, "config: seed is not to be set, each run sets its own"),
        ({"server-round": 3}, "server-round is not to be set"),
        ({"learning_rate": 0.1, "learning-rate": 0.2}, "are one setting, .* 0.1 and 0.2"),
        ({7: 1}, "the name of a setting is text, not 7"),
    ],
    ids=stable_id,
)
def test_a_setting_that_nothing_reads_is_refused(config: dict, message: str):
    with pytest.raises(fed.FedError, match=message):
        check(config)


def test_every_slip_of_the_pen_is_found():
    declared = ("learning-rate", "momentum", "weight-decay", "num-classes-per-partition")
    task = replace(TASK, config=dict.fromkeys(declared, 1.0))
    drawn = random.Random(0)
    names = [*KINDS, *declared]
    for _ in range(500):
        name = drawn.choice(names)
        at = drawn.randrange(len(name))
        before, letter, after = name[:at], name[at], name[at + 1 :]
        other = drawn.choice("abcdefghijklmnopqrstuvwxyz-")
        typo = drawn.choice(
            [
                before + after,
                before + other + letter + after,
                before + other + after,
                before + after[:1] + letter + after[1:],
            ]
        )
        if typo in names:
            continue
        spelled = drawn.choice([typo, typo.replace("-", "_")])
        with pytest.raises(fed.FedError, match=f"no setting {typo}. Did you mean {name}?"):
            check({spelled: 1}, task)


def with_reader(read: Callable[[dict], Any], eager: bool) -> Callable[[dict], fed.Task]:
    """A task that is made of settings, and looks them up at once or as data is loaded."""

    def make(config: dict) -> fed.Task:
        if eager:
            read(config)

        def load_late(partition_id: int, num_partitions: int | None) -> fed.Data:
            read(config)
            return load(partition_id, num_partitions)

        return replace(TASK, data=load_late)

    return make


READERS: dict[str, Callable[[dict], Any]] = {
    "get": lambda config: config.get("hidden-size", 8),
    "get in snake_case": lambda config: config.get("hidden_size", 8),
    "item": lambda config: config["hidden-size"],
    "in": lambda config: "hidden_size" in config,
    "pop": lambda config: config.pop("hidden-size", None),
    "setdefault": lambda config: config.setdefault("hidden-size", 4),
    "all": lambda config: {**config},
    "merged": lambda config: {"hidden-size": 4} | config,
    "merged first": lambda config: config | {"other": 4},
    "copied": lambda config: config.copy(),
    "as keywords": lambda config: (lambda **settings: settings)(**config),
    "items": lambda config: [value for key, value in config.items() if key == "hidden-size"],
}


@pytest.mark.parametrize("eager", [True, False], ids=["at once", "late"])
@pytest.mark.parametrize("name", READERS)
def test_what_a_function_reads_is_a_setting(name: str, eager: bool):
    make = with_reader(READERS[name], eager)
    check({"hidden_size": 3}, source=make, num_clients=2)
    if name not in ("all", "merged", "merged first", "copied", "as keywords", "items"):
        with pytest.raises(fed.FedError, match="no setting hidden-sise"):
            check({"hidden-sise": 3, "hidden-size": 3}, source=make, num_clients=2)


def penalty(config: dict) -> float:
    return config.get("penalty", 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": lambda model, x, y, config: config.get("penalty", 0.0) * model(x).sum()},
        {"loss": lambda model, x, y, config: penalty(config) * model(x).sum()},
        {"metrics": {"size": lambda model, x, y, config: penalty(config) * model(x)}},
        {"metrics": {"size": fed.DatasetMetric(lambda model, x, y, config: penalty(config), sum)}},
        {"train_step": lambda model, optimizer, batch, key, config: mx.array(penalty(config))},
    ],
    ids=["loss", "loss, elsewhere", "metric", "dataset metric", "train step"],
)
def test_what_a_function_of_the_settings_reads_is_a_setting(fields: dict):
    task = replace(TASK, **fields)
    check({"penalty": 0.9}, task)
    with pytest.raises(fed.FedError, match="no setting penalti"):
        check({"penalti": 0.9}, task)


class Penalizing(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["learning-rate"] = penalty(config)
        return super().configure_train(server_round, arrays, config, grid)


def test_what_a_function_that_the_strategy_calls_reads_is_a_setting():
    check_config(TracedConfig({"penalty": 0.9}), TASK, [Penalizing()])
    with pytest.raises(fed.FedError, match="no setting penalti"):
        check_config(TracedConfig({"penalti": 0.9}), TASK, [Penalizing()])


def later(config: dict) -> Any:
    return optim.SGD(0.1 if config["server-round"] == 1 else penalty(config))


class Later:
    def rate(self, config: dict) -> float:
        return config.get("penalty", 0.0)

    def make(self, config: dict) -> Any:
        return optim.SGD(0.1 if config["server-round"] == 1 else self.rate(config))


@pytest.mark.parametrize("optimizer", [later, Later().make], ids=["function", "method"])
def test_what_the_optimizer_reads_in_later_rounds_is_a_setting(optimizer: Callable):
    check({"penalty": 0.9}, replace(TASK, optimizer=optimizer))
    with pytest.raises(fed.FedError, match="no setting penalti"):
        check({"penalti": 0.9}, replace(TASK, optimizer=optimizer))


@pytest.mark.parametrize("config", [3, "learning-rate=1", [("learning-rate", 1)]], ids=stable_id)
def test_settings_are_a_dictionary(config: Any):
    with pytest.raises(fed.FedError, match="config is a dictionary"):
        fed.simulate(TASK, config=config)
    with pytest.raises(fed.FedError, match=r"Task\.config is a dictionary"):
        replace(TASK, config=config)


def momentum(config: dict) -> Any:
    return optim.SGD(config["learning-rate"], momentum=config["momentum"])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda config: optim.SGD(0.1, momentum=config["momentum"]),
        lambda config: momentum(config),
        lambda config: optim.SGD(0.1, momentum={"momentum": 0, **config}["momentum"]),
        partial(momentum),
    ],
    ids=["item", "elsewhere", "all", "partial"],
)
def test_what_the_optimizer_reads_is_a_setting(optimizer: Callable):
    task = replace(TASK, optimizer=optimizer)
    check({"momentum": 0.9}, task)
    check({"learning-rate": 0.9, "momentum": 0.9}, task)


class Warm(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["learning-rate"] *= float(config.get("warm-up", 1))
        return super().configure_train(server_round, arrays, config, grid)


def test_what_a_strategy_reads_is_a_setting(tmp_path: Path):
    strategy = partial(Warm, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    simulate(strategy(), tmp_path, TASK, 2, num_rounds=1, config={"warm_up": 0.5})
    with pytest.raises(fed.FedError, match="no setting warm-upp"):
        simulate(strategy(), tmp_path, TASK, 2, num_rounds=1, config={"warm-upp": 0.5})


class InSnakeCase(FedAvg):
    """A strategy that sets one of the library's settings, as Python spells it."""

    def configure_train(self, server_round, arrays, config, grid):
        config["local_steps"] = 3
        return super().configure_train(server_round, arrays, config, grid)


def test_a_strategys_own_settings_are_spelled_either_way(tmp_path: Path):
    steps = replace(TASK, local_steps=3)
    expected = simulate(FedAvg(), tmp_path, steps, 2, num_rounds=1)
    in_simulation = simulate(InSnakeCase(), tmp_path, TASK, 2, num_rounds=1)
    on_nodes = federate(
        InSnakeCase(),
        tmp_path / "run",
        [fed.client_app(TASK)] * 2,
        task=TASK,
        num_rounds=1,
        seed=SEED,
    )
    for name, array in expected.parameters.items():
        assert mx.array_equal(in_simulation.parameters[name], array)
        assert np.allclose(on_nodes.parameters[name], array, atol=1e-6)


def test_a_slip_in_a_task_is_found():
    with pytest.raises(
        fed.FedError, match=r"Task.config: there is no setting local-epoch. Did you"
    ):
        check({}, replace(TASK, config={"local_epoch": 2}))
    reads = replace(
        TASK, config={"local-epoch": 2}, optimizer=lambda config: optim.SGD(config["local-epoch"])
    )
    check({}, reads)


# -- spelling ------------------------------------------------------------------------------


def test_both_spellings_are_one_setting_everywhere(tmp_path: Path):
    seen: set[tuple] = set()

    def optimizer(config: dict) -> Any:
        seen.add((config["learning_rate"], config["learning-rate"], config.get("local_steps")))
        return optim.SGD(config["learning_rate"])

    def make(config: dict) -> fed.Task:
        assert config["hidden_size"] == config["hidden-size"] == 4
        return replace(TASK, optimizer=optimizer, config={"learning_rate": 0.3})

    config = {"hidden_size": np.int64(4), "local_steps": 2}
    for batched in (True, False):
        one = simulate(FedAvg(), tmp_path, make, 3, config=config, batched=batched)
        other = simulate(FedAvg(), tmp_path, make, 3, config={"hidden-size": 4, "local-steps": 2})
        assert all(mx.array_equal(one.parameters[n], other.parameters[n]) for n in one.parameters)
    assert seen == {(0.3, 0.3, 2)}
    sent = json.loads((one.folder / "settings.json").read_text())["config"]
    assert {key: sent[key] for key in ("learning-rate", "hidden-size", "local-steps")} == {
        "learning-rate": 0.3,
        "hidden-size": 4,
        "local-steps": 2,
    }
    assert not any("_" in key for key in sent)


def test_two_spellings_of_one_value_are_one_setting():
    assert dict(TracedConfig({"batch_size": 3, "batch-size": 3})) == {"batch-size": 3}
    with pytest.raises(fed.FedError, match=r"Task.config: batch-size and batch_size are one"):
        replace(TASK, config={"batch_size": 3, "batch-size": 4})


def test_settings_travel_between_processes():
    config = TracedConfig({"batch_size": 3}, "-c")
    again = pickle.loads(pickle.dumps(config))
    assert (again, again.source, again["batch_size"]) == (config, "-c", 3)


def test_a_setting_that_is_missing_is_named():
    with pytest.raises(KeyError, match=r"no setting momentum: .* Task.config, or with -c momentum"):
        TracedConfig({})["momentum"]


def test_settings_of_mlx_lms_file_are_spelled_either_way(tmp_path: Path):
    path = tmp_path / "lora.yaml"
    path.write_text("learning-rate: 1e-4\nfederation:\n  local-iters: 3\n")
    config = load_config(path)
    assert (config.learning_rate, config.federation.local_iters) == (1e-4, 3)
    path.write_text("learning-rate: 1e-4\nlearning_rate: 1e-5\n")
    with pytest.raises(fed.FedError, match="has learning_rate twice"):
        load_config(path)


# -- values --------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
COUNTS = ("batch-size", "gradient-accumulation", "local-epochs", "local-steps")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1.5, 2.0, "big", 0, -1, True, NAN, [1]], ids=stable_id)
def test_counts_are_whole_numbers(name: str, value: Any):
    expected = re.escape(f"{name} is a whole number, 1 or more, not {value!r}.")
    with pytest.raises(fed.FedError, match=f"config: {expected}"):
        check({name.replace("-", "_"): value})
    with pytest.raises(fed.FedError, match=f"Task.config: {expected}"):
        check({}, replace(TASK, config={name: value}))
    field = name.replace("-", "_")
    with pytest.raises(fed.FedError, match=f"Task.{field} is a whole number, 1 or more"):
        replace(TASK, **{field: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"learning-rate": "fast"}, "learning-rate is a finite number, not 'fast'"),
        ({"learning-rate": NAN}, "learning-rate is a finite number, not nan"),
        ({"learning-rate": -INF}, "learning-rate is a finite number, not -inf"),
        ({"learning-rate": True}, "learning-rate is a finite number, not True"),
        ({"nesterov": "yes"}, "nesterov is true or false, not 'yes'"),
        ({"most": "x"}, "most is a finite number, not 'x'"),
        ({"name": 12}, r"""name is text \(in quotes where .*: '"12"'\), not 12"""),
        ({"name": True}, "name is text .* not True"),
        ({"sizes": 3}, "sizes is a list, each entry a finite number, not 3"),
        ({"sizes": ["3"]}, "sizes is a list, each entry a finite number, not \\['3'\\]"),
        ({"max-grad-norm": 0}, "max-grad-norm is a finite number above 0, not 0"),
        ({"max-grad-norm": INF}, "max-grad-norm is a finite number above 0, not inf"),
        ({"proximal-mu": -0.1}, "proximal-mu is a finite number, 0 or more, not -0.1"),
        ({"name": None}, "name is text .* not None"),
        ({"batches": [1, "a"]}, "batches is a number, text, .* to nodes, not \\[1, 'a'\\]"),
    ],
    ids=stable_id,
)
def test_a_value_that_cannot_be_is_refused(config: dict, message: str):
    declared = {"learning-rate": 1, "nesterov": False, "most": INF, "name": "a", "sizes": [1]}
    declared["batches"] = []
    with pytest.raises(fed.FedError, match=message):
        check(config, replace(TASK, config=declared))


def test_values_that_can_be_are_taken():
    declared = {"learning-rate": 1, "nesterov": False, "most": INF, "name": "a", "sizes": [1]}
    task = replace(TASK, config=declared)
    check({"learning-rate": 0.5, "nesterov": True, "most": INF, "name": "7", "sizes": [1, 2]}, task)
    check({"nesterov": 0, "most": 2, "batch-size": np.int32(2), "max-grad-norm": 1e-3}, task)


# -- where they are given ------------------------------------------------------------------


@pytest.mark.parametrize("lead", [partial(fed.serve, port=0, wait=0.0), fed.simulate])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"round_timout": 3}, r"has no argument 'round_timout'. Did you mean round_timeout\?"),
        ({"num_round": 3}, r"has no argument 'num_round'. Did you mean num_rounds\?"),
        ({"batch_size": 3}, r"has no argument 'batch_size'. Write config={\"batch-size\": ...}"),
        ({"hidden_layers": 3}, r"no argument 'hidden_layers'. It has .* config={\"hidden-layers\""),
        ({"config": {"round-timeout": 3}}, "Give it as --round-timeout, or round_timeout= in Pyth"),
        ({"config": {"round_timout": 3}}, "Did you mean --round-timeout, or round_timeout="),
        ({"config": {"fraction-train": 0.1}}, "an argument of the strategy, -s fraction-train=..."),
        ({"config": {"eval-batch-size": 9}}, r"a field of the task, Task\(eval_batch_size=...\)"),
        ({"config": {"local-epochs": 1.5}}, "config: local-epochs is a whole number, 1 or more"),
        ({"strategy": "fedavg"}, r"Flower has no strategy 'fedavg'. Did you mean FedAvg\?"),
        ({"strategy": "FedAdm"}, r"Flower has no strategy 'FedAdm'. Did you mean FedAdam\?"),
        ({"strategy": "best"}, "Flower has no strategy 'best'. It has Bulyan, FedAdagrad"),
        ({"strategy": FedAvg}, r"strategy is one of .* not .*: write FedAvg\(\)"),
        ({"strategy": FedAvg(fraction_train=1.5)}, "FedAvg: fraction_train is a number from 0 to"),
        ({"strategy": FedAvg(fraction_evaluate=-1)}, "FedAvg: fraction_evaluate is a number, from"),
        ({"seed": 1.5}, "seed is a whole number, not 1.5"),
        ({"min_replies": 1.5}, "min_replies is a whole number, 1 or more, not 1.5"),
        ({"patience": -1}, "patience is a whole number, 0 or more, not -1"),
        ({"target": "accuracy"}, "target is METRIC=VALUE, such as accuracy=0.95"),
        ({"target": "accuracy=high"}, "target: accuracy is a finite number, not 'high'"),
    ],
    ids=stable_id,
)
def test_what_python_refuses(lead: Callable, arguments: dict, message: str, tmp_path: Path):
    with pytest.raises(fed.FedError, match=message.replace("number from", "number, from")):
        lead(TASK, **{"runs": tmp_path, "listeners": (), **arguments})
    assert list(tmp_path.iterdir()) == []


def small(*arguments: object, task: str = "tests.helpers.simulated:TASK") -> tuple[int, str]:
    run = command("simulate", task, "--clients", 4, "--rounds", 1, "--workers", 0, *arguments)
    return run.code, " ".join(run.text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", "learning-rat=1"), "-c: there is no setting learning-rat. Did you mean learning-r"),
        (("-c", "local-epochs=1.5"), "-c: local-epochs is a whole number, 1 or more, not 1.5"),
        (("-c", "batch_size=big"), "-c: batch-size is a whole number, 1 or more, not 'big'"),
        (("-c", "batch_size=2", "-c", "batch-size=3"), "-c: batch-size and batch_size are one"),
        (("-c", "seed=2"), "-c: there is no setting seed. Give it as --seed"),
        (("-s", "fraction_train=1.5"), "-s: fraction-train is a number, from 0 to 1, not 1.5"),
        (("-s", "fraction_trian=1"), "-s: FedAvg has no argument fraction-trian. Did you mean fra"),
        (("-s", "min-train-nodes=1.5"), "-s: min-train-nodes is a whole number, 0 or more"),
        (("--strategy", "FedAdam", "-s", "eta=big"), "-s: eta is a finite number, not 'big'"),
        (("--strategy", "FedAdm"), "Flower has no strategy 'FedAdm'. Did you mean FedAdam?"),
    ],
    ids=stable_id,
)
def test_what_commands_refuse(arguments: tuple, message: str, tmp_path: Path):
    code, text = small(*arguments, "--runs", tmp_path)
    assert code == 1
    assert message in text
    assert list(tmp_path.iterdir()) == []


def test_what_commands_take(tmp_path: Path):
    code, text = small("--runs", tmp_path, "--name", "run", "-c", "learning_rate=0.1")
    assert code == 0, text
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["config"]["learning-rate"] == 0.1
    code, text = small("--runs", tmp_path, "-c", "hidden=4", task="tests.helpers.tasks:moons")
    assert code == 0, text
    texts = "tests.helpers.tasks:with_a_text"
    code, text = small("--runs", tmp_path, "-c", "name=12", task=texts)
    assert (code, "-c: name is text (in quotes" in text) == (1, True), text
    code, text = small("--runs", tmp_path, "-c", 'name="12"', "--name", "texts", task=texts)
    assert code == 0, text
    settings = json.loads((tmp_path / "texts" / "settings.json").read_text())
    assert settings["config"]["name"] == "12"
    code, text = small("--runs", tmp_path, "-c", "hiden=4", task="tests.helpers.tasks:moons")
    assert (code, "Did you mean hidden?" in text) == (1, True), text


def test_a_strategy_is_taken_by_its_name(tmp_path: Path):
    result = simulate("FedAvgM", tmp_path, TASK, 2, num_rounds=1)  # type: ignore[arg-type]
    settings = json.loads((result.folder / "settings.json").read_text())
    assert settings["strategy"]["name"] == "FedAvgM"


def test_settings_of_flwr_run_are_free_but_for_slips(tmp_path: Path):
    def lead(**run_config: Any) -> None:
        app = fed.server_app(TASK, "FedAvg", runs=tmp_path, num_rounds=1, wait=5.0)
        clients = [fed.client_app(TASK)] * 2
        grid = LoopbackGrid(clients, run_config=run_config)
        app(grid, Context(1, 0, {}, RecordDict(), run_config))

    lead(**{"some-mods": 3, "learning_rate": 0.1})
    for config, message in (
        ({"learning-rat": 1}, r"The run's config: there is no setting learning-rat. Did you mean"),
        ({"min-node": 2}, r"no setting min-node. Did you mean min-nodes\?"),
        ({"min-nodes": 1.5}, "The run's config: min-nodes is a whole number, 1 or more, not 1.5"),
        ({"local-epochs": "x"}, "The run's config: local-epochs is a whole number, 1 or more"),
    ):
        with pytest.raises(fed.FedError, match=message):
            lead(**config)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        (TASK, {"hidden": 3}, "config: there is no setting hidden. There are"),
        (with_reader(READERS["get"], False), {"hidden-sise": 3}, "Did you mean hidden-size"),
    ],
    ids=["a task", "a function"],
)
def test_what_a_node_refuses(source: Any, config: dict, message: str):
    with pytest.raises(fed.FedError, match=message):
        fed.join(source, "127.0.0.1:1", wait=0.0, config=config, listener=lambda event: None)


def test_a_node_says_which_settings_are_the_servers():
    told: list[str] = []

    def listen(event: events.Event) -> None:
        told.extend([event.text] if isinstance(event, events.Notice) else [])

    with pytest.raises(fed.FedError, match="No server at"):
        fed.join(TASK, "127.0.0.1:1", wait=0.0, config={"learning_rate": 0.5}, listener=listen)
    assert told == ["learning-rate: the server's values are trained with, not this node's"]


# -- runs that go on -----------------------------------------------------------------------


def test_a_run_of_an_older_version_goes_on_with_its_settings(tmp_path: Path):
    """It kept settings as they were spelled, and also those that nothing read."""
    config = {"learning_rate": 0.1, "colour": "red"}
    make = with_reader(lambda config: config.get("colour"), True)
    first = simulate(FedAvg(), tmp_path, make, 4, num_rounds=1, config=config, name="run")
    path = first.folder / "settings.json"
    path.write_text(path.read_text().replace('"learning-rate"', '"learning_rate"'))
    (path,) = (first.folder / "checkpoints").iterdir()
    whole = read(path)
    path.unlink()
    spelled = {key.replace("-", "_"): value for key, value in whole.identity["setting"].items()}
    writing = Checkpoints(first.folder, keep=3)
    writing.save(whole._replace(identity={**whole.identity, "setting": spelled}), lambda: None)
    writing.wait()
    again = simulate(FedAvg(), tmp_path, TASK, 4, num_rounds=2, config=config, resume="run")
    assert len(again.rounds) == 2
