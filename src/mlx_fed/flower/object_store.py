"""Flower's object store in memory, with large objects on disk."""

from __future__ import annotations

from typing import Any

from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from ..arrays.flower_records import SpooledBytes
from ..arrays.spool import Spool


class SpoolingStoreFactory(ObjectStoreFactory):
    """The factory of a :class:`SpoolingObjectStore`, as Flower's LinkState takes it."""

    def __init__(self, spool: Spool):
        super().__init__()
        self.store_instance = SpoolingObjectStore(spool)


class SpoolingObjectStore(InMemoryObjectStore):
    """Flower's store in memory, with the bytes of large objects in a spool.

    It has the objects of the server's own messages; those of replies are in
    :mod:`~mlx_fed.flower.incoming_replies`.
    """

    def __init__(self, spool: Spool):
        super().__init__()
        self._spool = spool

    def put_views(self, object_id: str, *views: bytes | memoryview) -> None:
        """Stores the bytes of an object, which are not hashed again."""
        content: Any = self._spool.put(*views)
        with self.lock_store:
            entry = self.store[object_id]
            if not entry.is_available:
                entry.content, entry.is_available = content, True

    def get(self, object_id: str) -> bytes | None:
        content: SpooledBytes | bytes | None = super().get(object_id)
        return content.read() if isinstance(content, SpooledBytes) else content
