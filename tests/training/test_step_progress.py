"""Reports on a training that goes on: which steps they are of, and that they change nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

import mlx_fed as fed
from mlx_fed.events import TrainingProgress
from mlx_fed.monitoring import node_terminal
from mlx_fed.monitoring.node_terminal import NodeTerminal
from mlx_fed.training import step_progress
from mlx_fed.training.step_progress import StepProgress
from mlx_fed.training.trainer import ClientUpdate

from ..helpers.trainers import examples, trainer, vector, weighted

pytestmark = pytest.mark.usefixtures("uncompiled")
X, Y = examples(40)


class Stream:
    num_batches = 5

    def __call__(self, key):
        yield from ((X[n : n + 8], Y[n : n + 8]) for n in range(0, 40, 8))


def train(steps_per_report, data=(X, Y), **settings) -> tuple[ClientUpdate, list]:
    reports: list[TrainingProgress] = []
    of = trainer(**settings)
    if steps_per_report != 0:
        of.progress = partial(StepProgress, reports.append, steps_per_report)
    config = {"server-round": 3}
    return of.train(of.parameters(), of.statistics(), fed.Data(data), config), reports


@pytest.mark.parametrize(
    ("settings", "data", "steps", "num_steps"),
    [
        ({"local_epochs": 2}, (X, Y), [3, 6, 9], 10),
        ({"local_steps": 7}, (X, Y), [3, 6], 7),
        ({"gradient_accumulation": 2, "local_epochs": 3}, (X, Y), [3, 6], 9),
        ({"local_epochs": 2}, Stream(), [3, 6, 9], 10),
        ({}, lambda key: Stream()(key), [3], None),
    ],
    ids=["epochs", "steps", "micro-batches", "stream", "stream of unknown length"],
)
def test_reports_come_each_so_many_steps(settings, data, steps, num_steps):
    _, reports = train(3, data, **settings)
    assert [report.step for report in reports] == steps
    assert {(report.round, report.of) for report in reports} == {(3, num_steps)}
    assert all(report.peak_memory > 0 and report.steps_per_second > 0 for report in reports)


def test_a_report_has_the_mean_loss_of_its_steps():
    update, each = train(1, loss=weighted, local_steps=7)
    _, pairs = train(2, loss=weighted, local_steps=7)
    assert [report.unit for report in pairs] == ["words"] * 3
    first, second = each[0], each[1]
    weights = [report.units_per_second / report.steps_per_second for report in (first, second)]
    mean = np.average([first.loss, second.loss], weights=weights)
    assert pairs[0].loss == pytest.approx(mean, rel=1e-5)
    assert len(each) == 6  # the last step is the round's own figure
    assert np.isfinite(update.metrics["loss"])


@pytest.mark.parametrize("steps_per_report", [1, 2, None])
def test_reports_change_nothing(steps_per_report, monkeypatch):
    monkeypatch.setattr(step_progress, "_PAUSE", 0.0)
    plain, none = train(0, local_epochs=2)
    update, reports = train(steps_per_report, local_epochs=2)
    assert reports
    assert not none
    assert update.metrics == plain.metrics
    for name, array in plain.parameters.items():
        assert mx.array_equal(update.parameters[name], array), name


def test_a_short_training_is_not_reported_on():
    assert train(None)[1] == []


def test_steps_without_weight_have_no_loss():
    def loss(model, x, y):
        return vector(model, x, y).mean(), mx.array(0.0 if y.shape[0] == 8 else 1.0)

    x, y = examples(44)
    _, reports = train(2, (x, y), loss=loss, weight_unit="words")
    assert reports[0].loss is None


REPORT = TrainingProgress(3, 40, 200, 1.25, 5.1, "tokens", 812.4, 1_500_000_000, False)


def test_a_terminal_shows_the_step_and_a_file_a_line_a_minute(monkeypatch):
    shown = NodeTerminal(Console(file=io.StringIO(), force_terminal=True, width=120))
    shown(REPORT)
    (bar,) = shown.bars.progress.tasks
    assert (bar.completed, bar.total) == (40, 200)
    text = "round 3 train: step 40 of 200   loss 1.2500   5.1 steps/s   812 tokens/s   "
    assert bar.description == text + "at most 1.5 GB of memory"
    shown.close()
    lines = io.StringIO()
    logged = NodeTerminal(Console(file=lines, width=120))
    for _ in range(3):
        logged(REPORT)
    assert lines.getvalue().count("step 40 of 200") == 1
    monkeypatch.setattr(node_terminal, "_LINE_PAUSE", 0.0)
    logged(REPORT)
    assert lines.getvalue().count("step 40 of 200") == 2


def test_each_report_that_was_asked_for_is_a_line():
    lines = io.StringIO()
    shown = NodeTerminal(Console(file=lines, width=120))
    for _ in range(3):
        shown(replace(REPORT, by_steps=True, of=None, loss=None, units_per_second=None))
    line = "round 3 train: step 40   5.1 steps/s   at most 1.5 GB of memory\n"
    assert lines.getvalue() == 3 * line
