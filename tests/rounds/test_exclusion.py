"""Rounds that are repeated, and nodes that are left out because their replies are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from flwr.app import Context, Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy

from mlx_fed.rounds import messages, loop
from mlx_fed.flower.error_replies import failed_reply
from mlx_fed.rounds.exclusion import refused_running, to_leave_out

from ..helpers.replies import with_metrics, with_weight
from ..helpers.run_folders import read_history
from ..helpers.federated import CLIENT, NORMALIZED, difference, federate, on_train
from ..helpers.loopback import App

NAN = with_weight(lambda w: w * mx.nan)


def unfit_in(numbers: set[int], change: Callable[[Message], None] = NAN, times: int = 99) -> App:
    """A client whose training replies of some rounds are unfit, so many times at most."""
    left = {"times": times}

    def app(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        training = message.metadata.message_type == "train"
        if training and int(message.metadata.group_id) in numbers and left["times"]:
            left["times"] -= 1
            change(reply)
        return reply

    return app


def larger(reply: Message) -> None:
    reply.content["arrays"].update(messages.pack({"extra": mx.zeros((2**20,))}))


def of_round_7(reply: Message) -> None:
    reply.metadata.group_id = "7"


@pytest.mark.parametrize(
    ("change", "reason", "settings"),
    [
        (with_metrics(num_examples=500), "num-examples is 500, and more than 400", {}),
        (with_metrics(num_examples=1e13), "more than 1e+12", {"max_examples": 1e12}),
        (larger, "and no reply of this model more than", {}),
        (of_round_7, "it is a reply of round 7, expected round 1", {}),
        (
            with_weight(lambda w: w + 1e4),
            "more than 20 times the median of",
            {"max_update_norm": 20.0},
        ),
    ],
    ids=["many examples", "endless examples", "size", "another round", "norm"],
)
@pytest.mark.parametrize("kind", [FedAvg, FedMedian])
def test_what_cannot_be_believed_is_refused(kind, change, reason, settings, tmp_path: Path):
    apps = [CLIENT, on_train(change), CLIENT]
    leading = {"max_examples": 400.0, **settings}
    result = federate(kind(), tmp_path, apps, num_rounds=1, **leading)
    (record,) = result.rounds
    (refused,) = record["refused"]
    assert (refused["node"], refused["phase"]) == ("node-1", "train")
    assert reason in refused["reason"]
    assert record["train"]["nodes"] == ["node-0", "node-2"]


def test_examples_of_an_evaluation_are_believed_up_to_the_limit(tmp_path: Path):
    """They weigh its loss, by which the best round is chosen."""

    def app(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        if message.metadata.message_type == "evaluate":
            with_metrics(num_examples=500 if message.metadata.group_id == "1" else 400)(reply)
        return reply

    result = federate(FedAvg(), tmp_path, [app, CLIENT], num_rounds=2, max_examples=400.0)
    (refused,) = result.rounds[0]["refused"]
    assert (refused["node"], refused["phase"]) == ("node-0", "evaluate")
    assert "num-examples is 500, and more than 400 is not believed" in refused["reason"]
    evaluated = [record["evaluate"]["nodes"] for record in result.rounds]
    assert evaluated == [["node-1"], ["node-0", "node-1"]]


def test_a_limit_is_what_was_asked_for(tmp_path: Path):
    far = on_train(with_weight(lambda w: w + 1e4))
    free = {"max_update_norm": math.inf}
    result = federate(FedAvg(), tmp_path / "off", [CLIENT, far, CLIENT], num_rounds=1, **free)
    assert result.rounds[0]["refused"] == []
    result = federate(FedAvg(), tmp_path / "two", [CLIENT, far], num_rounds=1, max_update_norm=2.0)
    assert result.rounds[0]["refused"] == []


HUGE = {
    "update": (with_weight(lambda w: w * 0 + 1e18), "its update has the norm 6"),
    "infinite norm": (with_weight(lambda w: w * 0 + 1e30), "its update has the norm inf"),
    "weight": (
        with_metrics(num_examples=10**12),
        "num-examples is 1e+12, more than 1000 times the median of the others",
    ),
    "norm and weight": (
        lambda reply: [change(reply) for change, _ in (HUGE["weight"], HUGE["update"])],
        "its update has the norm 6",
    ),
}


@pytest.mark.parametrize("kind", [FedAvg, FedMedian])
@pytest.mark.parametrize("what", HUGE)
@pytest.mark.parametrize("place", [0, 2])
def test_by_default_no_node_takes_over(what: str, place: int, kind, tmp_path: Path):
    """Wherever it stands among the others, and whether they are summed as they come."""
    change, reason = HUGE[what]

    def changed(reply: Message) -> None:
        if reply.metadata.group_id == "2":
            change(reply)

    def apps(hostile: App) -> list[App]:
        return [hostile if node == place else CLIENT for node in range(4)]

    failing = unfit_in({2})  # which is refused for what it is by itself
    expected = federate(kind(), tmp_path / "expected", apps(failing), num_rounds=3)
    result = federate(kind(), tmp_path / "hostile", apps(on_train(changed)), num_rounds=3)
    assert [len(record["refused"]) for record in result.rounds] == [0, 1, 0]
    (refused,) = result.rounds[1]["refused"]
    assert refused["node"] == f"node-{place}"
    assert reason in refused["reason"]
    assert difference(result.parameters, expected.parameters) == 0


@pytest.mark.parametrize(("kind", "size"), [(FedAvg, 1e15), (FedMedian, 1e15), (FedAvg, 1e30)])
def test_running_statistics_are_in_proportion_too(kind, size, tmp_path: Path):
    def change(reply: Message) -> None:
        statistics = messages.unpack(reply.content["statistics"])
        far = {name: array + size for name, array in statistics.items()}
        reply.content["statistics"] = messages.pack(far)

    app = fed.client_app(NORMALIZED)
    apps = [app, on_train(change, app), app, app]
    result = federate(kind(), tmp_path, apps, task=NORMALIZED, num_rounds=1)
    (refused,) = result.rounds[0]["refused"]
    assert refused["node"] == "node-1"
    assert re.search(r"the change of its running statistics has the norm .*more", refused["reason"])
    assert all(mx.abs(array).max() < 10 for array in result.statistics.values())


def test_an_evaluation_weighs_no_more_than_it_may(tmp_path: Path):
    def app(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        if message.metadata.message_type == "evaluate":
            with_metrics(num_examples=10**9, loss=-1e30)(reply)
        return reply

    result = federate(FedAvg(), tmp_path, [app, CLIENT, CLIENT], num_rounds=1)
    (refused,) = result.rounds[0]["refused"]
    assert (refused["node"], refused["phase"]) == ("node-0", "evaluate")
    assert "num-examples is 1e+09, more than 1000 times the median" in refused["reason"]
    assert result.rounds[0]["evaluate"]["loss"] > 0


@pytest.mark.parametrize("times", [300, 0.003], ids=["larger", "smaller"])
def test_honest_nodes_may_be_very_unequal(times: float, tmp_path: Path):
    """Hundreds of times as many examples, or an update dozens of times as large."""

    def change(reply: Message) -> None:
        count = reply.content["metrics"]["num-examples"]
        with_metrics(num_examples=max(1, int(count * times)))(reply)

    farther = with_weight(lambda w: w * times / 20)
    for name, each in (("weight", change), ("norm", farther)):
        for count in (2, 3):
            apps = [on_train(each), *[CLIENT] * (count - 1)]
            result = federate(FedAvg(), tmp_path / f"{name}-{count}", apps, num_rounds=1)
            assert result.rounds[0]["refused"] == []


def test_of_two_nodes_neither_excludes_the_other(tmp_path: Path):
    """A huge update does not count, and is held against nobody: it may be the other that lies."""
    huge = on_train(with_weight(lambda w: w * 0 + 1e30))
    result = federate(FedAvg(), tmp_path, [CLIENT, huge], num_rounds=4)
    for record in result.rounds:
        assert "left_out" not in record
        (refused,) = record["refused"]
        assert (refused["node"], refused["excused"]) == ("node-1", True)
        assert record["train"]["nodes"] == ["node-0"]


def test_nodes_are_not_left_out_for_a_model_that_fails(tmp_path: Path):
    """Where half of the replies or more are not finite, it is what they were sent."""
    ill = range(1, 6)
    apps = [CLIENT, unfit_in({*ill}), unfit_in({*ill}, with_metrics(loss=math.nan)), CLIENT]
    result = federate(FedAvg(), tmp_path / "half", apps, num_rounds=6)
    assert [record.get("left_out") for record in result.rounds] == [None] * 6
    assert all(each["excused"] for record in result.rounds for each in record["refused"])
    assert result.rounds[5]["refused"] == []
    apps = [CLIENT, unfit_in({*ill}), CLIENT]
    result = federate(FedAvg(), tmp_path / "fewer", apps, num_rounds=3)
    assert result.rounds[2]["left_out"] == ["node-1"]


def renamed(reply: Message) -> None:
    reply.content["measured"] = reply.content.pop("metrics")


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize(
    "change",
    [with_metrics(mood=1.0), lambda reply: reply.content["metrics"].pop("loss"), renamed],
    ids=["more", "fewer", "renamed"],
)
@pytest.mark.parametrize("kind", [FedAvg, FedMedian])
def test_of_two_ways_to_name_things_the_tasks_own_counts(kind, change, phase, tmp_path: Path):
    """Also where the odd one comes first."""

    def odd(message: Message, context: Context) -> Message:
        reply = CLIENT(message, context)
        if message.metadata.message_type == phase:
            change(reply)
        return reply

    result = federate(kind(), tmp_path, [odd, CLIENT], num_rounds=1)
    (refused,) = result.rounds[0]["refused"]
    assert (refused["node"], refused["phase"]) == ("node-0", phase)
    assert result.rounds[0][phase]["nodes"] == ["node-1"]


def test_a_node_is_left_out_after_three_refusals_running_and_that_is_said(tmp_path: Path):
    told: list[dict] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.NodeRefused):
            told.append(event)

    apps = [CLIENT, unfit_in({1, 2, 4, 5, 6, 7}), CLIENT]
    result = federate(FedAvg(), tmp_path, apps, num_rounds=7, listener=listener)
    took_part = [record["train"]["nodes"] for record in result.rounds]
    assert took_part[2] == ["node-0", "node-1", "node-2"]
    assert [record.get("left_out") for record in result.rounds] == [None] * 5 + [["node-1"], None]
    assert [len(record["refused"]) for record in result.rounds] == [1, 1, 0, 1, 1, 1, 0]
    assert result.rounds[6]["evaluate"]["nodes"] == ["node-0", "node-2"]
    (event,) = told
    assert event.node == "node-1"
    assert event.reason.startswith("3 replies running were refused, the last for this: ")


def test_a_strategy_that_wants_all_nodes_does_not_wait_for_one_left_out(tmp_path: Path):
    """It is left out when the round is over; before the next there is a limit to the wait."""
    apps = [CLIENT, unfit_in({1, 2, 3}), CLIENT]
    strategy = FedAvg(min_available_nodes=3)
    with pytest.raises(loop.RunError, match=r"2 of 3 nodes came .* left out: node-1: 3 replies"):
        federate(strategy, tmp_path, apps, num_rounds=4, wait=0.2)
    *_, last = read_history(tmp_path)
    assert last["left_out"] == ["node-1"]
    assert last["evaluate"]["nodes"] == ["node-0", "node-1", "node-2"]


def test_a_resumed_run_counts_on(tmp_path: Path):
    apps = [CLIENT, unfit_in({1, 2, 3, 4}), CLIENT]
    federate(FedAvg(), tmp_path, apps, num_rounds=2)
    result = federate(FedAvg(), tmp_path, apps, num_rounds=4, resume=True)
    assert [record.get("left_out") for record in result.rounds] == [None, None, ["node-1"], None]


def test_being_gone_counts_neither_before_nor_after_a_resumption(tmp_path: Path):
    def gone(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return CLIENT(message, context)
        return failed_reply(message, "node 1 has left", missing=True)

    apps = [CLIENT, gone, CLIENT]
    federate(FedAvg(), tmp_path, apps, num_rounds=2)
    result = federate(FedAvg(), tmp_path, apps, num_rounds=5, resume=True)
    assert [record.get("left_out") for record in result.rounds] == [None] * 5
    expected = {"node": "node-1", "phase": "train", "reason": "node 1 has left", "missing": True}
    assert [record["refused"] for record in result.rounds] == [[expected]] * 5


def test_only_what_a_node_sent_in_training_counts():
    late = {"node": "a", "phase": "train", "reason": "no reply", "missing": True}
    unfit = {"node": "a", "phase": "train", "reason": "NaN"}
    evaluated = {"node": "a", "phase": "evaluate", "reason": "no test examples"}
    records = [{"refused": [unfit, unfit]}, {"refused": [late, evaluated]}, {"refused": [unfit]}]
    assert refused_running(records, "a") == 3
    assert set(to_leave_out(records)) == {"a"}
    assert to_leave_out([*records, {"refused": [late]}]) == {}
    assert refused_running([*records, {"refused": [], "train": {"nodes": ["a"]}}], "a") == 0
    assert refused_running([{"refused": [unfit], "left_out": ["a"]}, records[2]], "a") == 1


# -- rounds that are repeated --------------------------------------------------------------


class Scheduled(FedAvg):
    """Sends a rate that falls from round to round."""

    rate = 1.0

    def configure_train(self, server_round, arrays, config, grid):
        self.rate /= 2
        config["learning-rate"] = self.rate
        return super().configure_train(server_round, arrays, config, grid)


@pytest.mark.parametrize("kind", [FedAvg, FedAdam, FedMedian, Scheduled])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("keep", [0, 3])
def test_a_repeated_round_ends_as_if_it_had_been_well(kind, number, keep, tmp_path: Path):
    expected = federate(kind(), tmp_path / "well", (CLIENT,) * 3)
    notes: list[str] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    apps = [unfit_in({number}, times=1) for _ in range(3)]
    result = federate(kind(), tmp_path / "ill", apps, listener=listener, keep=keep)
    assert difference(result.parameters, expected.parameters) == 0
    repeated = result.rounds[number - 1]
    assert repeated["repeats"] == 1
    assert len(repeated["refused"]) == 3
    assert [record["round"] for record in result.rounds] == [1, 2, 3]
    assert len(notes) == 1
    assert f"Round {number}: none of 3 nodes" in notes[0]
    assert "The round is run again (repeat 1 of 2)." in notes[0]


def test_a_round_is_repeated_where_fewer_count_than_have_to(tmp_path: Path):
    apps = [unfit_in({1}, times=2), CLIENT, CLIENT]
    result = federate(FedAvg(), tmp_path, apps, num_rounds=1, min_replies=3)
    assert result.rounds[0]["repeats"] == 2
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1", "node-2"]


def test_a_repeated_round_draws_other_nodes(tmp_path: Path):
    """Two of seven are drawn; with luck as bad as this one would draw the same two for ever."""
    asked: list[list[int]] = []

    class Watched(FedAvg):
        def configure_train(self, *arguments):
            drawn = list(super().configure_train(*arguments))
            asked.append(sorted(message.metadata.dst_node_id for message in drawn))
            return drawn

    with pytest.raises(loop.RunError):
        federate(Watched(0.3), tmp_path, [unfit_in({1})] * 7, num_rounds=1, max_repeats=4)
    assert len(asked) == 5
    assert len({tuple(nodes) for nodes in asked}) > 1


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_a_run_stops_when_a_round_cannot_be_had_and_goes_on_later(kind, tmp_path: Path):
    def strategy() -> Strategy:
        return kind(min_available_nodes=3)

    expected = federate(strategy(), tmp_path / "well", (CLIENT,) * 3)
    apps = [unfit_in({2}) for _ in range(3)]
    with pytest.raises(loop.RunError, match="Round 2: none of 3 nodes"):
        federate(strategy(), tmp_path / "ill", apps, max_repeats=1)
    assert [record["round"] for record in read_history(tmp_path / "ill")] == [1]
    result = federate(strategy(), tmp_path / "ill", (CLIENT,) * 3, resume=True)
    assert difference(result.parameters, expected.parameters) == 0


def test_a_node_is_left_out_while_a_round_is_repeated(tmp_path: Path):
    apps = [CLIENT, unfit_in({1}), CLIENT]
    result = federate(FedAvg(), tmp_path, apps, num_rounds=1, min_replies=2, max_repeats=5)
    assert result.rounds[0].get("repeats") is None
    apps = [CLIENT, unfit_in({1}), CLIENT, CLIENT]
    folder = tmp_path / "four"
    result = federate(FedAvg(), folder, apps, num_rounds=1, min_replies=4, max_repeats=5)
    (record,) = result.rounds
    assert (record["repeats"], record["left_out"]) == (3, ["node-1"])
    assert record["train"]["nodes"] == ["node-0", "node-2", "node-3"]
