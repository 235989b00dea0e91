"""Local training of many clients at once: stacked parameters, one program for all of them.

The step is that of a node (:mod:`mlx_fed.training.steps`), mapped over a leading axis of clients.
Each client has the same batches as alone, so that its update is the same as alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..arrays import randomness
from ..arrays.examples import Examples, count, leaves
from ..arrays.named_arrays import Arrays, StackedRow
from ..errors import FedError
from ..task import Config, Data, Task
from ..training.batches import BatchIndices
from ..training.metrics import count_units, weighted_mean
from ..training.optimizer_state import STATEFUL_OPTIMIZER, initial_state, signature, state_of
from ..training.programs import CHANGES_STATE, compiled, pure
from ..training.steps import StepContext, TrainState
from ..training.trainer import ClientUpdate, Trainer, proximal_term
from ..training.training_programs import TrainingPrograms
from .client_groups import ClientGroup, regroup, stack_arrays
from .mapped_step import BatchedError, check_purity, check_step, mapped_step
from .stacking import Feed, HostStacks, device_feed, host_can_read


class ClientInput(NamedTuple):
    """Input of a client's training: its partition, its examples, its client state if any."""

    client: int
    examples: Examples
    client_state: Mapping[str, mx.array] | None = None


class _StepLosses(NamedTuple):
    """Losses of a group's step and their weights, shape (members,) each."""

    members: tuple[int, ...]
    losses: mx.array
    weights: mx.array


class ImpureOptimizer(FedError):
    """A ``Task.optimizer`` that may return another optimizer at each call.

    Attributes:
        optimizer (Optimizer): The first client's.
    """

    def __init__(self, optimizer: Any):
        super().__init__(
            "Task.optimizer changes a global or closure variable, or an attribute, that it reads, "
            "or draws random numbers. It is called once for each client, in a simulation by all "
            'clients of a process: let it depend on its settings alone, as config["server-round"]'
        )
        self.optimizer = optimizer


