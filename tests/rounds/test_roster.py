"""Who takes part in a run, who is waited for, and why others are left out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import pytest
from flwr.app import Context, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from mlx.utils import tree_flatten

from mlx_fed.rounds import messages, roster, loop
from mlx_fed.runs import status
from mlx_fed.runs.history import History
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.training.trainer import Trainer

from ..helpers.loopback import App, LoopbackGrid
from ..helpers.federated import CLIENT, SEED, TASK, federate
from ..helpers.run_folders import read_history

pytestmark = pytest.mark.usefixtures("uncompiled")


def appending(told: list[events.Event], kind: type[events.Event]) -> events.Listener:
    def listen(event: events.Event) -> None:
        if isinstance(event, kind):
            told.append(event)

    return listen


def lead(grid: Grid, folder: Path, listener=None, **settings) -> loop.Result:
    """A run of one round by two nodes or more."""
    leading = RunSettings(num_rounds=1, seed=SEED, **settings)
    history = History(folder, (listener,) if listener else ())
    return loop.run(grid, FedAvg(), Trainer(TASK, SEED), leading, history)


class Forgetful(LoopbackGrid):
    """A grid that cannot store the first messages of a kind, and says so as Flower's does."""

    kind = ""
    node_id = 2
    times = 1

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return ["" if self._fails(message) else self._push(message) for message in messages]

    def _fails(self, message: Message) -> bool:
        to, kind = message.metadata.dst_node_id, message.metadata.message_type
        fails = self.times > 0 and to == self.node_id and kind == self.kind
        self.times -= fails
        return fails


def test_a_node_that_could_not_be_asked_is_asked_again(tmp_path: Path):
    grid = Forgetful([CLIENT] * 3)
    grid.kind = "query.roll_call"
    result = lead(grid, tmp_path, min_nodes=3)
    assert grid.times == 0
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1", "node-2"]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_node_that_could_not_be_sent_a_message_is_left_out(kind: str, tmp_path: Path):
    told: list[dict] = []
    grid = Forgetful([CLIENT] * 3)
    grid.kind = kind
    result = lead(
        grid,
        tmp_path,
        appending(told, events.ReplyRefused),
    )
    expected = {"node": "node-1", "phase": kind, "reason": "the message to it could not be sent"}
    assert [event.to_dict() for event in told] == [expected]
    assert result.rounds[0]["refused"] == [{**expected, "missing": True}]
    assert result.rounds[0][kind]["nodes"] == ["node-0", "node-2"]


class Slow(LoopbackGrid):
    """A grid that brings one answer at a time, those to the roll call a while after each other."""

    delay = 0.2
    given = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.given < len(self.contexts):
            self.given += 1
            time.sleep(self.delay)
        return super().pull_messages(sorted(message_ids)[:1])


def test_a_roll_call_goes_on_for_as_long_as_answers_come(tmp_path: Path, monkeypatch):
    """A simulation of many nodes takes longer over it than one silent node may."""
    monkeypatch.setattr(roster, "_PATIENCE", 5 * Slow.delay)
    result = lead(Slow([CLIENT] * 7), tmp_path)
    assert len(result.rounds[0]["train"]["nodes"]) == 7


class Silent(LoopbackGrid):
    """A grid that brings one answer at a time, and none of its last node."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        *_, last = self.contexts
        answers = {i: self._replies[i] for i in message_ids if i in self._replies}
        heard = [i for i, answer in answers.items() if answer.metadata.src_node_id != last]
        return super().pull_messages(heard[:1])


@pytest.mark.parametrize("wait", [0.3, 60.0], ids=["until the wait is over", "for its patience"])
def test_a_silent_node_holds_up_the_start_only_so_long(wait: float, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(roster, "_PATIENCE", 60.3 - wait)
    result = lead(Silent([CLIENT] * 3), tmp_path, wait=wait)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]


def test_a_run_without_nodes_says_why_they_were_left_out(tmp_path: Path):
    other = fed.client_app(replace(TASK, model=lambda: nn.Linear(5, 3)))
    with pytest.raises(loop.RunError, match=r"0 of 2 nodes came within 0 seconds; ") as raised:
        federate(FedAvg(), tmp_path, [other] * 5, wait=0.2)
    assert (
        "left out: node-4: its model is not the server's: parameter 'layers.0.weight' is missing; "
        "node-3: " in str(raised.value)
    )
    assert "; and 2 more. Start more nodes" in str(raised.value)


def test_who_is_not_let_in_stands_in_the_runs_status(tmp_path: Path):
    other = fed.client_app(replace(TASK, model=lambda: nn.Linear(5, 3)))
    federate(FedAvg(), tmp_path, [CLIENT, CLIENT, other], num_rounds=1)
    ((name, reason),) = status.read(tmp_path)["refused"].items()
    assert name == "node-2"
    assert reason.startswith("its model is not the server's: parameter 'layers.0.weight'")


def test_a_node_that_left_when_it_was_refused_is_remembered(tmp_path: Path):
    """As our nodes do."""
    grid = LoopbackGrid([CLIENT])

    def leaves(event: events.Event) -> None:
        if isinstance(event, events.NodeRefused):
            grid.apps.clear()

    with pytest.raises(loop.RunError, match="left out: node-0: its model is not the server's"):
        loop.run(
            grid,
            FedAvg(),
            Trainer(replace(TASK, model=lambda: nn.Linear(5, 3)), SEED),
            RunSettings(wait=0.2),
            History(tmp_path, (leaves,)),
        )


def test_a_name_is_one_nodes_alone(tmp_path: Path):
    """The record of a run knows nodes by their names."""
    grid = LoopbackGrid([CLIENT] * 3)
    for node_id in (1, 2):
        grid.contexts[node_id].node_config["name"] = "mac"
    told: list[dict] = []
    result = lead(
        grid,
        tmp_path,
        appending(told, events.NodeRefused),
    )
    (refused,) = told
    assert refused.node == "mac"
    assert "its name is taken by the node with id 0" in refused.reason
    assert result.rounds[0]["train"]["nodes"] == ["mac", "node-2"]


def test_a_node_with_another_fingerprint_is_turned_away(tmp_path: Path):
    """Whatever a task says has to be the same, beside its parameters' names and shapes."""
    told: list[dict] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.NodeRefused):
            told.append(event)

    same, other = (
        replace(TASK, fingerprint=lambda digest=digest: {"base model": digest})
        for digest in ("3f2a", "9c1b")
    )
    apps = [fed.client_app(task) for task in (same, same, other, TASK)]
    history = History(tmp_path, (listen,))
    leading = RunSettings(num_rounds=1, seed=SEED)
    result = loop.run(LoopbackGrid(apps), FedAvg(), Trainer(same, SEED), leading, history)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]
    assert [event.reason for event in told] == [
        "its base model is not the server's: 9c1b, expected 3f2a",
        "its base model is not the server's: None, expected 3f2a",
    ]


