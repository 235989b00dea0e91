"""Probes of a task's functions: their effects on a model, by calls on a few examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import examples, module_state, randomness, weights
from ..arrays.examples import Examples, ExamplesError
from ..arrays.named_arrays import WeightsError
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from .label_range import check_all_indices, check_indices, extreme_rows
from .programs import find_difference
from .steps import augment_batch, forward_mode

_ROWS = 8
"""Rows of examples and rows of padding in a probe of padding."""
_SCALES = (1.0, 10.0, 100.0)
"""Deviations of floating-point numbers in a probe of padding."""
_LIMITS = (16, 10, 8, 6, 5, 4, 3, 2)
"""Ends of the integers in a probe of padding: the largest that the functions take is used."""
_EXAMPLES = 8
"""Examples in a probe of a forward pass's effects."""


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
    """Check that a forward pass in training mode changes no array but the declared buffers.

    Args:
        model (nn.Module): The model, which is as before afterwards.
        slots (Slots): Its arrays by kind.
        loss (callable): The task's.
        batch: A batch.
        augment (callable, optional): The task's.
        config (dict, optional): The settings, for a loss that takes them.
        note (callable): ``note(text)`` logs values that are not carried from step to step.
        has_weight (bool): Whether the loss returns (mean, weight).

    Raises:
        WeightsError: If an array was assigned another value.
        ExamplesError: If a label is out of range.
    """

    def call(batch: Examples) -> Any:
        with randomness.seed_generators(0, "probe"), _keys() as keys:
            rows = augment_batch(augment, keys.next(), batch) if augment else batch
            return examples.call(loss, model, rows, config)

    with forward_mode(model, training=True):
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
            and not _equal(after[name], array)
        ]
        counters_after = module_state.counters(model)
        numbers = [name for name, n in counters_after.items() if counters.get(name, n) != n]
        new = [name for name in after if name not in arrays]
        remembers = not changes and _remembers(slots, buffers, call, batch, output)
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


def check_labels(
    model: nn.Module, loss: Callable[..., Any], batch: Examples, config: Mapping[str, Any] | None
) -> None:
    """Check, on the examples with the least and the largest labels, that the loss has an output
    for each in an evaluation.

    Args:
        model (nn.Module): The model, which is as before afterwards.
        loss (callable): The task's.
        batch: A batch, or all of a client's examples.
        config (dict, optional): The settings, for a loss that takes them.

    Raises:
        ExamplesError: If a label is out of range.
    """
    rows = sample(batch)
    with (
        forward_mode(model, training=False),
        randomness.seed_generators(0, "probe"),
        _keys(),
        check_indices(),
    ):
        try:
            examples.call(loss, model, rows, config)
        except ExamplesError:
            raise
        except Exception:  # of a loss that needs whole batches; the evaluation shows any fault
            return


def _remembers(
    slots: Slots,
    buffers: Mapping[str, mx.array],
    call: Callable[[Examples], Any],
    batch: Examples,
    output: Any,
) -> bool:
    """Whether a loss depends on earlier forward passes other than through buffers.

    ``output`` is that of the first call, from these values of the buffers.
    """
    weights.put(slots.statistics, buffers)
    with suppress(Exception):  # of a loss that needs different examples
        call(examples.take(batch, mx.zeros(examples.count(batch), mx.uint32)))
    weights.put(slots.statistics, buffers)
    return not _equal(_value(call(batch)), _value(output), 1e-4)


