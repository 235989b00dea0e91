"""The partitions that a worker has loaded: as many as fit, the last used kept longest."""

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


class Partitions:
    """Loads clients' data when they are sampled.

    Args:
        task (Task): Whose ``data`` loads a partition.
        num_clients (int): How many partitions there are.
        most_bytes (int): How many bytes of arrays to keep; the last partition is kept anyhow.
    """

    def __init__(self, task: Task, num_clients: int, most_bytes: int):
        self.most_bytes = most_bytes
        self.task = task
        self.num_clients = num_clients
        self._held: OrderedDict[int, tuple[Data, int]] = OrderedDict()
        self._bytes = 0
        self._seen: dict[int, int] = {}
        self._labels: dict[int, dict[int, int]] = {}

    def get(self, client: int) -> Data:
        """A client's data, its arrays as MLX's.

        Raises:
            SimulationError: If the data is not what it was when it was loaded before.
        """
        if client in self._held:
            self._held.move_to_end(client)
            return self._held[client][0]
        data = self._load(client)
        if client not in self._seen and len(self._seen) < labels.MOST_CLIENTS:
            self._labels[client] = labels.count(data)
        if not self._seen:  # once, at the start: look whether it is the same again
            self._check(client, data)
            data = self._load(client)
        self._check(client, data)
        size = size_of(data)
        self._held[client] = (data, size)
        self._bytes += size
        while self._bytes > self.most_bytes and len(self._held) > 1:
            _, (_, freed) = self._held.popitem(last=False)
            self._bytes -= freed
        return data

    def new_labels(self) -> dict[int, dict[int, int]]:
        """How many examples of each label the clients have that were loaded for the first time
        since this was last asked."""
        new, self._labels = self._labels, {}
        return new

    def _load(self, client: int) -> Data:
        return batches.load(self.task, client, self.num_clients)

    def _check(self, client: int, data: Data) -> None:
        seen = self._seen.setdefault(client, now := _fingerprint(data))
        if seen != now:
            raise SimulationError(
                f"Task.data gave other examples for partition {client} than before. It must give "
                "the same ones for the same arguments: let its random choices follow from the "
                "partition's number"
            )


def _arrays(data: Data) -> list[mx.array]:
    splits = [s for s in (data.train, data.test) if s is not None and not callable(s)]
    return [array for split in splits for array in leaves(split)]


def size_of(data: Data) -> int:
    """The bytes of a client's arrays."""
    return sum(array.nbytes for array in _arrays(data))


def _fingerprint(data: Data) -> int:
    """Of the shapes, and of the first and last example of each array."""
    value = 0
    for array in _arrays(data):
        value = zlib.crc32(repr((array.shape, array.dtype)).encode(), value)
        if array.size:
            ends = mx.stack([array[0], array[-1]]).astype(mx.float32)
            value = zlib.crc32(np.asarray(ends).tobytes(), value)
    return value
