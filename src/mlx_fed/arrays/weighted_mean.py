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

from . import named_arrays
from .named_arrays import Arrays, LazyArrays, Spec, StackedRow, to_float32
from .spool import Spool

LARGEST_BLOCK = 16
"""Places of a block, at most: so many updates are summed in float32."""
_FEWEST_BLOCKS = 20
_FEW = 4
"""Updates on disk that wait to be added up together: the whole sum goes through memory each time.
Of no more than these there is no sum: it is taken once, a piece at a time, when the mean is."""
_NOTHING = np.float64(-0.0)
"""What changes no number that is added to it, not the sign of a zero either."""

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
    """The mean of all updates: float32 arrays by name, the total weight, and who counted.

    Each array is computed when it is asked for.
    """

    parameters: Mapping[str, np.ndarray]
    statistics: Mapping[str, np.ndarray]
    weight: float
    counted: list[Counted]

    def as_reply(self, like: ArrayRecord, weighted_by: str, spool: Spool) -> RecordDict:
        """The mean as the reply of one client that has all the weight.

        Args:
            like (ArrayRecord): The masters before, whose order the mean's arrays take.
            weighted_by (str): The metric that weighs.
            spool (Spool): Where large arrays wait.
        """
        arrays = spool.put_record((name, spool.put_values(self.parameters[name])) for name in like)
        metrics = MetricRecord({weighted_by: self.weight})
        return RecordDict({"arrays": arrays, "metrics": metrics})

    def running_statistics(self, spec: Spec) -> Arrays:
        """The mean statistics in the model's dtypes."""
        return {
            name: mx.array(self.statistics[name]).astype(getattr(mx, dtype))
            for name, (_, dtype) in spec.items()
        }


