"""Flower's Grid over a server's state in the same process, without requests or polling."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from .error_replies import error_reply, explain_missing
from .link_state import Link
from .one_run_grid import OneRunGrid, set_message_id
from .serialize import cut_arrays, views_of

_LIFETIME = 10 * 365 * 86400.0
"""Seconds to live of a message in Flower: the round's timeout ends the wait for it."""


class LinkGrid(OneRunGrid):
    """Flower's ``Grid`` on the state that the Fleet routes serve."""

    def __init__(self, link: Link):
        self._link = link
        self.spool = link.spool
        self._news_count = 0
        self._receivers: dict[str, int] = {}

    @property
    def run(self) -> Any:
        """The run, as Flower describes it."""
        (run,) = self._link.state.get_run_info(run_ids=[self._link.run_id])
        return run

    @property
    def bytes_sent(self) -> int:
        """Bytes that nodes have pulled so far; objects in their caches are not pulled again."""
        return self._link.bytes_sent

    def get_node_ids(self) -> Iterable[int]:
        """The ids of the nodes that are online."""
        return self._link.online()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are online."""
        return self._link.state.get_node_info(node_ids=list(self.get_node_ids()))

    def name_of(self, node_id: int) -> str | None:
        """The name of a node's key on the allowlist, if there is one."""
        return self._link.name_of(node_id)

    def number_of(self, node_id: int) -> int | None:
        """The node id (partition) of a node's key on the allowlist, if there is one."""
        return self._link.number_of(node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Stores messages for their nodes; returns their ids, in order.

        The reply to a message for a node that is offline is an error.
        """
        state, store = self._link.state, self._link.store
        messages = list(messages)
        # Records that messages share are hashed and stored once. All are registered before any
        # is stored, or the first receiver's confirmation could delete what the next one needs.
        with no_object_id_recompute():
            objects: dict[str, Any] = {}
            missing: set[str] = set()
            for message in messages:
                cut_arrays(message)
                message.metadata.ttl = _LIFETIME
                set_message_id(message, message.object_id)
                objects.update(get_all_nested_objects(message))
                missing.update(store.preregister(self._link.run_id, get_object_tree(message)))
            for object_id in missing:
                store.put_views(object_id, *views_of(objects[object_id]))
        for message in messages:
            self._receivers[message.metadata.message_id] = message.metadata.dst_node_id
            state.store_message_ins(remove_content_from_message(message))
        self._link.wake_nodes([message.metadata.dst_node_id for message in messages])
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Complete replies to these messages, and errors for those whose nodes are offline."""
        message_ids = set(message_ids)
        state = self._link.state
        with state.lock:  # a node must not come online in between: Flower has no error for it
            online = self._link.online()
            complete = set(filter(self._link.is_complete, message_ids))
            missing = {i for i in message_ids if self._receivers.get(i) not in online} - complete
            # For complete replies Flower would give errors, too, once their nodes are offline.
            errors = state.get_message_res(set(missing), self._link.run_id) if missing else []
        replies = [self._reply_to(message_id) for message_id in complete]
        replies += map(explain_missing, errors)
        self._forget(complete | missing)
        return replies

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Deletes messages and their replies, which nodes may be working on."""
        message_ids = set(message_ids)
        receivers = {
            message_id: self._receivers[message_id]
            for message_id in message_ids & self._receivers.keys()
        }
        self._link.watch_for_late(receivers)
        self._forget(message_ids)

    def late_replies(self) -> Mapping[str, float]:
        """When nodes announced replies to messages that were withdrawn."""
        return self._link.take_late()

    def last_pieces(self, message_ids: Iterable[str]) -> Mapping[str, float]:
        """When a reply was announced, or its last object arrived."""
        replies = {message_id: self._link.replies.get(message_id) for message_id in message_ids}
        return {message_id: reply.last_piece for message_id, reply in replies.items() if reply}

    def _forget(self, message_ids: set[str]) -> None:
        state = self._link.state
        with state.lock:
            state.delete_messages(message_ids)
            for message_id in message_ids:
                self._receivers.pop(message_id, None)
                self._link.replies.pop(message_id, None)
                state.object_store.delete(message_id)  # where the node has not confirmed it

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends messages and waits for their replies, at most ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        pending = set(self.push_messages(messages))
        replies: list[Message] = []
        while pending and (deadline is None or time.monotonic() < deadline):
            batch = self.pull_messages(pending)
            pending -= {reply.metadata.reply_to_message_id for reply in batch}
            replies += batch
            if not batch:
                self.wait(0.5)
        return replies

    def wait(self, timeout: float) -> None:
        """Waits for news since the last call, at most ``timeout`` seconds."""
        self._news_count = self._link.wait_for_news(self._news_count, timeout)

    def _reply_to(self, message_id: str) -> Message:
        """The reply to a message, or an error reply where what the node sent cannot be parsed."""
        incoming = self._link.replies[message_id]
        try:
            reply = cast(Message, incoming.inflate(self._link.reply_limit))
            set_message_id(reply, incoming.object_id)
            metadata = reply.metadata
            if (metadata.reply_to_message_id, metadata.src_node_id) != (
                message_id,
                incoming.node_id,
            ):
                raise ValueError("it is another message than was announced")
        except Exception as error:
            problem = ValueError(f"the reply cannot be read: {error!r:.500}")
            reply = error_reply(self._link.state.message_ins_store[message_id], problem)
        return reply
