"""Deserialization of Flower's messages from their objects, without a copy of the arrays.

Flower's ``inflate_object_from_contents`` joins the chunks of each array into new bytes. Here an
array refers to its chunks, in memory or on disk, and joins them when its bytes are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

from flwr.app import Array, ArrayRecord, Message
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ..arrays.flower_records import Segment, SegmentedArray, SpooledBytes, records_in

_ARRAY, _CHUNK = (f"{kind}{HEAD_VALUE_DIVIDER}".encode() for kind in ("Array", "ArrayChunk"))
"""The first bytes of an array's object and of a chunk's."""
_HEAD = 256
"""Bytes that are more than the head of an array's chunk."""


def inflate(
    object_id: str, objects: Mapping[str, SpooledBytes | bytes], limit: float = math.inf
) -> Any:
    """The object of an id, inflated from the bytes of its descendants.

    Args:
        object_id (str): Its id.
        objects (dict): The bytes of each object that it is made of, by id.
        limit (float): Bytes that its arrays may have in all: one may name a chunk many times.

    Raises:
        ValueError: If they have more.
    """
    arrays: dict[str, InflatableObject] = {}
    contents: dict[str, bytes] = {}
    for key, value in objects.items():
        if _head(value).startswith(_CHUNK):
            continue
        contents[key] = content = value.read() if isinstance(value, SpooledBytes) else value
        if content.startswith(_ARRAY):
            arrays[key] = array = _array(content, objects, limit)
            limit -= sum(map(len, cast(_Segments, array.data).segments))
    item = inflate_object_from_contents(object_id, contents, objects=arrays)
    if isinstance(item, Message) and item.has_content():
        for record in records_in(item.content, ArrayRecord).values():
            for name, array in record.items():
                segments = cast(_Segments, array.data).segments
                record[name] = SegmentedArray(array.dtype, array.shape, array.stype, segments)
    return item


def _array(content: bytes, objects: Mapping[str, SpooledBytes | bytes], limit: float) -> Array:
    """An array over the segments of its chunks, from its serialized form."""
    ids = get_object_children_ids_from_object_content(content)
    header = json.loads(get_object_body(content, Array))
    by_id = {key: _chunk(objects[key]) for key in ids}
    chunks = [by_id[ids[number]] for number in header["arraychunk_ids"]]
    if sum(map(len, chunks)) > limit:
        raise ValueError("its arrays have more bytes than a reply may have")
    return Array(header["dtype"], tuple(header["shape"]), header["stype"], _Segments(chunks))


def _chunk(value: SpooledBytes | bytes) -> Segment:
    head = _head(value)
    if not head.startswith(_CHUNK) or HEAD_BODY_DIVIDER not in head:
        raise ValueError("a chunk of an array is not one")
    return Segment(value, head.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER))


def _head(value: SpooledBytes | bytes) -> bytes:
    return value.read(0, _HEAD) if isinstance(value, SpooledBytes) else value[:_HEAD]


class _Segments(bytes):
    """Empty bytes with the segments as an attribute: Flower's records accept only bytes."""

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Iterable[Segment]) -> _Segments:
        instance = super().__new__(cls)
        instance.segments = tuple(segments)
        return instance
