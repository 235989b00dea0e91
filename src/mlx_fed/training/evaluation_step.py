"""One step of evaluation as a pure function of arrays: the loss and the metrics on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import examples, weights
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from ..errors import FedError
from ..task import Config, DatasetMetric, Task
from .steps import forward_mode, loss_and_weight, with_round_and_step

LOSS = "loss"

Function = Callable[..., Any] | DatasetMetric
Outputs = dict[str, tuple[mx.array, ...]]
"""Outputs of each function on a batch, by name: the mean and its weight, float32 scalars; or the
arrays that a :class:`~mlx_fed.task.DatasetMetric` predicts, shape (batch, ...) each."""


class MetricError(FedError):
    """A metric whose output has no mean over the examples."""


class Untraceable(Exception):
    """A metric that fails while the evaluation step is traced."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def evaluation_step(
    model: nn.Module,
    slots: Slots,
    task: Task,
    functions: Mapping[str, Function],
    order: Sequence[str],
    layouts: dict[str, Any],
    config: Config,
) -> Callable[..., Outputs]:
    """The function ``step(parameters, statistics, key, round_and_step, batch, mask)``.

    Args:
        model (nn.Module): The model.
        slots (Slots): Where its arrays are held.
        task (Task): Its ``weight_unit`` defines a tuple that the loss returns.
        functions (dict): The loss and metrics to evaluate, by name.
        order (list): All names: a function's random key does not depend on which others run.
        layouts (dict): How a DatasetMetric's arrays are passed to its ``compute``, by name: their
            number, or their names. The step adds the missing ones.
        config (dict): The settings, for functions that take them.

    Raises:
        Untraceable: If a metric raises; an exception of the loss is not changed.
    """

    def step(parameters, statistics, key, round_and_step, batch, mask):
        sequence = Keys(key)
        keys = {name: sequence.next() for name in order}
        settings = with_round_and_step(config, round_and_step)
        outputs: Outputs = {}
        with forward_mode(model, training=False):
            weights.put(slots.parameters, parameters)
            weights.put(slots.statistics, statistics)
            function: Any
            for name, function in functions.items():
                with draw_keys_from(Keys(keys[name])):
                    if name == LOSS:
                        output = examples.call(function, model, batch, settings)
                        outputs[name] = loss_and_weight(task, output, batch, mask)
                        continue
                    try:
                        arguments = model, batch, settings
                        outputs[name] = metric_outputs(function, arguments, mask, name, layouts)
                    except Exception as error:
                        raise Untraceable(name) from error
        return outputs

    return step


def metric_outputs(
    metric: Function,
    arguments: tuple[nn.Module, Any, Config | None],
    mask: mx.array | None,
    name: str,
    layouts: dict[str, Any],
) -> tuple[mx.array, ...]:
    """Output of a metric on a batch: see :data:`Outputs`.

    Raises:
        MetricError: If the shapes are not those of a metric, in words.
    """
    num_rows = examples.count(arguments[1])
    if not isinstance(metric, DatasetMetric):
        return mean_and_weight(examples.call(metric, *arguments), num_rows, mask, name)
    predictions = examples.call(metric.predict, *arguments)
    layout: Any
    values: Any
    if isinstance(predictions, Mapping):
        layout, values = tuple(predictions), tuple(predictions.values())
    else:
        values = predictions if isinstance(predictions, (tuple, list)) else (predictions,)
        layout = len(values)
    if layouts.setdefault(name, layout) != layout:
        raise MetricError(
            f"metric {name!r} predicts {layout} on one batch and {layouts[name]} on another: its "
            "predict returns the same arrays, or the same names, on each"
        )
    arrays = tuple(_as_array(value, name) for value in values)
    for array in arrays:
        if array.ndim == 0 or len(array) != num_rows:
            raise MetricError(
                f"metric {name!r} predicts an array of shape {array.shape} for a batch of "
                f"{num_rows} examples: the leading axis of each is that of the examples"
            )
    return arrays


def mean_and_weight(
    output: Any, num_rows: int, mask: mx.array | None, name: str
) -> tuple[mx.array, mx.array]:
    """Mean of a metric over a batch and its weight, from the metric's output.

    Args:
        output: A value for each example, shape (batch,), or several, whose mean is the example's:
            (batch, ...); a mean, a scalar; or a tuple of a mean and its weight, two scalars.
        num_rows (int): Rows of the batch.
        mask (mx.array, optional): float32 of shape (batch,), 0 for padding.
        name (str): The metric's name.

    Returns:
        tuple: Two float32 scalars.

    Raises:
        MetricError: If the output is none of these.
    """
    if isinstance(output, tuple):
        if len(output) != 2:
            raise MetricError(
                f"metric {name!r} returned a tuple of {len(output)}: as a tuple it returns (mean, "
                "weight)"
            )
        mean, weight = (_as_array(value, name) for value in output)
        if mean.size != 1 or weight.size != 1:
            raise MetricError(
                f"metric {name!r} returned a tuple of shapes {mean.shape} and {weight.shape}: as a "
                "tuple it returns (mean, weight), two scalars; values of each example are returned "
                "alone, with their leading axis"
            )
        # See steps.py on a weight by which the mean itself was divided.
        weight = mx.maximum(weight.reshape(()), 0).astype(mx.float32)
        return mean.reshape(()).astype(mx.float32), weight
    values = _as_array(output, name).astype(mx.float32)  # a bfloat16 cannot count to 257
    if values.ndim and len(values) == num_rows and values.size:
        values = values.reshape(num_rows, -1).mean(axis=1)
        if mask is None:
            return values.mean(), mx.array(num_rows, mx.float32)
        weight = mask.sum()
        return (values * mask).sum() / weight, weight
    if values.size == 1 and mask is None:
        return values.reshape(()), mx.array(num_rows, mx.float32)
    raise MetricError(
        f"metric {name!r} returned the shape {values.shape} for a batch of {num_rows} examples: it "
        "returns a value for each example, with the leading axis of the batch; a mean, which is a "
        "scalar; or (mean, weight). Give each class a metric of its own; for one over all "
        "examples at once there is mlx_fed.DatasetMetric"
    )


def _as_array(value: Any, name: str) -> mx.array:
    """MLX array of a metric's output: an array, or a number of Python's or NumPy's."""
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        value = mx.array(np.asarray(value))
    if not isinstance(value, mx.array):
        raise MetricError(
            f"metric {name!r} returned a {type(value).__name__}: it returns an mx.array or a number"
        )
    if value.dtype == mx.complex64:
        raise MetricError(f"metric {name!r} returned complex numbers, and metrics are real")
    return value
