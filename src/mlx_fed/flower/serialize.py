"""Serialization of Flower's messages into objects, without a copy of the arrays.

Flower joins the bytes of each array and copies each of its chunks, again for every use. Here a
chunk is a view of an array's bytes, and its id is computed once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from flwr.app import Array, ArrayRecord, Message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from ..arrays.flower_records import records_in, segments_of


class Chunk(InflatableObject):
    """A chunk of an array, in the same bytes as Flower's own.

    Attributes:
        views (list): Its bytes, one view after another.
    """

    def __init__(self, views: list[memoryview]):
        size = sum(map(len, views))
        head = (
            f"ArrayChunk{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{size}".encode() + HEAD_BODY_DIVIDER
        )
        self.views = [memoryview(head), *views]
        digest = hashlib.sha256()
        for view in self.views:
            digest.update(view)
        self._id = digest.hexdigest()

    @property
    def object_id(self) -> str:
        return self._id

    def deflate(self) -> bytes:
        return b"".join(self.views)


def cut_arrays(message: Message, max_bytes: float = math.inf) -> None:
    """Splits the arrays of a message into :class:`Chunk`, in place of Flower's ``ArrayChunk``.

    Args:
        message (Message): The message; arrays that have chunks already keep them.
        max_bytes (float): Bytes of a chunk, where Flower would take more.
    """
    size = int(min(max_bytes, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE))
    if not message.has_content():
        return
    for record in records_in(message.content, ArrayRecord).values():
        for array in record.values():
            if "_chunks" not in array.__dict__:
                array.__dict__["_chunks"] = [
                    (chunk.object_id, chunk) for chunk in _chunks(array, size)
                ]


def views_of(item: InflatableObject) -> list[memoryview] | tuple[bytes]:
    """An object's bytes, one view after another."""
    return item.views if isinstance(item, Chunk) else (item.deflate(),)


def _chunks(array: Array, size: int) -> Iterator[Chunk]:
    views: list[memoryview] = []
    space = size
    for segment in segments_of(array):
        remainder = memoryview(segment.read())
        while remainder:
            views.append(remainder[:space])
            remainder = remainder[space:]
            space -= len(views[-1])
            if not space:
                yield Chunk(views)
                views, space = [], size
    if views:
        yield Chunk(views)
