"""A round's training phase: from the model before it to the strategy's new one.

A strategy that needs no more of the updates than their mean gets one reply that has it; every
other gets them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, Message

from . import aggregate, checks, exchange, strategies, sums
from .errors import RunError
from .phase import Model, Phase, Run


def train(run: Run, model: Model, record: dict[str, Any]) -> Model:
    """Lets the strategy's nodes train and aggregates their updates.

    Args:
        run (Run): What the run is led with.
        model (Model): The model before.
        record (dict): The round's, which the phase is written to.

    Raises:
        RunError: If no reply counts, or the strategy fails.
    """
    phase = Phase(run, "train", record)
    outgoing = phase.configure(model)
    if strategies.is_linear(run.strategy):
        return _train_to_a_mean(phase, model, outgoing)
    return _train_to_replies(phase, model, outgoing)


def _train_to_replies(phase: Phase, model: Model, outgoing: list[Message]) -> Model:
    run = phase.run
    asked = [phase.node_of(message) for message in outgoing]
    updates = _updates(phase, outgoing)
    with phase.timed("aggregate"):
        for _, reply, update in updates:
            reply.content = update.for_strategy()
        replies = [reply for _, reply, _ in updates]
        masters, metrics = _aggregate(
            phase, model, lambda: run.strategy.aggregate_train(phase.number, replies)
        )
        statistics = model.statistics
        if run.averaged and updates:
            running: Iterable[sums.CountedUpdate] = (
                (counted, {}, update.statistics) for counted, update in _counted(updates, asked)
            )
            mean = sums.mean(sums.blocks(running, len(asked)))
            statistics = mean.running_statistics(run.averaged)
    phase.record["train"] = {**metrics, "nodes": [node for node, *_ in updates]}
    phase.record_each({node: update.metrics for node, _, update in updates})
    return Model(masters, statistics)


def _train_to_a_mean(phase: Phase, model: Model, outgoing: list[Message]) -> Model:
    run = phase.run
    nodes = [phase.node_of(message) for message in outgoing]
    total = _total(phase, outgoing, nodes)
    with phase.timed("aggregate"):
        mean = total.mean()
        _require(phase, len(mean.counted), outgoing)
        if not mean.counted:
            return model
        content = mean.as_reply(model.masters, run.weighted_by)
        each = [counted.metrics for counted in mean.counted]
        masters, metrics = _aggregate(
            phase,
            model,
            lambda: strategies.aggregate_mean(run.strategy, phase.number, content, each),
        )
        statistics = mean.running_statistics(run.averaged) if run.averaged else model.statistics
    phase.record["train"] = {**metrics, "nodes": [nodes[c.place] for c in mean.counted]}
    phase.record_each({nodes[c.place]: c.metrics for c in mean.counted})
    return Model(masters, statistics)


def _total(phase: Phase, outgoing: list[Message], nodes: list[str]) -> sums.Total:
    """The sum of the updates, made where the clients train if the grid can do that."""
    if sum_updates := exchange.summing(phase.run.grid, outgoing):
        return _summed_by_grid(phase, outgoing, nodes, sum_updates)
    updates = _updates(phase, outgoing)
    total = sums.Total()
    with phase.timed("aggregate"):
        counted = ((c, u.parameters, u.statistics) for c, u in _counted(updates, nodes))
        for block in sums.blocks(counted, len(nodes)):
            total.add(block)
    return total


def _counted(
    updates: list[tuple[str, Message, checks.Reply]], nodes: list[str]
) -> Iterator[tuple[sums.Counted, checks.Reply]]:
    """Each update with its place among the nodes that were asked, and its weight."""
    places = {node: place for place, node in enumerate(nodes)}
    for node, _, update in updates:
        yield sums.Counted(places[node], update.weight, update.metrics), update


def _summed_by_grid(
    phase: Phase, outgoing: list[Message], nodes: list[str], sum_updates: exchange.SumUpdates
) -> sums.Total:
    run = phase.run
    phase.begin(outgoing)
    total, up = sums.Total(), 0
    failed: dict[int, str] = {}
    sizes = exchange.sizes(outgoing)
    with phase.timed("train"):
        for outcome in sum_updates(outgoing, run.weighted_by):
            came = [counted.place for block in outcome.blocks for counted in block.counted]
            for block in outcome.blocks:
                total.add(block)
            failed |= dict(outcome.failed)
            # An update has the arrays of the message, in as many bytes.
            up += sum(sizes[place] for place in came)
            run.history.notify("replies", count=len(came) + len(outcome.failed))
    for place in sorted(failed):
        phase.refuse(nodes[place], failed[place])
    phase.count_bytes(sum(sizes), up)
    return total


def _updates(phase: Phase, outgoing: list[Message]) -> list[tuple[str, Message, checks.Reply]]:
    """Each node's name, its reply, and what is in it; only of replies that count."""
    run = phase.run
    updates: dict[str, checks.Reply] = {}
    accepted: list[tuple[str, Message]] = []
    replies = phase.exchange(outgoing)
    with phase.timed("aggregate"):
        for node, reply in replies:
            with phase.refusing(node):
                updates[node] = checks.check_update(
                    reply, run.trainer.spec, run.averaged, run.weighted_by
                )
                accepted.append((node, reply))
        counting = phase.with_one_set_of_names(accepted)
    _require(phase, len(counting), outgoing)
    return [(node, reply, updates[node]) for node, reply in counting]


def _require(phase: Phase, count: int, outgoing: list[Message]) -> None:
    if outgoing and not count:
        raise RunError(
            f"Round {phase.number}: none of {len(outgoing)} nodes gave a train reply that "
            "counts. The reasons stand above; the model of the round before is kept."
        )


def _aggregate(
    phase: Phase, model: Model, hook: Callable[[], tuple]
) -> tuple[ArrayRecord, dict[str, Any]]:
    """The strategy's new masters, or the old ones if it gives none, and its metrics."""
    with phase.hook("aggregate_train"):
        masters, metrics = hook()
        if masters is None:
            return model.masters, {**(metrics or {})}
        return aggregate.from_strategy(masters, phase.run.trainer.spec), {**(metrics or {})}
