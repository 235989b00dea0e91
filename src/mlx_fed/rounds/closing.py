"""What closes a phase of a round: a quorum of replies, and a grace time for the others after it.

A server cannot tell a node that trains slowly from one that will never reply: both send heartbeats.
What tells them apart is that the slow one replies in the end. So a phase that closes without a node
goes on watching for its late reply, and waits for that node longer the next time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from .settings import RunSettings

LEAST_GRACE = 30.0
"""Seconds of grace at least: a node without a heartbeat is offline after 20."""
GRACE_TIMES = 3.0
"""How many times the quorum's time the grace is, by default."""
FIRST_TIMES = 10.0
"""How many times, for a node whose own time is not known yet."""
OWN_TIMES = 2.0
"""How many times a node's last time it has, by default, where that is longer."""
TRANSFER_PAUSE = 120.0
"""Seconds without a piece of a reply after which its transfer stands still: pieces have 5 MiB."""
MISSES = 3
"""Phases that a node may miss before it is set aside; each has a quarter of the grace before."""
_SHORTER = 4.0
_MOST_WITHDRAWN = 10_000


class Closing(Protocol):
    """What closes phases. One object lasts for a run; nodes go by their names."""

    def set_aside(self, phase: str, nodes: Mapping[str, int]) -> Mapping[str, str]:
        """Nodes that a phase does not ask, with the reason.

        Args:
            phase (str): ``"train"`` or ``"evaluate"``.
            nodes (dict): The ids of the nodes that the strategy selected.
        """

    def overdue(
        self,
        phase: str,
        seconds: float,
        replies: Mapping[str, float],
        pending: Mapping[str, float | None],
    ) -> Mapping[str, str]:
        """Nodes that a phase stops waiting for, with the reason.

        Args:
            phase (str): ``"train"`` or ``"evaluate"``.
            seconds (float): Seconds since the messages were sent.
            replies (dict): When each reply came, in the same seconds.
            pending (dict): The other nodes, and when the last piece of a reply arrived.
        """

    def replied(self, phase: str, node: str, seconds: float) -> None:
        """A reply came in time."""

    def withdrawn(self, message_id: str, phase: str, node: str, start: float) -> None:
        """A message was withdrawn that was sent at this monotonic time."""

    def replied_late(self, message_id: str, time: float) -> None:
        """A reply to a message that was withdrawn came, at this monotonic time."""


class _Withdrawn(NamedTuple):
    phase: str
    node: str
    start: float


@dataclass
class _Attendance:
    """What a node has missed, and how long its replies take.

    Attributes:
        misses (Counter): By phase, consecutive messages without a reply in time.
        seconds (dict): By phase, the time of its last reply.
        excused (set): Phases whose late reply excused misses, without one in time since.
        has_returned (bool): A sign of it came since the last miss.
        skips (Counter): How often each phase has not asked it since it last did.
    """

    misses: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    has_returned: bool = False
    skips: Counter[str] = field(default_factory=Counter)


