"""A Flower grid in this process: ClientApps answer as soon as a message is sent to them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from mlx_fed.flower import one_run_grid

App = Callable[[Message, Context], Message]
"""A ClientApp, or a function around one."""


class LoopbackGrid(one_run_grid.OneRunGrid):
    """A grid whose nodes are ClientApps in this process.

    Messages and replies are copied on their way, so that neither side holds what the other may
    change. An app that raises is answered for with an error, as Flower's nodes do.

    Args:
        apps (sequence): The app of each node; the first holds partition 0.
        node_ids (sequence, optional): The nodes' ids. Default: 1, 2, ...
        backwards (bool): List nodes, and bring replies, last node first.
        run_config (dict, optional): The run's settings that apps see.

    Attributes:
        apps (dict): The nodes that are online, by id: take one out and the node has left.
        contexts (dict): Each node's context, which lasts as long as the grid.
    """

    def __init__(
        self,
        apps: Sequence[App],
        *,
        node_ids: Sequence[int] | None = None,
        backwards: bool = False,
        run_config: dict[str, Any] | None = None,
    ):
        one_run_grid.begin_run()
        node_ids = node_ids or range(1, len(apps) + 1)
        self.apps = dict(zip(node_ids, apps, strict=True))
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={
                    "partition-id": partition,
                    "num-partitions": len(apps),
                    "share-errors": True,
                },
                state=RecordDict(),
                run_config=run_config or {},
            )
            for partition, node_id in enumerate(node_ids)
        }
        self.step = -1 if backwards else 1
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)[:: self.step]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [message_id for message_id in message_ids if message_id in self._replies]
        replies = [self._replies.pop(message_id) for message_id in wanted]
        order = list(self.contexts)[:: self.step]
        return sorted(replies, key=lambda reply: order.index(reply.metadata.src_node_id))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _push(self, message: Message) -> str:
        message_id = f"message-{next(self._numbers)}"
        one_run_grid.set_message_id(message, message_id)
        self._replies[message_id] = copy.deepcopy(self._answer(copy.deepcopy(message)))
        return message_id

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if node_id not in self.apps:
            gone = Error(ErrorCode.NODE_UNAVAILABLE, f"node {node_id} has left")
            return Message(gone, reply_to=message)
        try:
            reply = self.apps[node_id](message, self.contexts[node_id])
            answers = reply.metadata.reply_to_message_id
            # Flower's mods give back an error about a reply as the reply to that reply, which
            # a SuperLink would drop.
            assert answers == message.metadata.message_id, f"no reply to the message: {reply}"
            return reply
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raised = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(raised, reply_to=message)
