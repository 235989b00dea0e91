"""Evaluation of a model on a client's examples: the loss and the task's metrics.

A metric's failure is its own: whatever one function returns or raises, the loss and the other
metrics count.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import examples, randomness, weights
from ..arrays.named_arrays import Arrays
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from ..errors import FedError
from ..task import Config, DatasetMetric, Split, Task
from .batches import BatchLoader
from .metrics import Evaluation, as_number, count_units, derive_metrics, is_defined, reason_of
from .programs import Program
from .steps import loss_and_weight, running, with_moment

LOSS = "loss"

Function = Callable[..., Any] | DatasetMetric
Outputs = dict[str, tuple[mx.array, ...]]
"""Of each function, by name: the mean over a batch and its weight, float32 scalars; or the arrays
that a :class:`~mlx_fed.task.DatasetMetric` predicts, shape (batch, ...) each."""


class MetricError(FedError):
    """A metric that returns what has no mean over the examples."""


class Untraceable(Exception):
    """A metric that fails while the evaluation step is traced."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


class Evaluator:
    """Evaluates a task's model, in one compiled program for all functions that can be traced.

    A metric that cannot, as it calls NumPy or ``.item()``, runs beside it uncompiled.

    Args:
        task (Task): Whose loss and metrics are evaluated.
        model (nn.Module): The task's model.
        slots (Slots): Where its arrays are held.
        batches (Batches): Gives the examples in batches.
        note (callable): Told in words why a step is not compiled.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        slots: Slots,
        batches: BatchLoader,
        note: Callable[[str], None],
    ):
        self.task, self.model, self.slots, self.batches = task, model, slots, batches
        self.note = note
        self.functions: dict[str, Function] = {LOSS: task.loss, **task.metrics}
        self._uncompiled: set[str] = set()
        self._layouts: dict[str, Any] = {}
        self._programs: dict[Any, Program] = {}
        self._logged: set[str] = set()
        self._probes = {
            name: _probe(function, task.loss)
            for name, function in self.functions.items()
            if not isinstance(function, DatasetMetric)
        }

    def evaluate(
        self, parameters: Arrays, statistics: Arrays, split: Split, config: Config
    ) -> Evaluation:
        """The loss and all metrics.

        Args:
            parameters (dict): All parameters by name.
            statistics (dict): Running statistics by name.
            split (tuple, dict or callable): As ``Data.test``.
            config (dict): The settings, for functions that take them.

        Raises:
            ExamplesError: If there are no examples.
            Exception: What the loss raises.
        """
        outputs, errors, num_examples = self._run(
            list(self.functions), parameters, statistics, split, config
        )
        metrics: dict[str, Any] = {"num-examples": num_examples}
        totals: dict[str, float] = {}
        undefined: dict[str, str] = {}
        shares: list[float] = []
        for name, function in self.functions.items():
            value, weight = math.nan, 0.0
            try:
                if name in errors:
                    raise errors[name]
                if isinstance(function, DatasetMetric):
                    value, weight = self._compute(name, function, outputs), float(num_examples)
                    why = f"its compute returned {value}"
                else:
                    values, weighed = _columns([batch[name] for batch in outputs])
                    value, weight, why = _mean(values, weighed)
                    shares = weighed if name == LOSS else shares
            except Exception as error:
                why = self._log(name, error)
            metrics[name], totals[name] = value, weight
            if not is_defined(value):
                undefined[name] = why
        metrics |= count_units(self.task, [share for share in shares if math.isfinite(share)])
        further, reasons = derive_metrics(self.task, metrics)
        if all(total == num_examples for total in totals.values()):
            totals = {}
        return Evaluation(metrics | further, totals, undefined | reasons)

    def loss(self, parameters: Arrays, statistics: Arrays, split: Split, config: Config) -> float:
        """The mean loss alone."""
        outputs, _, _ = self._run([LOSS], parameters, statistics, split, config)
        return _mean(*_columns([batch[LOSS] for batch in outputs]))[0]

    def _run(
        self,
        names: Sequence[str],
        parameters: Arrays,
        statistics: Arrays,
        split: Split,
        config: Config,
    ) -> tuple[list[Outputs], dict[str, Exception], int]:
        """What functions give on each batch, those that failed, and the number of examples."""
        results: list[Outputs] = []
        errors: dict[str, Exception] = {}
        num_examples = 0
        probes = [self._probes[name] for name in names if name in self._probes]
        batches = self.batches.evaluation(split, probes, config)
        moment = mx.array(int(config.get("server-round", 0))), mx.array(0)
        for number, (batch, mask, size) in enumerate(batches):
            # The same in each round, so that rounds compare.
            key = randomness.key(0, "evaluate", number)
            arguments = parameters, statistics, key, moment
            outputs = self._step(names, config, number, *arguments, batch, mask)
            for name in names:
                if name in outputs or name in errors:
                    continue
                rows = examples.first(batch, size)
                try:
                    with randomness.seed_generators(0, "evaluate", number):
                        outputs |= self._plain_step([name], config)(*arguments, rows, None)
                    mx.eval(outputs[name])  # or what fails would fail with the others
                except Exception as error:
                    cause = error.__cause__ if isinstance(error, Untraceable) else error
                    errors[name] = cause if isinstance(cause, Exception) else error
            for name in outputs.keys() - self._probes.keys():
                outputs[name] = tuple(array[:size] for array in outputs[name])
            mx.async_eval(outputs)
            results.append(outputs)
            num_examples += size
        if not results:
            raise examples.ExamplesError("The client has no examples to evaluate on.")
        return results, errors, num_examples

    def _step(self, names: Sequence[str], config: Config, number: int, *arguments: Any) -> Outputs:
        """What all functions that can be traced give on a batch."""
        settings: Any = ()
        if any(examples.takes_config(self._probed(name)) for name in names):
            settings = repr(sorted((k, v) for k, v in config.items() if k != "server-round"))
        while True:
            traceable = tuple(name for name in names if name not in self._uncompiled)
            key = traceable, settings
            if key not in self._programs:
                mx.eval(self.model.parameters())
                self._programs[key] = Program(
                    self._plain_step(traceable, config),
                    lambda outputs: {
                        f"{name!r}": array
                        for name, arrays in outputs.items()
                        for array in arrays[:1]
                    },
                    self.task.compile,
                    self.note,
                    "evaluation",
                    raises=Untraceable,
                )
            try:
                return dict(self._programs[key]((0, "evaluate", number), *arguments))
            except Untraceable as error:
                self._uncompiled.add(error.name)

    def _probed(self, name: str) -> Callable[..., Any]:
        function = self.functions[name]
        return function.predict if isinstance(function, DatasetMetric) else function

    def _plain_step(self, names: Iterable[str], config: Config) -> Callable[..., Outputs]:
        functions = {name: self.functions[name] for name in names}
        order = list(self.functions)
        return evaluation_step(
            self.model, self.slots, self.task, functions, order, self._layouts, config
        )

    def _compute(self, name: str, metric: DatasetMetric, outputs: Sequence[Outputs]) -> float:
        columns = zip(*(batch[name] for batch in outputs), strict=True)
        arrays = [mx.concatenate(list(column)) for column in columns]
        # NumPy has no bfloat16.
        arrays = [a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for a in arrays]
        mx.eval(arrays)
        layout = self._layouts[name]
        if isinstance(layout, tuple):
            return as_number(metric.compute(**dict(zip(layout, arrays, strict=True))))
        return as_number(metric.compute(*arrays))

    def _log(self, name: str, error: Exception) -> str:
        """The reason in a line; the log has the traceback, once in a process."""
        reason = reason_of(error)
        if name not in self._logged and not isinstance(error, FedError):
            self._logged.add(name)
            logging.getLogger("flwr").warning("Metric %r: %s", name, reason, exc_info=error)
        return reason


def evaluation_step(
    model: nn.Module,
    slots: Slots,
    task: Task,
    functions: Mapping[str, Function],
    order: Sequence[str],
    layouts: dict[str, Any],
    config: Config,
) -> Callable[..., Outputs]:
    """The function ``step(parameters, statistics, key, moment, batch, mask)``.

    Args:
        model (nn.Module): The model.
        slots (Slots): Where its arrays are held.
        task (Task): Says what a tuple of the loss is.
        functions (dict): The loss and metrics to evaluate, by name.
        order (list): All names: a function's random key does not depend on which others run.
        layouts (dict): How a DatasetMetric's arrays are passed to its ``compute``, by name: their
            number, or their names. What is not in it is added.
        config (dict): The settings, for functions that take them.

    Raises:
        Untraceable: If a metric raises; what the loss raises is not changed.
    """

    def step(parameters, statistics, key, moment, batch, mask):
        chain = Keys(key)
        keys = {name: chain.next() for name in order}
        settings = with_moment(config, moment)
        outputs: Outputs = {}
        with running(model, training=False):
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
    """What a metric gives on a batch: see :data:`Outputs`.

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
    """The mean over a batch of what a metric returned, and the batch's weight.

    Args:
        output: A value for each example, shape (batch,), or several, whose mean is the example's:
            (batch, ...); a mean, a scalar; or a tuple of a mean and its weight, two scalars.
        num_rows (int): Rows of the batch.
        mask (mx.array, optional): float32 of shape (batch,), 0 for padding.
        name (str): The metric's name.

    Returns:
        tuple: Two float32 scalars.

    Raises:
        MetricError: If it is none of these.
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
    """An array, or a number of Python's or NumPy's, as MLX's."""
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        value = mx.array(np.asarray(value))
    if not isinstance(value, mx.array):
        raise MetricError(
            f"metric {name!r} returned a {type(value).__name__}: it returns an mx.array or a number"
        )
    if value.dtype == mx.complex64:
        raise MetricError(f"metric {name!r} returned complex numbers, and metrics are real")
    return value


