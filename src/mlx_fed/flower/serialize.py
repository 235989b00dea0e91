"""The objects that a message is made of, without a copy of its arrays.

Flower's own way joins the bytes of each array and copies each of its chunks, and does so again
for every use of one. Here a chunk is a view of an array's bytes, and its id is made once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from ..arrays.flower_records import records_in, segments_of


class Chunk(InflatableObject):
    """A chunk of an array, in the same bytes as Flower's own.

    Attributes:
        parts (list): Its bytes, one part after another.
    """

    def __init__(self, views: list[memoryview]):
        kind, size = ArrayChunk.__qualname__, sum(map(len, views))
        head = f"{kind}{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{size}".encode() + HEAD_BODY_DIVIDER
        self.parts = [memoryview(head), *views]
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        self._id = digest.hexdigest()

    @property
    def object_id(self) -> str:
        return self._id

    def deflate(self) -> bytes:
        return b"".join(self.parts)


def cut_arrays(message: Message, largest: float = math.inf) -> None:
    """Cuts the arrays of a message into chunks of ours, which Flower takes for its own.

    Args:
        message (Message): The message; arrays that are cut already stay so.
        largest (float): Bytes of a chunk, where Flower would take more.
    """
    size = int(min(largest, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE))
    if not message.has_content():
        return
    for record in records_in(message.content, ArrayRecord).values():
        for array in record.values():
            if "_chunks" not in array.__dict__:
                array.__dict__["_chunks"] = [
                    (chunk.object_id, chunk) for chunk in _chunks(array, size)
                ]


def parts_in(item: InflatableObject) -> list[memoryview] | tuple[bytes]:
    """An object's bytes, one part after another."""
    return item.parts if isinstance(item, Chunk) else (item.deflate(),)


def _chunks(array: Array, size: int) -> Iterator[Chunk]:
    views: list[memoryview] = []
    room = size
    for part in segments_of(array):
        left = memoryview(part.read())
        while left:
            views.append(left[:room])
            left = left[room:]
            room -= len(views[-1])
            if not room:
                yield Chunk(views)
                views, room = [], size
    if views:
        yield Chunk(views)
