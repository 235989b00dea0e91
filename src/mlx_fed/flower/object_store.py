"""The objects that the server's messages are made of; large ones wait on disk."""

from __future__ import annotations

from typing import Any

from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from ..arrays.flower_records import SpooledBytes
from ..arrays.spool import Spool


class StoreFactory(ObjectStoreFactory):
    """Gives Flower's state a store that lets large objects wait in a spool."""

    def __init__(self, spool: Spool):
        super().__init__()
        self.store_instance = Objects(spool)


class Objects(InMemoryObjectStore):
    """Flower's store in memory, but for large objects, whose bytes are in a spool.

    Only objects of the server's own messages are in it: what nodes send is in ``incoming``.
    """

    def __init__(self, spool: Spool):
        super().__init__()
        self._spool = spool

    def put_parts(self, object_id: str, *parts: bytes | memoryview) -> None:
        """Takes the bytes of an object, whose id was just made from them."""
        waiting: Any = self._spool.put(*parts)
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = waiting, True

    def get(self, object_id: str) -> bytes | None:
        held: SpooledBytes | bytes | None = super().get(object_id)
        return held.read() if isinstance(held, SpooledBytes) else held
