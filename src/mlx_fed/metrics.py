"""What a client reports: means over its steps, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .task import Task


def counted(
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


def derived(task: Task, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that follow from others."""
    return dict(task.derived(metrics)) if task.derived else {}


def weighted_mean(values: Sequence[float], shares: Sequence[float]) -> float:
    """The mean of a client's steps, each with its share.

    Raises:
        ValueError: If all shares are 0.
    """
    if not any(shares):
        raise ValueError("The loss or a metric has weight 0 on all of the client's examples.")
    return math.fsum(v * s for v, s in zip(values, shares, strict=True)) / math.fsum(shares)
