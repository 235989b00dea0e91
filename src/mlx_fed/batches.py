"""Which examples make up each step: shuffled, and the last batch padded and masked or short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class Rows(NamedTuple):
    """The examples of one step.

    ``indices`` has shape (batch,) and dtype uint32. ``mask`` is float32 of the same shape, 1 for
    an example and 0 for padding, or ``None`` where batches are not padded.
    """

    indices: mx.array
    mask: mx.array | None


def as_arrays(arrays: Sequence[Any]) -> tuple[mx.array, ...]:
    """NumPy or MLX arrays as evaluated MLX arrays: the one copy that is made of a split."""
    converted = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in arrays)
    mx.eval(converted)
    return converted


def epoch(num_examples: int, batch_size: int, padded: bool, key: mx.array | None) -> Iterator[Rows]:
    """The steps of one pass over ``num_examples`` examples.

    Args:
        num_examples (int): How many examples there are.
        batch_size (int): Examples a step.
        padded (bool): Pad the last batch to ``batch_size`` and mask the padding, so that all
            steps have one shape; otherwise the last batch is shorter.
        key (mx.array, optional): Shuffle with this random key. In order without.
    """
    # NumPy's shuffle: MLX's would wait for the device, and is slower on the CPU.
    order = np.arange(num_examples)
    if key is not None:
        order = np.random.default_rng(np.array(key)).permutation(num_examples)
    order = order.astype(np.uint32)
    full = mx.ones(batch_size) if padded else None
    for start in range(0, num_examples, batch_size):
        rows = order[start : start + batch_size]
        if not padded or len(rows) == batch_size:
            yield Rows(mx.array(rows), full)
            continue
        mask = np.zeros(batch_size, np.float32)
        mask[: len(rows)] = 1.0
        yield Rows(mx.array(np.resize(rows, batch_size)), mx.array(mask))
