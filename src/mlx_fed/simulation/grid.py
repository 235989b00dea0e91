"""A Flower grid whose nodes are simulated on this machine."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..flower import local
from ..flower.replies import failed_reply
from . import process
from .pool import InProcess, Pool, Span, by_block
from .worker import Outcome, Request, Seat

_SPANS_A_WORKER = 4
"""How finely a phase is cut for each worker: enough that none waits long for the others."""
_LONGEST_SPAN = 16


class SimulationGrid(Grid):
    """Clients of this machine as nodes: node ``k + 1`` holds partition ``k``.

    Its clients have a time of their own (see :class:`~mlx_fed.simulation.faults.Faults`): a
    phase may take longer here than its timeout.

    Args:
        num_clients (int): How many there are.
        pool (Pool or InProcess): Who does their work.
        folder (Path): Where requests are written for the pool.
        timeout (float): Seconds that a client has; see ``Faults``.
        notify (callable): Told what happens.
    """

    virtual_time = True

    def __init__(
        self,
        num_clients: int,
        pool: Pool | InProcess,
        folder: Path,
        timeout: float,
        notify: Callable[..., None],
    ):
        local.begin_run()
        self.num_clients = num_clients
        self.pool, self.folder, self.timeout, self.notify = pool, folder, timeout, notify
        self._numbers = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        self._coming: Iterator[list[Message]] = iter(())
        self._noted = False

    # -- what strategies and Flower's own loop use -------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"message-{next(self._numbers)}")
            local.number(message, ids[-1])
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that come next; whoever pulls gets its messages' work done."""
        wanted = [id for id in message_ids if id in self._pushed]
        if wanted:
            messages = [self._pushed.pop(id) for id in wanted]
            self._coming = itertools.chain(self._coming, self._replies(messages))
        return next(self._coming, [])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = [self._pushed.pop(id) for id in self.push_messages(messages)]
        return [reply for some in self._replies(sent) for reply in some]

    def set_run(self, run: Any) -> None:
        raise RuntimeError("A simulation's grid has its run already.")

    @property
    def run(self) -> Any:
        raise RuntimeError("A simulation's run is not kept by Flower.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    # -- the work --------------------------------------------------------------------------

    def sum_updates(self, messages: Sequence[Message], weighted_by: str) -> Iterator[Outcome]:
        """Lets clients train and sums their updates by block, where they are made.

        Args:
            messages (list): Training messages in the roster's order, which gives clients their
                places.
            weighted_by (str): The metric that weighs an update.
        """
        yield from self._work(messages, weighted_by)

    def _replies(self, messages: list[Message]) -> Iterator[list[Message]]:
        for outcome in self._work(messages, None):
            replies = [
                Message(content, reply_to=messages[place]) for place, content in outcome.replies
            ]
            for place, reason in outcome.failed:
                replies.append(failed_reply(messages[place], reason))
            yield replies

    def _work(self, messages: Sequence[Message], weighted_by: str | None) -> Iterator[Outcome]:
        """Cuts the messages into spans of one request each, and has them done."""
        requests: dict[tuple[int, str], Path] = {}
        by_request: dict[Path, list[Seat]] = {}
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for place, message in enumerate(messages):
            kind = message.metadata.message_type
            content = message.content
            key = (_identity(content), kind)
            if key not in requests:
                requests[key] = folder / f"{len(requests)}.request"
                request = Request(kind, content, self.timeout, weighted_by)
                process.write_request(request, requests[key])
            seat = Seat(place, message.metadata.dst_node_id - 1)
            by_request.setdefault(requests[key], []).append(seat)
        spans = [
            Span(path, tuple(seats))
            for path, all_seats in by_request.items()
            for seats in self._cut(all_seats)
        ]
        try:
            for outcome in self.pool.run(spans):
                if outcome.note and not self._noted:
                    self._noted = True  # the other workers find the same
                    self.notify("note", text=outcome.note)
                yield outcome
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _cut(self, seats: list[Seat]) -> Iterator[list[Seat]]:
        """Spans of whole blocks, several for each worker."""
        blocks = by_block(seats)
        each = max(1, min(_LONGEST_SPAN, len(blocks) // (self.pool.size * _SPANS_A_WORKER)))
        for start in range(0, len(blocks), each):
            yield [seat for block in blocks[start : start + each] for seat in block]


def _identity(content: RecordDict) -> int:
    """The same for messages that were given the same records."""
    return hash(tuple(id(record) for record in content.values()))
