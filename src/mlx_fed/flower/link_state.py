"""The state of a federation's server: Flower's LinkState in memory, and one run in it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from itertools import islice
from typing import cast

from flwr.common.constant import HEARTBEAT_PATIENCE, NOOP_FLWR_AID, SubStatus
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    NodeStatus,
    TaskType,
)
from flwr.superlink.federation import NoOpFederationManager

from ..arrays.spool import Spool
from . import headers as ours
from . import one_run_grid
from .access import Denied, Door
from .incoming_replies import IncomingReply
from .object_store import Objects, StoreFactory

_SUSPENDED = 5.0
"""Seconds without a look at the nodes, after which this process may have been suspended."""
_GRACE = 20.0
"""Seconds that nodes then have to be heard again: what Flower gives them between two beats."""
_MOST_NODES = 10_000
"""Nodes that may register where any may."""
_REPLY_LIMIT = 2**30
_RECONNECT = 1.0
"""Seconds that a node whose connection broke has to make another."""


class Link:
    """Flower's state with one run, and the events that routes and grid wake each other with.

    Args:
        spool (Spool, optional): Where large objects wait. Default: in memory.
        door (Door, optional): Knows which nodes may take part; without one any may.

    Attributes:
        reply_limit (int): Bytes that a reply may have in all.
        state (InMemoryLinkState): Flower's own.
        store (Objects): The objects that the server's messages are made of.
        replies (dict): Replies that arrive or have arrived, by the ids of the messages that they
            answer.
        run_id (int): The run.
        bytes_sent (int): Bytes of objects that nodes have pulled.
        outcome (str): The run's, once it is over: nodes that ask for work are told.
        loop (asyncio.AbstractEventLoop): Where the routes run, once they do.
        over (asyncio.Event): Set when the run or its server ends: no request is held any more.
    """

    def __init__(self, spool: Spool | None = None, door: Door | None = None) -> None:
        self.spool = spool or Spool()
        self.door = door
        self.reply_limit = _REPLY_LIMIT
        self.factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), StoreFactory(self.spool)
        )
        self.state = cast(InMemoryLinkState, self.factory.state())
        self.store = cast(Objects, self.state.object_store)
        self.replies: dict[str, IncomingReply] = {}
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
        # Flower ends a run a minute after its last heartbeat, which a suspended laptop misses. The
        # run lives in this process and ends with it.
        self.state.task_token_store[self._task_id].active_until = datetime.max.replace(tzinfo=UTC)
        one_run_grid.begin_run(self.run_id, self._task_id)

        self.outcome = ""
        self.bytes_sent = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.over = asyncio.Event()
        self._work: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = threading.Condition()
        self._count = 0
        self._held: Counter[int] = Counter()
        self._heard: Counter[int] = Counter()
        self._looked = time.time()

    def finish(self, outcome: str = ours.FINISHED) -> None:
        """Answers the requests that are held: that the run is over, and how it ended.

        Args:
            outcome (str): The run's; empty where it goes on with another server.
        """
        self.outcome = outcome
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.over.set)
        self.wake_nodes(list(self._work))

    def close(self) -> None:
        """Ends the run in Flower's state."""
        self.state.finish_task(self._task_id, SubStatus.COMPLETED, "")

    # Who is there.

    def online(self) -> set[int]:
        """The ids of the nodes that are online.

        Nodes could not be heard while this process was suspended: they get a while to be. And
        where the clock was set back, a node that is silent from then on has no more than its time:
        Flower goes by that clock.
        """
        now = time.time()
        suspended = now - self._looked > _SUSPENDED
        with self.state.lock:
            for node in self.state.nodes.values():
                if node.status == NodeStatus.ONLINE:
                    most = now + HEARTBEAT_PATIENCE * node.heartbeat_interval
                    least = now + _GRACE if suspended else 0.0
                    node.online_until = min(max(node.online_until, least), most)
        self._looked = now
        online = self.state.get_nodes(self.run_id)
        return online if self.door is None else {i for i in online if self._is_known(i)}

    def is_full(self) -> bool:
        """Whether as many nodes are online as may register: one that is not makes room."""
        state = self.state
        with state.lock:
            if len(state.nodes) >= _MOST_NODES:
                gone = (node for node in state.nodes.values() if node.status != NodeStatus.ONLINE)
                for node in islice(gone, 1):
                    self.forget_node(node.node_id)
            return len(state.nodes) >= _MOST_NODES

    def forget_node(self, node_id: int) -> None:
        """Takes a node off the list for good, with all that is kept of it."""
        state = self.state
        with state.lock:
            if (node := state.nodes.pop(node_id, None)) is None:
                return
            state.node_public_key_to_node_id.pop(node.public_key, None)
            state.owner_to_node_ids[node.owner_aid].discard(node_id)
        for kept in (self._work, self._held, self._heard):
            kept.pop(node_id, None)

    def name_of(self, node_id: int) -> str | None:
        """The name that the door has for a node, where there is a door."""
        node = self.state.nodes.get(node_id)
        return node.name if node is not None and self.door is not None else None

    def number_of(self, node_id: int) -> int | None:
        """The number that the door has for a node, where there is a door.

        Raises:
            Denied: If the door does not know the node any more.
        """
        node = self.state.nodes.get(node_id)
        return self.door.number_of(node.public_key) if node and self.door is not None else None

    def require_known(self, node_id: int) -> None:
        """Raises :class:`Denied` if the door does not know a node any more."""
        if self.door is not None:
            node = self.state.nodes.get(node_id)
            if node is None:
                raise Denied("This node has been started a second time.")
            self.door.name_of(node.public_key)

    def _is_known(self, node_id: int) -> bool:
        """Whether the door knows a node still; one that was revoked is told so as it waits."""
        try:
            self.require_known(node_id)
        except Denied:
            self.state.deactivate_node(node_id)
            self.wake_nodes([node_id])
            return False
        return True

    def hold(self, node_id: int) -> None:
        """A request of the node is held open."""
        self._held[node_id] += 1
        self._heard[node_id] += 1

    def let_go(self, node_id: int, broken: bool) -> None:
        """A held request has been answered, or its connection broke.

        A process that ends closes its connections, so that a node which was killed is noticed
        without waiting for heartbeats that do not come.
        """
        if node_id not in self._held:
            return  # it has been forgotten meanwhile
        self._held[node_id] -= 1
        if broken and self.loop is not None:
            heard = self._heard[node_id]
            self.loop.call_later(_RECONNECT, self._count_as_gone, node_id, heard)

    def _count_as_gone(self, node_id: int, heard: int) -> None:
        """A node that was heard since has made another connection; if that broke too, it has time
        of its own."""
        silent = not self._held[node_id] and self._heard[node_id] == heard
        if silent and self.state.deactivate_node(node_id):
            self.tell_grid()

    def make_another_of(self, key: bytes) -> None:
        """A node that was here and comes again gets another id, as one without a key does.

        It is another process: what the one before it was asked, will never be answered, and what
        is known of that one need not hold for this. One whose connection was down for a while
        does not come again, but goes on.
        """
        state = self.state
        with state.lock:
            node_id = state.get_node_id_by_public_key(key)
            found = state.get_node_info(node_ids=[] if node_id is None else [node_id])
            for node in found:
                if node.status == NodeStatus.OFFLINE:
                    self.forget_node(node.node_id)
                    state.create_node(node.owner_aid, node.owner_name, key, 0, name=node.name)

    # Messages.

    def is_for(self, message_id: str, node_id: int) -> bool:
        """Whether there is such a message, for this node."""
        message = self.state.message_ins_store.get(message_id)
        return message is not None and message.metadata.dst_node_id == node_id

    def announce(self, message_id: str, reply: IncomingReply) -> IncomingReply | None:
        """The reply to a message that counts: the first that its node announced.

        One whose sending broke off is announced again, and goes on. ``None`` if another counts,
        or the message is not waited for any more.
        """
        with self.state.lock:
            if not self.is_for(message_id, reply.node_id):
                return None
            counts = self.replies.setdefault(message_id, reply)
        same = (counts.object_id, counts.children) == (reply.object_id, reply.children)
        return counts if same else None

    def is_complete(self, message_id: str) -> bool:
        """Whether a message's reply has arrived."""
        reply = self.replies.get(message_id)
        return reply is not None and reply.is_complete

    def deliver_again(self, node_id: int) -> None:
        """Offers a node what it was sent before and did not get: the connection broke.

        To be called when it asks for work, since it does so with nothing left to answer.
        """
        state = self.state
        with state.lock:
            for message_id, message in state.message_ins_store.items():
                if (
                    message.metadata.dst_node_id == node_id
                    and message_id not in self.replies
                    and message_id in state.object_store
                ):
                    message.metadata.delivered_at = ""

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

    def wait_for_news(self, since: int, timeout: float) -> int:
        """Waits until there is news after ``since``, at most ``timeout`` seconds.

        Returns:
            int: The number of news then.
        """
        with self._news:
            self._news.wait_for(lambda: self._count > since, timeout)
            return self._count
