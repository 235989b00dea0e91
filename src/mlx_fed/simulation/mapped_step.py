"""Training step of many clients: the step of one client, mapped over a leading axis.

``mx.vmap`` computes some operations wrong for all clients but the first (ml-explore/mlx#4321), so
a mapped step is compared with the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arrays import module_state
from ..arrays.examples import Examples, leaves, replace_leaves
from ..arrays.named_arrays import Arrays
from ..errors import FedError
from ..task import Config
from ..training.optimizer_state import is_elementwise, update_step
from ..training.programs import CHANGES_STATE, find_difference
from ..training.random_inputs import random_like, random_parameters
from ..training.steps import (
    Gradient,
    StepContext,
    StepResult,
    TrainState,
    compose_step,
    gradient_step,
)
from ..training.trainer import Trainer


class BatchedError(FedError):
    """A step of many clients whose result differs from that of one client."""


def mapped_step(trainer: Trainer, optimizer: Any, config: Config) -> Callable[..., StepResult]:
    """Training step in which each array of the state and the batch has an axis of clients."""
    arguments = (trainer.model, trainer.slots, trainer.task, config)
    gradient = gradient_step(*arguments, is_mapped=True)
    return compose_step(_map_gradient(trainer.model, gradient), _map_update(optimizer))


def check_purity(
    trainer: Trainer, config: Config, arguments: tuple[TrainState, StepContext, Examples, Any]
) -> None:
    """Check, before a trace, that a plain step changes no Python state that it reads.

    Args:
        trainer (Trainer): The task's trainer.
        config (dict): The settings.
        arguments (tuple): Those of the mapped step.

    Raises:
        BatchedError: If it does so at its second call: the first one may fill a cache.
    """
    state, context, batch, mask = arguments
    state, batch, masks = select_clients(0, (state, batch, () if mask is None else (mask,)))
    gradient = gradient_step(trainer.model, trainer.slots, trainer.task, config)
    for _ in range(2):
        before = trainer.programs.python_state.snapshot()
        mx.eval(gradient(state, context, batch, *(masks or (None,))))
        if trainer.programs.python_state.snapshot() == before:
            return
    raise BatchedError(CHANGES_STATE)


def check_step(
    trainer: Trainer,
    optimizer: Any,
    config: Config,
    arguments: tuple[TrainState, StepContext, Examples, mx.array | None],
    losses: mx.array,
    loss_only: bool,
) -> None:
    """Comparison of a mapped step with the plain step, for the last client.

    Args:
        trainer (Trainer): The task's trainer.
        optimizer (Optimizer): The program's.
        config (dict): The settings.
        arguments (tuple): Those of the mapped step.
        losses (mx.array): Losses from the compiled program, shape (clients,).
        loss_only (bool): Compare the loss. Otherwise also gradients, statistics and the optimizer's
            update, uncompiled, for the client's examples and parameters and for random ones.

    Raises:
        BatchedError: If a result differs by more than rounding, naming the parameter.
    """
    state, context, batch, mask = arguments
    task_arguments = (trainer.model, trainer.slots, trainer.task, config)
    gradient = gradient_step(*task_arguments)
    map_gradient = _map_gradient(trainer.model, gradient_step(*task_arguments, is_mapped=True))
    map_update = _map_update(optimizer)
    update = update_step(optimizer)
    masks = () if mask is None else (mask,)

    def compare(state: TrainState, batch: Examples, masks: tuple[mx.array, ...]) -> None:
        results = map_gradient(state, context, batch, *(masks or (None,)))
        new_arrays = map_update(
            state.parameters, state.optimizer_state, context.counters, results.grads
        )
        row = select_clients(1, (state, batch, masks, results, new_arrays[:2]))
        state, batch, masks, result, (parameters, optimizer_state) = row
        plain = gradient(state, context, batch, *(masks or (None,)))
        plain_parameters, plain_optimizer_state, _ = update(
            state.parameters, state.optimizer_state, context.counters, result.grads
        )
        for name, arrays, reference in (
            ("the gradient of ", result.grads, plain.grads),
            ("the running statistics ", result.statistics, plain.statistics),
            ("the loss", {"": result.loss}, {"": plain.loss}),
            ("the update of ", parameters, plain_parameters),
            ("the optimizer's state ", optimizer_state, plain_optimizer_state),
        ):
            _require_equal(name, arrays, reference)

    last = len(losses) - 1
    if not loss_only:
        ends = select_clients(mx.array([0, last]), (state, batch, masks))
        compare(*ends)
        # Where a gradient is zero at first, or a slice has the constant that is written into it,
        # only other values show a difference.
        compare(*_random_pair(*ends[:2]), ends[2])
    state, batch, masks, loss = select_clients(last, (state, batch, masks, losses))
    plain = gradient(state, context, batch, *(masks or (None,)))
    _require_equal("the loss", {"": loss}, {"": plain.loss})


def _require_equal(
    name: str, arrays: Mapping[str, mx.array], reference: Mapping[str, mx.array]
) -> None:
    if difference := find_difference(arrays, reference):
        raise BatchedError(f"mapped over clients by mx.vmap, {name}{difference}")


def _random_pair(state: TrainState, batch: Examples) -> tuple[TrainState, Examples]:
    """Random parameters and examples of two clients."""
    size = len(leaves(batch)[0][0])
    parameters, rows = select_clients(0, (state.parameters, batch))
    pair = [(random_parameters(parameters, n), random_like(rows, size, n)) for n in (0, 1)]
    parameters = {name: mx.stack([arrays[name] for arrays, _ in pair]) for name in parameters}
    columns = zip(*(leaves(examples) for _, examples in pair), strict=True)
    batch = replace_leaves(rows, [mx.stack(list(column)) for column in columns])
    return state._replace(parameters=parameters), batch


def select_clients(index: Any, stack: Any) -> Any:
    """Entries of a tree of stacked arrays: one client, or several by an array of indices."""
    if isinstance(stack, mx.array):
        return stack[index]
    if isinstance(stack, Mapping):
        return {name: select_clients(index, child) for name, child in stack.items()}
    children = [select_clients(index, child) for child in stack]
    return type(stack)(*children) if hasattr(stack, "_fields") else type(stack)(children)


def _map_gradient(model: nn.Module, gradient: Callable[..., Gradient]) -> Callable[..., Gradient]:
    """Gradient function of many clients, each array with a leading axis of clients."""

    def map_gradient(state, context, batch, mask):
        masks = () if mask is None else (mask,)

        def client_gradient(parameters, statistics, key, batch, *mask):
            client = TrainState(parameters, statistics, {}, key)
            return gradient(client, context, batch, *(mask or (None,)))

        # A checkpointed module is run again, and so changed, after its step is over.
        with module_state.preserve(model):
            return Gradient(
                *mx.vmap(client_gradient)(
                    state.parameters, state.statistics, state.key, batch, *masks
                )
            )

    return map_gradient


def _map_update(optimizer: Any) -> Callable[..., tuple[Arrays, Arrays, Arrays]]:
    """Optimizer update over a leading axis of clients; the counters have no such axis."""
    update = update_step(optimizer)
    if is_elementwise(optimizer):
        return update

    def map_update(parameters, state, counters, grads):
        new_counters: Arrays = {}

        def client_update(parameters, state, grads):
            *arrays, after = update(parameters, state, counters, grads)
            new_counters.update(after)  # a function of the counters alone
            return arrays

        return *mx.vmap(client_update)(parameters, state, grads), new_counters

    return map_update
