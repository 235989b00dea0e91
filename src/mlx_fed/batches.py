"""Which examples make up each step: shuffled, and the last batch of a pass padded or short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .errors import FedError
from .task import Data, Task

_TAIL_SIZES = 8
"""How many sizes a padded last batch may have: each is one more trace of a program."""


class Rows(NamedTuple):
    """The examples of one step.

    ``indices`` is a NumPy array of shape (batch,) and dtype uint32; the first ``size`` are
    examples, what follows is padding, to be masked out.
    """

    indices: np.ndarray
    size: int

    def mask(self) -> np.ndarray | None:
        """float32 of shape (batch,): 1 for an example, 0 for padding; ``None`` if all are 1."""
        if self.size == len(self.indices):
            return None
        return (np.arange(len(self.indices)) < self.size).astype(np.float32)


def as_arrays(arrays: Sequence[Any]) -> tuple[mx.array, ...]:
    """NumPy or MLX arrays as evaluated MLX arrays: the one copy that is made of a split."""
    converted = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in arrays)
    mx.eval(converted)
    return converted


def load(task: Task, partition_id: int, num_partitions: int | None) -> Data:
    """A partition's data, its arrays as MLX's: NumPy's are not kept beside them.

    Raises:
        FedError: If ``task.data`` returns something else.
    """
    data = task.data(partition_id, num_partitions)
    if not isinstance(data, Data):
        raise FedError(f"Task.data must return mlx_fed.Data, not a {type(data).__name__}")
    return Data(_converted(data.train), _converted(data.test))


def _converted(examples: Any) -> Any:
    return examples if examples is None or callable(examples) else as_arrays(examples)


def epoch(num_examples: int, batch_size: int, padded: bool, seed: int | None) -> Iterator[Rows]:
    """The steps of one pass over ``num_examples`` examples.

    Args:
        num_examples (int): How many examples there are.
        batch_size (int): Examples a step.
        padded (bool): Pad the last batch to a multiple of an eighth of ``batch_size``, so that
            clients of any number of examples share a few programs.
        seed (int, optional): Shuffle by this seed. In order without.
    """
    # NumPy's shuffle: MLX's would wait for the device, and is slower on the CPU.
    order = np.arange(num_examples, dtype=np.uint32)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, num_examples, batch_size):
        rows = order[start : start + batch_size]
        count = len(rows)
        if padded and count < batch_size:
            rows = np.resize(rows, padded_size(count, batch_size))
        yield Rows(rows, count)


def padded_size(count: int, batch_size: int) -> int:
    """The size that a batch of ``count`` examples is padded to."""
    step = -(-batch_size // _TAIL_SIZES)
    return min(batch_size, -(-count // step) * step)