def _value(output: Any) -> mx.array:
    """Loss alone, of an output that may be a tuple."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, mx.array) else mx.array(0.0)


def is_paddable(
    model: nn.Module,
    slots: Slots,
    functions: Sequence[Callable[..., Any]],
    arrays: Examples,
    augment: Callable[..., Any] | None,
    training: bool,
    config: Mapping[str, Any] | None,
) -> bool:
    """Whether each function returns a value for each example, independent of the other examples.

    Then a batch can be padded and the padding masked out. The functions are called on the same
    examples with different padding, with the same random keys, and for training the gradients of
    the first are compared as well. Examples and parameters are random, so that the result is the
    same in each process and round, whatever data a client has.

    Args:
        model (nn.Module): The model, which is as before afterwards.
        slots (Slots): Its arrays by kind.
        functions (list): The loss, or the loss and metrics.
        arrays: Examples, of which only shapes and dtypes are used.
        augment (callable, optional): The task's.
        training (bool): The model's mode.
        config (dict, optional): The settings, for functions that take them.
    """
    arguments = model, slots, functions, augment, training, config
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
    model: nn.Module,
    slots: Slots,
    functions: Sequence[Callable[..., Any]],
    augment: Callable[..., Any] | None,
    training: bool,
    config: Mapping[str, Any] | None,
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
        for name, array in random_parameters(weights.get(slots.parameters)).items()
    }
    with module_state.preserve(model):
        weights.put(slots.parameters, parameters)
        values = [_values(model, functions, b, augment, training, config) for b in batches]
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
            weights.put(slots.parameters, parameters)
            (values,) = _values(model, functions[:1], batch, augment, training, config)
            return values[:_ROWS].sum()

        with forward_mode(model, training):
            return mx.grad(total)(parameters)

    if not training:
        return False
    return find_difference(gradient(batches[2]), gradient(batches[0])) is not None


class Draw(NamedTuple):
    """Distribution of random examples with values that few have.

    ``scale`` is the deviation of floating-point numbers, ``limit`` the end of the integers; the
    leaf number ``missing`` has entries of NaN, or of -100, which losses leave out as labels.
    """

    scale: float
    limit: int
    missing: int | None = None


def _depends_on_rare_values(
    model: nn.Module,
    slots: Slots,
    functions: Sequence[Callable[..., Any]],
    augment: Callable[..., Any] | None,
    training: bool,
    config: Mapping[str, Any] | None,
    arrays: Examples,
) -> bool:
    """Whether values of examples change with others of large numbers, or with missing ones.

    What a function does not take, such as a label that the model has no output for, shows nothing.
    """
    parameters = random_parameters(weights.get(slots.parameters))

    def depends(draw: Draw) -> bool | None:
        """``None`` if a function does not take such examples."""
        real, padding = (_draw_like(arrays, draw, number) for number in range(2))
        paddings = [padding, *(_rows(padding, [row] * _ROWS) for row in (0, 1))]
        try:
            with module_state.preserve(model), check_all_indices():
                weights.put(slots.parameters, parameters)
                plain, *variants = [
                    _values(model, functions, _concatenate(real, rows), augment, training, config)
                    for rows in paddings
                ]
        except Exception:
            return None
        return not all(
            _equal(value[:_ROWS], reference[:_ROWS])
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


def _draw_like(arrays: Examples, draw: Draw, number: int) -> Examples:
    """Random examples of given shapes and dtypes."""
    generator = np.random.default_rng(randomness.derive(0, "rare examples", number))

    def draw_leaf(array: mx.array, is_missing: bool) -> mx.array:
        shape = (_ROWS, *array.shape[1:])
        missing = generator.random(shape) < 0.4
        if mx.issubdtype(array.dtype, mx.inexact):
            values = draw.scale * generator.normal(size=shape)
            values = np.where(missing, np.nan, values) if is_missing else values
            return mx.array(values.astype(np.float32)).astype(array.dtype)
        is_image = array.dtype == mx.uint8 and array.ndim > 1
        integers = generator.integers(0, 256 if is_image else draw.limit, shape)
        if is_missing and mx.issubdtype(array.dtype, mx.signedinteger):
            integers = np.where(missing, -100, integers)
        if array.dtype == mx.bool_:
            integers = integers % 2
        return mx.array(integers).astype(array.dtype)

    leaves = enumerate(examples.leaves(arrays))
    return examples.replace_leaves(
        arrays, [draw_leaf(array, index == draw.missing) for index, array in leaves]
    )


def random_like(arrays: Examples, size: int, number: int, wide: bool = False) -> Examples:
    """Random examples of given shapes and dtypes: positive numbers, integers of 0 and 1.

    Args:
        arrays: Examples, or a batch.
        size (int): How many.
        number (int): Seed.
        wide (bool): Large and negative numbers as well.
    """
    keys = Keys(randomness.key(0, "random examples", number))

    def draw(array: mx.array) -> mx.array:
        shape = (size, *array.shape[1:])
        if mx.issubdtype(array.dtype, mx.inexact):
            if wide:
                return (2 * mx.random.normal(shape, key=keys.next())).astype(array.dtype)
            return mx.random.uniform(0.05, 1.0, shape, key=keys.next()).astype(array.dtype)
        return mx.random.bernoulli(0.5, shape, key=keys.next()).astype(array.dtype)

    return examples.replace_leaves(arrays, [draw(array) for array in examples.leaves(arrays)])


def random_parameters(parameters: Mapping[str, mx.array], number: int = 0) -> dict[str, mx.array]:
    """Random parameters of given shapes and dtypes; weights scaled by their inputs.

    Args:
        parameters (dict): Parameters by name.
        number (int): Seed.
    """
    keys = Keys(randomness.key(0, "random parameters", number))

    def draw(array: mx.array) -> mx.array:
        inputs = math.prod(array.shape[1:]) if array.ndim > 1 else 10
        values = mx.random.normal(array.shape, key=keys.next()) / math.sqrt(max(1, inputs))
        return values.astype(array.dtype)

    return {name: draw(array) for name, array in parameters.items()}


def sample(arrays: Examples) -> Examples:
    """Sample of examples: the first few, and those with the least and the largest label."""
    first = range(min(_EXAMPLES, examples.count(arrays)))
    return _rows(arrays, [*first, *extreme_rows(arrays)])


def _keys() -> Any:
    return draw_keys_from(Keys(randomness.key(0, "probe")))


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
        with forward_mode(model, training), _keys() as keys:
            rows = augment_batch(augment, keys.next(), batch) if augment else batch
            values.append(examples.call(function, model, rows, config))
    return values


def _rows(arrays: Examples, rows: list[int]) -> Examples:
    return examples.take(arrays, mx.array(rows, mx.uint32))


def _concatenate(arrays: Examples, padding: Examples) -> Examples:
    pairs = zip(examples.leaves(arrays), examples.leaves(padding), strict=True)
    return examples.replace_leaves(arrays, [mx.concatenate(list(pair)) for pair in pairs])


def _is_same(a: mx.array, b: mx.array) -> bool:
    """Whether two arrays have their values at one address, so that they need not be compared."""
    return a.shape == b.shape and a.dtype == b.dtype and len({_address(a), _address(b)}) == 1


def _address(array: mx.array) -> int:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.asarray(array).ctypes.data


def _equal(array: mx.array, reference: mx.array, tolerance: float = 0.0) -> bool:
    if array.shape != reference.shape or array.dtype != reference.dtype:
        return False
    if mx.issubdtype(array.dtype, mx.inexact) and array.dtype != mx.complex64:
        values, plain = (np.asarray(a.astype(mx.float32)) for a in (array, reference))
        size = float(np.abs(plain[np.isfinite(plain)]).max(initial=0))
        return np.allclose(values, plain, rtol=0, atol=tolerance * size, equal_nan=True)
    return bool(mx.array_equal(array, reference).item())


def _quote(names: Sequence[str]) -> str:
    text = ", ".join(repr(name) for name in names[:3])
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text
