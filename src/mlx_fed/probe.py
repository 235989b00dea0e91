"""What a task's functions do with a model, found out by calling them on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import examples, module_state, randomness
from .examples import Examples
from .index_checks import extreme_rows, indices_checked
from .randomness import Keys, drawing_from
from .steps import augmented, running
from .weights import Slots, WeightsError

_REAL_ROWS = 3
"""Examples whose values must not change with the padding after them."""
_PADDING_ROWS = 2
_EXAMPLES = 8
"""Examples that the effects of a forward pass are looked for with."""


def check_effects(
    model: nn.Module,
    slots: Slots,
    loss: Callable[..., Any],
    batch: Examples,
    augment: Callable[..., Any] | None,
    config: Mapping[str, Any] | None,
    note: Callable[[str], None],
    has_weight: bool,
) -> None:
    """Checks that a forward pass in training mode changes no array but the declared buffers.

    Args:
        model (nn.Module): The model, which is as before afterwards.
        slots (Slots): Its arrays by kind.
        loss (callable): The task's.
        batch: A batch.
        augment (callable, optional): The task's.
        config (dict, optional): The settings, for a loss that takes them.
        note (callable): Told what is not carried from step to step, or not used.
        has_weight (bool): Whether the loss returns (mean, weight).

    Raises:
        WeightsError: If an array was assigned another value.
        ExamplesError: If a label is out of range.
    """
    with running(model, training=True), _keys() as keys:
        arrays = {n: module_state.reference(a) for n, a in module_state.arrays(model).items()}
        counters = module_state.counters(model)
        if augment:
            batch = augmented(augment, keys.next(), batch)
        with indices_checked():
            output = examples.call(loss, model, batch, config)
        after = module_state.arrays(model)
        changed = [
            name
            for name, array in arrays.items()
            if name not in slots.statistics
            and name in after
            and not _is_same(after[name], array)
            and not _equal(after[name], array)
        ]
        moved = [n for n, v in module_state.counters(model).items() if counters.get(n, v) != v]
    if changed:
        raise WeightsError(
            f"The model's forward pass assigns another value to {_listed(changed)}. What it is to "
            "keep from step to step has to be named: Task(buffers=lambda name: 'average' if name "
            f"== {changed[0]!r} else None) averages it over clients as running statistics are; "
            "'local' leaves each client its own."
        )
    if moved:
        note(
            f"the model's forward pass changes {_listed(moved)}, a number of Python's, which is "
            "not kept from step to step: make it an mx.array and name it in Task.buffers"
        )
    if isinstance(output, (tuple, list)) and not has_weight:
        note(
            "Task.loss returns a tuple: its first value is the loss, the rest is not used. If the "
            'second is the weight of a mean, name what it counts: Task(weight_unit="tokens")'
        )


def is_paddable(
    model: nn.Module,
    functions: Sequence[Callable[..., Any]],
    arrays: Examples,
    augment: Callable[..., Any] | None,
    training: bool,
    config: Mapping[str, Any] | None,
) -> bool:
    """Whether each function gives a value an example, whatever other examples are in the batch.

    Then a batch can be padded and the padding masked out. The functions are called on the same
    examples with different padding, with the same random keys.
    """
    total = examples.count(arrays)
    real = [place % total for place in range(_REAL_ROWS)]
    first, last = [0] * _PADDING_ROWS, [total - 1] * _PADDING_ROWS
    try:
        values = [
            _values(model, functions, batch, augment, training, config)
            for batch in (
                _rows(arrays, real + first),
                _rows(arrays, real + last),
                _zeroed(_rows(arrays, real + first)),
                _rows(arrays, [*real, *first, 0]),  # one more: is the length the batch's?
            )
        ]
    except Exception:  # a function that wants whole batches; what is wrong shows in training
        return False
    sizes = [_REAL_ROWS + _PADDING_ROWS] * 3 + [_REAL_ROWS + _PADDING_ROWS + 1]
    for outputs, size in zip(values, sizes, strict=True):
        if any(not isinstance(out, mx.array) or out.shape != (size,) for out in outputs):
            return False
    plain, *others = values[:3]
    return all(
        _equal(other[:_REAL_ROWS], expected[:_REAL_ROWS], 1e-5)
        for outputs in others
        for other, expected in zip(outputs, plain, strict=True)
    )


def sample(arrays: Examples) -> Examples:
    """The first few examples, and those with the least and the largest label."""
    first = range(min(_EXAMPLES, examples.count(arrays)))
    return _rows(arrays, [*first, *extreme_rows(arrays)])


def _keys() -> Any:
    return drawing_from(Keys(randomness.key(0, "probe")))


def _values(
    model: nn.Module,
    functions: Sequence[Callable[..., Any]],
    batch: Examples,
    augment: Callable[..., Any] | None,
    training: bool,
    config: Mapping[str, Any] | None,
) -> list[Any]:
    values = []
    for function in functions:
        with running(model, training), _keys() as keys:
            rows = augmented(augment, keys.next(), batch) if augment else batch
            values.append(examples.call(function, model, rows, config))
    return values


def _rows(arrays: Examples, rows: list[int]) -> Examples:
    return examples.take(arrays, mx.array(rows, mx.uint32))


def _zeroed(arrays: Examples) -> Examples:
    """The arrays with zeros as padding."""

    def zeroed(array: mx.array) -> mx.array:
        padding = mx.zeros((_PADDING_ROWS, *array.shape[1:]), array.dtype)
        return mx.concatenate([array[:_REAL_ROWS], padding])

    return examples.replace_leaves(arrays, [zeroed(a) for a in examples.leaves(arrays)])


def _is_same(array: mx.array, other: mx.array) -> bool:
    """Whether two arrays have their values at one address, so that they need not be compared."""
    if array.shape != other.shape or array.dtype != other.dtype:
        return False
    return len({_address(array), _address(other)}) == 1


def _address(array: mx.array) -> int:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array).ctypes.data


def _equal(array: mx.array, other: mx.array, tolerance: float = 0.0) -> bool:
    if array.shape != other.shape or array.dtype != other.dtype:
        return False
    if mx.issubdtype(array.dtype, mx.inexact) and array.dtype != mx.complex64:
        values, expected = (np.asarray(a.astype(mx.float32)) for a in (array, other))
        return np.allclose(values, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return bool(mx.array_equal(array, other).item())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
