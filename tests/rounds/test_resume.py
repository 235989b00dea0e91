"""A run that was stopped goes on to the result that it would have reached."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import fields as fields_of
from dataclasses import replace
from filecmp import cmp
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, Strategy

from mlx_fed.rounds.checkpoint import Checkpoint, CheckpointError, Checkpoints, read
from mlx_fed.errors import FedError
from mlx_fed.runs.history import HistoryError
from mlx_fed.arrays.spool import Spool
from mlx_fed.rounds.strategy_state import State, StateError

from ..conftest import command
from ..helpers.run_folders import read_history
from ..helpers.federated import BFLOAT16, NORMALIZED, TASK, difference, federate
from ..helpers.strategies import STRATEGIES, run_ours
from ..helpers.run_folders import checkpoints, figures

pytestmark = pytest.mark.usefixtures("uncompiled")


def assert_same_end(resumed: fed.Result, expected: fed.Result) -> None:
    assert difference(resumed.parameters, expected.parameters) == 0
    if expected.statistics:
        assert difference(resumed.statistics, expected.statistics) == 0
    assert figures(resumed.rounds) == figures(expected.rounds)
    assert read_history(resumed.folder) == resumed.rounds
    for name in ("model.safetensors", "best.safetensors"):
        assert cmp(resumed.folder / name, expected.folder / name, shallow=False), name


# -- to the result of a run that was not stopped -------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_to_the_same_bits(name: str, tmp_path: Path):
    make = STRATEGIES[name]
    expected = run_ours(make(), tmp_path / "whole", num_rounds=4)
    run_ours(make(), tmp_path / "parts", num_rounds=2)
    resumed = run_ours(make(), tmp_path / "parts", num_rounds=4, resume=True)
    assert_same_end(resumed, expected)


class Averaged(FedMedian):
    """A strategy of one's own: its median moves, in place and with moments that share arrays."""

    def __init__(self) -> None:
        super().__init__(fraction_train=0.6)
        self.seen: list[Any] = []
        self.fast: dict[str, np.ndarray] = {}
        self.slow = self.fast

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        for name, array in arrays.items():
            new = array.numpy().astype(np.float64)
            if name in self.fast:
                self.slow[name] += 0.3 * (new - self.fast[name])
            else:
                self.fast[name] = new
        self.seen.append((server_round, random.random(), dict(metrics)))
        shift = np.float32(self.seen[0][1])
        moved = {name: Array(a + shift * len(self.seen)) for name, a in self.slow.items()}
        return ArrayRecord(moved), metrics


def test_a_strategy_of_ones_own_goes_on_to_the_same_bits(tmp_path: Path):
    expected = federate(Averaged(), tmp_path / "whole", num_rounds=5)
    federate(Averaged(), tmp_path / "parts", num_rounds=2)
    for num_rounds in (3, 5):
        strategy = Averaged()
        resumed = federate(strategy, tmp_path / "parts", num_rounds=num_rounds, resume=True)
    assert_same_end(resumed, expected)
    assert strategy.fast is strategy.slow


@pytest.mark.parametrize("task", [NORMALIZED, BFLOAT16], ids=["statistics", "bfloat16"])
def test_masters_and_statistics_go_on(task: fed.Task, tmp_path: Path):
    apps = [fed.client_app(task)] * 3
    expected = federate(FedAvgM(0.5), tmp_path / "whole", apps, task=task, num_rounds=4)
    federate(FedAvgM(0.5), tmp_path / "parts", apps, task=task, num_rounds=2)
    resumed = federate(FedAvgM(0.5), tmp_path / "parts", apps, task=task, num_rounds=4, resume=True)
    assert_same_end(resumed, expected)


class Stopped(Exception):
    """What ends a run here."""


