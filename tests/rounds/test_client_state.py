"""What clients keep for themselves when a round is repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from mlx_fed.rounds import messages, loop
from mlx_fed.rounds.client_state import ClientStateError, load, save, rewind
from mlx_fed.flower import one_run_grid
from mlx_fed.runs.history import History
from mlx_fed.runs.result import Result
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import App, LoopbackGrid
from ..helpers.simulated import LOCAL, SEED, TASK, assert_same

KEEPING = {
    "personal": replace(TASK, personal=lambda name: name.startswith("layers.4")),
    "optimizer": replace(TASK, keep_optimizer=True, optimizer=lambda config: optim.Adam(0.02)),
    "statistics": LOCAL,
}


@pytest.fixture(params=KEEPING.values(), ids=KEEPING)
def task(request: pytest.FixtureRequest) -> fed.Task:
    return request.param


def lead(grid: LoopbackGrid, task: fed.Task, folder: Path, resume: bool = False) -> Result:
    folder.mkdir(exist_ok=True)
    settings = RunSettings(num_rounds=4, seed=SEED, min_replies=3)
    strategy = FedAvg(min_train_nodes=3, min_available_nodes=3)
    trainer = Trainer(task, SEED)
    return loop.run(grid, strategy, trainer, settings, History(folder), resume=resume)


def losing(app: App, number: int) -> App:
    """The first reply to training in a round is lost on its way: the client has trained."""
    lost: list[int] = []

    def answer(message: Message, context: Context) -> Message:
        training = message.metadata.message_type == MessageType.TRAIN
        reply = app(message, context)
        if training and int(message.metadata.group_id) == number and not lost:
            lost.append(number)
            raise ConnectionError("the reply was cut off")
        return reply

    return answer


def assert_same_run(one: Result, other: Result) -> None:
    """But for the traces of what happened."""
    plain = {"repeats": 0, "refused": [], "bytes": {}}
    assert_same(
        replace(one, rounds=[record | plain for record in one.rounds]),
        replace(other, rounds=[record | plain for record in other.rounds]),
    )


@pytest.mark.parametrize("number", [1, 3])
def test_a_repeated_round_starts_from_the_state_before_it(task, number: int, tmp_path: Path):
    app = fed.client_app(task)
    expected = lead(LoopbackGrid([app] * 3), task, tmp_path / "undisturbed")
    repeated = lead(LoopbackGrid([losing(app, number), app, app]), task, tmp_path / "repeated")
    assert repeated.rounds[number - 1]["repeats"] == 1
    assert_same_run(repeated, expected)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_resumed_run_starts_from_the_state_before_it(task, phase: str, tmp_path: Path):
    """The server dies in the third round, when its clients have trained in it."""
    app = fed.client_app(task)
    expected = lead(LoopbackGrid([app] * 3), task, tmp_path / "undisturbed")

    class Killed(Exception):
        pass

    def die(message: Message, context: Context) -> Message:
        kind = message.metadata.message_type
        if kind == phase and message.metadata.group_id == "3":
            grid.die()
        return app(message, context)

    class Mortal(LoopbackGrid):
        dying = alive = True

        def die(self) -> None:
            self.alive = not self.dying

        def pull_messages(self, message_ids):
            if not self.alive:
                self.alive, self.dying = True, False
                raise Killed
            return super().pull_messages(message_ids)

    grid = Mortal([app, app, die])
    with pytest.raises(Killed):
        lead(grid, task, tmp_path / "killed")
    resumed = lead(grid, task, tmp_path / "killed", resume=True)
    assert_same_run(resumed, expected)


def arrays(value: float) -> dict[str, mx.array]:
    return {"parameters/a": mx.array([value])}


def value(state: dict[str, mx.array] | None) -> float | None:
    return None if state is None else state["parameters/a"].item()


def train(context: RecordDict, *numbers: int | None) -> None:
    for number in numbers:
        before = value(rewind(context, number)) or 0.0
        save(context, number, arrays(before + 1))


def test_a_client_goes_back_two_rounds():
    context = RecordDict()
    train(context, 1, 2, 3, 4, 5, 6)
    assert value(load(context, 6)) == 6
    train(context, 5)
    assert value(load(context, 6)) == 5
    train(context, 6, 6)
    assert value(load(context, None)) == 6
    assert len(context) == 4, "three states, and that there was a first"


def test_a_client_goes_back_to_a_round_that_it_was_not_in():
    context = RecordDict()
    train(context, 2, 5, 9)
    assert value(load(context, 8)) == 2
    assert value(rewind(context, 9)) == 2
    assert value(rewind(context, 8)) == 2
    train(context, 8)
    assert value(load(context, 8)) == 3


def test_a_client_that_goes_back_further_says_so():
    context = RecordDict()
    train(context, 2, 3, 4, 5, 6, 7)
    for number in (3, 4, 5):
        with pytest.raises(ClientStateError, match="not that after round 2"):
            rewind(context, number)
    assert value(load(context, 7)) == 6, "and keeps what it has"
    assert rewind(context, 2) is None, "it had none"
    train(context, 2)
    assert value(load(context, None)) == 1


def test_a_round_of_which_nothing_is_kept_leaves_the_state_before_it():
    context = RecordDict()
    train(context, 1, 2)
    rewind(context, 2)
    save(context, 2, {})
    assert value(load(context, 2)) == 1


def test_a_server_that_does_not_count_rounds_goes_on_from_the_last_state():
    """As a loop of one's own over Flower's grid may."""
    one_run_grid.begin_run()
    task = KEEPING["personal"]
    app, context = fed.client_app(task), Context(1, 7, {"partition-id": 0}, RecordDict(), {})
    record = messages.pack(Trainer(task, SEED).parameters())
    losses = []
    for _ in range(3):
        content = RecordDict({"arrays": record, "config": ConfigRecord(task.config)})
        reply = app(Message(content, 7, MessageType.TRAIN), context)
        content = RecordDict({"arrays": record, "config": ConfigRecord(task.config)})
        reply = app(Message(content, 7, MessageType.EVALUATE), context)
        metrics = reply.content["metrics"]
        assert isinstance(metrics, MetricRecord)
        losses.append(metrics["loss"])
    assert len(set(losses)) == 3
