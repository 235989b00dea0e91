"""Metrics of a client: weighted means over its steps, and metrics derived from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ..arrays.examples import ExamplesError
from ..errors import FedError, TaskError
from ..task import Task
from ..tracebacks import definition, location
from .confusion_matrix import ConfusionMatrix


class Evaluation(NamedTuple):
    """Evaluation of a model on a client's examples.

    Attributes:
        metrics (dict): ``num-examples``, ``loss``, the task's metrics and those derived from them.
            An undefined metric is NaN or infinite.
        weights (dict): The total weight of the loss and of each of the task's metrics, if for one
            of them it is not the number of examples; else empty.
        undefined (dict): Reasons of undefined metrics, by name.
        counts (dict): Counts of each :class:`~mlx_fed.ConfusionMatrix`, row by row, by name.
    """

    metrics: dict[str, Any]
    weights: dict[str, float]
    undefined: dict[str, str]
    counts: Mapping[str, list[int]] = MappingProxyType({})


def is_defined(value: Any) -> bool:
    """Whether a metric, a number or a list of them, is finite."""
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def reason_of(error: Exception) -> str:
    """Reason in a line: an exception of the user's code, with the file and line that raised it."""
    if isinstance(error, FedError):
        return str(error)
    source = location(error)
    suffix = f" ({source[0]}, line {source[1]})" if source else ""
    return f"{type(error).__name__}: {error}{suffix}"


def count_units(
    task: Task, weights: Sequence[float], seconds: float | None = None
) -> dict[str, int | float]:
    """Number of units (``Task.weight_unit``) and units per second; empty without a unit.

    Args:
        task (Task): The task, with a ``weight_unit`` such as ``"tokens"``.
        weights (list): The weight of each step's loss.
        seconds (float, optional): Duration of all steps.
    """
    if task.weight_unit is None:
        return {}
    total = round(math.fsum(weights))
    counts: dict[str, int | float] = {f"num-{task.weight_unit}": total}
    if seconds:
        counts[f"{task.weight_unit}-per-second"] = total / seconds
    return counts


def placeholder_metrics(task: Task, phase: str, loss_key: str | None = None) -> dict[str, float]:
    """Names of the metrics that a client reports, each with a placeholder value of 1.

    Args:
        task (Task): The task.
        phase (str): ``"train"`` or ``"evaluate"``.
        loss_key (str, optional): Name of the loss before training, if the server asks for it.
    """
    names = {"num-examples", "loss", *count_units(task, [1.0], 1.0 if phase == "train" else None)}
    if phase == "train":
        return dict.fromkeys(names | {loss_key or "loss"}, 1.0)
    numbers = [n for n, m in task.metrics.items() if not isinstance(m, ConfusionMatrix)]
    metrics = dict.fromkeys([*names, *numbers], 1.0)
    return metrics | derive_metrics(task, metrics)[0]


def derive_metrics(
    task: Task, metrics: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of ``Task.derived``, and the reasons of undefined ones, by name.

    Where ``Task.derived`` raises, as ``math.exp`` does on a large loss and an F1 score without
    true positives, all are NaN, by the names that it returns where every metric is 1.

    Raises:
        TaskError: If it returns the name of a metric that it does not derive.
    """
    if task.derived is None:
        return {}, {}
    try:
        result = task.derived(metrics)
        if not isinstance(result, Mapping):
            raise TaskError(
                f"it returned a {type(result).__name__}, not a dictionary of metrics"
                f"{definition(task.derived)}"
            )
        values = {name: as_number(value) for name, value in result.items()}
        names = list(values)
    except Exception as error:
        reason = f"Task.derived failed: {reason_of(error)}"
        try:
            names = list(task.derived(dict.fromkeys(metrics, 1.0)))
        except Exception:  # it raises for any metrics: there are no names
            return {}, {"derived": reason}
        values = dict.fromkeys(names, math.nan)
        reasons = dict.fromkeys(names, reason)
    else:
        reasons = {n: f"it is {v}" for n, v in values.items() if not math.isfinite(v)}
    for name in ("loss", "num-examples", "nodes", *task.metrics):
        if name in names:
            raise TaskError(
                f"Task.derived{definition(task.derived)} returns {name!r}, which an evaluation "
                "reports itself: give the derived metric another name, and return it alone."
            )
    return values, reasons


def as_number(value: Any) -> float:
    """Python float of a number of Python's, NumPy's or MLX's; NaN for ``None``."""
    return math.nan if value is None else float(value)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean over a client's steps.

    Raises:
        ExamplesError: If all weights are 0.
    """
    if not any(weights):
        raise ExamplesError("The loss or a metric has weight 0 on all of the client's examples.")
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