def test_what_only_a_node_says_is_not_asked_of_it(tmp_path: Path):
    telling = replace(TASK, fingerprint=lambda: {"base model": "3f2a", "tokenizer": lambda: "9c1b"})
    apps = [fed.client_app(task) for task in (telling, TASK)]
    leading = RunSettings(num_rounds=1, seed=SEED)
    history = History(tmp_path)
    result = loop.run(LoopbackGrid(apps), FedAvg(), Trainer(TASK, SEED), leading, history)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]


def test_a_task_saves_the_model_in_a_form_of_its_own(tmp_path: Path):
    def save(model: nn.Module, folder: Path) -> Path:
        model.save_weights(str(folder / "weights.npz"))
        return folder / "weights.npz"

    apps = [CLIENT] * 2
    trainer = Trainer(replace(TASK, save=save), SEED)
    leading = RunSettings(num_rounds=1, seed=SEED)
    result = loop.run(LoopbackGrid(apps), FedAvg(), trainer, leading, History(tmp_path))
    assert result.model == tmp_path / "weights.npz"
    assert not (tmp_path / "model.safetensors").exists()
    model = TASK.model()
    model.load_weights(str(result.model))
    for name, array in result.parameters.items():
        assert mx.array_equal(dict(tree_flatten(model.parameters()))[name], array)


@pytest.mark.parametrize("answer", ["[]", "[" * 100_000], ids=["list", "nested"])
@pytest.mark.parametrize("what", ["fingerprint", "parameters"])
def test_an_answer_to_the_roll_call_that_is_no_answer(what: str, answer: str, tmp_path: Path):
    told: list[dict] = []
    task = replace(TASK, fingerprint=lambda: {"base model": "3f2a"})
    node = fed.client_app(task)

    def odd(message: Message, context: Context) -> Message:
        reply = node(message, context)
        if message.metadata.message_type == messages.ROLL_CALL:
            reply.content["node"][what] = answer
        return reply

    def listen(event: events.Event) -> None:
        if isinstance(event, events.NodeRefused):
            told.append(event)

    grid, history = LoopbackGrid([node, node, odd]), History(tmp_path, (listen,))
    loop.run(grid, FedAvg(), Trainer(task, SEED), RunSettings(num_rounds=1, seed=SEED), history)
    assert [event.node for event in told] == ["node-2"]
    assert "unreadable answer" in told[0].reason


def with_versions(text: str | None) -> App:
    """A client whose answer to the roll call has these versions."""

    def app(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        if message.metadata.message_type == messages.ROLL_CALL:
            record = reply.content["node"]
            if text is None:
                del record["versions"]
            else:
                record["versions"] = json.dumps({**json.loads(record["versions"]), "mlx": text})
        return reply

    return app


def test_other_versions_are_said_once_and_recorded(tmp_path: Path):
    notes: list[events.Event] = []
    apps = [CLIENT, with_versions("0.1"), with_versions("0.1"), with_versions(None)]
    result = federate(
        FedAvg(),
        tmp_path,
        [*apps, with_versions("0.2")],
        num_rounds=2,
        min_nodes=5,
        listener=appending(notes, events.Notice),
    )
    texts = [note.text for note in notes if "last bits" in note.text]
    assert len(texts) == 2, "one for each difference"
    assert {text.split(",")[0].split(" has ")[1] for text in texts} == {"mlx 0.1", "mlx 0.2"}
    first, second = read_history(tmp_path)
    assert first["versions"].keys() == {"node-1", "node-2", "node-4"}
    assert first["versions"]["node-4"].startswith("mlx 0.2, here ")
    assert "versions" not in second
    assert len(result.rounds[0]["train"]["nodes"]) == 5, "nobody is left out for it"
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["versions"]["python"]


def test_a_run_that_goes_on_with_other_versions_says_so(tmp_path: Path):
    federate(FedAvg(), tmp_path, num_rounds=1)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    settings["versions"]["numpy"] = "1.0"
    path.write_text(json.dumps(settings))
    notes: list[events.Event] = []
    listener = appending(notes, events.Notice)
    federate(FedAvg(), tmp_path, num_rounds=2, resume=True, listener=listener)
    assert [
        n.text for n in notes if n.text.startswith("before round 2 the run had numpy 1.0, here")
    ]
