"""What closes a phase: a quorum and a grace time, by a clock of the test's own."""

from __future__ import annotations

import math
from collections import Counter
from itertools import count, pairwise

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from mlx_fed.rounds.closing import LEAST_GRACE, MISSES, QuorumClosing
from mlx_fed.rounds.settings import RunSettings

NEVER = math.inf
EIGHT = [f"node-{number}" for number in range(8)]
SILENT = EIGHT[-1]


class Clocked:
    """A run in which each node needs its own time for a phase, late or not.

    Args:
        settings: Those of the run.
    """

    step = 0.25

    def __init__(self, **settings: float):
        self.closing = QuorumClosing(RunSettings(**settings))
        self.now = 0.0
        self.ids = dict(zip(EIGHT, count(1)))
        self.late: list[tuple[float, str]] = []
        self.busy: dict[str, float] = {}
        self.asked: Counter[str] = Counter()
        self.message_ids = count()

    def phase(
        self, phase: str, seconds: dict[str, float], pieces: dict[str, float] | None = None
    ) -> tuple[float, set[str]]:
        """One phase: how long it took, and whose replies came in time.

        Args:
            phase (str): ``"train"`` or ``"evaluate"``.
            seconds (dict): How long each node works on its message, once it is free.
            pieces (dict, optional): How long its reply then is on its way, in pieces.
        """
        self.take_late()
        aside = self.closing.set_aside(phase, {node: self.ids[node] for node in seconds})
        start, nodes = self.now, [node for node in seconds if node not in aside]
        self.asked.update(nodes)
        worked = {
            node: max(0.0, self.busy.get(node, 0.0) - start) + seconds[node] for node in nodes
        }
        transfer = pieces or {}
        arrival = {node: worked[node] + transfer.get(node, 0.0) for node in nodes}
        replies: dict[str, float] = {}
        pending = set(nodes)
        while pending:
            self.take_late()
            elapsed = self.now - start
            for node in sorted(pending, key=arrival.__getitem__):
                if arrival[node] <= elapsed:
                    replies[node] = arrival[node]
                    self.closing.replied(phase, node, arrival[node])
                    pending.remove(node)
            last = {n: elapsed if worked[n] <= elapsed else None for n in pending}
            for node in self.closing.overdue(phase, elapsed, replies, last):
                message_id = str(next(self.message_ids))
                self.closing.withdrawn(message_id, phase, node, start)
                is_begun = self.busy.get(node, 0.0) <= self.now  # else it never sees the message
                if is_begun and worked[node] < NEVER:
                    self.late.append((start + worked[node], message_id))
                    self.busy[node] = start + worked[node]
                pending.remove(node)
            if pending:
                self.now += self.step
        return self.now - start, set(replies)

    def take_late(self) -> None:
        for time, message_id in [each for each in self.late if each[0] <= self.now]:
            self.late.remove((time, message_id))
            self.closing.replied_late(message_id, time)

    def rounds(self, number: int, train: dict[str, float], evaluate: dict[str, float]) -> Counter:
        """How often each node's update came in time."""
        trained: Counter[str] = Counter()
        for _ in range(number):
            trained.update(self.phase("train", train)[1])
            self.phase("evaluate", evaluate)
        return trained


def all_in(seconds: float, **others: float) -> dict[str, float]:
    return dict.fromkeys(EIGHT, seconds) | {k.replace("_", "-"): v for k, v in others.items()}


@pytest.mark.parametrize(
    ("rounds", "train", "evaluate"), [(400, 1.0, 0.25), (120, 5.0, 1.0), (100, 60.0, 10.0)]
)
def test_one_silent_node_of_eight_costs_a_tenth_of_the_run_at_most(rounds, train, evaluate):
    with_it, without = Clocked(), Clocked()
    trained = with_it.rounds(rounds, all_in(train, node_7=NEVER), all_in(evaluate, node_7=NEVER))
    without.rounds(rounds, all_in(train), all_in(evaluate))
    assert with_it.now <= 1.1 * without.now
    assert trained == Counter(dict.fromkeys(EIGHT[:-1], rounds)), "the others miss nothing"
    assert with_it.asked[SILENT] < 12


@pytest.mark.parametrize("times", [2, 3.5, 10, 40])
def test_an_honest_node_is_waited_for_however_slow_it_is(times):
    """It may miss the first rounds, while the server does not know how long it takes."""
    run = Clocked()
    run.step = 2.5
    rounds = 3 * times
    trained = run.rounds(
        int(rounds), all_in(60.0, node_7=60.0 * times), all_in(5.0, node_7=5.0 * times)
    )
    missed_at_first = 0 if times <= 10 else times
    assert trained[SILENT] >= int(rounds) - missed_at_first