class BatchedTrainer:
    """Trainer of chunks of clients, with the results of one client after another.

    Args:
        trainer (Trainer): The task's trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._compiled: tuple[Any, TrainingPrograms] | None = None
        self._stacks = HostStacks()
        self._check_periods: dict[Any, int] = {}
        self._is_pure = False

    @staticmethod
    def why_not(task: Task) -> str | None:
        """Reason why a task's clients cannot train together, or ``None``."""
        if task.keep_optimizer:
            return "each keeps its own optimizer's state, which are at different steps"
        if task.train_step is not None:
            return "Task.train_step trains one client"
        return None if task.compile else "Task.compile is False"

    def train(
        self,
        parameters: Arrays,
        statistics: Arrays,
        clients: Sequence[ClientInput],
        config: Config,
    ) -> list[ClientUpdate]:
        """Local training of a chunk of clients, from the same global arrays.

        Args:
            parameters (dict): Global parameters by name.
            statistics (dict): Global running statistics by name.
            clients (list): The clients, each with one example or more.
            config (dict): The server's settings, as for ``Trainer.train``.

        Raises:
            FedError: If the task's clients cannot train together.
            ImpureOptimizer: If the task's optimizers may differ.
            BatchedError: If the mapped step differs from the plain one.
        """
        trainer = self.trainer
        if reason := self.why_not(trainer.task):
            raise FedError(reason)
        optimizer, is_impure = trainer.programs.make_optimizer(config)
        if is_impure:
            raise ImpureOptimizer(optimizer)
        combine = trainer.client_arrays.combine
        starts = [combine(parameters, statistics, client.client_state) for client in clients]
        programs = self._programs(optimizer, config)
        # In the rounds 1, 2, 8, 32 ...: Python variables that a model reads may change.
        check_period = int(config.get("server-round", 0)).bit_length() // 2
        counters = state_of(optimizer)
        optimizer_state = programs.initial_state(counters, starts[0][0])
        proximal = proximal_term(parameters, config)
        seeds = [randomness.round_seed(config, client.client) for client in clients]
        with trainer.load_arrays(*starts[0]):
            steps = [
                list(trainer.batches.rows(client.examples, config, seed))
                for client, seed in zip(clients, seeds, strict=True)
            ]
        examples = [client.examples for client in clients]
        # A buffer may be an array of the batch itself, which would change with the stack.
        by_host = host_can_read(examples) and trainer.task.buffers is None
        feed = self._stacks.feed(examples) if by_host else device_feed(examples)
        state = TrainState(
            stack_arrays([parameters for parameters, _ in starts]),
            stack_arrays([statistics for _, statistics in starts]),
            stack_arrays([optimizer_state] * len(clients)),
            mx.stack([randomness.key(*seed, "layers") for seed in seeds]),
        )
        groups = [ClientGroup(tuple(range(len(clients))), state)]
        finished_groups: list[ClientGroup] = []
        start_time = time.perf_counter()
        step_losses: list[_StepLosses] = []
        for number in range(max(map(len, steps))):
            groups, done_groups = regroup(groups, steps, number)
            finished_groups += done_groups
            context = StepContext(counters, proximal, trainer.round_and_step(config, number + 1))
            for index, (members, state) in enumerate(groups):
                batch, mask = _batch(feed, members, [steps[member][number] for member in members])
                if not self._is_pure:
                    check_purity(trainer, config, (state, context, batch, mask))
                    self._is_pure = True
                result = programs.step(state, context, batch, mask)
                (mx.eval if by_host else mx.async_eval)(result)
                shapes = tuple(array.shape[1:] for array in leaves(batch))
                program = (shapes, mask is None)
                if len(members) > 1 and self._check_periods.get(program) != check_period:
                    arguments = state, context, batch, mask
                    loss_only = program in self._check_periods
                    check_step(
                        trainer, programs.optimizer, config, arguments, result.loss, loss_only
                    )
                    self._check_periods[program] = check_period
                counters = result.counters
                step_losses.append(_StepLosses(members, result.loss, result.weight))
                groups[index] = ClientGroup(members, result.state)
        groups = [*finished_groups, *groups]
        mx.eval([group.state for group in groups], [losses[1:] for losses in step_losses])
        if self._compiled is not None and signature(programs.optimizer) != self._compiled[0][0]:
            raise BatchedError(STATEFUL_OPTIMIZER)
        seconds = (time.perf_counter() - start_time) / len(clients)
        states = _client_states(groups)
        updates = []
        for index, (values, weights) in enumerate(_client_losses(step_losses, len(clients))):
            examples = clients[index].examples
            metrics: dict[str, int | float] = {
                "num-examples": count(examples),
                "loss": weighted_mean(values, weights),
            }
            trainer.note_divergence(values, weights)
            metrics |= count_units(trainer.task, weights, seconds)
            metrics |= trainer.first_loss(*starts[index], Data(examples), config)
            updates.append(trainer.make_update(states[index], counters, metrics, config))
        return updates

    def _programs(self, optimizer: Any, config: Config) -> TrainingPrograms:
        """Compiled programs of many clients, traced anew when a constant in them changes."""
        trainer = self.trainer
        key = trainer.programs.key(optimizer, config)
        if trainer.programs.has_changing_state:
            raise BatchedError(CHANGES_STATE)
        if self._compiled is None or self._compiled[0] != key:
            mx.eval(trainer.model.parameters())
            step = compiled(pure(mapped_step(trainer, optimizer, config)))
            state = compiled(initial_state(optimizer))
            self._compiled = (key, TrainingPrograms(state, step, optimizer))
            self._check_periods.clear()
            self._is_pure = False
        return self._compiled[1]


def _batch(
    feed: Feed, members: tuple[int, ...], steps: list[BatchIndices]
) -> tuple[Examples, mx.array | None]:
    masks = [step.mask() for step in steps]
    batch = feed(members, [step.indices for step in steps])
    if all(mask is None for mask in masks):
        return batch, None
    ones = mx.ones(len(steps[0].indices))
    return batch, mx.stack([ones if mask is None else mx.array(mask) for mask in masks])


def _client_losses(
    step_losses: Sequence[_StepLosses], num_clients: int
) -> list[tuple[list[float], list[float]]]:
    """Losses of each client's steps and their weights."""
    columns: list[tuple[list[float], list[float]]] = [([], []) for _ in range(num_clients)]
    for members, losses, weights in step_losses:
        rows: Any = zip(members, losses.tolist(), weights.tolist(), strict=True)  # type: ignore[arg-type]
        for member, loss, weight in rows:
            columns[member][0].append(loss)
            columns[member][1].append(weight)
    return columns


def _client_states(groups: Sequence[ClientGroup]) -> dict[int, TrainState]:
    """Final state of each client, whose arrays are slices of the stacks, taken on access."""
    states = {}
    for members, state in groups:
        hosts: list[dict] = [{}, {}]
        for row, member in enumerate(members):
            parameters, statistics = (
                StackedRow(stack, host, row)
                for stack, host in zip((state.parameters, state.statistics), hosts, strict=True)
            )
            states[member] = TrainState(parameters, statistics, {}, state.key)
    return states
