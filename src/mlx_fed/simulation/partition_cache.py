"""Cache of partitions in a worker: least recently used ones are dropped first."""

from __future__ import annotations

import zlib
from collections import OrderedDict

import mlx.core as mx
import numpy as np

from ..arrays.examples import leaves
from ..errors import SimulationError
from ..runs import labels
from ..task import Data, Task
from ..training import batches
from ..training.python_state import PythonState


class Partitions:
    """Cache of the data of partitions, loaded when clients are sampled.

    Args:
        task (Task): The task, whose ``data`` loads a partition.
        num_clients (int): Number of partitions.
        max_bytes (int): Size of all arrays in the cache; the last partition is always in it.
        python_state (PythonState): What the task's functions read of Python.

    Attributes:
        changes_state (bool): Whether loading a partition changes that, so that it has to be loaded
            each time before it is used.
    """

    def __init__(self, task: Task, num_clients: int, max_bytes: int, python_state: PythonState):
        self.max_bytes = max_bytes
        self.task = task
        self.num_clients = num_clients
        self.changes_state = False
        self._python_state = python_state
        self._entries: OrderedDict[int, tuple[Data, int]] = OrderedDict()
        self._bytes = 0
        self._fingerprints: dict[int, int] = {}
        self._labels: dict[int, dict[int, int]] = {}

    def get(self, client: int) -> Data:
        """Data of a client, as MLX arrays.

        Raises:
            SimulationError: If the data differs from that of an earlier load.
        """
        if client in self._entries and not self.changes_state:
            self._entries.move_to_end(client)
            return self._entries[client][0]
        data = self._load(client)
        if client not in self._fingerprints and len(self._fingerprints) < labels.MOST_CLIENTS:
            self._labels[client] = labels.count(data)
        if not self._fingerprints:  # once in a process: a second load must be the same
            self._check(client, data)
            data = self._load(client)
        self._check(client, data)
        if self.changes_state:
            return data
        size = size_of(data)
        self._entries[client] = (data, size)
        self._bytes += size
        while self._bytes > self.max_bytes and len(self._entries) > 1:
            _, (_, old_size) = self._entries.popitem(last=False)
            self._bytes -= old_size
        return data

    def new_labels(self) -> dict[int, dict[int, int]]:
        """Number of examples of each label, by client, of first loads since the last call."""
        labels, self._labels = self._labels, {}
        return labels

    def _load(self, client: int) -> Data:
        state = self._python_state.snapshot() if self._fingerprints else None
        data = batches.load(self.task, client, self.num_clients)
        if state is not None and state != self._python_state.snapshot():
            self.changes_state = True
        return data

    def _check(self, client: int, data: Data) -> None:
        fingerprint = _fingerprint(data)
        if self._fingerprints.setdefault(client, fingerprint) != fingerprint:
            raise SimulationError(
                f"Task.data gave other examples for partition {client} than before. It must give "
                "the same ones for the same arguments: let its random choices follow from the "
                "partition's number"
            )


def _arrays(data: Data) -> list[mx.array]:
    splits = [s for s in (data.train, data.test) if s is not None and not callable(s)]
    return [array for split in splits for array in leaves(split)]


def size_of(data: Data) -> int:
    """Size of a client's arrays in bytes."""
    return sum(array.nbytes for array in _arrays(data))


def _fingerprint(data: Data) -> int:
    """Checksum of the shapes, and of the first and last example of each array."""
    value = 0
    for array in _arrays(data):
        value = zlib.crc32(repr((array.shape, array.dtype)).encode(), value)
        if array.size:
            ends = mx.stack([array[0], array[-1]]).astype(mx.float32)
            value = zlib.crc32(np.asarray(ends).tobytes(), value)
    return value