def stop_in(number: int, phase: str) -> Callable[[str, dict], None]:
    def listen(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and (event.round, event.phase) == (number, phase):
            raise Stopped

    return listen


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_round_that_was_cut_short_is_repeated(number: int, phase: str, tmp_path: Path):
    """Its strategy had gone on already: it starts from what it was before the round."""
    expected = federate(FedAdam(), tmp_path / "whole", num_rounds=4)
    with pytest.raises(Stopped):
        federate(FedAdam(), tmp_path / "parts", num_rounds=4, listener=stop_in(number, phase))
    resumed = federate(FedAdam(), tmp_path / "parts", num_rounds=4, resume=True)
    assert_same_end(resumed, expected)


SIMULATED = ["FedAvg", "FedAvgM", "FedAdam", "FedMedian", "QFedAvg"]


def simulated(strategy: Strategy, runs: Path, task: fed.Task = TASK, **options) -> fed.Result:
    options = {"workers": 0, "seed": 7, "listeners": (), "num_clients": 7, **options}
    return fed.simulate(task, strategy, runs=runs, **options)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulations_go_on_to_the_same_bits(name: str, tmp_path: Path):
    make = STRATEGIES[name]
    expected = simulated(make(), tmp_path, name="whole", num_rounds=4)
    listeners = (stop_in(3, "evaluate"),)
    with pytest.raises(Stopped):
        simulated(make(), tmp_path, name="parts", num_rounds=4, listeners=listeners)
    resumed = simulated(make(), tmp_path, resume="parts")  # as many rounds as it was to have
    assert_same_end(resumed, expected)


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_clients_of_a_simulation_have_their_own_statistics_again(stop: int, tmp_path: Path):
    task = replace(NORMALIZED, statistics="local")

    def half() -> Strategy:
        return FedAvg(
            fraction_train=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
        )

    expected = simulated(half(), tmp_path, task, name="whole", num_rounds=6)
    listeners = (stop_in(stop, "evaluate"),)
    with pytest.raises(Stopped):
        simulated(half(), tmp_path, task, name="parts", num_rounds=6, listeners=listeners)
    newest = checkpoints(tmp_path / "parts")[stop - 1]
    newest.write_bytes(newest.read_bytes()[:-1])  # so it goes on from further back
    resumed = simulated(half(), tmp_path, task, resume=tmp_path / "parts")
    assert_same_end(resumed, expected)


def test_a_run_that_is_done_can_be_asked_for_more_rounds_only(tmp_path: Path):
    expected = federate(FedAdam(), tmp_path / "run", num_rounds=2)
    told: list[str] = []
    again = federate(
        FedAdam(),
        tmp_path / "run",
        num_rounds=1,
        resume=True,
        listener=lambda event: told.append(event.name),
    )
    assert_same_end(again, expected)
    assert told == ["resumed", "started", "finished"]


def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path):
    def run_id(name: str, **arguments: Any) -> str:
        folder = federate(FedAvg(), tmp_path / name, **arguments).folder
        return json.loads((folder / "settings.json").read_bytes())["config"]["run-id"]

    first = run_id("run", num_rounds=1)
    assert run_id("run", num_rounds=2, resume=True) == first
    assert run_id("other", num_rounds=1) != first


