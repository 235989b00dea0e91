"""Padding of batches: whether a task's functions allow it, by calls on random examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import examples, module_state, weights
from ..arrays.examples import Examples
from .label_range import check_all_indices
from .probe import Probe, equal, take_rows
from .programs import find_difference
from .random_inputs import Draw, draw_like, random_like, random_parameters

_ROWS = 8
"""Rows of examples and rows of padding in a probe of padding."""
_SCALES = (1.0, 10.0, 100.0)
"""Deviations of floating-point numbers in a probe of padding."""
_LIMITS = (16, 10, 8, 6, 5, 4, 3, 2)
"""Ends of the integers in a probe of padding: the largest that the functions take is used."""


def is_paddable(probe: Probe, functions: Sequence[Callable[..., Any]], arrays: Examples) -> bool:
    """Whether each function returns a value for each example, independent of the other examples.

    Then a batch can be padded and the padding masked out. The functions are called on the same
    examples with different padding, with the same random keys, and for training the gradients of
    the first are compared as well. Examples and parameters are random, so that the result is the
    same in each process and round, whatever data a client has.

    Args:
        probe (Probe): The probe, in the mode of the model.
        functions (list): The loss, or the loss and metrics.
        arrays: Examples, of which only shapes and dtypes are used.
    """
    arguments = probe, functions
    try:
        return (
            _depends_on_others(*arguments, arrays, 1.0, False) is False
            and not any(
                _depends_on_others(*arguments, arrays, scale, True) for scale in (4.0, 1.0, 0.1)
            )
            and not _depends_on_rare_values(*arguments, arrays)
        )
    except Exception:  # of a function that needs whole batches; training shows any fault
        return False


def _depends_on_others(
    probe: Probe,
    functions: Sequence[Callable[..., Any]],
    arrays: Examples,
    scale: float,
    wide: bool,
) -> bool | None:
    """Whether the values or gradients of examples change with the other examples of a batch, or a
    function returns no value for each; ``None`` where values are not finite.

    Args:
        scale (float): Factor of the random parameters: larger ones give larger losses.
        wide (bool): Examples of large and of negative numbers.
    """
    real, *paddings = (random_like(arrays, _ROWS, number, wide) for number in range(3))
    zeros = examples.replace_leaves(real, [mx.zeros_like(a) for a in examples.leaves(real)])
    longer = random_like(arrays, _ROWS + 1, 3, wide)  # is the length that of the batch?
    batches = [_concatenate(real, rows) for rows in (*paddings, zeros, longer)]
    parameters = {
        name: (scale * array).astype(array.dtype)
        for name, array in random_parameters(weights.get(probe.slots.parameters)).items()
    }
    with module_state.preserve(probe.model):
        weights.put(probe.slots.parameters, parameters)
        values = [probe.values(functions, batch) for batch in batches]
    for outputs, batch in zip(values, batches, strict=True):
        shape = (examples.count(batch),)
        if any(not isinstance(out, mx.array) or out.shape != shape for out in outputs):
            return True
    plain, *variants = [
        [np.asarray(out[:_ROWS].astype(mx.float32)) for out in outputs] for outputs in values[:3]
    ]
    if not all(np.isfinite(out).all() for out in plain):
        return None
    if not all(
        np.array_equal(out, reference)
        for outputs in variants
        for out, reference in zip(outputs, plain, strict=True)
    ):
        return True

    def gradient(batch: Examples) -> dict[str, mx.array]:
        def total(parameters: dict[str, mx.array]) -> mx.array:
            weights.put(probe.slots.parameters, parameters)
            (values,) = probe.values(functions[:1], batch)
            return values[:_ROWS].sum()

        with probe.mode():
            return mx.grad(total)(parameters)

    if not probe.training:
        return False
    return find_difference(gradient(batches[2]), gradient(batches[0])) is not None


def _depends_on_rare_values(
    probe: Probe,
    functions: Sequence[Callable[..., Any]],
    arrays: Examples,
) -> bool:
    """Whether values of examples change with others of large numbers, or with missing ones.

    What a function does not take, such as a label that the model has no output for, shows nothing.
    """
    parameters = random_parameters(weights.get(probe.slots.parameters))

    def depends(draw: Draw) -> bool | None:
        """``None`` if a function does not take such examples."""
        real, padding = (draw_like(arrays, _ROWS, draw, number) for number in range(2))
        paddings = [padding, *(take_rows(padding, [row] * _ROWS) for row in (0, 1))]
        try:
            with module_state.preserve(probe.model), check_all_indices():
                weights.put(probe.slots.parameters, parameters)
                plain, *variants = [
                    probe.values(functions, _concatenate(real, rows)) for rows in paddings
                ]
        except Exception:
            return None
        return not all(
            equal(value[:_ROWS], reference[:_ROWS])
            for values in variants
            for value, reference in zip(values, plain, strict=True)
        )

    limits = (limit for limit in _LIMITS if depends(Draw(1.0, limit)) is not None)
    limit = next(limits, 2)
    numbers = range(len(examples.leaves(arrays)))
    draws = [
        *(Draw(scale, limit) for scale in _SCALES),
        *(Draw(1.0, limit, number) for number in numbers),
    ]
    return any(depends(draw) for draw in draws)


def _concatenate(arrays: Examples, padding: Examples) -> Examples:
    pairs = zip(examples.leaves(arrays), examples.leaves(padding), strict=True)
    return examples.replace_leaves(arrays, [mx.concatenate(list(pair)) for pair in pairs])
