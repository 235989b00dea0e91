"""The objects that messages are made of, as Flower keeps them; large ones wait on disk."""

from __future__ import annotations

from typing import Any

from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from ..spool import OnDisk, Spool
from .inflating import inflate


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
        head = object_content.find(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER)
        waiting: Any = self._spool.put_numbers(object_content, head)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and entry.content is object_content:
                entry.content = waiting

    def put_own(self, object_id: str, *parts: bytes | memoryview) -> None:
        """Takes the bytes of an object of our own, whose id was just made from them."""
        waiting: Any = self._spool.put(*parts)
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = waiting, True

    def get(self, object_id: str) -> bytes | None:
        held = self.held(object_id)
        return held.read() if isinstance(held, OnDisk) else held

    def held(self, object_id: str) -> OnDisk | bytes | None:
        """An object's bytes, in memory or where they wait."""
        return super().get(object_id)

    def inflate(self, object_id: str) -> Any:
        """An object with all that it is made of; the bytes of its arrays stay where they are."""
        tree = iterate_object_tree(self.get_object_tree(object_id))
        return inflate(
            object_id, {node.object_id: self.held(node.object_id) or b"" for node in tree}
        )