class InColumns(FedAvg):
    """Gives its arrays as Fortran lays them out."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        turned = {name: Array(np.asfortranarray(a.numpy())) for name, a in arrays.items()}
        return ArrayRecord(turned), metrics


def test_how_a_strategy_lays_out_its_arrays_is_of_no_account(tmp_path: Path):
    expected = federate(InColumns(), tmp_path / "whole", num_rounds=3)
    federate(InColumns(), tmp_path / "parts", num_rounds=1)
    resumed = federate(InColumns(), tmp_path / "parts", num_rounds=3, resume=True)
    assert_same_end(resumed, expected)


# -- only if it is the same run ------------------------------------------------------------


def other_model(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def half_precision() -> nn.Module:
    model = TASK.model()
    model.set_dtype(mx.float16)
    return model


def frozen() -> nn.Module:
    model = TASK.model()
    model.layers[0].freeze()
    return model


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"strategy": FedAvg()}, "strategy name was FedAdam and is FedAvg"),
        ({"strategy": FedAdam(eta=0.5)}, "strategy eta was 0.1 and is 0.5"),
        ({"config": {"learning-rate": 0.3}}, "setting learning-rate was 0.2 and is 0.3"),
        ({"config": {"momentum": 0.9}}, "setting momentum was absent and is 0.9"),
        ({"batch_size": 8}, "task batch_size was 16 and is 8"),
        ({"keep_optimizer": True}, "task keep_optimizer was False and is True"),
        ({"weight_unit": "tokens"}, "task weight_unit was absent and is tokens"),
        (
            {"personal": lambda name: name == "layers.0.bias"},
            r"layers.0.bias was float32 \(8,\) and is float32 \(8,\), personal",
        ),
        (
            {"fingerprint": lambda: {"base model": "3f2a"}},
            "fingerprint base model was absent and is 3f2a",
        ),
        (
            {"model": other_model(9)},
            r"layers.0.weight was float32 \(8, 5\) and is float32 \(9, 5\)",
        ),
        ({"model": half_precision}, r"layers.0.bias was float32 \(8,\) and is float16 \(8,\)"),
        ({"model": frozen}, r"parameters layers.0.weight was float32 \(8, 5\) and is absent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_changed_is_refused(changed: dict, difference: str, tmp_path: Path):
    federate(FedAdam(), tmp_path, (fed.client_app(TASK),) * 3, num_rounds=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    names = {field.name for field in fields_of(fed.Task)} - {"config"}
    fields = {key: value for key, value in changed.items() if key in names}
    others = {key: value for key, value in changed.items() if key not in fields}
    strategy = others.pop("strategy", None) or FedAdam()
    with pytest.raises(CheckpointError, match=rf"cannot go on.*: .*{difference}"):
        federate(strategy, tmp_path, (), task=replace(TASK, **fields), resume=True, **others)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"num_clients": 6}, "clients was 7 and is 6"),
        ({"faults": fed.Faults(failure_rate=0.5)}, "faults failure_rate was 0.0 and is 0.5"),
        (
            {"faults": fed.Faults(hostile=0.2, attack="scale")},
            "faults hostile was 0.0 and is 0.2; faults attack was sign-flip and is scale",
        ),
    ],
)
def test_a_simulation_that_changed_is_refused(changed: dict, difference: str, tmp_path: Path):
    simulated(FedAvg(), tmp_path, name="run", num_rounds=1)
    with pytest.raises(CheckpointError, match=rf"cannot go on.*: {difference}\. "):
        simulated(FedAvg(), tmp_path, resume="run", num_rounds=2, **changed)
    assert len(read_history(tmp_path / "run")) == 1


def test_a_simulation_of_an_older_version_goes_on(tmp_path: Path):
    """Its checkpoints do not say how many clients there are."""
    simulated(FedAvg(), tmp_path, name="run", num_rounds=1)
    (path,) = checkpoints(tmp_path / "run").values()
    whole = read(path)
    path.unlink()
    identity = {k: v for k, v in whole.identity.items() if k not in ("clients", "faults")}
    assert identity != whole.identity
    writing = Checkpoints(tmp_path / "run", keep=3)
    writing.save(whole._replace(identity=identity), lambda: None)
    writing.wait()
    assert len(simulated(FedAvg(), tmp_path, resume="run", num_rounds=2).rounds) == 2


def test_how_many_nodes_are_waited_for_may_change(tmp_path: Path):
    federate(FedAvg(min_available_nodes=7), tmp_path, num_rounds=1)
    result = federate(FedAvg(), tmp_path, (fed.client_app(TASK),) * 3, num_rounds=2, resume=True)
    assert [len(record["train"]["nodes"]) for record in result.rounds] == [7, 3]


def test_a_strategy_that_cannot_be_kept_is_refused_at_the_start(tmp_path: Path):
    strategy = FedAvg()
    strategy.rng = np.random.default_rng(0)
    with pytest.raises(StateError, match=r"FedAvg\.rng is a numpy.*Generator.*--keep 0"):
        federate(strategy, tmp_path / "kept")
    result = federate(strategy, tmp_path / "not", num_rounds=1, keep=0)
    assert not (result.folder / "checkpoints").exists()


def test_a_run_has_one_leader(tmp_path: Path):
    def lead_too(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            with pytest.raises(HistoryError, match="is being led by another process"):
                federate(FedAvg(), tmp_path, num_rounds=1, resume=True)

    federate(FedAvg(), tmp_path, num_rounds=1, listener=lead_too)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": "nothing"}, "There is no run 'nothing' to resume, neither in"),
        ({"resume": "other"}, "There is no run 'other' to resume"),
        ({"resume": "run", "name": "new"}, "leave out --name to resume it"),
    ],
)
def test_a_folder_that_is_no_run(arguments: dict, message: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FedError, match=message):
        simulated(FedAvg(), tmp_path, **arguments)


# -- past what is damaged ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, fed.Result]:
    """A run that was stopped in its fourth round, and the one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    expected = simulated(FedAdam(), folder, name="whole", num_rounds=4)
    listeners = (stop_in(4, "evaluate"),)
    with pytest.raises(Stopped):
        simulated(FedAdam(), folder, name="stopped", num_rounds=4, listeners=listeners)
    return folder / "stopped", expected


