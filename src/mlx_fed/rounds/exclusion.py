"""Exclusion of nodes whose replies were refused several times in a row, by the record of a run.

Only training counts: a node that has no examples to evaluate on may train well. So does only what a
node sent, and not that it was late or gone, nor what is excused: that half of all replies or more
are not finite, which is the fault of the model that was sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PATIENCE = 3
"""Refusals running after which a node is left out."""


def refused_running(records: Sequence[Mapping[str, Any]], node: str) -> int:
    """Number of refusals in a row of a node's training replies, up to the last round.

    Args:
        records (list): Those of the rounds so far, as in ``history.jsonl``.
        node (str): The node's name. Once it has been left out its count begins anew.
    """
    times = 0
    for record in reversed(records):
        has_trained = node in record.get("train", {}).get("nodes", ())
        if has_trained or node in record.get("left_out", ()):
            break
        times += sum(1 for name in _refused(record) if name == node)
    return times


def to_leave_out(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Reasons of exclusion, by node: of nodes whose last refusal in this round was one too many.

    Args:
        records (list): Those of the rounds so far, with the one that is going on.
    """
    reasons = {name: reason for name, reason in _reasons(records[-1]) if reason}
    return {
        node: f"{times} replies running were refused, the last for this: {reason}"
        for node, reason in reasons.items()
        if (times := refused_running(records, node)) >= PATIENCE
    }


def _refused(record: Mapping[str, Any]) -> Iterable[str]:
    return (name for name, _ in _reasons(record))


def _reasons(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for entry in record.get("refused", ()):
        counts_against_node = not (entry.get("missing") or entry.get("excused"))
        if entry["phase"] == "train" and counts_against_node:
            yield entry["node"], entry["reason"]