def block_size(num_places: int) -> int:
    """Number of places of a block: small enough that several workers share a small round."""
    return max(1, min(LARGEST_BLOCK, num_places // _FEWEST_BLOCKS))


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
        yield lazy_block(number, group)


def lazy_block(number: int, updates: Iterable[CountedUpdate]) -> Block:
    """A block whose sums are computed when they are read, a piece of an array at a time."""
    clients, *arrays_of_updates = zip(*updates, strict=True)
    parameters, statistics = (
        {name: ArraySum(clients, arrays, name) for name in arrays[0]}
        for arrays in arrays_of_updates
    )
    return Block(number, parameters, statistics, list(clients))


class ArraySum(NamedTuple):
    """Sum of one array over a block, from :func:`sum_block`."""

    clients: Sequence[Counted]
    arrays: Sequence[Mapping[str, mx.array]]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.arrays[0]
        return first.spec[self.name][0] if isinstance(first, LazyArrays) else first[self.name].shape

    def pieces(self) -> Iterator[np.ndarray]:
        """The sum, flat and a piece at a time, each in the memory of the one before."""
        (first, weight), *later_updates = (
            (named_arrays.pieces(arrays, self.name), np.float32(client.weight))
            for client, arrays in zip(self.clients, self.arrays, strict=True)
        )
        totals, products = np.empty((2, named_arrays.PIECE), np.float32)
        for values in first:
            total, product = totals[: values.size], products[: values.size]
            np.multiply(values, weight, out=total)
            for values_of_update, its_weight in later_updates:
                total += np.multiply(next(values_of_update), its_weight, out=product)
            yield total


def pieces(summand: np.ndarray | ArraySum) -> Iterator[np.ndarray]:
    """A block's sum of one array, flat and a piece at a time."""
    return summand.pieces() if isinstance(summand, ArraySum) else named_arrays.cut(summand)


def sum_block(number: int, updates: Iterable[CountedUpdate]) -> Block:
    """Sums the updates of one block.

    Args:
        number (int): The block's.
        updates (iterable): Who each is from, its parameters and its running statistics; in the
            order of their places.
    """
    parameters: Sums = {}
    statistics: Sums = {}
    clients = []
    for client, arrays, running in updates:
        _add(parameters, arrays, client.weight)
        _add(statistics, running, client.weight)
        clients.append(client)
    return Block(number, parameters, statistics, clients)


class Total:
    """The sum of blocks that come in any order, added up in the order of their numbers.

    A block that comes early is kept until those before it have come. So hardly any are kept,
    where they come about in order and each one comes, those without updates too.

    Attributes:
        early (dict): The blocks that are kept, by number.
    """

    def __init__(self) -> None:
        self._parameters = _Sum()
        self._statistics = _Sum()
        self._counted: list[Counted] = []
        self.early: dict[int, Block] = {}
        self._next = 0

    def add(self, block: Block) -> None:
        """Adds a block, whose updates have the same names as those of all others."""
        self.early[block.number] = block
        while self._next in self.early:
            self.append(self.early.pop(self._next))
            self._next += 1

    def mean(self) -> Mean:
        """The mean over all updates, once the last block has been added."""
        for number in sorted(self.early):
            self.append(self.early.pop(number))
        weight = sum(client.weight for client in self._counted)
        parameters, statistics = _Means(self._parameters, weight), _Means(self._statistics, weight)
        return Mean(parameters, statistics, weight, self._counted)

    def append(self, block: Block) -> None:
        """Adds a block, after which none with a lower number comes."""
        self._parameters.take(block.parameters, len(block.counted))
        self._statistics.take(block.statistics, len(block.counted))
        self._counted += block.counted


class _Sum:
    """A sum of arrays by name: what is added up, and the parts that are not yet, in order."""

    def __init__(self) -> None:
        self._sums: Sums = {}
        self._waiting: list[Mapping[str, np.ndarray | ArraySum]] = []
        self._updates = 0

    def take(self, summand: Mapping[str, np.ndarray | ArraySum], updates: int) -> None:
        """Adds the sums of further updates."""
        if not summand:
            return
        self._waiting.append(summand)
        self._updates += updates
        in_memory = any(isinstance(array, np.ndarray) for array in summand.values())
        if in_memory or self._updates > _FEW:
            self._add_up()

    def _add_up(self) -> None:
        for name, like in self.like.items():
            if name not in self._sums:
                self._sums[name] = np.full(like.shape, _NOTHING)
            summands = self._parts(name)
            for total in named_arrays.cut(self._sums[name]):
                _add_next(total, summands)
        self._waiting, self._updates = [], 0

    @property
    def like(self) -> Mapping[str, np.ndarray | ArraySum]:
        """Arrays with the sum's names and shapes."""
        return self._sums or next(iter(self._waiting), {})

    def mean(self, name: str, weight: float) -> np.ndarray:
        """The sum of one array, divided by a weight."""
        mean = np.empty(self.like[name].shape, np.float32)
        summands = self._parts(name)
        sum_pieces = named_arrays.cut(self._sums[name]) if name in self._sums else None
        totals = np.empty(named_arrays.PIECE)
        for piece in named_arrays.cut(mean):
            total = totals[: piece.size]
            total[:] = next(sum_pieces) if sum_pieces else _NOTHING
            _add_next(total, summands)
            np.divide(total, weight, out=piece, casting="same_kind")
        return mean

    def _parts(self, name: str) -> list[Iterator[np.ndarray]]:
        """Summands of each piece of an array."""
        return [pieces(summand[name]) for summand in self._waiting]


def _add_next(total: np.ndarray, summands: Iterable[Iterator[np.ndarray]]) -> None:
    """Adds the next piece of each part: one at a time, as a core's cache holds no more."""
    for summand in summands:
        total += next(summand)


class _Means(Mapping[str, np.ndarray]):
    """A sum divided by a weight, in float32."""

    def __init__(self, total: _Sum, weight: float):
        self._total, self._weight = total, weight

    def __getitem__(self, name: str) -> np.ndarray:
        return self._total.mean(name, self._weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._total.like)

    def __len__(self) -> int:
        return len(self._total.like)


def in_order(ordered_blocks: Iterable[Block]) -> Total:
    """The sum of blocks that come in the order of their numbers: none waits for one without
    updates, which never comes."""
    total = Total()
    for block in ordered_blocks:
        total.append(block)
    return total


def _add(sums: Sums, arrays: Mapping[str, mx.array], weight: float) -> None:
    for name in arrays:
        if isinstance(arrays, StackedRow):
            product = arrays.float32(name) * np.float32(weight)
        else:
            product = to_float32(arrays[name]) * np.float32(weight)
        if name in sums:
            sums[name] += product
        else:
            sums[name] = product
