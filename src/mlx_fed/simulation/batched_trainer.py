"""Many clients' training at once: their parameters stacked, one program for all of them.

The step is the one that a node runs (:mod:`mlx_fed.training.steps`), mapped over a leading axis of
clients. Each client takes the batches that it would take alone, in batches of the same size, so
that what it ends with is what it would end with alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..arrays import module_state, randomness
from ..arrays.examples import Examples, count, leaves, replace_leaves
from ..arrays.named_arrays import Arrays, StackedRow
from ..errors import FedError
from ..task import Config, Data, Task
from ..task_settings import TracedConfig
from ..training.batches import BatchIndices
from ..training.metrics import count_units, weighted_mean
from ..training.probe import random_like, random_parameters
from ..training.programs import compiled, find_difference, pure
from ..training.steps import (
    Client,
    Gradient,
    Shared,
    Step,
    counters_of,
    gradient_step,
    initial_state,
    is_elementwise,
    update_step,
)
from ..training.trainer import ClientUpdate, Trainer, TrainingPrograms
from .stacking import Feed, HostStacks, device_feed, host_can_read


class BatchedError(FedError):
    """A step that gives many clients another result than one."""


class ClientInput(NamedTuple):
    """A client to train: its partition, its examples, and what it has kept of its last update."""

    client: int
    examples: Examples
    client_state: Mapping[str, mx.array] | None = None


class _Group(NamedTuple):
    """Clients whose next batches have one size, stacked: ``places`` are theirs in the chunk."""

    places: tuple[int, ...]
    at: Client


class BatchedTrainer:
    """Trains chunks of clients as :class:`~mlx_fed.training.trainer.Trainer` trains one.

    Args:
        trainer (Trainer): The task's model.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._compiled: tuple[Any, TrainingPrograms] | None = None
        self._stacks = HostStacks()
        self._checked: dict[Any, int] = {}

    @staticmethod
    def why_not(task: Task) -> str | None:
        """Why a task's clients cannot train together, or None if they may."""
        if task.keep_optimizer:
            return "each keeps its own optimizer's state, which are at different steps"
        if task.train_step is not None:
            return "Task.train_step trains one client"
        return None if task.compile else "Task.compile is False"

    def train(
        self,
        parameters: Arrays,
        statistics: Arrays,
        members: Sequence[ClientInput],
        config: Config,
    ) -> list[ClientUpdate]:
        """What each client ends with.

        Args:
            parameters (dict): The global parameters, from which all start.
            statistics (dict): The global running statistics.
            members (list): The clients. None may have no examples.
            config (dict): The server's settings, as for ``Trainer.train``.
        """
        trainer = self.trainer
        if reason := self.why_not(trainer.task):
            raise FedError(reason)
        optimizer = trainer.task.optimizer(TracedConfig(config))
        starts = [
            trainer.combine_client_state(parameters, statistics, member.client_state)
            for member in members
        ]
        programs = self._programs(optimizer, config)
        key = repr(trainer.training_key(optimizer, config))
        # In the rounds 1, 2, 8, 32 ...: what a model's code reads of Python's variables may change.
        period = int(config.get("server-round", 0)).bit_length() // 2
        counters = counters_of(optimizer)
        state = programs.initial_state(counters, starts[0][0])
        mu = float(config.get("proximal-mu", 0.0))
        anchor = (parameters, mx.array(mu)) if mu else None
        moments = [randomness.round_seed(config, member.client) for member in members]
        with trainer.holding(*starts[0]):
            rows = [
                list(trainer.batches.rows(member.examples, config, moment))
                for member, moment in zip(members, moments, strict=True)
            ]
        examples = [member.examples for member in members]
        # A buffer may be an array of the batch itself, which would change with the stack.
        by_host = host_can_read(examples) and trainer.task.buffers is None
        feed = self._stacks.feed(examples) if by_host else device_feed(examples)
        groups = [
            _Group(
                tuple(range(len(members))),
                Client(
                    _stacked([everything for everything, _ in starts]),
                    _stacked([running for _, running in starts]),
                    _repeat(state, len(members)),
                    mx.stack([randomness.key(*moment, "layers") for moment in moments]),
                ),
            )
        ]
        done: list[_Group] = []
        began = time.perf_counter()
        losses: list[tuple[tuple[int, ...], mx.array, mx.array]] = []
        for number in range(max(map(len, rows))):
            groups = _regroup(groups, rows, number, done)
            shared = Shared(counters, anchor, trainer.moment(config, number + 1))
            moved = []
            for places, at in groups:
                batch, mask = _batch(feed, places, [rows[place][number] for place in places])
                result = programs.step(at, shared, batch, mask)
                (mx.eval if by_host else mx.async_eval)(result)
                shapes = tuple(array.shape[1:] for array in leaves(batch))
                program = (key, shapes, mask is None)
                if len(places) > 1 and self._checked.get(program) != period:
                    is_new = program not in self._checked
                    check = self._check if is_new else self._check_loss
                    check(optimizer, config, (at, shared, batch, mask), result.loss)
                    self._checked[program] = period
                at, counters, loss, weight = result
                losses.append((places, loss, weight))
                moved.append(_Group(places, at))
            groups = moved
        ends = _ends([*done, *groups], losses, members, trainer.task, began)
        updates = []
        for (at, metrics), start, member in zip(ends, starts, members, strict=True):
            metrics |= trainer.first_loss(*start, Data(member.examples), config)
            updates.append(trainer.update(at, counters, metrics))
        return updates

    def _check(
        self,
        optimizer: Any,
        config: Config,
        arguments: tuple[Client, Shared, Examples, mx.array | None],
        losses: mx.array,
    ) -> None:
        """Compares a step of many clients with the plain step.

        This is done once for each program, that is for each set of settings and shapes of a batch.
        ``mx.vmap`` gets some operations wrong for all clients but the first
        (ml-explore/mlx#4321): the last client is looked at, on its own examples and parameters and
        on random ones.

        Args:
            optimizer (Optimizer): As of the program.
            config (dict): The settings.
            arguments (tuple): Those of the step.
            losses (mx.array): What the compiled program gave, shape (clients,).

        Raises:
            BatchedError: If a result differs by more than rounding, naming the parameter.
        """
        trainer = self.trainer
        clients, shared, batch, mask = arguments
        gradient = gradient_step(trainer.model, trainer.slots, trainer.task, config)
        update = update_step(optimizer)
        map_gradient = _mapped_gradient(trainer.model, gradient)
        map_update = update if is_elementwise(optimizer) else _mapped_update(update)
        rows = mx.array([0, len(losses) - 1])
        masks = () if mask is None else (mask,)
        some = _client(rows, (clients, batch, masks, losses))

        def compare(at: Client, batch: Examples, loss: mx.array | None) -> None:
            mapped = map_gradient(at, shared, batch, *(some[2] or (None,)))
            parameters, state, _ = map_update(at, shared.counters, mapped.grads)
            stacks = (at, batch, some[2], mapped.loss if loss is None else loss)
            client, batch, masks, figure = _client(1, stacks)
            result, after, state_after = _client(1, (mapped, parameters, state))
            plain = gradient(client, shared, batch, *(masks or (None,)))
            expected, expected_state, _ = update(client, shared.counters, result.grads)
            for what, arrays, right in (
                ("the gradient of ", result.grads, plain.grads),
                ("the running statistics ", result.statistics, plain.statistics),
                ("the loss", {"": figure}, {"": plain.loss}),
                ("the update of ", after, expected),
                ("the optimizer's state ", state_after, expected_state),
            ):
                if difference := find_difference(arrays, right):
                    raise BatchedError(f"mapped over clients by mx.vmap, {what}{difference}")

        compare(some[0], some[1], some[3])
        # Where a gradient is zero at first, or a slice holds the constant that is written into it,
        # only other values show a difference.
        size = len(leaves(batch)[0][0])
        like = _client(0, (some[0].parameters, some[1]))
        two = [(random_parameters(like[0], n), random_like(like[1], size, n)) for n in (0, 1)]
        parameters = {name: mx.stack([one[0][name] for one in two]) for name in like[0]}
        columns = zip(*(leaves(one[1]) for one in two), strict=True)
        rows = replace_leaves(like[1], [mx.stack(list(column)) for column in columns])
        compare(some[0]._replace(parameters=parameters), rows, None)

    def _check_loss(
        self,
        optimizer: Any,
        config: Config,
        arguments: tuple[Client, Shared, Examples, mx.array | None],
        losses: mx.array,
    ) -> None:
        """Compares the loss of the last client with that of the plain step.

        Raises:
            BatchedError: If they differ by more than rounding.
        """
        trainer = self.trainer
        at, shared, batch, mask = arguments
        masks = () if mask is None else (mask,)
        client, batch, masks, loss = _client(len(losses) - 1, (at, batch, masks, losses))
        gradient = gradient_step(trainer.model, trainer.slots, trainer.task, config)
        plain = gradient(client, shared, batch, *(masks or (None,)))
        if difference := find_difference({"": loss}, {"": plain.loss}):
            raise BatchedError(f"mapped over clients by mx.vmap, the loss{difference}")

    def _programs(self, optimizer: Any, config: Config) -> TrainingPrograms:
        """Those of many clients; the trainer knows when they have to be traced anew."""
        trainer = self.trainer
        key = trainer.training_key(optimizer, config)
        if self._compiled is None or self._compiled[0] != key:
            mx.eval(trainer.model.parameters())
            gradient = gradient_step(trainer.model, trainer.slots, trainer.task, config)
            update = update_step(optimizer)
            if not is_elementwise(optimizer):
                update = _mapped_update(update)
            step = compiled(pure(_mapped(trainer.model, gradient, update)))
            self._compiled = (key, TrainingPrograms(compiled(initial_state(optimizer)), step))
        return self._compiled[1]


