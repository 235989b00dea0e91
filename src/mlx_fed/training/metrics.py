"""What a client reports: means over its steps, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..arrays.examples import ExamplesError
from ..errors import FedError, TaskError
from ..task import Task
from ..tracebacks import definition, location


class Evaluation(NamedTuple):
    """The metrics of a model on a client's examples.

    Attributes:
        metrics (dict): ``num-examples``, ``loss``, the task's metrics and those derived from them.
            A metric that has no finite value, an undefined one, is NaN or infinite.
        weights (dict): The total weight of the loss and of each of the task's metrics, if for one
            of them it is not the number of examples; else empty.
        undefined (dict): Why a metric is undefined, by its name.
    """

    metrics: dict[str, Any]
    weights: dict[str, float]
    undefined: dict[str, str]


def is_defined(value: Any) -> bool:
    """Whether a metric, a number or a list of them, is finite."""
    return all(math.isfinite(v) for v in (value if isinstance(value, list) else [value]))


def reason_of(error: Exception) -> str:
    """An exception of the user's code in a line, with the file and line that raised it."""
    if isinstance(error, FedError):
        return str(error)
    place = location(error)
    where = f" ({place[0]}, line {place[1]})" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def count_units(
    task: Task, shares: Sequence[float], seconds: float | None = None
) -> dict[str, int | float]:
    """What the weights of a client's losses add up to, where the task says what they count.

    Args:
        task (Task): Whose ``weight_unit`` may be ``"tokens"``.
        shares (list): The weight of each step's loss.
        seconds (float, optional): What the steps took together.
    """
    if task.weight_unit is None:
        return {}
    total = round(math.fsum(shares))
    counts: dict[str, int | float] = {f"num-{task.weight_unit}": total}
    if seconds:
        counts[f"{task.weight_unit}-per-second"] = total / seconds
    return counts


def placeholder_metrics(task: Task, phase: str, loss_key: str | None = None) -> dict[str, float]:
    """The metrics that a client reports, each with some number.

    Args:
        task (Task): What it trains.
        phase (str): ``"train"`` or ``"evaluate"``.
        loss_key (str, optional): What the loss before training is called, if it is asked for.
    """
    names = {"num-examples", "loss", *count_units(task, [1.0], 1.0 if phase == "train" else None)}
    if phase == "train":
        return dict.fromkeys(names | {loss_key or "loss"}, 1.0)
    metrics = dict.fromkeys([*names, *task.metrics], 1.0)
    return metrics | derive_metrics(task, metrics)[0]


def derive_metrics(
    task: Task, metrics: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics that follow from others, and why one of them is undefined, by name.

    Where ``Task.derived`` raises, as ``math.exp`` does on a large loss and an F1 score without
    true positives, all of them are NaN, by the names that they have where every metric is 1.
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
    except Exception as error:
        reason = f"Task.derived failed: {reason_of(error)}"
        try:
            names = list(task.derived(dict.fromkeys(metrics, 1.0)))
        except Exception:  # on any metrics: it has no names
            return {}, {"derived": reason}
        return dict.fromkeys(names, math.nan), dict.fromkeys(names, reason)
    return values, {n: f"it is {v}" for n, v in values.items() if not math.isfinite(v)}


def as_number(value: Any) -> float:
    """A number of Python's, NumPy's or MLX's; NaN for ``None``."""
    return math.nan if value is None else float(value)


def weighted_mean(values: Sequence[float], shares: Sequence[float]) -> float:
    """The mean of a client's steps, each with its share.

    Raises:
        ExamplesError: If all shares are 0.
    """
    if not any(shares):
        raise ExamplesError("The loss or a metric has weight 0 on all of the client's examples.")
    return math.fsum(v * s for v, s in zip(values, shares, strict=True)) / math.fsum(shares)
