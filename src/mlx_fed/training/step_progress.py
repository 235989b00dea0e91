"""Progress of a client's training within a round, from the losses of the steps that have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..events import Listener, TrainingProgress
from .metrics import weighted_mean

_PAUSE = 1.0
"""Seconds between two reports, where no number of steps is given."""


class StepProgress:
    """Reports of one training to a listener.

    The loss of the last step is not read, as the device may be at work on it: a report waits for
    nothing that training would not wait for.

    Args:
        listener (callable): Is called with each :class:`~mlx_fed.events.TrainingProgress`.
        steps_per_report (int, optional): Steps between two reports. Default: a report a second.
        server_round (int): The round.
        num_steps (int, optional): Steps of the training, if that is known.
        unit (str, optional): What the losses' weights count.
    """

    def __init__(
        self,
        listener: Listener,
        steps_per_report: int | None,
        server_round: int,
        num_steps: int | None,
        unit: str | None,
    ):
        self.listener, self.steps_per_report = listener, steps_per_report
        self.server_round, self.num_steps, self.unit = server_round, num_steps, unit
        self.reported = 0
        self.report_time = time.perf_counter()
        mx.reset_peak_memory()

    def update(self, losses: Sequence[mx.array], weights: Sequence[mx.array]) -> None:
        """Reports, if it is time to, on the steps since the last report.

        Args:
            losses (list): The loss of each step so far, float32 scalars.
            weights (list): Their weights.
        """
        ended, current_time = len(losses) - 1, time.perf_counter()
        if self.steps_per_report is None:
            is_due = ended > self.reported and current_time >= self.report_time + _PAUSE
        else:
            is_due = ended >= self.reported + self.steps_per_report
        if not is_due:
            return
        steps = slice(self.reported, ended)
        counts: Any = [weight.item() for weight in weights[steps]]
        values: Any = [loss.item() for loss in losses[steps]]
        seconds = time.perf_counter() - self.report_time
        self.listener(
            TrainingProgress(
                round=self.server_round,
                step=ended,
                of=self.num_steps,
                loss=weighted_mean(values, counts) if any(counts) else None,
                steps_per_second=(ended - self.reported) / seconds,
                unit=self.unit,
                units_per_second=sum(counts) / seconds if self.unit else None,
                peak_memory=mx.get_peak_memory(),
                by_steps=self.steps_per_report is not None,
            )
        )
        self.reported, self.report_time = ended, time.perf_counter()


ProgressFactory = Callable[[int, int | None, str | None], StepProgress]
"""``progress(server_round, num_steps, unit)``, of one training."""
