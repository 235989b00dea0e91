"""Stacks of many clients' examples for a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..arrays.examples import Examples, count, leaves, replace_leaves

Feed = Callable[[Sequence[int], Sequence[np.ndarray]], Examples]
"""``feed(members, indices)``: a tree of arrays of shape (members, batch, ...)."""

_MAX_STACKS = 32


class HostStacks:
    """Stacks of examples, to which the host copies rows: one copy, and no graph.

    They are reused, so that a step has to be evaluated before the next call of a feed.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple, tuple[mx.array, np.ndarray]] = {}

    def feed(self, examples: Sequence[Examples]) -> Feed:
        """Feed of these clients' examples."""
        arrays = [leaves(tree) for tree in examples]
        views = [[np.asarray(array) for array in columns] for columns in arrays]

        def feed(members: Sequence[int], indices: Sequence[np.ndarray]) -> Examples:
            stacks = []
            for column, like in enumerate(arrays[0]):
                shape = (len(members), len(indices[0]), *like.shape[1:])
                array, view = self._stack(column, shape, like.dtype)
                for row, (member, index) in enumerate(zip(members, indices, strict=True)):
                    # "raise" would make a copy first.
                    views[member][column].take(index, axis=0, out=view[row], mode="clip")
                stacks.append(array)
            return replace_leaves(examples[0], stacks)

        return feed

    def _stack(
        self, column: int, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> tuple[mx.array, np.ndarray]:
        key = (column, shape, dtype)  # two columns of one shape and dtype are two stacks
        if key not in self._stacks:
            if len(self._stacks) == _MAX_STACKS:
                self._stacks.clear()
            array = mx.zeros(shape, dtype)
            mx.eval(array)
            self._stacks[key] = (array, np.asarray(array))
        return self._stacks[key]


def device_feed(examples: Sequence[Examples]) -> Feed:
    """Feed by one gather on the device, from the concatenation of all clients' examples."""
    lengths = [count(tree) for tree in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint32)
    columns = [mx.concatenate(list(column)) for column in zip(*map(leaves, examples), strict=True)]

    def feed(members: Sequence[int], indices: Sequence[np.ndarray]) -> Examples:
        rows = [index + starts[member] for member, index in zip(members, indices, strict=True)]
        index = mx.array(np.stack(rows))
        return replace_leaves(examples[0], [mx.take(column, index, axis=0) for column in columns])

    return feed


def host_can_read(examples: Sequence[Examples]) -> bool:
    """Whether NumPy can view the arrays without a copy: on a CPU, and in a dtype that it has."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and all(array.dtype != mx.bfloat16 for tree in examples for array in leaves(tree))
