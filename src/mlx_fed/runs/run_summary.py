"""Summary of a run for a list of runs: rounds, time, traffic, last and best metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import round_record

_LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "error", "mse", "rmse", "mae", "nll", "wer", "cer")
"""Last words of metrics that are to become small."""
_PHASES = ("evaluate", "central", "train")


def is_lower_better(metric: str) -> bool:
    """Whether a metric is to become small, by the last word of its name."""
    return re.split(r"[-_ /]", metric)[-1].lower() in _LOWER_IS_BETTER


class RunSummary:
    """Summary of the rounds so far, updated round by round.

    Attributes:
        rounds (int): The number of rounds.
        seconds (float): Duration of their phases.
        bytes (float): Bytes of arrays sent and received.
        metrics (dict): ``[last, best, round of the best]`` of each metric, by names such as
            ``evaluate/loss``. The best is the lowest or the highest value: see
            :func:`is_lower_better`.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.seconds = self.bytes = 0.0
        self.metrics: dict[str, list[float]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds the next round."""
        self.rounds += 1
        self.seconds += sum(record.get("seconds", {}).values())
        self.bytes += sum(record.get("bytes", {}).values())
        number = record["round"]
        for name, value in round_record.figures(record).items():
            phase, _, metric = name.partition("/")
            is_count = metric == "nodes" or metric.startswith("num-")
            if phase not in _PHASES or is_count or round_record.is_detail(metric):
                continue
            _, best, best_round = self.metrics.get(name, (value, value, number))
            if value < best if is_lower_better(metric) else value > best:
                best, best_round = value, number
            self.metrics[name] = [value, best, best_round]

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values."""
        return {**vars(self), "metrics": {name: [*row] for name, row in self.metrics.items()}}


def summarize(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of all rounds of a run."""
    summary = RunSummary()
    for record in rounds:
        summary.add(record)
    return summary.to_dict()
