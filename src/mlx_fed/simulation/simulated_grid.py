"""A Flower grid whose nodes are simulated on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, pairwise
from pathlib import Path

from flwr.app import Message

from ..arrays.weighted_mean import block_size
from ..events import ClientTraceback, LabelsCounted, Listener, Notice
from ..flower import one_run_grid
from ..flower.error_replies import failed_reply
from . import worker_process
from .worker_messages import SampledClient, WorkRequest, WorkResult
from .worker_pool import InProcessPool, Pool, WorkUnit, by_block

_UNITS_PER_WORKER = 4
"""How finely a phase is cut for each worker: enough that none waits long for the others."""
_MIN_UNIT = 16
"""Clients that make a span worth its while: they train together."""
_MAX_UNIT = 256


class SimulationGrid(one_run_grid.OneRunGrid):
    """Clients of this machine as nodes: node ``k + 1`` holds partition ``k``.

    Its clients have a time of their own (see :class:`~mlx_fed.simulation.faults.Faults`): a
    phase may take longer here than its timeout.

    Args:
        num_clients (int): How many there are.
        pool (Pool or InProcess): Who does their work.
        folder (Path): Where requests are written for the pool.
        timeout (float): Seconds that a client has; see ``Faults``.
        listener (callable): Called with the events of the clients' work.
    """

    virtual_time = True

    def __init__(
        self,
        num_clients: int,
        pool: Pool | InProcessPool,
        folder: Path,
        timeout: float,
        listener: Listener,
    ):
        one_run_grid.begin_run()
        self.num_clients = num_clients
        self.pool, self.folder, self.timeout, self.listener = pool, folder, timeout, listener
        self._numbers = count(1)
        self._pushed: dict[str, Message] = {}
        self._coming: Iterator[list[Message]] = iter(())
        self._noted: set[str] = set()
        self._has_traceback = False

    # -- what strategies and Flower's own loop use -------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"message-{next(self._numbers)}")
            one_run_grid.set_message_id(message, ids[-1])
            self._pushed[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The next replies: pulling them runs the clients of the messages."""
        pushed_ids = [id for id in message_ids if id in self._pushed]
        if pushed_ids:
            messages = [self._pushed.pop(id) for id in pushed_ids]
            self._coming = chain(self._coming, self._replies(messages))
        return next(self._coming, [])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        pushed_messages = [self._pushed.pop(id) for id in self.push_messages(messages)]
        return [reply for some in self._replies(pushed_messages) for reply in some]

    # -- the work --------------------------------------------------------------------------

    def sum_updates(self, messages: Sequence[Message], weighted_by: str) -> Iterator[WorkResult]:
        """Training of clients, whose updates are summed by block where they are computed.

        Args:
            messages (list): Training messages in the roster's order, which gives clients their
                places.
            weighted_by (str): The metric that weighs an update.
        """
        yield from self._work(messages, weighted_by)

    def _replies(self, messages: list[Message]) -> Iterator[list[Message]]:
        for outcome in self._work(messages, None):
            replies = [
                Message(content, reply_to=messages[position])
                for position, content in outcome.replies
            ]
            for position, reason, missing in outcome.failures:
                replies.append(failed_reply(messages[position], reason, missing))
            yield replies

    def _work(self, messages: Sequence[Message], weighted_by: str | None) -> Iterator[WorkResult]:
        """Cuts the messages into spans of one request each, and has them done."""
        requests: dict[tuple[int, str], Path] = {}
        by_request: dict[Path, list[SampledClient]] = {}
        size = block_size(len(messages))
        for position, message in enumerate(messages):
            kind = message.metadata.message_type
            content = message.content
            key = (id(content), kind)
            if key not in requests:
                requests[key] = self.folder / f"{next(self._numbers)}.request"
                request = WorkRequest(kind, content, self.timeout, weighted_by)
                worker_process.write_request(request, requests[key])
            seat = SampledClient(position, message.metadata.dst_node_id - 1, position // size)
            by_request.setdefault(requests[key], []).append(seat)
        spans = [
            WorkUnit(path, tuple(seats))
            for path, all_seats in by_request.items()
            for seats in self._cut(all_seats)
        ]
        try:
            for outcome in self.pool.run(spans):
                for text in outcome.notes:
                    if text not in self._noted:  # the other workers find the same
                        self._noted.add(text)
                        self.listener(Notice(text))
                if outcome.traceback and not self._has_traceback:
                    self._has_traceback = True
                    self.listener(ClientTraceback(outcome.traceback))
                if outcome.labels:
                    self.listener(LabelsCounted(outcome.labels))
                yield outcome
        finally:
            for path in by_request:
                path.unlink(missing_ok=True)

    def _cut(self, seats: list[SampledClient]) -> Iterator[list[SampledClient]]:
        """Spans of whole blocks: one for each worker, or several if they are long enough."""
        blocks = by_block(seats)
        workers = self.pool.size
        spans = max(1, min(_UNITS_PER_WORKER, len(seats) // (workers * _MIN_UNIT))) * workers
        spans = max(spans, len(seats) // _MAX_UNIT)
        ends = [len(blocks) * number // spans for number in range(spans + 1)]
        for start, end in pairwise(ends):
            if span := [seat for block in blocks[start:end] for seat in block]:
                yield span