def _mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float, str]:
    """The mean over batches and its weight, and why it is not finite if it is not.

    A batch of weight 0 does not count, whatever its value is: it may be 0 / 0.
    """
    if not all(map(math.isfinite, weights)):
        return math.nan, 0.0, "its weight is not finite"
    total = math.fsum(weights)
    if not total:
        return math.nan, 0.0, "its weight is 0 on all of the examples"
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    for value, _ in pairs:
        if not math.isfinite(value):
            return value, total, f"it is {value}"
    return math.fsum(value * weight for value, weight in pairs) / total, total, ""


def _columns(pairs: Sequence[tuple[mx.array, ...]]) -> tuple[list[float], list[float]]:
    """The values and weights of batches as Python's numbers."""
    columns: Any = mx.stack([mx.stack(list(pair)) for pair in pairs], axis=1).tolist()
    values, weights = columns
    return values, weights


def _probe(function: Callable[..., Any], loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is asked whether it gives a value for each example.

    A metric that fails there does not keep the others' batches from being padded.
    """

    def probe(model: nn.Module, *arguments: Any, config: Config) -> Any:
        try:
            output = examples.call(function, model, arguments, config)
        except Exception:
            if function is loss:
                raise
            return mx.zeros(examples.count(arguments))
        return output[0] if function is loss and isinstance(output, (tuple, list)) else output

    return probe
