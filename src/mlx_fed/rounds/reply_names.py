"""Names of a reply's records and metrics, which have to be the same in all replies of a phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from ..arrays.flower_records import records_in
from . import messages

Names = frozenset[tuple[str, str]]
"""What is in a reply: each name, and of what kind it is."""


def odd_names(names: Mapping[str, Names], task_names: Names) -> dict[str, str]:
    """Refusals of replies whose records or metrics differ in name or kind from those of most nodes.

    Args:
        names (dict): Of each node, by its name, what :func:`names_in` gives.
        task_names (frozenset): What the task's own replies have: of two ways that as many nodes
            have, the one that is nearer to it is right.

    Returns:
        dict: A reason for each such node, by name.
    """
    reasons: dict[str, str] = {}
    counts = Counter(names.values())
    usual_names = max(
        counts, key=lambda ways: (counts[ways], -len(ways ^ task_names)), default=task_names
    )
    for node, node_names in names.items():
        for name in sorted(name for name, _ in usual_names ^ node_names)[:1]:
            reasons[node] = _why_odd(name, dict(node_names), dict(usual_names))
    return reasons


def _why_odd(name: str, node_names: Mapping[str, str], usual: Mapping[str, str]) -> str:
    if name not in node_names:
        return f"{name} is missing"
    if name not in usual:
        return f"{name} is not in the other replies"
    return f"{name} is {node_names[name]}, and {usual[name]} in the other replies"


def names_in(content: RecordDict) -> Names:
    """Names of a reply's records and metrics, without statistics, and the kind of each metric: a
    number, or a list of a length."""
    metric_records = records_in(content, MetricRecord)
    records = (*records_in(content, ArrayRecord), *metric_records)
    metrics = {name: value for record in metric_records.values() for name, value in record.items()}
    return names_of((n for n in records if n != messages.STATISTICS), metrics)


def names_of(records: Iterable[str], metrics: Mapping[str, Any]) -> Names:
    """Names and kinds of a reply with these records and metrics."""
    return frozenset(
        {(f"record {n!r}", "a record") for n in records}
        | {(f"metric {n!r}", _kind(value)) for n, value in metrics.items()}
    )


def _kind(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else "a number"
