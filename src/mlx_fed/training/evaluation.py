"""Evaluation of a model on a client's examples: the loss and the task's metrics.

A metric that fails is undefined: the loss and the other metrics are computed all the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..arrays import examples, randomness
from ..arrays.named_arrays import Arrays
from ..arrays.weights import Slots
from ..errors import FedError
from ..task import Config, DatasetMetric, Split, Task
from .batches import BatchLoader
from .confusion_matrix import ConfusionMatrix
from .evaluation_step import LOSS, Function, Outputs, Untraceable, evaluation_step
from .metrics import Evaluation, as_number, count_units, derive_metrics, is_defined, reason_of
from .programs import Program
from .python_state import PythonState, Snapshot

_MOST_STATES = 3
"""Python states for which an evaluation is compiled: each is another trace."""


class Evaluator:
    """Evaluator of a task's model: one compiled program for all functions that can be traced.

    A metric that cannot be traced, as it calls NumPy or ``.item()``, runs uncompiled.

    Args:
        task (Task): Whose loss and metrics are evaluated.
        model (nn.Module): The task's model.
        slots (Slots): Where its arrays are held.
        batches (BatchLoader): Loads the examples in batches.
        note (callable): ``note(text)`` logs why a step is not compiled.
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
        functions = [self._probed(name) for name in self.functions]
        self._python_state = PythonState(*functions, model)
        self._last_state: Snapshot | None = None
        self._num_changes = 0
        self._logged: set[str] = set()
        self._probes = {
            name: _probe(function, task.loss) for name, function in self.functions.items()
        }

    def evaluate(
        self, parameters: Arrays, statistics: Arrays, split: Split, config: Config
    ) -> Evaluation:
        """Loss and all metrics on the examples of a split.

        Args:
            parameters (dict): All parameters by name.
            statistics (dict): Running statistics by name.
            split (tuple, dict or callable): As ``Data.test``.
            config (dict): The settings, for functions that take them.

        Raises:
            ExamplesError: If there are no examples.
            Exception: Any exception of the loss.
        """
        outputs, errors, num_examples = self._run(
            list(self.functions), parameters, statistics, split, config
        )
        metrics: dict[str, Any] = {"num-examples": num_examples}
        totals: dict[str, float] = {}
        counts: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        loss_weights: list[float] = []
        for name, function in self.functions.items():
            value, weight = math.nan, 0.0
            try:
                if name in errors:
                    raise errors[name]
                if isinstance(function, ConfusionMatrix):
                    counts[name] = self._compute(name, function, outputs)
                    continue
                if isinstance(function, DatasetMetric):
                    value = as_number(self._compute(name, function, outputs))
                    weight = float(num_examples)
                    reason = f"its compute returned {value}"
                else:
                    values, batch_weights = _columns([batch[name] for batch in outputs])
                    value, weight, reason = _mean(values, batch_weights)
                    loss_weights = batch_weights if name == LOSS else loss_weights
            except Exception as error:
                reason = self._log(name, error)
                if isinstance(function, ConfusionMatrix):
                    reasons[name] = reason
                    continue
            metrics[name], totals[name] = value, weight
            if not is_defined(value):
                reasons[name] = reason
        metrics |= count_units(self.task, [w for w in loss_weights if math.isfinite(w)])
        derived_metrics, derived_reasons = derive_metrics(self.task, metrics)
        if all(total == num_examples for total in totals.values()):
            totals = {}
        return Evaluation(metrics | derived_metrics, totals, reasons | derived_reasons, counts)

    def loss(self, parameters: Arrays, statistics: Arrays, split: Split, config: Config) -> float:
        """Mean loss, without the metrics."""
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
        """Outputs of functions on each batch, exceptions by function, number of examples."""
        state = self._python_state.snapshot()
        if state != self._last_state:  # a program has the values of its trace
            self._programs.clear()
            self._num_changes += 1
            self._last_state = state
        results: list[Outputs] = []
        errors: dict[str, Exception] = {}
        num_examples = 0
        probes = [self._probes[name] for name in names]
        batches = self.batches.evaluation(split, probes, config)
        round_and_step = mx.array(int(config.get("server-round", 0))), mx.array(0)
        for number, (batch, mask, size) in enumerate(batches):
            # The same key in each round, so that rounds can be compared.
            key = randomness.key(0, "evaluate", number)
            arguments = parameters, statistics, key, round_and_step
            outputs = self._step(names, config, number, *arguments, batch, mask)
            for name in names:
                if name in outputs or name in errors:
                    continue
                rows = examples.first(batch, size)
                try:
                    with randomness.seed_generators(0, "evaluate", number):
                        outputs |= self._plain_step([name], config)(*arguments, rows, None)
                    mx.eval(outputs[name])  # an exception here is this function's alone
                except Exception as error:
                    cause = error.__cause__ if isinstance(error, Untraceable) else error
                    errors[name] = cause if isinstance(cause, Exception) else error
            for name in outputs:
                if isinstance(self.functions[name], DatasetMetric):
                    outputs[name] = tuple(array[:size] for array in outputs[name])
            mx.async_eval(outputs)
            results.append(outputs)
            num_examples += size
        if not results:
            raise examples.ExamplesError("The client has no examples to evaluate on.")
        return results, errors, num_examples

    def _step(self, names: Sequence[str], config: Config, number: int, *arguments: Any) -> Outputs:
        """Outputs on a batch of all functions that can be traced."""
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
                    self.task.compile and self._num_changes < _MOST_STATES,
                    self.note,
                    "evaluation",
                    self._python_state,
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

    def _compute(self, name: str, metric: DatasetMetric, outputs: Sequence[Outputs]) -> Any:
        columns = zip(*(batch[name] for batch in outputs), strict=True)
        arrays = [mx.concatenate(list(column)) for column in columns]
        # NumPy has no bfloat16.
        arrays = [a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for a in arrays]
        mx.eval(arrays)
        layout = self._layouts[name]
        if isinstance(layout, tuple):
            return metric.compute(**dict(zip(layout, arrays, strict=True)))
        return metric.compute(*arrays)

    def _log(self, name: str, error: Exception) -> str:
        """Reason in a line; the log has the traceback, once in a process."""
        reason = reason_of(error)
        if name not in self._logged and not isinstance(error, FedError):
            self._logged.add(name)
            logging.getLogger("flwr").warning("Metric %r: %s", name, reason, exc_info=error)
        return reason


