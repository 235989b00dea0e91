"""State of a federation's server: Flower's in-memory ``LinkState`` with one run.

Its event loop serves the Fleet routes; the round loop uses the grid in another thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
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
from .allowlist import AccessDenied, NodeAllowlist
from .incoming_replies import IncomingReply
from .object_store import SpoolingObjectStore, SpoolingStoreFactory

_SUSPENSION = 5.0
"""Seconds between two checks of the nodes, after which this process may have been suspended."""
_GRACE = 20.0
"""Seconds that nodes then have for a heartbeat: what Flower allows between two."""
_MAX_NODES = 10_000
"""Nodes that may register where there is no allowlist."""
_REPLY_LIMIT = 2**30
_RECONNECT = 1.0
"""Seconds for a node whose connection broke to make another."""


class Link:
    """Flower's state with one run, and the events between routes and grid.

    Args:
        spool (Spool, optional): Storage of large objects. Default: memory.
        allowlist (NodeAllowlist, optional): The nodes that may participate. Default: any.

    Attributes:
        reply_limit (int): Bytes that a reply may have in all.
        state (InMemoryLinkState): Flower's own.
        store (SpoolingObjectStore): The objects that the server's messages are made of.
        replies (dict): Replies, complete or not, by the ids of their messages.
        run_id (int): The run.
        bytes_sent (int): Bytes of objects that nodes have pulled.
        outcome (str): The outcome of the run, once it is over.
        loop (asyncio.AbstractEventLoop): Where the routes run, once they do.
        run_end (asyncio.Event): Set when the run or its server ends: long polls end as well.
    """

    def __init__(self, spool: Spool | None = None, allowlist: NodeAllowlist | None = None) -> None:
        self.spool = spool or Spool()
        self.allowlist = allowlist
        self.reply_limit = _REPLY_LIMIT
        self.factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), SpoolingStoreFactory(self.spool)
        )
        self.state = cast(InMemoryLinkState, self.factory.state())
        self.store = cast(SpoolingObjectStore, self.state.object_store)
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
        self.run_end = asyncio.Event()
        self._message_events: dict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._news = threading.Condition()
        self._news_count = 0
        self._open_polls: Counter[int] = Counter()
        self._poll_counts: Counter[int] = Counter()
        self._last_check = time.time()
        self._withdrawn: dict[str, int] = {}
        self._late: dict[str, float] = {}

    def finish(self, outcome: str = ours.FINISHED) -> None:
        """Ends the long polls: the responses have the outcome of the run.

        Args:
            outcome (str): The outcome; empty where another server resumes the run.
        """
        self.outcome = outcome
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.run_end.set)
        self.wake_nodes(list(self._message_events))

    def close(self) -> None:
        """Ends the run in Flower's state."""
        self.state.finish_task(self._task_id, SubStatus.COMPLETED, "")

    # Nodes.

    def online(self) -> set[int]:
        """The ids of the nodes that are online, by Flower's rule for heartbeats.

        After a suspension of this process nodes have a grace period. Where the clock was set back,
        a node's deadline moves with it, since Flower compares it with that clock.
        """
        clock = time.time()
        was_suspended = clock - self._last_check > _SUSPENSION
        with self.state.lock:
            for node in self.state.nodes.values():
                if node.status == NodeStatus.ONLINE:
                    latest = clock + HEARTBEAT_PATIENCE * node.heartbeat_interval
                    earliest = clock + _GRACE if was_suspended else 0.0
                    node.online_until = min(max(node.online_until, earliest), latest)
        self._last_check = clock
        online = self.state.get_nodes(self.run_id)
        return online if self.allowlist is None else {i for i in online if self._is_listed(i)}

    def is_full(self) -> bool:
        """Whether as many nodes are online as may register; else one offline node is forgotten."""
        state = self.state
        with state.lock:
            if len(state.nodes) >= _MAX_NODES:
                offline = (
                    node for node in state.nodes.values() if node.status != NodeStatus.ONLINE
                )
                for node in islice(offline, 1):
                    self.forget_node(node.node_id)
            return len(state.nodes) >= _MAX_NODES

    def forget_node(self, node_id: int) -> None:
        """Deletes a node and its state."""
        state = self.state
        with state.lock:
            if (node := state.nodes.pop(node_id, None)) is None:
                return
            state.node_public_key_to_node_id.pop(node.public_key, None)
            state.owner_to_node_ids[node.owner_aid].discard(node_id)
        for by_node in (self._message_events, self._open_polls, self._poll_counts):
            by_node.pop(node_id, None)

    def name_of(self, node_id: int) -> str | None:
        """The name of a node on the allowlist, if there is one."""
        node = self.state.nodes.get(node_id)
        return node.name if node is not None and self.allowlist is not None else None

    def number_of(self, node_id: int) -> int | None:
        """The node id (partition) of a node on the allowlist, if there is one.

        Raises:
            AccessDenied: If the node is not listed any more.
        """
        node = self.state.nodes.get(node_id)
        return (
            self.allowlist.number_of(node.public_key)
            if node and self.allowlist is not None
            else None
        )

    def require_listed(self, node_id: int) -> None:
        """Raises :class:`AccessDenied` if a node is not listed any more."""
        if self.allowlist is not None:
            node = self.state.nodes.get(node_id)
            if node is None:
                raise AccessDenied("This node has been started a second time.")
            self.allowlist.name_of(node.public_key)

    def _is_listed(self, node_id: int) -> bool:
        """Whether a node is listed; the long poll of one that was revoked ends with the reason."""
        try:
            self.require_listed(node_id)
        except AccessDenied:
            self.state.deactivate_node(node_id)
            self.wake_nodes([node_id])
            return False
        return True

    def begin_poll(self, node_id: int) -> None:
        """Counts a long poll of a node as open."""
        self._open_polls[node_id] += 1
        self._poll_counts[node_id] += 1

    def end_poll(self, node_id: int, is_connected: bool) -> None:
        """Counts a long poll as ended; a node without another one soon is offline.

        The system closes the connections of a process that is killed, before a heartbeat is
        missing.
        """
        if node_id not in self._open_polls:
            return  # the node was forgotten meanwhile
        self._open_polls[node_id] -= 1
        if not is_connected and self.loop is not None:
            poll_count = self._poll_counts[node_id]
            self.loop.call_later(_RECONNECT, self._deactivate_silent, node_id, poll_count)

    def _deactivate_silent(self, node_id: int, poll_count: int) -> None:
        """Deactivates a node that has made no poll since; a later one has a deadline itself."""
        is_silent = not self._open_polls[node_id] and self._poll_counts[node_id] == poll_count
        if is_silent and self.state.deactivate_node(node_id):
            self.notify_grid()

    def renew_node_id(self, key: bytes) -> None:
        """New id of an offline node that is activated again.

        It is another process: messages to the previous one will not be answered, and its state
        does not hold. A node whose connection was down for a while is not activated again.
        """
        state = self.state
        with state.lock:
            node_id = state.get_node_id_by_public_key(key)
            nodes = state.get_node_info(node_ids=[] if node_id is None else [node_id])
            for node in nodes:
                if node.status == NodeStatus.OFFLINE:
                    self.forget_node(node.node_id)
                    state.create_node(node.owner_aid, node.owner_name, key, 0, name=node.name)

    # Messages.

    def is_addressed_to(self, message_id: str, node_id: int) -> bool:
        """Whether a message with this id exists, for this node."""
        message = self.state.message_ins_store.get(message_id)
        return message is not None and message.metadata.dst_node_id == node_id

    def accept_reply(self, message_id: str, reply: IncomingReply) -> IncomingReply | None:
        """The reply to a message with the objects that have arrived: the first announced counts.

        A reply whose transfer broke off is announced again, and resumed. ``None`` for another
        reply than the first, or where the message was withdrawn.
        """
        with self.state.lock:
            if not self.is_addressed_to(message_id, reply.node_id):
                if self._withdrawn.get(message_id) == reply.node_id:
                    self._late[message_id] = time.monotonic()
                    del self._withdrawn[message_id]
                return None
            first = self.replies.setdefault(message_id, reply)
        is_first = (first.object_id, first.children) == (reply.object_id, reply.children)
        return first if is_first else None

    def watch_for_late(self, receivers: Mapping[str, int]) -> None:
        """Notes from now on whether nodes reply to messages that are withdrawn.

        Args:
            receivers (dict): The node of each message.
        """
        with self.state.lock:
            self._withdrawn |= receivers
            for oldest in list(self._withdrawn)[:-_MAX_NODES]:
                del self._withdrawn[oldest]

    def take_late(self) -> dict[str, float]:
        """The monotonic time of each late reply since the last call, by message."""
        with self.state.lock:
            late_messages, self._late = self._late, {}
            return late_messages

    def is_complete(self, message_id: str) -> bool:
        """Whether all objects of a message's reply have arrived."""
        reply = self.replies.get(message_id)
        return reply is not None and reply.is_complete

    def redeliver(self, node_id: int) -> None:
        """Delivers messages again that a node has not answered: the connection broke before.

        A node that pulls messages has no others to answer.
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

    # Events for the routes, which the grid sets from its thread.

    def message_event(self, node_id: int) -> asyncio.Event:
        """The event that is set when there may be a message for a node."""
        return self._message_events[node_id]

    def wake_nodes(self, node_ids: list[int]) -> None:
        """Ends the waiting of long polls for messages."""
        if self.loop is None or self.loop.is_closed():
            return
        for node_id in node_ids:
            self.loop.call_soon_threadsafe(self._message_events[node_id].set)

    # News for the grid, from the routes.

    def notify_grid(self) -> None:
        """Counts a piece of news: a complete reply, or a node that is online or offline now."""
        with self._news:
            self._news_count += 1
            self._news.notify_all()

    def news_count(self) -> int:
        """The number of pieces of news so far."""
        return self._news_count

    def wait_for_news(self, last_count: int, timeout: float) -> int:
        """Waits for more news than ``last_count``, at most ``timeout`` seconds.

        Returns:
            int: The number of news then.
        """
        with self._news:
            self._news.wait_for(lambda: self._news_count > last_count, timeout)
            return self._news_count