def test_nodes_that_take_turns_to_be_slow_are_waited_for():
    run = Clocked()
    for number in range(24):
        slow = EIGHT[number % 8]
        _, replies = run.phase("train", all_in(10.0) | {slow: 38.0})
        assert replies == set(EIGHT)


def test_a_slow_transfer_is_waited_for_as_long_as_pieces_arrive():
    run = Clocked()
    seconds, replies = run.phase("train", all_in(5.0), {SILENT: 1000.0})
    assert replies == set(EIGHT)
    assert seconds == 1005.0


def test_a_reply_that_is_announced_and_never_ends_is_waited_for_less_and_less():
    closing = QuorumClosing(RunSettings())
    replies = dict.fromkeys(EIGHT[:-1], 1.0)
    last = []
    for _ in range(MISSES):
        waited = next(s for s in range(10_000) if closing.overdue("train", s, replies, {SILENT: 1}))
        last.append(waited)
    assert last[0] > 100
    assert [later < earlier / 2 for earlier, later in pairwise(last)] == [True, True]
    assert closing.set_aside("train", dict.fromkeys(EIGHT, 1)).keys() == {SILENT}


def test_a_node_that_never_evaluates_is_still_trained_with():
    run = Clocked()
    trained = run.rounds(100, all_in(5.0), all_in(1.0, node_7=NEVER))
    assert trained[SILENT] == 100
    assert run.asked[SILENT] < 100 + 12


def test_whoever_joins_anew_is_asked_anew_with_less_grace():
    run = Clocked()
    silent = all_in(5.0, node_7=NEVER)
    run.rounds(3, silent, silent)
    asked = run.asked[SILENT]
    for number in range(10, 15):
        run.ids[SILENT] = number
        seconds, _ = run.phase("train", silent)
        assert seconds < 6
    assert run.asked[SILENT] == asked + 5
    _, replies = run.phase("train", all_in(5.0) | {SILENT: 5.1})
    assert SILENT not in replies, "its id is the last one: it has not shown itself"
    run.ids[SILENT] = 20
    _, replies = run.phase("train", all_in(5.0))
    assert SILENT in replies


def test_late_replies_do_not_buy_a_node_time_again_and_again():
    """One is excused; the next ones count only after a reply in time."""
    run = Clocked()
    honest, hostile = 0.0, 0.0
    for _ in range(100):
        seconds, replies = run.phase("train", all_in(5.0, node_7=NEVER))
        hostile, honest = hostile + seconds, honest + 5.0
        # It announces a reply when it is too late, each time.
        for message_id in list(run.closing._withdrawn):
            run.closing.replied_late(message_id, run.now)
        assert SILENT not in replies
    assert hostile < 1.7 * honest
    _, replies = run.phase("train", all_in(5.0))
    assert SILENT in replies, "it is asked as before"


def test_nobody_is_waited_for_less_where_all_reply_or_all_are_asked_for():
    slow = Clocked(grace=NEVER)
    seconds, replies = slow.phase("train", all_in(1.0, node_7=3000.0))
    assert (seconds, replies) == (3000.0, set(EIGHT))
    needed = Clocked(min_replies=8)
    seconds, replies = needed.phase("train", all_in(1.0, node_7=3000.0))
    assert (seconds, replies) == (3000.0, set(EIGHT))
    timeout = Clocked(min_replies=8, round_timeout=100.0)
    assert timeout.phase("train", all_in(1.0, node_7=3000.0))[0] == 100.0


def test_a_grace_of_ones_own_is_neither_longer_nor_shorter():
    run = Clocked(grace=2.0)
    assert run.phase("train", all_in(1.0, node_7=2.75))[1] == set(EIGHT)
    seconds, replies = run.phase("train", all_in(1.0, node_7=4.0))
    assert (seconds, SILENT in replies) == (3.25, False)


def test_when_most_go_silent_the_others_go_on_after_one_timeout():
    run = Clocked(round_timeout=600.0)
    silent = dict.fromkeys(EIGHT[2:], NEVER)
    assert run.phase("train", all_in(1.0) | silent)[0] == 600.0
    seconds = [run.phase("train", all_in(1.0) | silent)[0] for _ in range(3)]
    assert sum(seconds) < 2 * LEAST_GRACE
    assert run.phase("train", all_in(1.0) | silent) == (1.0, set(EIGHT[:2]))


def test_where_all_would_be_set_aside_all_are_asked():
    run = Clocked(round_timeout=10.0)
    for _ in range(6):
        seconds, replies = run.phase("train", dict.fromkeys(EIGHT, NEVER))
        assert (seconds, replies) == (10.0, set())
    assert run.phase("train", all_in(1.0))[1] == set(EIGHT)
