"""What a client reports: means over its steps, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
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


def reported(task: Task, phase: str, loss_key: str | None = None) -> dict[str, float]:
    """The metrics that a client reports, each with some number.

    Args:
        task (Task): What it trains.
        phase (str): ``"train"`` or ``"evaluate"``.
        loss_key (str, optional): What the loss before training is called, if it is asked for.
    """
    names = {"num-examples", "loss", *counted(task, [1.0], 1.0 if phase == "train" else None)}
    if phase == "train":
        return dict.fromkeys(names | {loss_key or "loss"}, 1.0)
    metrics = dict.fromkeys([*names, *task.metrics], 1.0)
    with suppress(Exception):  # it is made for what an evaluation gives
        metrics |= derived(task, metrics)
    return metrics


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
