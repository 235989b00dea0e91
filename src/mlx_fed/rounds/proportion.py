"""Checks of a reply's size against the other replies of its round.

A node's update or number of examples is believed up to a multiple of what the others have, so that
none makes the model its own with one huge number. The defaults are far above what honest nodes of
very unequal data differ by. Simulated clients are believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

NORM_TIMES = 100.0
"""How many times the median norm of the others' updates one may have by default. Clients with 2 to
5,000 examples differed by 21 times at most."""
WEIGHT_TIMES = 1000.0
"""How many times the median weight of the others a reply may have by default."""
BELIEVED = 1e5
"""A weight that is believed whatever the others are: some clients have two examples."""
MAX_EXAMPLES = 1e12
"""Examples that no node has."""
ENOUGH = 3
"""Replies of which one can be told from the others."""


def explain_norms(norms: Mapping[str, float], times: float) -> dict[str, str]:
    """Refusals of updates whose norm is above ``max_update_norm`` medians.

    Args:
        norms (dict): Each update's, by the name of its node. Of fewer than three none can be told
            from the others.
        times (float): How many times the median of all one may be.
    """
    if len(norms) < ENOUGH or math.isinf(times):
        return {}
    middle = median(norms.values())
    return {
        node: f"its update has the norm {norm:.4g}, more than {times:g} times the median of "
        f"{middle:.4g}"
        for node, norm in norms.items()
        if not norm <= times * middle
    }


def explain_huge_norms(
    norms: Mapping[str, float], model: float, what: str = "its update"
) -> dict[str, str]:
    """Refusals of updates with norms that no training gives, by default.

    One may be as large as the model, or :data:`NORM_TIMES` the median of the others. Of two
    replies it has to be that many times the other's and the model's, or neither is refused.

    Args:
        norms (dict): Each update's, by the name of its node.
        model (float): The norm of what was sent.
        what (str): What the norms are of.
    """
    if len(norms) < ENOUGH:
        model = NORM_TIMES * model or math.inf
    middle = _median_of_others(norms)
    return {
        node: f"{what} has the norm {norm:.4g}, more than {NORM_TIMES:g} times the others' "
        f"({middle:.4g}), and what it was sent {model:.4g}: set max_update_norm if it is right"
        for node, norm in norms.items()
        if not norm <= max(NORM_TIMES * middle, model)
    }


def explain_weights(weights: Mapping[str, float], weighted_by: str) -> dict[str, str]:
    """Refusals of replies that would weigh far more than the others, by default.

    Args:
        weights (dict): Each reply's, by the name of its node. Of fewer than three none can be told
            from the others.
        weighted_by (str): What they are called, ``"num-examples"``.
    """
    if len(weights) < ENOUGH:
        return {}
    middle = _median_of_others(weights)
    return {
        node: f"{weighted_by} is {weight:g}, more than {WEIGHT_TIMES:g} times the median "
        f"of the others, {middle:g}: set max_examples if that is right"
        for node, weight in weights.items()
        if weight > max(WEIGHT_TIMES * middle, BELIEVED)
    }


def _median_of_others(values: Mapping[str, float]) -> float:
    """The median of all but the largest, which is that of the others for each value above it."""
    return median(sorted(values.values())[:-1] or [math.inf])


def believed_after(record: Mapping[str, Any], weighted_by: str) -> float:
    """The weight that is believed whatever the others are, once a round has been."""
    metrics_of_nodes = record.get("each", {}).get("train", {}).values()
    middle = median([metrics.get(weighted_by, 0.0) for metrics in metrics_of_nodes] or [0.0])
    if spread := record.get("spread", {}).get("train", {}).get(weighted_by):
        middle = spread[2]
    return max(WEIGHT_TIMES * float(middle), BELIEVED)
