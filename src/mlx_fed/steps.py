"""One step of training or evaluation as a pure function of arrays.

Everything that a step changes goes in and comes out: parameters, running statistics, the
optimizer's state, the random key. So the same function is compiled as it is for one client, and
mapped over many clients at once for a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from . import linear, weights
from .randomness import Keys, drawing_from
from .task import Config, Task
from .weights import Arrays, Slots


class Client(NamedTuple):
    """What a client's training carries from step to step.

    ``parameters`` and ``statistics`` are by name, ``state`` has the optimizer's arrays by their
    paths, ``key`` is the random key of the layers. With many clients at once each array has a
    leading axis, one entry a client.
    """

    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    state: Mapping[str, mx.array]
    key: mx.array


class Shared(NamedTuple):
    """What is the same for all clients at one step.

    ``counters`` are the optimizer's own scalars (the step's number, the learning rate) by their
    paths, ``anchor`` the global parameters and FedProx's factor, where there is one.
    """

    counters: Arrays
    anchor: tuple[Arrays, mx.array] | None


class Step(NamedTuple):
    """What a step gives: the client afterwards, the optimizer's scalars, the loss's mean over
    the batch and the weight that the mean has, both float32 scalars."""

    client: Client
    counters: Arrays
    loss: mx.array
    weight: mx.array


class Gradient(NamedTuple):
    """What a batch gives before the optimizer has its turn, and what it leaves of the client."""

    grads: Arrays
    statistics: Mapping[str, mx.array]
    key: mx.array
    loss: mx.array
    weight: mx.array


def training_step(
    model: nn.Module, slots: Slots, task: Task, optimizer: optim.Optimizer, config: Config
) -> Callable[..., Step]:
    """The function ``step(client, shared, batch, mask)``.

    ``batch`` is a tuple of arrays, ``mask`` float32 of shape (batch,) or ``None``: see
    :class:`~mlx_fed.batches.Rows`.
    """
    gradient, update = gradient_step(model, slots, task, config), update_step(optimizer)

    def step(client, shared, batch, mask):
        given = gradient(client, shared.anchor, batch, mask)
        parameters, state, counters = update(client, shared.counters, given.grads)
        moved = Client(parameters, given.statistics, state, given.key)
        return Step(moved, counters, given.loss, given.weight)

    return step


def gradient_step(
    model: nn.Module, slots: Slots, task: Task, config: Config
) -> Callable[..., Gradient]:
    """The function ``gradient(client, anchor, batch, mask)``: all of a step but the update."""
    max_norm = config.get("max-grad-norm", task.max_grad_norm)
    layers = linear.layers(slots)

    def objective(parameters, statistics, key, batch, mask):
        keys = Keys(key)
        with (
            holding(model, slots, parameters, statistics, training=True),
            linear.in_order(layers),
            drawing_from(keys),
        ):
            if task.augment:
                batch = tuple(task.augment(keys.next(), *batch))
            loss, weight = _mean_and_weight(task.loss(model, *batch), batch, mask)
            return loss, weight, weights.get(slots.statistics), keys.state

    def gradient(client, anchor, batch, mask):
        before = client.parameters
        (loss, weight, statistics, key), grads = mx.value_and_grad(objective)(
            before, client.statistics, client.key, batch, mask
        )
        if anchor:
            start, mu = anchor
            for name, at_start in start.items():  # what is personal has no global value
                grads[name] += mu.astype(grads[name].dtype) * (before[name] - at_start)
        if max_norm is not None:
            grads, _ = optim.clip_grad_norm(grads, float(max_norm))
        return Gradient(grads, statistics, key, loss, weight)

    return gradient


def update_step(optimizer: optim.Optimizer) -> Callable[..., Any]:
    """The function ``update(client, counters, grads)``: new parameters, state and counters."""

    def update(client, counters, grads):
        optimizer.state = tree_unflatten([*counters.items(), *client.state.items()])
        after = dict(
            tree_flatten(optimizer.apply_gradients(_nested(grads), _nested(client.parameters)))
        )
        counters, state = _split(optimizer.state, counters)
        return {name: after[name] for name in client.parameters}, state, counters

    return update


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
    """Whether an optimizer is one of MLX's own that treats each element by itself, so that
    arrays may be stacked."""
    return type(optimizer) in _ELEMENTWISE


_SERIAL_NUMBERS = count()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile`` of a function that does not live as long as the process.

    MLX keeps programs by thread and by the address of their function. When a function goes, only
    the thread that last called it forgets its programs; in any other, a new function at the same
    address would silently run the old one's (seen in MLX 0.32). A constant among the arguments,
    different for each function, tells them apart.
    """
    program = mx.compile(lambda number, *args: function(*args))
    return partial(program, next(_SERIAL_NUMBERS))


