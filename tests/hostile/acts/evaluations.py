"""Replies to evaluation that must not count: functions of the question."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from .training_replies import Reply

METRICS = {"num-examples": 40, "loss": 0.5, "accuracy": 0.5}


def with_metrics(remove: tuple[str, ...] = (), **changes: Any) -> Reply:
    """An evaluation with other metrics."""
    metrics = METRICS | {name.replace("_", "-"): value for name, value in changes.items()}
    metrics = {name: value for name, value in metrics.items() if name not in remove}
    return lambda question: Message(
        RecordDict({"metrics": MetricRecord(metrics)}), reply_to=question
    )


def with_records(**records: Any) -> Reply:
    """An evaluation with other records."""
    content = {"metrics": MetricRecord(METRICS)} | records
    return lambda question: Message(RecordDict(content), reply_to=question)


ACTS: dict[str, Reply] = {
    **{
        f"num-examples is {value}": with_metrics(num_examples=value)
        for value in (0, -1, 10**12, 10**15, 1e300, float("nan"), float("inf"), [40])
    },
    "num-examples is missing": with_metrics(remove=("num-examples",)),
    "the loss is a list": with_metrics(loss=[0.5]),
    "the loss is missing": with_metrics(remove=("loss",)),
    "the accuracy is missing": with_metrics(remove=("accuracy",)),
    "the accuracy is a list": with_metrics(accuracy=[1.0, 1.0]),
    "metrics that nobody else has": with_metrics(mine=1.0),
    "a list of 100,000 values": with_metrics(mine=[0.5] * 100_000),
    "20,000 metrics": with_metrics(**{f"m{n}": 0.5 for n in range(20_000)}),
    "a metric with a long name": with_metrics(**{"m" * 100_000: 0.5}),
    "two records of metrics": with_records(more=MetricRecord(METRICS)),
    "a weight below 0": with_records(weights=ConfigRecord({"loss": -1.0, "accuracy": 40.0})),
    "a weight that is NaN": with_records(weights=ConfigRecord({"loss": float("nan")})),
    "a weight of 1e300": with_records(weights=ConfigRecord({"loss": 1e300, "accuracy": 40.0})),
    "a weight that is a text": with_records(weights=ConfigRecord({"loss": "many"})),
    "arrays in place of metrics": with_records(metrics=ArrayRecord()),
    "no content": lambda question: Message(RecordDict(), reply_to=question),
    "an error": lambda question: Message(Error(1, "\x1b[2Jno"), reply_to=question),
}