class QuorumClosing:
    """Closes a phase a grace time after a quorum of replies, and at the round's timeout.

    The quorum is half of the nodes that missed nothing lately, and ``min_replies`` in training. The
    grace is ``settings.grace`` seconds, or by default the longest of :data:`LEAST_GRACE`,
    :data:`GRACE_TIMES` the quorum's time (:data:`FIRST_TIMES` the first time), and what makes
    :data:`OWN_TIMES` the node's last time; and a reply whose pieces arrive is waited for. With each
    message that a node misses its grace is a quarter. After :data:`MISSES` it is set aside until it
    shows itself, by a late reply or by joining anew, or until a number of phases has passed that
    doubles with each miss.

    A late reply excuses what was missed before it; another of that phase only after one in time.
    """

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self._nodes: dict[str, _Attendance] = {}
        self._ids: dict[str, int] = {}
        self._withdrawn: dict[str, _Withdrawn] = {}

    def set_aside(self, phase: str, nodes: Mapping[str, int]) -> Mapping[str, str]:
        """Nodes that a phase does not ask, unless these are all."""
        aside: dict[str, str] = {}
        for name in nodes.keys() & self._nodes.keys():
            node = self._nodes[name]
            node.has_returned |= self._ids.get(name, nodes[name]) != nodes[name]
            misses = node.misses.total()
            is_absent = misses >= MISSES and node.misses[phase] and not node.has_returned
            if is_absent and node.skips[phase] < 2**misses:
                aside[name] = f"not asked: it missed {misses} messages, and did not reply since"
        self._ids.update(nodes)
        if len(aside) == len(nodes):
            return {}
        for name in nodes.keys() & self._nodes.keys():
            skips = self._nodes[name].skips
            skips[phase] = skips[phase] + 1 if name in aside else 0
        return aside

    def overdue(
        self,
        phase: str,
        seconds: float,
        replies: Mapping[str, float],
        pending: Mapping[str, float | None],
    ) -> Mapping[str, str]:
        """Nodes whose grace is over; each has one more miss."""
        if seconds >= self.settings.round_timeout:
            within = f"within {self.settings.round_timeout:.0f} seconds"
            reasons = dict.fromkeys(pending, f"no reply {within}: one that comes later is dropped")
        else:
            quorum = self._quorum(phase, [*replies, *pending])
            if len(replies) < quorum:
                return {}
            quorum_time = sorted(replies.values())[quorum - 1]
            reasons = {
                node: f"no reply within {seconds - quorum_time:.1f} seconds after {quorum} others: "
                "one that comes later is dropped"
                for node, last_piece in pending.items()
                if seconds > self._deadline(phase, node, quorum_time, last_piece)
            }
        for name in reasons:
            node = self._nodes.setdefault(name, _Attendance())
            node.misses[phase] += 1
            node.has_returned = False
        return reasons

    def _quorum(self, phase: str, nodes: list[str]) -> int:
        present = [node for node in nodes if not self._misses(node)]
        quorum = math.ceil(len(present or nodes) / 2)
        return max(quorum, self.settings.min_replies) if phase == "train" else quorum

    def _deadline(
        self, phase: str, name: str, quorum_time: float, last_piece: float | None
    ) -> float:
        """When a node's grace is over, in seconds since the phase began."""
        share = _SHORTER ** -self._misses(name)
        if self.settings.grace is not None:
            return quorum_time + self.settings.grace * share
        own_time = self._nodes.get(name, _Attendance()).seconds.get(phase)
        times = FIRST_TIMES if own_time is None and share == 1.0 else GRACE_TIMES
        own_grace = OWN_TIMES * (own_time or 0.0) - quorum_time
        grace = max(LEAST_GRACE, times * quorum_time, own_grace)
        deadline = quorum_time + grace * share
        if last_piece is not None:
            deadline = max(deadline, last_piece + TRANSFER_PAUSE * share)
        return deadline

    def _misses(self, name: str) -> int:
        return self._nodes[name].misses.total() if name in self._nodes else 0

    def replied(self, phase: str, node: str, seconds: float) -> None:
        """Its misses of this phase are over."""
        attendance = self._nodes.setdefault(node, _Attendance())
        attendance.misses[phase] = 0
        attendance.seconds[phase] = seconds
        attendance.excused.discard(phase)

    def withdrawn(self, message_id: str, phase: str, node: str, start: float) -> None:
        """Notes the message, whose late reply is a sign of its node."""
        self._withdrawn[message_id] = _Withdrawn(phase, node, start)
        while len(self._withdrawn) > _MOST_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]

    def replied_late(self, message_id: str, time: float) -> None:
        """The node is asked again, and waited for longer."""
        if (message := self._withdrawn.pop(message_id, None)) is None:
            return
        node = self._nodes.setdefault(message.node, _Attendance())
        node.has_returned = True
        if message.phase not in node.excused:
            node.misses.clear()
            node.excused.add(message.phase)
            node.seconds[message.phase] = time - message.start
