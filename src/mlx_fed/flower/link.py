"""The state of a federation's server: Flower's LinkState in memory, and one run in it."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from typing import cast

from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, SubStatus
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager

_TASK_HEARTBEAT = 15.0
"""Seconds. Flower ends a run a minute after its last heartbeat."""


class Link:
    """Flower's state with one run, and the events that routes and grid wake each other with.

    Attributes:
        state (InMemoryLinkState): Flower's own.
        run_id (int): The run.
        finished (bool): The run is over: nodes that ask for work are told so.
        loop (asyncio.AbstractEventLoop): Where the routes run, once they do.
        complete (set): Ids of messages whose replies have all their objects.
        over (asyncio.Event): Set when the run is, to let held requests go.
    """

    def __init__(self) -> None:
        self.factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        self.state = cast(InMemoryLinkState, self.factory.state())
        self.run_id = self.state.create_run(
            fab_id=None,
            fab_version=None,
            fab_hash=None,
            override_config={},
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        (run,) = self.state.get_run_info(run_ids=[self.run_id])
        assert run.primary_task_id is not None
        self._task_id = run.primary_task_id
        self.state.claim_task(self._task_id)
        self.state.activate_task(self._task_id)
        # Message reads who sends it from here.
        TaskIdentity.task_id = self._task_id
        TaskIdentity.run_id = self.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

        self.finished = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self.complete: set[str] = set()
        self.over = asyncio.Event()
        self._work: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = threading.Condition()
        self._count = 0
        self._closed = threading.Event()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def _keep_alive(self) -> None:
        while not self._closed.wait(_TASK_HEARTBEAT):
            self.state.acknowledge_task_heartbeat(self._task_id)

    def finish(self) -> None:
        """Tells nodes, as they ask for work, that there is no more."""
        self.finished = True
        self.wake_nodes(list(self._work))
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.over.set)

    def close(self) -> None:
        """Ends the run in Flower's state."""
        self._closed.set()
        self.state.finish_task(self._task_id, SubStatus.COMPLETED, "")

    # Routes wait for work on their event loop; the grid puts it there from its own thread.

    def work_for(self, node_id: int) -> asyncio.Event:
        """Set when there may be a message for the node."""
        return self._work[node_id]

    def wake_nodes(self, node_ids: list[int]) -> None:
        """Lets nodes that wait for work look again."""
        if self.loop is None or self.loop.is_closed():
            return
        for node_id in node_ids:
            self.loop.call_soon_threadsafe(self._work[node_id].set)

    # The grid waits for news in its thread; the routes bring them.

    def tell_grid(self) -> None:
        """A reply is complete, or a node has come or gone."""
        with self._news:
            self._count += 1
            self._news.notify_all()

    def news(self) -> int:
        """A number that grows with every piece of news."""
        return self._count

    def wait_for_news(self, since: int, timeout: float) -> None:
        """Waits until there is news after ``since``, at most ``timeout`` seconds."""
        with self._news:
            self._news.wait_for(lambda: self._count > since, timeout)
