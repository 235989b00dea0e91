"""Messages between the round loop and Flower's state, in one process: no request, no polling."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from .error_replies import error_reply, gone
from .link_state import Link
from .one_run_grid import OneRunGrid, number
from .serialize import cut_arrays, parts_in

_LIFETIME = 10 * 365 * 86400.0
"""Seconds until Flower forgets a message: a round's timeout is what ends its waiting."""


class LinkGrid(OneRunGrid):
    """A Flower Grid straight on a :class:`Link`."""

    def __init__(self, link: Link):
        self._link = link
        self.spool = link.spool
        self._seen = 0
        self._receivers: dict[str, int] = {}

    @property
    def run(self) -> Any:
        """The run, as Flower describes it."""
        (run,) = self._link.state.get_run_info(run_ids=[self._link.run_id])
        return run

    @property
    def bytes_sent(self) -> int:
        """Bytes that nodes have pulled so far: what they hold already does not come again."""
        return self._link.bytes_sent

    def get_node_ids(self) -> Iterable[int]:
        """The ids of the nodes that are online."""
        return self._link.online()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are online."""
        return self._link.state.get_node_info(node_ids=list(self.get_node_ids()))

    def name_of(self, node_id: int) -> str | None:
        """The name that the server knows a node by, where it does."""
        return self._link.name_of(node_id)

    def number_of(self, node_id: int) -> int | None:
        """Which part of the data a node has to hold, where the server knows it."""
        return self._link.number_of(node_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands messages to the nodes they are for; every one gets an id, in order.

        A message for a node that has left is answered with an error when its reply is pulled.
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
                number(message, message.object_id)
                objects.update(get_all_nested_objects(message))
                missing.update(store.preregister(self._link.run_id, get_object_tree(message)))
            for object_id in missing:
                store.put_parts(object_id, *parts_in(objects[object_id]))
        for message in messages:
            self._receivers[message.metadata.message_id] = message.metadata.dst_node_id
            state.store_message_ins(remove_content_from_message(message))
        self._link.wake_nodes([message.metadata.dst_node_id for message in messages])
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are complete, or that will never come."""
        message_ids = set(message_ids)
        state = self._link.state
        with state.lock:  # of a node that came back in here Flower would say nothing
            online = self._link.online()
            complete = set(filter(self._link.is_complete, message_ids))
            lost = {i for i in message_ids if self._receivers.get(i) not in online} - complete
            # Flower would give a node's last reply away for an error once the node has left.
            errors = state.get_message_res(set(lost), self._link.run_id) if lost else []
        replies = [self._reply_to(message_id) for message_id in complete]
        replies += map(gone, errors)
        self._forget(complete | lost)
        return replies

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Takes messages back: nodes are not given them any more, and replies are dropped."""
        self._forget(set(message_ids))

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
            arrived = self.pull_messages(pending)
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
            if not arrived:
                self.wait(0.5)
        return replies

    def wait(self, timeout: float) -> None:
        """Waits for news since it last returned, at most ``timeout`` seconds."""
        self._seen = self._link.wait_for_news(self._seen, timeout)

    def _reply_to(self, message_id: str) -> Message:
        """The reply with its content or error.

        A node may send anything: what cannot be read counts as its error.
        """
        incoming = self._link.replies[message_id]
        try:
            reply = cast(Message, incoming.inflate(self._link.reply_limit))
            number(reply, incoming.object_id)
            about = reply.metadata
            if (about.reply_to_message_id, about.src_node_id) != (message_id, incoming.node_id):
                raise ValueError("it is another message than was announced")
        except Exception as error:
            problem = ValueError(f"the reply cannot be read: {error!r:.500}")
            reply = error_reply(self._link.state.message_ins_store[message_id], problem)
        return reply
