"""Properties of a strategy, Flower's or the user's, that a run depends on."""

from __future__ import annotations

import gc
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from ..arrays import randomness
from ..arrays.flower_records import records_in
from ..training.metrics import is_defined
from . import messages

_NOBODY = 0
"""The receiver of a message that is never sent."""


LEAST_NODES = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
"""What strategies call the numbers of nodes that they wait for."""


FRACTIONS = ("fraction_train", "fraction_evaluate")
"""What they call the shares of nodes that train and evaluate in a round."""


def describe(strategy: Strategy) -> dict[str, Any]:
    """A strategy's name and its plain settings, for the record of a run."""
    plain = {k: v for k, v in vars(strategy).items() if isinstance(v, (int, float, str, bool))}
    inner = getattr(strategy, "strategy", None)
    inner_description = {"strategy": describe(inner)} if inner is not None else {}
    return {"name": type(strategy).__name__, **plain, **inner_description}


def layers(strategy: Strategy) -> Iterator[Any]:
    """The strategy and those that it wraps, as Flower's for differential privacy do."""
    layer: Any = strategy
    while layer is not None:
        yield layer
        layer = getattr(layer, "strategy", None)


def attribute(strategy: Strategy, name: str) -> Any:
    """An attribute of the outermost layer that has it, or None."""
    return next((getattr(layer, name) for layer in layers(strategy) if hasattr(layer, name)), None)


def train_weighted_by(strategy: Strategy) -> str:
    """The metric that weighs an update: Flower's ``weighted_by_key``, unless the strategy has
    ``train_weighted_by_key`` for training."""
    keys = ("train_weighted_by_key", "weighted_by_key")
    return next(filter(None, (attribute(strategy, key) for key in keys)), "num-examples")


def least_nodes(strategy: Strategy) -> int:
    """The number of nodes that the strategy waits for."""
    return max(1, *(int(attribute(strategy, name) or 1) for name in LEAST_NODES))


_FLOWERS_MEAN = FedAvg().train_metrics_aggr_fn
_LINEAR = tuple(kind.aggregate_train for kind in (FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi))


def is_linear(strategy: Strategy) -> bool:
    """Whether the strategy needs no more of a round's updates than their weighted mean.

    So it is with FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam and FedYogi, with subclasses that
    leave their ``aggregate_train`` as it is, and with those that say ``needs_only_mean = True``.
    """
    return type(strategy).aggregate_train in _LINEAR or getattr(strategy, "needs_only_mean", False)


def aggregate_mean(
    strategy: Strategy, number: int, mean: RecordDict, metrics: Sequence[Mapping[str, Any]]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Aggregation of a linear strategy from one reply, the mean, in place of all.

    Args:
        strategy (Strategy): One that :func:`is_linear`.
        number (int): The round.
        mean (RecordDict): What a client would reply that had the mean and all the weight.
        metrics (list): Each client's metrics, for the strategy's ``train_metrics_aggr_fn``.
    """
    *_, averaging = layers(strategy)
    function = averaging.train_metrics_aggr_fn
    weighted_by = train_weighted_by(strategy)

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
    """Mean of metrics as Flower's strategies compute it, without a record for each client."""
    total = sum(client_metrics[weighted_by] for client_metrics in metrics)
    mean: dict[str, Any] = {}
    for client_metrics in metrics:
        share = client_metrics[weighted_by] / total
        for key, value in client_metrics.items():
            if key == weighted_by:
                continue
            if isinstance(value, list):
                before = mean.get(key, [0.0] * len(value))
                mean[key] = [old + v * share for old, v in zip(before, value, strict=True)]
            else:
                mean[key] = mean.get(key, 0.0) + value * share
    return MetricRecord(mean)


def leaves_evaluation_to_mean(strategy: Strategy) -> bool:
    """Whether the strategy does no more with the metrics of evaluations than take their mean, as
    Flower's do unless they are given an ``evaluate_metrics_aggr_fn``."""
    means = (getattr(layer, "evaluate_metrics_aggr_fn", None) for layer in layers(strategy))
    hooks = (getattr(layer.aggregate_evaluate, "__module__", "") for layer in layers(strategy))
    return _FLOWERS_MEAN in means and all(
        module.startswith("flwr.serverapp.strategy.") for module in hooks
    )


@contextmanager
def pooling(strategy: Strategy) -> Iterator[None]:
    """Context in which :func:`pooled_metrics` replaces Flower's mean of evaluation metrics."""
    averaging: list[Any] = [
        layer
        for layer in layers(strategy)
        if getattr(layer, "evaluate_metrics_aggr_fn", None) is _FLOWERS_MEAN
    ]
    for layer in averaging:
        layer.evaluate_metrics_aggr_fn = pooled_metrics
    try:
        yield
    finally:
        for layer in averaging:
            layer.evaluate_metrics_aggr_fn = _FLOWERS_MEAN


def pooled_metrics(contents: Sequence[RecordDict], weighted_by: str) -> MetricRecord:
    """Mean of each metric over the clients for which it is defined, by the metric's weight.

    In the form of Flower's ``evaluate_metrics_aggr_fn``.

    Args:
        contents (list): Replies of :func:`~mlx_fed.rounds.messages.pack_evaluation`; of other
            clients
            all metrics have the weight ``weighted_by``.
        weighted_by (str): The metric that weighs those which have no weight of their own.

    Returns:
        MetricRecord: NaN for a metric that is defined for no client.
    """
    clients: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for content in contents:
        metrics = next(iter(records_in(content, MetricRecord).values()))
        clients.append((metrics, messages.config_record(content, messages.WEIGHTS)))
    means = MetricRecord()
    for name in dict.fromkeys(chain.from_iterable(metrics for metrics, _ in clients)):
        if name == weighted_by:
            continue
        values: Any = [
            (metrics[name], weights.get(name, metrics[weighted_by]))
            for metrics, weights in clients
            if name in metrics and is_defined(metrics[name])
        ]
        total = sum(weight for _, weight in values)
        values = [(value, weight / total) for value, weight in values if weight]
        if not values:
            means[name] = math.nan
        elif isinstance(values[0][0], list):
            columns = zip(*([v * share for v in value] for value, share in values), strict=True)
            means[name] = [float(sum(column)) for column in columns]
        else:
            means[name] = float(sum(value * share for value, share in values))
    return means


def wants_same_names(strategy: Strategy) -> bool:
    """Whether replies with different names of records and metrics would end the run."""
    return is_linear(strategy) or any(isinstance(layer, FedAvg) for layer in layers(strategy))


@contextmanager
def seeded(strategy: Strategy, seed: int, number: int, hook: str) -> Iterator[None]:
    """Seeds the global random states that strategies draw from, and puts them back.

    Noise for privacy is drawn from NumPy's; nodes know the run's seed, so under a strategy
    for differential privacy, Flower's or one with the attribute ``private_noise = True``, it
    comes from the operating system instead.
    """
    noise = secrets.token_bytes(64) if name_of_private(strategy) else None
    with randomness.seed_temporarily(randomness.derive(seed, number, hook), noise):
        yield


@contextmanager
def collecting_only_new() -> Iterator[None]:
    """Context in which garbage collections skip all objects from before it.

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
