"""What a run has to know of a strategy, whichever of Flower's or of one's own it is."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from . import randomness
from .spool import records_in

_NOBODY = 0
"""The receiver of a message that is never sent."""


def default(min_nodes: int | None = None) -> Strategy:
    """The strategy of a run that names none: FedAvg, for 2 nodes or as many as are asked for."""
    least = min_nodes or 2
    return FedAvg(min_train_nodes=least, min_evaluate_nodes=least, min_available_nodes=least)


LEAST_NODES = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
"""What strategies call the numbers of nodes that they wait for."""


def describe(strategy: Strategy) -> dict[str, Any]:
    """A strategy's name and its plain settings, for the record of a run."""
    plain = {k: v for k, v in vars(strategy).items() if isinstance(v, (int, float, str, bool))}
    inner = getattr(strategy, "strategy", None)
    wrapped = {"strategy": describe(inner)} if inner is not None else {}
    return {"name": type(strategy).__name__, **plain, **wrapped}


def layers(strategy: Strategy) -> Iterator[Any]:
    """The strategy and those that it wraps, as Flower's for differential privacy do."""
    layer: Any = strategy
    while layer is not None:
        yield layer
        layer = getattr(layer, "strategy", None)


def attribute(strategy: Strategy, name: str) -> Any:
    """An attribute of the outermost layer that has it, or None."""
    return next((getattr(layer, name) for layer in layers(strategy) if hasattr(layer, name)), None)


def least_nodes(strategy: Strategy) -> int:
    """The number of nodes that the strategy waits for."""
    return max(1, *(int(attribute(strategy, name) or 1) for name in LEAST_NODES))


_FLOWERS_MEAN = FedAvg().train_metrics_aggr_fn
_LINEAR = tuple(kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi))


def is_linear(strategy: Strategy) -> bool:
    """Whether the strategy needs no more of a round's updates than their weighted mean.

    So it is with FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam and FedYogi, and with those of
    one's own that leave their ``aggregate_train`` as it is.
    """
    return type(strategy).aggregate_train in _LINEAR


def aggregate_mean(
    strategy: Strategy, number: int, mean: RecordDict, metrics: Sequence[Mapping[str, Any]]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Lets a linear strategy aggregate one reply, the mean, in place of all.

    Args:
        strategy (Strategy): One that :func:`is_linear`.
        number (int): The round.
        mean (RecordDict): What a client would reply that had the mean and all the weight.
        metrics (list): Each client's metrics, for the strategy's ``train_metrics_aggr_fn``.
    """
    averaging: Any = strategy
    function = averaging.train_metrics_aggr_fn
    weighted_by = averaging.weighted_by_key

    def aggregate(_: list[RecordDict], weighted_by: str) -> MetricRecord:
        if function is _FLOWERS_MEAN:
            return mean_metrics(metrics, weighted_by)
        return function(
            [RecordDict({"metrics": MetricRecord({**m})}) for m in metrics], weighted_by
        )

    if type(strategy).aggregate_train is FedAvg.aggregate_train:
        # The mean of one reply is that reply: what Flower would do first is copy it three times.
        return next(iter(records_in(mean, ArrayRecord).values())), aggregate([], weighted_by)
    averaging.train_metrics_aggr_fn = aggregate
    try:
        return strategy.aggregate_train(number, [Message(mean, _NOBODY, MessageType.TRAIN)])
    finally:
        averaging.train_metrics_aggr_fn = function


def mean_metrics(metrics: Sequence[Mapping[str, Any]], weighted_by: str) -> MetricRecord:
    """What Flower's strategies have as the mean of metrics, without a record for each client."""
    total = sum(each[weighted_by] for each in metrics)
    mean: dict[str, Any] = {}
    for each in metrics:
        share = each[weighted_by] / total
        for key, value in each.items():
            if key == weighted_by:
                continue
            if isinstance(value, list):
                before = mean.get(key, [0.0] * len(value))
                mean[key] = [old + v * share for old, v in zip(before, value, strict=True)]
            else:
                mean[key] = mean.get(key, 0.0) + value * share
    return MetricRecord(mean)


def wants_same_names(strategy: Strategy) -> bool:
    """Whether replies with names of their own for records and metrics would end the run."""
    return any(isinstance(layer, FedAvg) for layer in layers(strategy))


@contextmanager
def seeded(strategy: Strategy, seed: int, number: int, hook: str) -> Iterator[None]:
    """Seeds the global random states that strategies draw from, and puts them back.

    Noise for privacy is drawn from NumPy's; nodes know the run's seed, so under a strategy
    for differential privacy, Flower's or one with the attribute ``private_noise = True``, it
    comes from the operating system instead.
    """
    noise = secrets.token_bytes(64) if name_of_private(strategy) else None
    with randomness.seeded(randomness.derive(seed, number, hook), noise):
        yield


@contextmanager
def collecting_only_new() -> Iterator[None]:
    """Leaves what there is already out of garbage collections for a while, and collects the rest.

    Many of Flower's strategies collect after each reply that they unpack, and looking through all
    that a process has imported takes longer than a client's training. Flower's
    ``RecordDict.array_records``, which they ask for, leaves a cycle of references, which would keep
    a reply's arrays in memory or on disk until some later collection.
    """
    frozen = gc.get_freeze_count() > 0  # by somebody else, who wants it to stay so
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not frozen:
            gc.unfreeze()


def name_of_private(strategy: Strategy) -> str | None:
    """The name of the layer that draws noise for differential privacy: one of Flower's, or one with
    the attribute ``private_noise = True``."""
    for layer in layers(strategy):
        flowers = any(
            kind.__name__.startswith("DifferentialPrivacy") for kind in type(layer).__mro__
        )
        if flowers or getattr(layer, "private_noise", False):
            return type(layer).__name__
    return None