def copy_of(stopped: tuple[Path, fed.Result], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped[0], tmp_path / "run"))


def resume_to(expected: fed.Result, folder: Path) -> list[tuple[str, dict]]:
    told: list[tuple[str, dict]] = []
    listeners = (told.append,)
    resumed = simulated(FedAdam(), folder.parent, resume=folder.name, listeners=listeners)
    assert_same_end(resumed, expected)
    return told


def damages(size: int, header: int) -> list[tuple[str, int]]:
    """Each kind of place in a file: the header's length, the header, its end, the arrays."""
    places = [0, 7, 8, 9, header // 2, header - 1, header, (header + size) // 2, size - 1]
    return [(kind, place) for kind in ("cut", "flip", "zero") for place in places]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, tmp_path: Path):
    folder = copy_of(stopped, tmp_path)
    newest = checkpoints(folder)[3]
    whole = newest.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    kept = Checkpoints(folder, 3)
    for kind, place in damages(len(whole), header):
        damaged = bytearray(whole)
        if kind == "cut":
            del damaged[place:]
        elif kind == "flip":
            damaged[place] ^= 1
        else:
            damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
        if damaged == whole:
            continue
        newest.write_bytes(damaged)
        named: list[Path] = []
        last = kept.last(lambda path, why, named=named: named.append(path))
        assert last is not None
        assert (last.round, named) == (2, [newest]), (kind, place)

    told = resume_to(stopped[1], folder)
    (note,) = [event.text for event in told if isinstance(event, events.Notice)]
    assert newest.name in note
    assert "its bytes do not have the checksum of its name" in note
    assert events.RunResumed(2) in told


def test_a_file_that_was_given_a_checkpoints_name_is_not_read(stopped, tmp_path: Path):
    folder = copy_of(stopped, tmp_path)
    (folder / "checkpoints" / "00009-01234567.safetensors").write_bytes(b"\xff" * 100)
    (folder / "checkpoints" / "00003.part").write_bytes(b"half")
    (folder / "checkpoints" / "notes.safetensors").write_bytes(b"mine")
    told = resume_to(stopped[1], folder)
    assert events.RunResumed(3) in told
    left = {path.name.partition("-")[0] for path in (folder / "checkpoints").iterdir()}
    assert left == {"00002", "00003", "00004", "notes.safetensors"}


def test_without_a_whole_checkpoint_a_run_does_not_start_over(stopped, tmp_path: Path):
    folder = copy_of(stopped, tmp_path)
    for path in checkpoints(folder).values():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"None of the 3 checkpoints in .* is whole"):
        simulated(FedAdam(), tmp_path, resume="run")


@pytest.mark.parametrize("cut", [1, 20, -2, -1])
def test_half_a_line_of_history_is_repaired(cut: int, stopped, tmp_path: Path):
    folder = copy_of(stopped, tmp_path)
    history = folder / "history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(b"".join(lines) + lines[-1].replace(b'"round": 3', b'"round": 4')[:cut])
    resume_to(stopped[1], folder)


def test_rounds_after_the_checkpoint_are_dropped(stopped, tmp_path: Path):
    folder = copy_of(stopped, tmp_path)
    checkpoints(folder)[3].unlink()
    assert len(read_history(folder)) == 3
    told = resume_to(stopped[1], folder)
    assert events.RunResumed(2) in told


