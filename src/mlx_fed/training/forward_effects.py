"""Effects of a forward pass on a model, and labels without an output, seen on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import examples, module_state, randomness, weights
from ..arrays.examples import Examples, ExamplesError
from ..arrays.named_arrays import WeightsError
from .label_range import check_indices, extreme_rows
from .probe import Probe, equal, take_rows

_EXAMPLES = 8
"""Examples in a probe of a forward pass's effects."""


def check_effects(
    probe: Probe,
    loss: Callable[..., Any],
    batch: Examples,
    note: Callable[[str], None],
    has_weight: bool,
) -> None:
    """Check that a forward pass in training mode changes no array but the declared buffers.

    Args:
        probe (Probe): The probe, in training mode.
        loss (callable): The task's.
        batch: A batch.
        note (callable): ``note(text)`` logs values that are not carried from step to step.
        has_weight (bool): Whether the loss returns (mean, weight).

    Raises:
        WeightsError: If an array was assigned another value.
        ExamplesError: If a label is out of range.
    """

    slots, model = probe.slots, probe.model

    def call(batch: Examples) -> Any:
        with randomness.seed_generators(0, "probe"):
            return probe.call(loss, batch)

    with probe.mode():
        arrays = {n: module_state.alias(a) for n, a in module_state.arrays(model).items()}
        counters = module_state.counters(model)
        buffers = {n: module_state.alias(slot.get()) for n, slot in slots.statistics.items()}
        with check_indices():
            output = call(batch)
        after = module_state.arrays(model)
        changes = [
            name
            for name, array in arrays.items()
            if name not in slots.statistics
            and name in after
            and not _is_same(after[name], array)
            and not equal(after[name], array)
        ]
        counters_after = module_state.counters(model)
        numbers = [name for name, n in counters_after.items() if counters.get(name, n) != n]
        new = [name for name in after if name not in arrays]
        remembers = not changes and _remembers(probe, buffers, call, batch, output)
    if changes:
        raise WeightsError(
            f"The model's forward pass assigns another value to {_quote(changes)}. What it is to "
            "keep from step to step has to be named: Task(buffers=lambda name: 'average' if name "
            f"== {changes[0]!r} else None) averages it over clients as running statistics are; "
            "'local' leaves each client its own. What is to be trained must not be assigned there: "
            "compute what the layer uses in a variable, or change parameters in Task.train_step."
        )
    if remembers and new:
        raise WeightsError(
            f"The model's forward pass creates {_quote(new)} and uses it in the next one. Create "
            "it in the module's __init__ instead, and name it in Task.buffers, so that it is kept "
            "from step to step."
        )
    if numbers:
        note(
            f"the model's forward pass changes {_quote(numbers)}, a number of Python's, which is "
            "not kept from step to step: make it an mx.array and name it in Task.buffers"
        )
    elif remembers:
        note(
            "Task.loss gives another value when it is called with the same examples again: it "
            "depends on something that is neither an array of the model nor drawn by mx.random, "
            "numpy.random or random, and that clients and processes do not have alike"
        )
    if isinstance(output, (tuple, list)) and not has_weight:
        note(
            "Task.loss returns a tuple: its first value is the loss, the rest is not used. If the "
            'second is the weight of a mean, name what it counts: Task(weight_unit="tokens")'
        )


def check_labels(probe: Probe, loss: Callable[..., Any], batch: Examples) -> None:
    """Check, on the examples with the least and the largest labels, that the loss has an output
    for each in an evaluation.

    Args:
        probe (Probe): The probe, in evaluation mode.
        loss (callable): The task's.
        batch: A batch, or all of a client's examples.

    Raises:
        ExamplesError: If a label is out of range.
    """
    rows = sample(batch)
    with probe.mode(), randomness.seed_generators(0, "probe"), check_indices():
        try:
            probe.call(loss, rows)
        except ExamplesError:
            raise
        except Exception:  # of a loss that needs whole batches; the evaluation shows any fault
            return


def _remembers(
    probe: Probe,
    buffers: Mapping[str, mx.array],
    call: Callable[[Examples], Any],
    batch: Examples,
    output: Any,
) -> bool:
    """Whether a loss depends on earlier forward passes other than through buffers.

    ``output`` is that of the first call, from these values of the buffers.
    """
    weights.put(probe.slots.statistics, buffers)
    with suppress(Exception):  # of a loss that needs different examples
        call(examples.take(batch, mx.zeros(examples.count(batch), mx.uint32)))
    weights.put(probe.slots.statistics, buffers)
    return not equal(_value(call(batch)), _value(output), 1e-4)


def _value(output: Any) -> mx.array:
    """Loss alone, of an output that may be a tuple."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, mx.array) else mx.array(0.0)


def sample(arrays: Examples) -> Examples:
    """Sample of examples: the first few, and those with the least and the largest label."""
    first = range(min(_EXAMPLES, examples.count(arrays)))
    return take_rows(arrays, [*first, *extreme_rows(arrays)])


def _is_same(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays have their values at one address, so that they need not be compared."""
    return a.shape == b.shape and a.dtype == b.dtype and len({_address(a), _address(b)}) == 1


def _address(array: mx.array) -> int:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array).ctypes.data


def _quote(names: Sequence[str]) -> str:
    text = ", ".join(repr(name) for name in names[:3])
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text