def _mapped(
    model: nn.Module, gradient: Callable[..., Gradient], update: Callable[..., Any]
) -> Callable[..., Step]:
    """The step of many clients: gradients over a leading axis, what is shared has none."""
    mapped_gradient = _mapped_gradient(model, gradient)

    def many(at: Client, shared: Shared, batch: Any, mask: mx.array | None) -> Step:
        result = mapped_gradient(at, shared, batch, mask)
        parameters, state, counters = update(at, shared.counters, result.grads)
        after = Client(parameters, result.statistics, state, result.key)
        return Step(after, counters, result.loss, result.weight)

    return many


def _mapped_gradient(
    model: nn.Module, gradient: Callable[..., Gradient]
) -> Callable[..., Gradient]:
    """The gradient of many clients, each array with a leading axis of clients."""

    def many(at: Client, shared: Shared, batch: Any, mask: mx.array | None) -> Gradient:
        masks = () if mask is None else (mask,)

        def one(parameters, statistics, key, batch, *mask):
            client = Client(parameters, statistics, {}, key)
            return gradient(client, shared, batch, *(mask or (None,)))

        # A checkpointed module is run again, and so changed, after its step is over.
        with module_state.preserve(model):
            return Gradient(*mx.vmap(one)(at.parameters, at.statistics, at.key, batch, *masks))

    return many


