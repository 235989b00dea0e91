"""Probe of a task: calls of its functions on a few examples, to see what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import examples, randomness
from ..arrays.examples import Examples
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from .steps import augment_batch, forward_mode


class Probe(NamedTuple):
    """Call of a task's functions on a few examples, with the same random keys each time.

    ``model`` is as before afterwards, ``slots`` are its arrays by kind, ``augment`` is the task's,
    ``config`` has the settings for functions that take them, ``training`` is the model's mode.
    """

    model: nn.Module
    slots: Slots
    augment: Callable[..., Any] | None
    config: Mapping[str, Any] | None
    training: bool

    def call(self, function: Callable[..., Any], batch: Examples) -> Any:
        """Output of a function on a batch."""
        with draw_keys_from(Keys(randomness.key(0, "probe"))) as keys:
            rows = augment_batch(self.augment, keys.next(), batch) if self.augment else batch
            return examples.call(function, self.model, rows, self.config)

    def mode(self) -> Any:
        """Context of the model's mode."""
        return forward_mode(self.model, self.training)

    def values(self, functions: Sequence[Callable[..., Any]], batch: Examples) -> list[Any]:
        """Outputs of several functions on a batch."""
        outputs = []
        for function in functions:
            with self.mode():
                outputs.append(self.call(function, batch))
        return outputs


def take_rows(arrays: Examples, rows: list[int]) -> Examples:
    """Examples by their indices."""
    return examples.take(arrays, mx.array(rows, mx.uint32))


def equal(array: mx.array, reference: mx.array, tolerance: float = 0.0) -> bool:
    """Whether two arrays are equal, up to a tolerance relative to the largest value."""
    if array.shape != reference.shape or array.dtype != reference.dtype:
        return False
    if mx.issubdtype(array.dtype, mx.inexact) and array.dtype != mx.complex64:
        values, plain = (np.asarray(a.astype(mx.float32)) for a in (array, reference))
        size = float(np.abs(plain[np.isfinite(plain)]).max(initial=0))
        return np.allclose(values, plain, rtol=0, atol=tolerance * size, equal_nan=True)
    return bool(mx.array_equal(array, reference).item())
