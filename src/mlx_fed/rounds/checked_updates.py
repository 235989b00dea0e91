"""Updates of a round's training, checked one by one and against each other, and their mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from flwr.app import Message

from ..arrays import master_weights, weighted_mean
from ..arrays.named_arrays import LazyArrays
from ..arrays.weighted_mean import Mean, Total
from ..flower.one_run_grid import ClientFailure, SummedUpdates
from . import checks, exchange, proportion, reply_names
from .phase import Model, Phase


class Update(NamedTuple):
    """A node's update that counts: the message, and the reply that was read from it."""

    node: str
    message: Message
    reply: checks.Reply

    @property
    def names(self) -> reply_names.Names:
        """The names and kinds of its records and metrics."""
        return reply_names.names_in(self.message.content)

    def for_strategy(self) -> Message:
        """The message with float32 masters, as strategies get it."""
        self.message.content = self.reply.for_strategy()
        return self.message


def checked_updates(phase: Phase, outgoing: list[Message], model: Model) -> Iterator[Update]:
    """Sends the messages and yields each update that counts, in the order of the nodes.

    An update is yielded as it arrives, until the first that has to be compared with all others:
    this one and those after it wait on disk until the last has arrived. Names are the one thing
    that is left to compare (see :meth:`~mlx_fed.rounds.phase.Phase.refuse_odd_names`).

    Args:
        phase (Phase): The training phase, which records refusals, bytes and seconds.
        outgoing (list): Messages to nodes, which are removed from the list as they are sent.
        model (Model): The model in the messages.
    """
    run, limit = phase.run, phase.run.settings.max_update_norm
    # Simulated clients are trusted unless there is a limit.
    is_bounded = not run.roster.stays
    compares_norms = is_bounded if limit is None else limit < math.inf
    needs_before = compares_norms or run.transform is not None
    before = master_weights.lazy_masters(model.masters, run.trainer.spec) if needs_before else None
    # An update below all of these counts, whatever the others are.
    max_norm = max_shift = max_weight = math.inf
    if before is not None and compares_norms:
        max_norm = -1.0 if limit else checks.norm_of(before)
        max_shift = checks.norm_of(model.statistics)
    if is_bounded and not run.settings.max_examples:
        record = run.history.rounds[-1] if run.history.rounds else {}
        max_weight = proportion.believed_after(record, run.train_weighted_by)
    norms: dict[str, float] = {}
    shifts: dict[str, float] = {}
    weights: dict[str, float] = {}
    pending: list[Update] = []
    for node, message in phase.exchange(outgoing):
        update = _checked_update(phase, node, message, before)
        if update is None:
            continue
        norm, weight, shift = update.reply.norm or 0.0, update.reply.weight, 0.0
        if is_bounded:
            with phase.timed("check"):
                shift = checks.distance(update.reply.statistics, model.statistics)
        norms[node], shifts[node], weights[node] = norm, shift, weight
        is_usual = norm <= max_norm and shift <= max_shift and weight <= max_weight
        if is_usual and not pending:
            yield update
        else:
            pending.append(update)
    if not pending:
        return
    reasons: dict[str, str] = {}
    if limit:
        reasons = proportion.explain_norms(norms, limit)
    elif compares_norms:
        reasons = proportion.explain_huge_norms(norms, max_norm)
    if is_bounded and compares_norms:
        subject = "the change of its running statistics"
        reasons = {**proportion.explain_huge_norms(shifts, max_shift, subject), **reasons}
    for node, reason in reasons.items():
        phase.refuse(node, reason, excused=len(norms) < proportion.ENOUGH)
    heavy = phase.refuse_heavy({node: weights[node] for node in weights if node not in reasons})
    yield from (update for update in pending if update.node not in {*reasons, *heavy})


def _checked_update(
    phase: Phase, node: str, message: Message, before: LazyArrays | None
) -> Update | None:
    """Decodes an update and checks it by itself; None if it is refused."""
    run = phase.run
    with phase.timed("check"), phase.refusing(node):
        reply = checks.check_update(
            message,
            run.trainer.spec,
            run.averaged,
            run.train_weighted_by,
            phase.max_examples,
            before,
            run.transform,
        )
        return Update(node, message, reply)
    return None


