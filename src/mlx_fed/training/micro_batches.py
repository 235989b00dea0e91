"""Gradient accumulation: the gradient of a batch from micro-batches, in the memory of one.

The gradients of the micro-batches' mean losses are summed in float32, each by the weight of its
mean, and divided by the sum of the weights: the gradient of the mean over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple

import mlx.core as mx

from ..arrays import examples
from ..arrays.examples import Examples
from ..arrays.named_arrays import Arrays
from ..errors import TaskError


class BatchGradient(NamedTuple):
    """Gradients of a batch's mean loss by parameter, the loss, the weight of the mean, and the
    running statistics after the batch."""

    grads: Arrays
    loss: mx.array
    weight: mx.array
    statistics: Mapping[str, mx.array]


GradientFunction = Callable[
    [Mapping[str, mx.array], Examples, mx.array | None],
    BatchGradient,
]
"""``gradient(statistics, batch, mask)``, of the parameters of the step."""


def micro_batch_bounds(num_examples: int, number: int, smallest: int = 1) -> list[int]:
    """Where the micro-batches of a batch begin, and the end of the last one.

    Args:
        num_examples (int): Examples in the batch.
        number (int): Micro-batches, whose sizes differ by at most one; fewer if there are too few
            examples.
        smallest (int): Examples that each has at least.
    """
    number = max(1, min(number, num_examples // smallest))
    size, remainder = divmod(num_examples, number)
    return [0, *accumulate(size + (index < remainder) for index in range(number))]


def accumulated_gradient(
    gradient: GradientFunction,
    statistics: Mapping[str, mx.array],
    batch: Examples,
    mask: mx.array | None,
    number: int,
    smallest: int = 1,
    in_order: bool = True,
) -> BatchGradient:
    """Gradient of a batch, from that of its micro-batches, one after another.

    A micro-batch of weight 0 counts nothing, whatever its loss is. Gradients have the dtypes of the
    parameters again at the end. Running statistics go on from one micro-batch to the next.

    Args:
        gradient (callable): The gradient of a micro-batch.
        statistics (dict): Running statistics by name.
        batch: A tree of arrays with a leading axis of examples.
        mask (mx.array, optional): Mask of the padding, shape (batch,).
        number (int): Micro-batches.
        smallest (int): Examples that each has at least.
        in_order (bool): Let a micro-batch begin when the one before it is finished, so that only
            one is in memory. ``mx.vmap`` cannot map that.
    """
    sums: Arrays = {}
    loss = weight = mx.array(0.0)
    dtypes: dict[str, mx.Dtype] = {}
    for rows, row_mask in _micro_batches(batch, mask, number, smallest):
        if sums and in_order:
            leaves = mx.depends(examples.leaves(rows), [loss, weight, *sums.values()])
            rows = examples.replace_leaves(rows, leaves)
        result = gradient(statistics, rows, row_mask)
        statistics = result.statistics
        dtypes = {name: array.dtype for name, array in result.grads.items()}
        terms = {name: _weighted(array, result.weight) for name, array in result.grads.items()}
        sums = {name: sums[name] + term for name, term in terms.items()} if sums else terms
        loss = loss + _weighted(result.loss, result.weight)
        weight = weight + result.weight
    divisor = mx.where(weight > 0, weight, 1.0)
    grads = {name: (array / divisor).astype(dtypes[name]) for name, array in sums.items()}
    return BatchGradient(grads, loss / divisor, weight, statistics)


def _micro_batches(
    batch: Examples, mask: mx.array | None, number: int, smallest: int
) -> Iterator[tuple[Examples, mx.array | None]]:
    lengths = {array.shape[:1] for array in examples.leaves(batch)}
    if len(lengths) > 1:
        shapes = [array.shape for array in examples.leaves(batch)]
        raise TaskError(
            "gradient-accumulation divides a batch by its leading axis, the examples, which all of "
            f"its arrays need: a batch of Data.train has the shapes {shapes}."
        )
    bounds = micro_batch_bounds(examples.count(batch), number, smallest)
    for start, end in pairwise(bounds):
        leaves = [array[start:end] for array in examples.leaves(batch)]
        yield examples.replace_leaves(batch, leaves), None if mask is None else mask[start:end]


def _weighted(array: mx.array, weight: mx.array) -> mx.array:
    """Weight times the array, in float32 or complex64; 0 for a weight of 0, also of NaN."""
    wide = array if array.dtype == mx.complex64 else array.astype(mx.float32)
    return mx.where(weight > 0, weight * wide, mx.zeros_like(wide))
