"""The objects that messages are made of, as Flower keeps them; large ones wait on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, cast

from flwr.app import Array, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_children_ids_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from ..spool import OnDisk, Part, Spool, WaitingArray

_ARRAY, _CHUNK = (
    f"{kind.__qualname__}{HEAD_VALUE_DIVIDER}".encode() for kind in (Array, ArrayChunk)
)
_HEAD = 256
"""Bytes that are more than the head of an array's chunk."""


class StoreFactory(ObjectStoreFactory):
    """Gives Flower's state a store that lets large objects wait in a spool."""

    def __init__(self, spool: Spool):
        super().__init__()
        self.store_instance = Objects(spool)


class Objects(InMemoryObjectStore):
    """Flower's store in memory, but for large objects, whose bytes are in a spool."""

    def __init__(self, spool: Spool):
        super().__init__()
        self._spool = spool

    def put(self, object_id: str, object_content: bytes) -> None:
        """Takes an object that a node sent, once it is what its id says."""
        super().put(object_id, object_content)
        self._let_wait(object_id, object_content)

    def put_own(self, object_id: str, object_content: bytes) -> None:
        """Takes an object of our own, whose id was just made from it."""
        with self.lock_store:
            entry = self.store[object_id]
            if entry.is_available:
                return
            entry.content, entry.is_available = object_content, True
        self._let_wait(object_id, object_content)

    def _let_wait(self, object_id: str, content: bytes) -> None:
        waiting: Any = self._spool.put(content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and entry.content is content:
                entry.content = waiting

    def get(self, object_id: str) -> bytes | None:
        held = self.held(object_id)
        return held.read() if isinstance(held, OnDisk) else held

    def held(self, object_id: str) -> OnDisk | bytes | None:
        """An object's bytes, in memory or where they wait."""
        return super().get(object_id)

    def inflate(self, object_id: str) -> Any:
        """An object with all that it is made of; the bytes of its arrays stay where they are."""
        inflated: dict[str, InflatableObject] = {}
        contents: dict[str, bytes] = {}
        for tree in iterate_object_tree(self.get_object_tree(object_id)):
            held = self.held(tree.object_id) or b""
            if _head(held).startswith(_CHUNK):
                continue
            content = held.read() if isinstance(held, OnDisk) else held
            contents[tree.object_id] = content
            if content.startswith(_ARRAY):
                inflated[tree.object_id] = self._array(content)
        found = inflate_object_from_contents(object_id, contents, objects=inflated)
        if isinstance(found, Message) and found.has_content():
            for record in found.content.array_records.values():
                for name, array in record.items():
                    record[name] = WaitingArray(array, cast(_Parts, array.data).parts)
        return found

    def _array(self, content: bytes) -> Array:
        """An array that has its chunks in place of their bytes."""
        ids = get_object_children_ids_from_object_content(content)
        about = json.loads(get_object_body(content, Array))
        chunks = [self._chunk(ids[number]) for number in about["arraychunk_ids"]]
        return Array(about["dtype"], tuple(about["shape"]), about["stype"], _Parts(chunks))

    def _chunk(self, object_id: str) -> Part:
        held = self.held(object_id) or b""
        head = _head(held)
        if not head.startswith(_CHUNK) or HEAD_BODY_DIVIDER not in head:
            raise ValueError("a part of an array is none")
        return Part(held, head.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER))


def _head(held: OnDisk | bytes) -> bytes:
    return held.read(0, _HEAD) if isinstance(held, OnDisk) else held[:_HEAD]


class _Parts(bytes):
    """No bytes, and the parts that hold them: Flower's records copy arrays, and take only bytes."""

    parts: tuple[Part, ...]

    def __new__(cls, parts: Iterable[Part]) -> _Parts:
        made = super().__new__(cls)
        made.parts = tuple(parts)
        return made
