"""One phase's messages to nodes and their replies back, over any Flower grid."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ..arrays import master_weights
from ..arrays.named_arrays import Arrays, Spec
from ..arrays.spool import Spool
from ..flower.error_replies import is_missing
from ..flower.one_run_grid import OneRunGrid
from ..task import Config
from ..transforms.update_transform import UpdateTransform
from . import messages
from .closing import Closing

POLL = 0.5
"""Seconds until the nodes that are online are looked at again."""


def exchange(
    grid: OneRunGrid,
    outgoing: list[Message],
    names: Mapping[int, str],
    closing: Closing,
    phase: str,
    on_reply: Callable[[str], None],
    spool: Spool | None = None,
) -> Iterator[tuple[str, Message | str]]:
    """Sends messages and gives each node's name with its reply, in the order of the names.

    In place of a reply there is the reason why a node has none. A reply that comes before those
    that it stands behind waits on disk; what was given is not kept.

    Args:
        grid (Grid): Takes the messages and brings the replies.
        outgoing (list): Messages for nodes of the roster. They are taken out of the list: large
            ones must not be in memory while the replies come.
        names (dict): The nodes' names by id, in the order of the replies.
        closing (Closing): Decides which nodes are not waited for any longer.
        phase (str): ``"train"`` or ``"evaluate"``.
        on_reply (callable): Told the name of each node as its reply comes.
        spool (Spool, optional): Where early replies wait. Default: in memory.
    """
    spool = spool or Spool()
    answers: dict[int, Message | str] = dict.fromkeys(
        (message.metadata.dst_node_id for message in outgoing),
        "the message to it could not be sent",
    )
    start = time.monotonic()
    pending = push(grid, outgoing)
    outgoing.clear()
    for node_id in pending.values():
        del answers[node_id]
    order = deque(names)
    times: dict[str, float] = {}
    while order:
        if order[0] in answers:
            node_id = order.popleft()
            yield names[node_id], answers.pop(node_id)
            continue
        replies = list(grid.pull_messages(list(pending)))
        for reply in replies:
            node_id = pending.pop(reply.metadata.reply_to_message_id)
            if reply.has_content():
                spool.put_message(reply.content)
            answers[node_id] = reply
            if not (grid.virtual_time or is_missing(reply)):
                times[names[node_id]] = time.monotonic() - start
                closing.replied(phase, names[node_id], times[names[node_id]])
            on_reply(names[node_id])
        if replies:
            continue
        reasons: Mapping[str, str] = {}
        if not grid.virtual_time:
            take_late_replies(grid, closing)
            pieces = grid.last_pieces(pending)
            last_pieces = {
                names[node_id]: pieces[message_id] - start if message_id in pieces else None
                for message_id, node_id in pending.items()
            }
            reasons = closing.overdue(phase, time.monotonic() - start, times, last_pieces)
        if not reasons:
            grid.wait(POLL)
            continue
        late_messages = {
            message_id: node_id
            for message_id, node_id in pending.items()
            if names[node_id] in reasons
        }
        grid.withdraw(late_messages)
        for message_id, node_id in late_messages.items():
            closing.withdrawn(message_id, phase, names[node_id], start)
            answers[node_id] = reasons[names[node_id]]
            del pending[message_id]


def take_late_replies(grid: OneRunGrid, closing: Closing) -> None:
    """Notes replies to messages that were withdrawn."""
    for message_id, time_of_reply in grid.late_replies().items():
        closing.replied_late(message_id, time_of_reply)


def pack(outgoing: list[Message], spec: Spec, statistics: Arrays, config: Config) -> None:
    """Packs arrays and settings of a strategy's messages for the wire.

    Strategies put one content into all messages: each record is converted once, and none is
    changed in place.

    Args:
        outgoing (list): Messages with float32 masters, which are cast to the model's dtypes.
        spec (dict): The shape and dtype of each parameter.
        statistics (dict): Running statistics to send along, if any.
        config (dict): Settings for all, which a message's own stand over.
    """
    packed_records: dict[int, ArrayRecord] = {}
    contents: dict[int, tuple[RecordDict, RecordDict]] = {}
    statistics_records = {messages.STATISTICS: messages.pack(statistics)} if statistics else {}
    for message in outgoing:
        message.metadata.group_id = str(config["server-round"])
        content = message.content
        if id(content) not in contents:
            name, record = messages.parameters_of(content)
            if id(record) not in packed_records:
                packed_records[id(record)] = messages.pack(
                    master_weights.lazy_masters(record, spec)
                )
            settings_name, message_config = messages.config_of(content)
            packed_content: dict[str, Any] = {
                **statistics_records,
                name: packed_records[id(record)],
                settings_name: ConfigRecord({**config, **message_config}),
            }
            # Held together with what it was made from, whose id would else be free for another.
            contents[id(content)] = (content, RecordDict({**content, **packed_content}))
        message.content = contents[id(content)][1]


def sizes(outgoing: list[Message]) -> list[int]:
    """The bytes of each message's arrays; messages mostly share their content."""
    of_content = {id(message.content): message.content for message in outgoing}
    bytes_of = {key: messages.count_bytes(content) for key, content in of_content.items()}
    return [bytes_of[id(message.content)] for message in outgoing]


def update_sizes(outgoing: list[Message], transform: UpdateTransform | None) -> list[int]:
    """The bytes of the arrays of each message's reply: as many as its own, or those of the encoded
    update in place of the parameters."""
    if transform is None or not outgoing:
        return sizes(outgoing)
    zeros = {
        name: mx.zeros(shape, getattr(mx, dtype)) for name, (shape, dtype) in transform.spec.items()
    }
    name, _ = messages.parameters_of(outgoing[0].content)
    content = RecordDict({**outgoing[0].content, name: messages.pack(zeros)})
    return [messages.count_bytes(content)] * len(outgoing)


def bytes_to_nodes(grid: OneRunGrid, outgoing: list[Message]) -> Callable[[], int]:
    """Counter of the bytes that are sent to nodes from now until it is called.

    Where the grid does not count them, they are those of the messages' arrays.
    """
    start = grid.bytes_sent
    if start is None:
        size = sum(sizes(outgoing))
        return lambda: size
    return lambda: (grid.bytes_sent or 0) - start


def push(grid: OneRunGrid, outgoing: list[Message]) -> dict[str, int]:
    """Sends messages; the ids of those that were sent, and the node each went to."""
    if not outgoing:
        return {}
    receivers = [message.metadata.dst_node_id for message in outgoing]
    ids = list(grid.push_messages(outgoing))
    if len(ids) != len(receivers):  # Flower's in-memory grid passes over nodes that have left
        to = {message.metadata.message_id: message.metadata.dst_node_id for message in outgoing}
        receivers = [to[message_id] for message_id in ids]
    # Flower's HTTP grid gives "" for a message that it could not store.
    return {id: to for id, to in zip(ids, receivers, strict=True) if id}
