"""A round's training phase: from the model before it to the strategy's new one.

A strategy that needs no more of the updates than their mean gets one reply that has it; every
other gets them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message

from ..arrays import master_weights, weighted_mean
from ..arrays.named_arrays import LazyArrays
from ..errors import RunError, TooFewReplies
from . import checks, exchange, proportion, strategies
from .phase import Model, Phase, Run


def train(run: Run, model: Model, record: dict[str, Any]) -> Model:
    """Lets the strategy's nodes train and aggregates their updates.

    Args:
        run (Run): What the run is led with.
        model (Model): The model before.
        record (dict): The round's, which the phase is written to.

    Raises:
        TooFewReplies: If fewer replies count than have to.
        RunError: If the strategy fails.
    """
    phase = Phase(run, "train", record)
    outgoing = phase.configure(model)
    if strategies.is_linear(run.strategy):
        return _train_to_a_mean(phase, model, outgoing)
    return _train_to_replies(phase, model, outgoing)


def _train_to_replies(phase: Phase, model: Model, outgoing: list[Message]) -> Model:
    run = phase.run
    asked = [phase.node_of(message) for message in outgoing]
    updates = list(_updates(phase, outgoing, model))
    odd = phase.refuse_odd_names({update.node: update.names for update in updates})
    updates = [update for update in updates if update.node not in odd]
    _require(phase, len(updates))
    with phase.timed("aggregate"):
        for update in updates:
            update.message.content = update.reply.for_strategy()
        replies = [update.message for update in updates]
        masters, metrics = _aggregate(
            phase, model, lambda: run.strategy.aggregate_train(phase.number, replies)
        )
        statistics = model.statistics
        if run.averaged and updates:
            mean = _summed(updates, asked, statistics_only=True).mean()
            statistics = mean.running_statistics(run.averaged)
    phase.record["train"] = {**metrics, "nodes": [update.node for update in updates]}
    phase.record_each({update.node: update.reply.metrics for update in updates})
    return Model(masters, statistics)


def _train_to_a_mean(phase: Phase, model: Model, outgoing: list[Message]) -> Model:
    run = phase.run
    nodes = [phase.node_of(message) for message in outgoing]
    with phase.timed("aggregate"):
        mean = _total(phase, outgoing, nodes, model).mean()
        _require(phase, len(mean.counted))
        if not mean.counted:
            return model
        content = mean.as_reply(model.masters, run.weighted_by, run.spool)
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


def _total(
    phase: Phase, outgoing: list[Message], nodes: list[str], model: Model
) -> weighted_mean.Total:
    """The sum of the updates, made where the clients train if the grid can do that."""
    sum_updates = exchange.summing(phase.run.grid, outgoing)
    if sum_updates and not phase.run.settings.max_update_norm:
        return _summed_by_grid(phase, outgoing, nodes, sum_updates)
    # Those with the names of the first are summed as they come; the others wait on disk until it
    # is known which names most have.
    names: dict[str, checks.Names] = {}
    apart: list[Update] = []

    def alike() -> Iterator[Update]:
        for update in _updates(phase, outgoing, model):
            names[update.node] = update.names
            if update.names == next(iter(names.values())):
                yield update
            else:
                apart.append(update)

    total = _summed(alike(), nodes)
    odd = phase.refuse_odd_names(names)
    if next(iter(names), None) in odd:
        total = _summed([update for update in apart if update.node not in odd], nodes)
    return total


def _summed(
    updates: Iterable[Update], nodes: list[str], statistics_only: bool = False
) -> weighted_mean.Total:
    """The sum of updates in the order of the nodes that were asked."""
    places = {node: place for place, node in enumerate(nodes)}
    counted = (
        (
            weighted_mean.Counted(places[update.node], update.reply.weight, update.reply.metrics),
            {} if statistics_only else update.reply.parameters,
            update.reply.statistics,
        )
        for update in updates
    )
    return weighted_mean.in_order(weighted_mean.blocks(counted, len(nodes)))


def _summed_by_grid(
    phase: Phase, outgoing: list[Message], nodes: list[str], sum_updates: exchange.SumUpdates
) -> weighted_mean.Total:
    run = phase.run
    phase.begin(outgoing)
    total, up = weighted_mean.Total(), 0
    failed: dict[int, exchange.Failed] = {}
    sizes = exchange.sizes(outgoing)
    with phase.timed("train"):
        for outcome in sum_updates(outgoing, run.weighted_by):
            came = [counted.place for block in outcome.blocks for counted in block.counted]
            for block in outcome.blocks:
                total.add(block)
            failed |= {each.place: each for each in outcome.failures}
            # An update has the arrays of the message, in as many bytes.
            up += sum(sizes[place] for place in came)
            phase.answered(len(came) + len(outcome.failures))
    for place in sorted(failed):
        phase.refuse(nodes[place], failed[place].reason, failed[place].missing)
    phase.count_bytes(sum(sizes), up)
    return total


class Update(NamedTuple):
    """A node's reply that is fit to count, as it came and as it is read."""

    node: str
    message: Message
    reply: checks.Reply

    @property
    def names(self) -> checks.Names:
        """What its records and metrics are called, and of what kind they are."""
        return checks.names_in(self.message.content)


