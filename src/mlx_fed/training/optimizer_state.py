"""Optimizers as pure functions over named arrays, and their state by path.

An optimizer's state is split in two: its counters (the step's number, the learning rate), which are
the same for all clients at one step, and the arrays that it has for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..arrays import examples
from ..arrays.named_arrays import Arrays
from ..errors import TaskError
from .python_state import PythonState, Snapshot


def update_step(optimizer: optim.Optimizer) -> Callable[..., tuple[Arrays, Arrays, Arrays]]:
    """Optimizer update: ``update(parameters, state, counters, grads)``, which returns the new
    parameters, state and counters.

    Raises:
        TaskError: If the optimizer's class overrides ``update``, which works on a module.
    """
    if type(optimizer).update is not optim.Optimizer.update:
        raise TaskError(
            f"Task.optimizer returned {type(optimizer).__name__}, whose own update(model, "
            "gradients) would not be called: override apply_gradients or apply_single instead, or "
            "call it in Task.train_step."
        )

    def update(parameters, state, counters, grads):
        optimizer.state = tree_unflatten([*counters.items(), *state.items()])
        result = optimizer.apply_gradients(_nested(grads), _nested(parameters))
        arrays = dict(tree_flatten(result))
        counters, state = split_state(dict(tree_flatten(optimizer.state)), counters)
        return {name: arrays[name] for name in parameters}, state, counters

    return update


STATEFUL_OPTIMIZER = (
    "Task.optimizer's optimizer changes attributes of its own in a step, which are no part of its "
    "state: each client has one of its own, and its steps are not compiled. With keep_optimizer, "
    "only what is in its state is kept"
)


_ELEMENTWISE = (
    optim.SGD,
    optim.RMSprop,
    optim.Adagrad,
    optim.AdaDelta,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.Lion,
)


def is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer is one of MLX's that updates each element independently, so that
    parameters of several clients may be stacked."""
    return type(optimizer) in _ELEMENTWISE


def named_optimizers(optimizer: Any, path: str = "") -> Iterator[tuple[str, optim.Optimizer]]:
    """Optimizers that ``Task.optimizer`` returns, alone or in a dictionary or list, by path.

    Raises:
        TaskError: If there is something other than an optimizer.
    """
    if isinstance(optimizer, optim.Optimizer):
        yield path, optimizer
    elif isinstance(optimizer, (dict, list, tuple)):
        items = optimizer.items() if isinstance(optimizer, dict) else enumerate(optimizer)
        for key, child in items:
            yield from named_optimizers(child, f"{path}{key}.")
    else:
        raise TaskError(
            "Task.optimizer must return an mlx.optimizers.Optimizer, not a "
            f"{type(optimizer).__name__}: lambda config: optim.SGD(config['learning-rate'])."
        )


def state_of(optimizer: Any) -> Arrays:
    """State of one or several optimizers, by path: of a new one its counters."""
    return {
        f"{path}{name}": array
        for path, child in named_optimizers(optimizer)
        for name, array in examples.paths(child.state)
    }


def set_state(optimizer: optim.Optimizer, path: str, state: Mapping[str, mx.array]) -> None:
    """Assignment of the arrays below a path to one optimizer."""
    optimizer.state = tree_unflatten(
        [(name.removeprefix(path), a) for name, a in state.items() if name.startswith(path)]
    )


def initial_state(optimizer: Any) -> Callable[..., Arrays]:
    """Initial optimizer state: ``state(counters, parameters)``, arrays for each parameter."""

    def state(counters, parameters):
        optimizer.state = tree_unflatten(list(counters.items()))
        optimizer.init(_nested(parameters))
        return split_state(dict(tree_flatten(optimizer.state)), counters)[1]

    return state


def _nested(arrays: Arrays) -> Any:
    """Nested tree of named arrays: an optimizer's state has the module's paths."""
    return tree_unflatten(list(arrays.items()))


def split_state(state: Arrays, counters: Arrays) -> tuple[Arrays, Arrays]:
    """Optimizer state in two: the counters, and the arrays for each parameter."""
    arrays = dict(state)
    return {path: arrays.pop(path) for path in counters}, arrays


def signature(optimizer: optim.Optimizer) -> Snapshot:
    """Key of an optimizer's constants in a traced step: all that it reads but the state.

    The learning rate is in the state and may change from round to round without a new trace;
    momentum or another schedule may not.
    """
    list(named_optimizers(optimizer))  # raises for anything else
    return PythonState(optimizer).snapshot()