# -- what is kept --------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path: Path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.0, 6: 1.0}
    models: dict[int, dict] = {}

    def evaluate(number: int, parameters: dict, statistics: dict) -> dict:
        models[number] = parameters
        return {"loss": losses[number]}

    federate(FedAvg(), tmp_path, num_rounds=4, keep=2, evaluate_fn=evaluate)
    assert checkpoints(tmp_path).keys() == {2, 3, 4}
    result = federate(FedAvg(), tmp_path, num_rounds=6, keep=1, evaluate_fn=evaluate, resume=True)
    assert checkpoints(tmp_path).keys() == {2, 6}
    assert result.best == tmp_path / "best.safetensors"
    assert difference(mx.load(str(result.best)), models[2]) == 0
    assert difference(mx.load(str(result.model)), models[6]) == 0
    TASK.model().load_weights(str(result.best))


def test_a_checkpoint_is_readable(tmp_path: Path):
    federate(FedAdam(), tmp_path, num_rounds=2)
    path = checkpoints(tmp_path)[2]
    arrays, metadata = mx.load(str(path), return_metadata=True)
    assert metadata["round"] == "2"
    assert {"parameters/layers.0.weight", "strategy/FedAdam.m_t['layers.0.weight']"} <= set(arrays)
    kept: Checkpoint = read(path)
    assert kept.identity["strategy"]["name"] == "FedAdam"
    saved = mx.load(str(tmp_path / "model.safetensors"))
    assert difference(dict(kept.masters), saved) == 0


def test_large_parameters_of_a_checkpoint_wait_on_disk(tmp_path: Path):
    values = np.arange(2**19, dtype=np.float32)
    saved = Checkpoint(1, ArrayRecord({"w": Array(values)}), {}, State({}, {}), None, {})
    kept = Checkpoints(tmp_path, 1)
    kept.save(saved, lambda: None)
    kept.wait()
    read_again = kept.last(lambda path, why: pytest.fail(why), Spool(tmp_path / "waiting"))
    assert len(list((tmp_path / "waiting").iterdir())) == 1
    assert np.array_equal(read_again.masters["w"].numpy(), values)


def test_a_disk_that_is_full_ends_the_run_with_what_was_reached(tmp_path: Path):
    def fill(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record["round"] == 2:
            while not (tmp_path / "checkpoints").exists():  # it is made beside the rounds
                time.sleep(0.01)
            (tmp_path / "checkpoints" / "00003.part").symlink_to("/dev/full")

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(HistoryError, match="No space left on device"):
        federate(FedAvg(), tmp_path, num_rounds=5, listener=fill)
    assert {2}.issubset(checkpoints(tmp_path))
    resumed = federate(FedAvg(), tmp_path, num_rounds=5, resume=True)
    assert [record["round"] for record in resumed.rounds] == [1, 2, 3, 4, 5]


# -- the commands --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["serve", "simulate"])
def test_a_command_says_which_run_there_is_not(name: str, tmp_path: Path):
    code, text = command(name, "tests.helpers.tasks:moons", "--runs", tmp_path, "--resume", "gone")
    assert code == 1
    assert "Error: There is no run 'gone' to resume" in text


def test_the_quickstarts_server_says_which_run_there_is_not(start, tmp_path: Path):
    process = start("server.py", "--port", 0, "--runs", tmp_path, "--resume", "gone")
    assert process.ends() == 1
    assert "Error: There is no run 'gone' to resume" in process.text


def test_a_command_goes_on_with_its_run(tmp_path: Path):
    simulate = ("simulate", "tests.helpers.tasks:moons", "--workers", "0", "--clients", "3")
    first = command(*simulate, "--runs", tmp_path, "--name", "run", "--rounds", 2, "--keep", 1)
    assert first.code == 0, first.text
    assert checkpoints(tmp_path / "run").keys() == {2}
    second = command(*simulate, "--resume", tmp_path / "run", "--rounds", 3)
    assert second.code == 0, second.text
    assert "Resuming after round 2" in second.text
    assert [record["round"] for record in read_history(tmp_path / "run")] == [1, 2, 3]