def _updates(phase: Phase, outgoing: list[Message], model: Model) -> Iterator[Update]:
    """The updates that are fit to count, in the order of the nodes.

    They are given as they come, up to the first that has to be compared with all others: it and
    those after it wait on disk until the last has come.
    """
    run, limit = phase.run, phase.run.settings.max_update_norm
    # Simulated clients are believed, unless it was said how much.
    bounded = not run.roster.stays
    compares_norms = bounded if limit is None else limit < math.inf
    before = (
        master_weights.lazy_masters(model.masters, run.trainer.spec) if compares_norms else None
    )
    # What is not above these counts whatever the others are.
    least_norm = least_shift = least_weight = math.inf
    if before is not None:
        least_norm = -1.0 if limit else checks.norm_of(before)
        least_shift = checks.norm_of(model.statistics)
    if bounded and not run.settings.max_examples:
        last = run.history.rounds[-1] if run.history.rounds else {}
        least_weight = proportion.believed_after(last, run.weighted_by)
    norms: dict[str, float] = {}
    shifts: dict[str, float] = {}
    shares: dict[str, float] = {}
    waiting: list[Update] = []
    for update in _fit(phase, outgoing, before):
        norm, weight = update.reply.norm or 0.0, update.reply.weight
        shift = checks.distance(update.reply.statistics, model.statistics) if bounded else 0.0
        norms[update.node], shifts[update.node], shares[update.node] = norm, shift, weight
        is_usual = norm <= least_norm and shift <= least_shift and weight <= least_weight
        if not waiting and is_usual:
            yield update
        else:
            waiting.append(update)
    if not waiting:
        return
    large: dict[str, str] = {}
    if limit:
        large = proportion.explain_norms(norms, limit)
    elif before is not None:
        large = proportion.explain_huge_norms(norms, least_norm)
    if bounded and compares_norms:
        what = "the change of its running statistics"
        large = {**proportion.explain_huge_norms(shifts, least_shift, what), **large}
    for node, reason in large.items():
        phase.refuse(node, reason, excused=len(norms) < proportion.ENOUGH)
    heavy = phase.refuse_heavy({node: shares[node] for node in shares if node not in large})
    yield from (update for update in waiting if update.node not in {*large, *heavy})


def _fit(phase: Phase, outgoing: list[Message], before: LazyArrays | None) -> Iterator[Update]:
    """Each update that is fit to count by itself."""
    run = phase.run
    for node, message in phase.exchange(outgoing):
        reply = None
        with phase.timed("check"), phase.refusing(node):
            reply = checks.check_update(
                message,
                run.trainer.spec,
                run.averaged,
                run.weighted_by,
                phase.max_examples,
                before,
            )
        if reply is not None:
            yield Update(node, message, reply)


def _require(phase: Phase, count: int) -> None:
    phase.excuse_not_finite()
    if phase.asked and not count and (reason := phase.common_failure()):
        raise RunError(
            f"Round {phase.number}: all {phase.asked} nodes failed with the same error: {reason}"
        )
    needed = min(phase.run.settings.min_replies, phase.asked)
    if count < needed or (phase.asked and not count):
        some = f"{count} of {phase.asked} nodes" if count else f"none of {phase.asked} nodes"
        wanted = f", and {needed} are needed" if needed > 1 else ""
        raise TooFewReplies(
            f"Round {phase.number}: {some} gave a train reply that counts{wanted}. "
            "The reasons stand above; the model of the round before is kept."
        )


def _aggregate(
    phase: Phase, model: Model, hook: Callable[[], tuple]
) -> tuple[ArrayRecord, dict[str, Any]]:
    """The strategy's new masters, or the old ones if it gives none, and its metrics."""
    run = phase.run
    with phase.hook("aggregate_train"):
        masters, metrics = hook()
        if masters is None:
            return model.masters, {**(metrics or {})}
        masters = master_weights.from_strategy(masters, run.trainer.spec, run.spool)
        return masters, {**(metrics or {})}