# -- the two consumers ---------------------------------------------------------------------------


def all_updates(phase: Phase, outgoing: list[Message], model: Model) -> list[Update]:
    """All updates that count, for strategies that need each of them."""
    updates = list(checked_updates(phase, outgoing, model))
    odd_nodes = phase.refuse_odd_names({update.node: update.names for update in updates})
    return [update for update in updates if update.node not in odd_nodes]


def mean_update(phase: Phase, outgoing: list[Message], model: Model) -> Mean:
    """The weighted mean of the updates that count, for strategies that need no more.

    Updates are summed as they arrive, those with other names and kinds of metrics apart: which
    names most have is known at the end. Workers of a simulation sum where they train.
    """
    run, has_one_content = phase.run, len({id(message.content) for message in outgoing}) == 1
    if has_one_content and not run.settings.max_update_norm:
        outcomes = run.grid.sum_updates(outgoing, run.train_weighted_by)
        if outcomes is not None:
            return _mean_of_grid(phase, outgoing, outcomes)
    nodes = [phase.node_of(message) for message in outgoing]
    index = {node: position for position, node in enumerate(nodes)}
    size = weighted_mean.block_size(len(nodes))
    totals: defaultdict[reply_names.Names, Total] = defaultdict(Total)
    names: dict[str, reply_names.Names] = {}
    updates = checked_updates(phase, outgoing, model)
    for number, block in groupby(updates, lambda update: index[update.node] // size):
        updates_of: defaultdict[reply_names.Names, list[weighted_mean.CountedUpdate]]
        updates_of = defaultdict(list)
        for update in block:
            names[update.node] = update.names
            updates_of[update.names].append(_counted(update, index))
        with phase.timed("aggregate"):
            for same_names, counted_updates in updates_of.items():
                totals[same_names].append(weighted_mean.lazy_block(number, counted_updates))
    odd_nodes = phase.refuse_odd_names(names)
    usual = next((names[node] for node in names if node not in odd_nodes), frozenset())
    return totals[usual].mean()


def mean_statistics(updates: Iterable[Update], nodes: list[str]) -> Mean:
    """The weighted mean of the updates' running statistics alone.

    Args:
        updates (iterable): Updates in the order of the nodes.
        nodes (list): The names of all nodes with a message.
    """
    index = {node: position for position, node in enumerate(nodes)}
    counted_updates: list[weighted_mean.CountedUpdate] = []
    for update in updates:
        client, _, statistics = _counted(update, index)
        counted_updates.append((client, {}, statistics))
    return weighted_mean.in_order(weighted_mean.blocks(counted_updates, len(nodes))).mean()


def _counted(update: Update, index: dict[str, int]) -> weighted_mean.CountedUpdate:
    reply = update.reply
    client = weighted_mean.Counted(index[update.node], reply.weight, reply.metrics)
    return client, reply.parameters, reply.statistics


def _mean_of_grid(phase: Phase, outgoing: list[Message], outcomes: Iterator[SummedUpdates]) -> Mean:
    """The mean of sums that the grid's workers take, which check each update themselves."""
    nodes = [phase.node_of(message) for message in outgoing]
    phase.begin(outgoing)
    total, bytes_up = Total(), 0
    failures: dict[int, ClientFailure] = {}
    sizes = exchange.sizes(outgoing)
    update_sizes = exchange.update_sizes(outgoing, phase.run.transform)
    with phase.timed("train"):
        for outcome in outcomes:
            places = [client.place for block in outcome.blocks for client in block.counted]
            for block in outcome.blocks:
                total.add(block)
            failures |= {failure.place: failure for failure in outcome.failures}
            bytes_up += sum(update_sizes[position] for position in places)
            phase.answered(len(places) + len(outcome.failures))
    for position in sorted(failures):
        phase.refuse(nodes[position], failures[position].reason, failures[position].missing)
    phase.count_bytes(sum(sizes), bytes_up)
    with phase.timed("aggregate"):
        return total.mean()