def _client(index: Any, stack: Any) -> Any:
    """One client of a stack, or some: named tuples stay what they are."""
    if isinstance(stack, mx.array):
        return stack[index]
    if isinstance(stack, Mapping):
        return {name: _client(index, child) for name, child in stack.items()}
    children = [_client(index, child) for child in stack]
    return type(stack)(*children) if hasattr(stack, "_fields") else type(stack)(children)


def _mapped_update(update: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's update over a leading axis of clients; its counters have none."""

    def many(at: Client, counters: Arrays, grads: Arrays) -> Any:
        after: Arrays = {}

        def one(parameters, state, grads):
            moved = update(Client(parameters, {}, state, at.key), counters, grads)
            after.update(moved[2])  # they come from what is shared alone
            return moved[:2]

        return *mx.vmap(one)(at.parameters, at.state, grads), after

    return many


def _repeat(arrays: Arrays, times: int) -> Arrays:
    return {name: mx.broadcast_to(a, (times, *a.shape)) for name, a in arrays.items()}


def _stacked(many: Sequence[Arrays]) -> Arrays:
    """Each array of all clients; one that all share is not copied."""
    stacked = {}
    for name, first in many[0].items():
        columns = [arrays[name] for arrays in many]
        shared = all(array is first for array in columns)
        stacked[name] = (
            mx.broadcast_to(first, (len(many), *first.shape)) if shared else mx.stack(columns)
        )
    return stacked


def _batch(
    feed: Feed, places: tuple[int, ...], rows: list[BatchIndices]
) -> tuple[Examples, mx.array | None]:
    masks = [step.mask() for step in rows]
    if all(mask is None for mask in masks):
        return feed(places, [step.indices for step in rows]), None
    ones = mx.ones(len(rows[0].indices))
    mask = mx.stack([ones if mask is None else mx.array(mask) for mask in masks])
    return feed(places, [step.indices for step in rows]), mask


def _regroup(
    groups: list[_Group], rows: list[list[BatchIndices]], number: int, done: list[_Group]
) -> list[_Group]:
    """The clients that go on, together with those whose next batch has the same size.

    A group that stays together is left as it is, which it mostly is until the last batch of a
    pass. Clients that have no step left go to ``done``.
    """
    parts: dict[Any, list[_Group]] = {}
    for group in groups:
        wanted: dict[Any, list[int]] = {}
        for index, place in enumerate(group.places):
            wanted.setdefault(_kind(rows[place], number), []).append(index)
        for kind, chosen in wanted.items():
            part = group if len(wanted) == 1 else _part(group, chosen)
            parts.setdefault(kind, []).append(part)
    done += parts.pop(None, [])
    return [_joined(alike) for alike in parts.values()]


def _kind(rows: list[BatchIndices], number: int) -> Any:
    """What clients have in common that take a step together; ``None`` if there is none left."""
    if number >= len(rows):
        return None
    step = rows[number]
    # A batch without padding keeps out of the company of masks: bit for bit the same program as
    # alone.
    return len(step.indices), step.size == len(step.indices)


def _joined(groups: list[_Group]) -> _Group:
    if len(groups) == 1:
        return groups[0]
    places = tuple(place for group in groups for place in group.places)
    at = tree_map(lambda *parts: mx.concatenate(list(parts)), *(group.at for group in groups))
    return _Group(places, Client(*at))


def _part(group: _Group, chosen: list[int]) -> _Group:
    """Some clients of a group, without a copy where they stand together."""
    places = tuple(group.places[index] for index in chosen)
    first, last = chosen[0], chosen[-1]
    if chosen == list(range(first, last + 1)):
        return _Group(places, Client(*tree_map(lambda array: array[first : last + 1], group.at)))
    index = mx.array(chosen)
    at = tree_map(lambda array: mx.take(array, index, axis=0), group.at)
    return _Group(places, Client(*at))


def _ends(
    groups: list[_Group],
    losses: list[tuple[tuple[int, ...], mx.array, mx.array]],
    members: Sequence[ClientInput],
    task: Task,
    began: float,
) -> list[tuple[Client, dict[str, int | float]]]:
    """Where each client has come to, its arrays sliced where they are asked for; its metrics.

    ``began`` is when the training did, on the clock of ``time.perf_counter``.
    """
    values: list[tuple[list[float], list[float]]] = [([], []) for _ in members]
    mx.eval([at for _, at in groups], [step[1:] for step in losses])
    seconds = (time.perf_counter() - began) / len(members)  # a client's share of them
    for places, loss, weight in losses:
        means: Any = loss.tolist()
        shares: Any = weight.tolist()
        for place, mean, share in zip(places, means, shares, strict=True):
            values[place][0].append(mean)
            values[place][1].append(share)
    ends: dict[int, tuple[Client, dict[str, int | float]]] = {}
    for places, at in groups:
        hosts: list[dict] = [{}, {}]
        for index, place in enumerate(places):
            parameters, statistics = (
                StackedRow(stack, host, index)
                for stack, host in zip((at.parameters, at.statistics), hosts, strict=True)
            )
            metrics: dict[str, int | float] = {
                "num-examples": count(members[place].examples),
                "loss": weighted_mean(*values[place]),
            }
            metrics |= count_units(task, values[place][1], seconds)
            ends[place] = Client(parameters, statistics, {}, at.key), metrics
    return [ends[place] for place in range(len(members))]
