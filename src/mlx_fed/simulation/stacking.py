"""Gathering a step's examples of many clients into one stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..arrays.examples import Examples, count, leaves, replace_leaves

Feed = Callable[[Sequence[int], Sequence[np.ndarray]], Examples]
"""``feed(places, indices)``: for each array of a batch, shape (clients, batch, ...)."""

_MOST_STACKS = 32


class HostStacks:
    """Stacks of examples that the host copies rows into: one copy, and no graph.

    They are used again and again, so a step must be over before the next one is fed.
    """

    def __init__(self) -> None:
        self._held: dict[tuple, tuple[mx.array, np.ndarray]] = {}

    def feed(self, examples: Sequence[Examples]) -> Feed:
        """A feed of these clients' examples."""
        arrays = [leaves(each) for each in examples]
        views = [[np.asarray(array) for array in each] for each in arrays]

        def feed(places: Sequence[int], indices: Sequence[np.ndarray]) -> Examples:
            stacked = []
            for column, like in enumerate(arrays[0]):
                shape = (len(places), len(indices[0]), *like.shape[1:])
                array, view = self._stack(column, shape, like.dtype)
                for row, (place, index) in enumerate(zip(places, indices, strict=True)):
                    # "clip" spares a copy that "raise" makes to be able to undo.
                    views[place][column].take(index, axis=0, out=view[row], mode="clip")
                stacked.append(array)
            return replace_leaves(examples[0], stacked)

        return feed

    def _stack(
        self, column: int, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> tuple[mx.array, np.ndarray]:
        key = (column, shape, dtype)  # two columns of one shape and dtype are two stacks
        if key not in self._held:
            if len(self._held) == _MOST_STACKS:
                self._held.clear()
            array = mx.zeros(shape, dtype)
            mx.eval(array)
            self._held[key] = (array, np.asarray(array))
        return self._held[key]


def device_feed(examples: Sequence[Examples]) -> Feed:
    """One gather a step by the device, from all clients' examples laid end to end."""
    lengths = [count(each) for each in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint32)
    columns = [mx.concatenate(list(column)) for column in zip(*map(leaves, examples), strict=True)]

    def feed(places: Sequence[int], indices: Sequence[np.ndarray]) -> Examples:
        shifted = [index + starts[place] for place, index in zip(places, indices, strict=True)]
        index = mx.array(np.stack(shifted))
        return replace_leaves(examples[0], [mx.take(column, index, axis=0) for column in columns])

    return feed


def host_can_read(examples: Sequence[Examples]) -> bool:
    """Whether NumPy sees the arrays where they are: on a CPU, and in a dtype that it has."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and all(array.dtype != mx.bfloat16 for each in examples for array in leaves(each))
