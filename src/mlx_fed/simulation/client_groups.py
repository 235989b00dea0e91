"""Groups of clients that take a step together: those whose next batches have one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from ..arrays.named_arrays import Arrays
from ..training.batches import BatchIndices
from ..training.steps import TrainState


class ClientGroup(NamedTuple):
    """Training state of several clients, stacked; ``members`` are their indices in the chunk."""

    members: tuple[int, ...]
    state: TrainState


def regroup(
    groups: list[ClientGroup], steps: list[list[BatchIndices]], number: int
) -> tuple[list[ClientGroup], list[ClientGroup]]:
    """Groups for step ``number``, by the size of each client's batch; and groups without a step.

    A group that stays together is not copied, which is the case until the last batch of a pass.

    Args:
        groups (list): Groups of the step before.
        steps (list): Batches of each client in the chunk.
        number (int): The step, from 0.
    """
    by_kind: dict[Any, list[ClientGroup]] = {}
    for group in groups:
        rows_of_kind: dict[Any, list[int]] = {}
        for row, member in enumerate(group.members):
            rows_of_kind.setdefault(_batch_kind(steps[member], number), []).append(row)
        for kind, rows in rows_of_kind.items():
            subgroup = group if len(rows_of_kind) == 1 else _select(group, rows)
            by_kind.setdefault(kind, []).append(subgroup)
    done_groups = by_kind.pop(None, [])
    return [_concatenate(parts) for parts in by_kind.values()], done_groups


def _batch_kind(steps: list[BatchIndices], number: int) -> Any:
    """Size of a client's batch, and whether it has no padding; ``None`` after the last step.

    Batches without padding are apart from those with masks: bit for bit the program of one client.
    """
    if number >= len(steps):
        return None
    step = steps[number]
    return len(step.indices), step.size == len(step.indices)


def _concatenate(groups: list[ClientGroup]) -> ClientGroup:
    if len(groups) == 1:
        return groups[0]
    members = tuple(member for group in groups for member in group.members)
    states = [group.state for group in groups]
    state = tree_map(lambda *arrays: mx.concatenate(list(arrays)), *states)
    return ClientGroup(members, TrainState(*state))


def _select(group: ClientGroup, rows: list[int]) -> ClientGroup:
    """Some clients of a group, as a slice without a copy where they are consecutive."""
    members = tuple(group.members[row] for row in rows)
    first, last = rows[0], rows[-1]
    if rows == list(range(first, last + 1)):
        state = tree_map(lambda array: array[first : last + 1], group.state)
    else:
        index = mx.array(rows)
        state = tree_map(lambda array: mx.take(array, index, axis=0), group.state)
    return ClientGroup(members, TrainState(*state))


def stack_arrays(clients: Sequence[Arrays]) -> Arrays:
    """Each array of all clients, stacked; one that all share is broadcast without a copy."""
    stacks = {}
    for name, first in clients[0].items():
        column = [arrays[name] for arrays in clients]
        if all(array is first for array in column):
            stacks[name] = mx.broadcast_to(first, (len(clients), *first.shape))
        else:
            stacks[name] = mx.stack(column)
    return stacks