def counters_of(optimizer: optim.Optimizer) -> Arrays:
    """A new optimizer's own scalars, the same for all clients that are at one step."""
    return dict(tree_flatten(optimizer.state))


def initial_state(optimizer: optim.Optimizer) -> Callable[..., Arrays]:
    """The function ``state(counters, parameters)``: what a new optimizer keeps by parameter."""

    def state(counters, parameters):
        optimizer.state = tree_unflatten(list(counters.items()))
        optimizer.init(_nested(parameters))
        return _split(optimizer.state, counters)[1]

    return state


def _nested(arrays: Arrays) -> Any:
    """Arrays as the module nests them: an optimizer's state has these paths."""
    return tree_unflatten(list(arrays.items()))


def _split(state: Any, counters: Arrays) -> tuple[Arrays, Arrays]:
    flat = dict(tree_flatten(state))
    return {path: flat.pop(path) for path in counters}, flat


@contextmanager
def holding(
    model: nn.Module, slots: Slots, parameters: Arrays, statistics: Arrays, training: bool
) -> Iterator[None]:
    """Puts arrays into the model while a program is traced, and the old ones back.

    Without this the model is left holding tracers, which fail when next they are used.
    """
    places = {**slots.parameters, **slots.statistics}
    before = weights.get(places)
    was_training = model.training
    weights.put(places, {**parameters, **statistics})
    model.train(training)
    try:
        yield
    finally:
        weights.put(places, before)
        model.train(was_training)


def signature(optimizer: optim.Optimizer) -> Any:
    """What a traced step has baked in of its optimizer: everything but its state.

    The learning rate is part of the state and may change from round to round without a new
    trace; momentum or another schedule may not.
    """
    settings = {k: v for k, v in vars(optimizer).items() if k not in ("_state", "_initialized")}
    return (type(optimizer), _comparable(settings))


def _comparable(value: Any) -> Any:
    if isinstance(value, optim.Optimizer):
        return signature(value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    if isinstance(value, FunctionType):
        # A task makes its schedules and filters anew each round: same code, same values.
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = (value.__defaults__, value.__kwdefaults__)
        return (value.__code__, _comparable(defaults), _comparable(cells))
    if isinstance(value, partial):
        return (partial, *map(_comparable, (value.func, value.args, value.keywords)))
    return value.tolist() if hasattr(value, "tolist") else value


def _mean_and_weight(
    output: Any, batch: Sequence[mx.array], mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The mean over a batch of what a loss or metric returned, and the batch's weight."""
    if isinstance(output, tuple):
        mean, weight = output
        # A whole number by which the loss itself was divided: MLX's compiler takes its conversion
        # for the division's own, and then misses it among the outputs. No weight is below 0.
        weight = mx.maximum(weight, 0).astype(mx.float32)
        return mean.astype(mx.float32), weight
    output = output.astype(mx.float32)  # a bfloat16 cannot count to 257
    if output.ndim == 0:
        return output, mx.array(len(batch[0]), mx.float32)
    if mask is None:
        return output.mean(), mx.array(len(output), mx.float32)
    weight = mask.sum()
    return (output * mask).sum() / weight, weight