def _mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float, str]:
    """Weighted mean over batches, its weight, and the reason where it is not finite.

    A batch of weight 0 is skipped, whatever its value is: it may be 0 / 0.
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
    """Values and weights of batches as Python's numbers."""
    columns: Any = mx.stack([mx.stack(list(pair)) for pair in pairs], axis=1).tolist()
    values, weights = columns
    return values, weights


def _probe(function: Function, loss: Callable[..., Any]) -> Callable[..., Any]:
    """Function as :func:`~mlx_fed.training.padding.is_paddable` calls it.

    A metric that raises does not prevent padding of the others' batches.
    """

    def probe(model: nn.Module, *arguments: Any, config: Config) -> Any:
        try:
            if isinstance(function, DatasetMetric):
                return _projection(examples.call(function.predict, model, arguments, config))
            output = examples.call(function, model, arguments, config)
        except Exception:
            if function is loss:
                raise
            return mx.zeros(examples.count(arguments))
        return output[0] if function is loss and isinstance(output, (tuple, list)) else output

    return probe


def _projection(predictions: Any) -> mx.array:
    """A number for each example, shape (batch,), that changes with any of its predictions."""
    arrays: Any = tree_flatten(predictions)
    columns = [array.astype(mx.float32).reshape(len(array), -1) for _, array in arrays]
    values = mx.concatenate(columns, axis=1)
    return (values * mx.cos(mx.arange(values.shape[1]))).sum(axis=1)
