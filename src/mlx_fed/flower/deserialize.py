"""Messages from the objects that they are made of, without a copy of their arrays.

Flower's own way joins the chunks of each array into bytes of their own. Here an array holds its
chunks, in memory or on disk, and joins them when it is asked for its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ..arrays.flower_records import Segment, SegmentedArray, SpooledBytes, records_in

_ARRAY, _CHUNK = (
    f"{kind.__qualname__}{HEAD_VALUE_DIVIDER}".encode() for kind in (Array, ArrayChunk)
)
_HEAD = 256
"""Bytes that are more than the head of an array's chunk."""


def inflate(
    object_id: str, objects: Mapping[str, SpooledBytes | bytes], limit: float = math.inf
) -> Any:
    """An object with all that it is made of.

    Args:
        object_id (str): Its id.
        objects (dict): The bytes of each object that it is made of, by id.
        limit (float): Bytes that its arrays may have in all: one may name a chunk many times.

    Raises:
        ValueError: If they have more.
    """
    inflated: dict[str, InflatableObject] = {}
    contents: dict[str, bytes] = {}
    for each, held in objects.items():
        if _head(held).startswith(_CHUNK):
            continue
        contents[each] = content = held.read() if isinstance(held, SpooledBytes) else held
        if content.startswith(_ARRAY):
            inflated[each] = array = _array(content, objects, limit)
            limit -= sum(map(len, cast(_Segments, array.data).segments))
    found = inflate_object_from_contents(object_id, contents, objects=inflated)
    if isinstance(found, Message) and found.has_content():
        for record in records_in(found.content, ArrayRecord).values():
            for name, array in record.items():
                segments = cast(_Segments, array.data).segments
                record[name] = SegmentedArray(array.dtype, array.shape, array.stype, segments)
    return found


def _array(content: bytes, objects: Mapping[str, SpooledBytes | bytes], limit: float) -> Array:
    """An array that has its chunks in place of their bytes."""
    ids = get_object_children_ids_from_object_content(content)
    about = json.loads(get_object_body(content, Array))
    by_id = {each: _chunk(objects[each]) for each in ids}
    chunks = [by_id[ids[number]] for number in about["arraychunk_ids"]]
    if sum(map(len, chunks)) > limit:
        raise ValueError("its arrays have more bytes than a reply may have")
    return Array(about["dtype"], tuple(about["shape"]), about["stype"], _Segments(chunks))


def _chunk(held: SpooledBytes | bytes) -> Segment:
    head = _head(held)
    if not head.startswith(_CHUNK) or HEAD_BODY_DIVIDER not in head:
        raise ValueError("a part of an array is none")
    return Segment(held, head.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER))


def _head(held: SpooledBytes | bytes) -> bytes:
    return held.read(0, _HEAD) if isinstance(held, SpooledBytes) else held[:_HEAD]


class _Segments(bytes):
    """No bytes, and segments as an attribute: Flower's records copy arrays, and take only bytes."""

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> _Segments:
        instance = super().__new__(cls)
        instance.segments = tuple(segments)
        return instance
