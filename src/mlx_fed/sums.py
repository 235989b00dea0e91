"""The weighted mean of many updates, summed in blocks whose order no engine changes.

Floating-point sums depend on their order. Clients have places, in the roster's order; those of
one block of places are summed in float32, one after another, and then the blocks, in float64.
Whoever sums a block, a worker of a simulation or the server of a federation, ends with the same
bits, and only the sums have to be kept, however many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from . import weights
from .spool import Spool
from .weights import Arrays, Spec, StackedRow, Unread, to_float32

_LARGEST_BLOCK = 16
_FEWEST_BLOCKS = 20

Sums = dict[str, np.ndarray]


class Counted(NamedTuple):
    """A client's update that counts: its place, the weight of its arrays, and its metrics."""

    place: int
    weight: float
    metrics: Mapping[str, Any]


CountedUpdate = tuple[Counted, Mapping[str, mx.array], Mapping[str, mx.array]]
"""Who an update is from, its parameters and its running statistics."""


class Block(NamedTuple):
    """The sum of the updates from one block of places, each times its weight."""

    number: int
    parameters: Mapping[str, np.ndarray | ArraySum]
    statistics: Mapping[str, np.ndarray | ArraySum]
    counted: list[Counted]


class Mean(NamedTuple):
    """The mean of all updates: float32 arrays by name, the total weight, and who counted."""

    parameters: Sums
    statistics: Sums
    weight: float
    counted: list[Counted]

    def as_reply(self, like: ArrayRecord, weighted_by: str, spool: Spool) -> RecordDict:
        """What a client would reply that had the mean and all the weight.

        The mean's parameters go over into it, one after another.

        Args:
            like (ArrayRecord): The masters before, whose order the mean's arrays take.
            weighted_by (str): The metric that weighs.
            spool (Spool): Where large arrays wait.
        """
        arrays = spool.record((name, spool.values(self.parameters.pop(name))) for name in like)
        metrics = MetricRecord({weighted_by: self.weight})
        return RecordDict({"arrays": arrays, "metrics": metrics})

    def running_statistics(self, spec: Spec) -> Arrays:
        """The mean statistics in the model's dtypes."""
        return {
            name: mx.array(self.statistics[name]).astype(getattr(mx, dtype))
            for name, (_, dtype) in spec.items()
        }


def block_size(num_places: int) -> int:
    """How many places make a block: few enough that several workers share a small round."""
    return max(1, min(_LARGEST_BLOCK, num_places // _FEWEST_BLOCKS))


def blocks(updates: Iterable[CountedUpdate], num_places: int) -> Iterator[Block]:
    """Blocks of updates that come in the order of their places, each once its last has come.

    Their sums are taken where they are asked for, a piece of an array at a time: of updates that
    lie on disk there is never a whole array in memory.

    Args:
        updates (iterable): As for :func:`sum_block`, of any blocks.
        num_places (int): How many clients were asked, whether they answered or not.
    """
    size = block_size(num_places)
    for number, group in groupby(updates, lambda update: update[0].place // size):
        clients, *both = zip(*group, strict=True)
        parameters, statistics = (
            {name: ArraySum(clients, arrays, name) for name in arrays[0]} for arrays in both
        )
        yield Block(number, parameters, statistics, list(clients))


class ArraySum(NamedTuple):
    """What :func:`sum_block` sums of one array."""

    clients: Sequence[Counted]
    arrays: Sequence[Mapping[str, mx.array]]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.arrays[0]
        return first.spec[self.name][0] if isinstance(first, Unread) else first[self.name].shape

    def pieces(self) -> Iterator[np.ndarray]:
        """The sum, flat and a piece at a time."""
        (first, weight), *others = (
            (weights.pieces(arrays, self.name), np.float32(client.weight))
            for client, arrays in zip(self.clients, self.arrays, strict=True)
        )
        for values in first:
            total = values * weight
            for same, its_weight in others:
                total += next(same) * its_weight
            yield total


def pieces(part: np.ndarray | ArraySum) -> Iterator[np.ndarray]:
    """A block's sum of one array, flat and a piece at a time."""
    return part.pieces() if isinstance(part, ArraySum) else weights.cut(part)


def sum_block(number: int, updates: Iterable[CountedUpdate]) -> Block:
    """Sums the updates of one block.

    Args:
        number (int): The block's.
        updates (iterable): Who each is from, its parameters and its running statistics; in the
            order of their places.
    """
    parameters: Sums = {}
    statistics: Sums = {}
    counted = []
    for client, arrays, running in updates:
        _add(parameters, arrays, arrays, client.weight)
        _add(statistics, running, running, client.weight)
        counted.append(client)
    return Block(number, parameters, statistics, counted)


class Total:
    """The sum of blocks that come in any order, added up in the order of their numbers.

    A block that comes early is kept until those before it have come. So hardly any are kept,
    where they come about in order and each one comes, those without updates too.

    Attributes:
        early (dict): The blocks that are kept, by number.
    """

    def __init__(self) -> None:
        self._parameters: Sums = {}
        self._statistics: Sums = {}
        self._counted: list[Counted] = []
        self.early: dict[int, Block] = {}
        self._next = 0

    def add(self, block: Block) -> None:
        """Takes a block in, whose updates have the same names as those of all others."""
        self.early[block.number] = block
        while self._next in self.early:
            self._take(self.early.pop(self._next))
            self._next += 1

    def mean(self) -> Mean:
        """The mean over all updates, once the last block has been added: it uses the sum up."""
        for number in sorted(self.early):
            self._take(self.early.pop(number))
        weight = sum(client.weight for client in self._counted)
        parameters = _divided(self._parameters, weight)
        return Mean(parameters, _divided(self._statistics, weight), weight, self._counted)

    def _take(self, block: Block) -> None:
        for total, part in (
            (self._parameters, block.parameters),
            (self._statistics, block.statistics),
        ):
            for name, array in part.items():
                _take_in(total, name, array)
        self._counted += block.counted


def in_order(parts: Iterable[Block]) -> Total:
    """The sum of blocks that come in the order of their numbers: none waits for one without
    updates, which never comes."""
    total = Total()
    for block in parts:
        total._take(block)
    return total


def mean(parts: Iterable[Block]) -> Mean:
    """The mean over blocks in any order."""
    total = Total()
    for block in parts:
        total.add(block)
    return total.mean()


def _add(sums: Sums, names: Iterable[str], arrays: Mapping[str, mx.array], weight: float) -> None:
    for name in names:
        if isinstance(arrays, StackedRow):
            product = arrays.float32(name) * np.float32(weight)
        else:
            product = to_float32(arrays[name]) * np.float32(weight)
        if name in sums:
            sums[name] += product
        else:
            sums[name] = product


def _take_in(totals: Sums, name: str, part: np.ndarray | ArraySum) -> None:
    first = name not in totals
    if first:
        totals[name] = np.empty(part.shape, np.float64)
    total, end = totals[name].reshape(-1), 0
    for piece in pieces(part):
        start, end = end, end + piece.size
        if first:
            total[start:end] = piece
        else:
            total[start:end] += piece


def _divided(sums: Sums, weight: float) -> Sums:
    divided: Sums = {}
    for name in list(sums):
        total = sums.pop(name)
        total /= weight
        divided[name] = total.astype(np.float32)
    return divided
