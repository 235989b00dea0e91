"""Grids for one run: what the round loop asks of a grid beyond Flower's, with defaults."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from ..arrays.spool import Spool
from ..arrays.weighted_mean import Block
from .error_replies import is_missing

_POLL = 0.1
"""Seconds between looks at a grid that cannot be waited for."""


def begin_run(run_id: int = 1, task_id: int = 1) -> None:
    """Sets this process's ``TaskIdentity``, which Flower's ``Message(...)`` has its sender from."""
    TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def set_message_id(message: Message, message_id: str) -> None:
    """Sets the id of a message, which Flower has as read-only: its reply refers to it."""
    message.metadata.__dict__["_message_id"] = message_id


class ClientFailure(NamedTuple):
    """Reason why the message at a place has no update; ``missing`` if its node sent nothing."""

    place: int
    reason: str
    missing: bool = False


class SummedUpdates(Protocol):
    """Updates of some of the messages: their sums by block, and failures."""

    @property
    def blocks(self) -> list[Block]: ...

    @property
    def failures(self) -> list[ClientFailure]: ...


class OneRunGrid(Grid):
    """A grid for one run, with defaults for what it need not be able to do.

    Attributes:
        virtual_time (bool): The grid has the clock that ends a phase, not the round loop.
        spool (Spool, optional): Where the grid keeps what nodes send.
    """

    virtual_time = False
    spool: Spool | None = None

    @property
    def bytes_sent(self) -> int | None:
        """Bytes that nodes have received so far; None if the grid does not count them."""
        return None

    def wait(self, timeout: float) -> None:
        """Waits for news of nodes or replies, at most ``timeout`` seconds."""
        time.sleep(min(timeout, _POLL))

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Withdraws messages, so that late nodes do not work on rounds that are over."""

    def late_replies(self) -> Mapping[str, float]:
        """Withdrawn messages to which replies came since the last call, and the monotonic time of
        each."""
        return {}

    def last_pieces(self, message_ids: Iterable[str]) -> Mapping[str, float]:
        """When the last piece of an incomplete reply arrived, in monotonic time, by message."""
        return {}

    def sum_updates(
        self, messages: Sequence[Message], weighted_by: str
    ) -> Iterator[SummedUpdates] | None:
        """Trains and sums updates where they are computed; None if the grid cannot.

        Args:
            messages (list): Training messages of one content; their order gives nodes their places.
            weighted_by (str): The metric that weighs an update.
        """
        return None

    def name_of(self, node_id: int) -> str | None:
        """The name that a node must have, if the grid knows it."""
        return None

    def number_of(self, node_id: int) -> int | None:
        """The partition that a node must have, if the grid knows it."""
        return None

    def set_run(self, run: Any) -> None:
        raise RuntimeError("This grid has its run already.")

    @property
    def run(self) -> Any:
        raise RuntimeError("This grid's run is not kept by Flower.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Flower's ``Message(...)``, which new code calls itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class FlowerGrid(OneRunGrid):
    """Any Flower grid, with the defaults of :class:`OneRunGrid`."""

    def __init__(self, grid: Grid):
        self._grid = grid
        self._withdrawn: set[str] = set()
        self._late: dict[str, float] = {}

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for reply in self._grid.pull_messages([*message_ids, *self._withdrawn]):
            message_id = reply.metadata.reply_to_message_id
            if message_id not in self._withdrawn:
                replies.append(reply)
                continue
            self._withdrawn.remove(message_id)
            if not is_missing(reply):
                self._late[message_id] = time.monotonic()
        return replies

    def withdraw(self, message_ids: Iterable[str]) -> None:
        self._withdrawn.update(message_ids)

    def late_replies(self) -> Mapping[str, float]:
        late_messages, self._late = self._late, {}
        return late_messages

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


def one_run_grid(grid: Grid) -> OneRunGrid:
    """The grid itself if it is one of ours, or else an adapter around it."""
    return grid if isinstance(grid, OneRunGrid) else FlowerGrid(grid)
