"""One step of training or evaluation as a pure function of arrays.

Everything that a step changes goes in and comes out: parameters, running statistics, the
optimizer's state, the random key. So the same function is compiled as it is for one client, and
mapped over many clients at once for a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..arrays import examples, module_state, named_arrays, weights
from ..arrays.named_arrays import Arrays
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from ..errors import FedError, TaskError
from ..task import Config, Task
from ..task_settings import TracedConfig
from . import linear


class LossError(FedError, TypeError):
    """A loss or metric that returns what has no mean."""


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
    paths, ``anchor`` the global parameters and FedProx's factor, where there is one, ``moment``
    the round and the step within it, int32 scalars, for a loss that takes the settings.
    """

    counters: Arrays
    anchor: tuple[Arrays, mx.array] | None
    moment: tuple[mx.array, mx.array] | None = None


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
    model: nn.Module, slots: Slots, task: Task, optimizer: Any, config: Config
) -> Callable[..., Step]:
    """The function ``step(client, shared, batch, mask)``.

    ``batch`` is a tree of arrays, ``mask`` float32 of shape (batch,) or ``None``: see
    :class:`~mlx_fed.training.batches.Rows`.
    """
    gradient, update = gradient_step(model, slots, task, config), update_step(optimizer)

    def step(client, shared, batch, mask):
        result = gradient(client, shared, batch, mask)
        parameters, state, counters = update(client, shared.counters, result.grads)
        after = Client(parameters, result.statistics, state, result.key)
        return Step(after, counters, result.loss, result.weight)

    return step


def gradient_step(
    model: nn.Module, slots: Slots, task: Task, config: Config
) -> Callable[..., Gradient]:
    """The function ``gradient(client, shared, batch, mask)``: all of a step but the update."""
    max_norm = config.get("max-grad-norm", task.max_grad_norm)
    layers = linear.layers(slots)

    def gradient(client, shared, batch, mask):
        keys = Keys(client.key)
        settings = with_moment(config, shared.moment)

        def objective(parameters, statistics, batch, mask):
            weights.put(slots.parameters, parameters)
            weights.put(slots.statistics, statistics)
            if task.augment:
                batch = augmented(task.augment, keys.next(), batch)
            output = examples.call(task.loss, model, batch, settings)
            loss, weight = loss_and_weight(task, output, batch, mask)
            return loss, weight, weights.get(slots.statistics), keys.state

        before = client.parameters
        # The whole of it: a checkpointed module runs its forward pass again for the gradient.
        with running(model, training=True), linear.in_order(layers), draw_keys_from(keys):
            (loss, weight, statistics, key), grads = mx.value_and_grad(objective)(
                before, client.statistics, batch, mask
            )
        if shared.anchor:
            start, mu = shared.anchor
            for name, at_start in start.items():  # what is personal has no global value
                grads[name] += mu.astype(grads[name].dtype) * (before[name] - at_start)
        if max_norm is not None:
            grads, _ = optim.clip_grad_norm(grads, float(max_norm))
        return Gradient(grads, statistics, key, loss, weight)

    return gradient


def custom_step(
    model: nn.Module, slots: Slots, task: Task, optimizer: Any, config: Config
) -> Callable[..., Step]:
    """The function ``step(client, shared, batch, mask)`` of a task with a ``train_step``.

    The module and the optimizers are the task's to update; what they hold afterwards is the result.
    """
    optimizers = dict(_optimizers(optimizer))
    assert task.train_step is not None
    train_step = task.train_step

    def step(client, shared, batch, mask):
        if shared.anchor:
            raise FedError(
                "The strategy asks for a proximal term (proximal-mu), which belongs in the "
                'gradient, and Task.train_step computes that itself: use config["proximal-mu"] '
                "there with a strategy of your own, or a strategy other than FedProx."
            )
        keys = Keys(client.key)
        state = {**shared.counters, **client.state}
        for path, each in optimizers.items():
            _set_state(each, path, state)
        with running(model, training=True), draw_keys_from(keys):
            weights.put(slots.parameters, client.parameters)
            weights.put(slots.statistics, client.statistics)
            if task.augment:
                batch = augmented(task.augment, keys.next(), batch)
            server_round, local_step = (int(number.item()) for number in shared.moment)
            moment = {"server-round": server_round, "local-step": local_step}
            settings = TracedConfig({**config, **moment})
            output = train_step(model, optimizer, batch, keys.next(), settings)
            loss, weight = loss_and_weight(task, output, batch, mask)
            parameters, statistics = weights.get(slots.parameters), weights.get(slots.statistics)
        named_arrays.check(named_arrays.spec(client.parameters), named_arrays.spec(parameters))
        counters, state = split_state(state_of(optimizer), shared.counters)
        return Step(Client(parameters, statistics, state, keys.state), counters, loss, weight)

    return step


def with_moment(config: Config, moment: tuple[mx.array, mx.array] | None) -> Config | None:
    """The settings as a loss gets them: the round and the step are arrays, which change without a
    new trace. ``None`` where the loss takes none."""
    if moment is None:
        return None
    server_round, local_step = moment
    settings = TracedConfig(config)
    settings.update({"server-round": server_round, "local-step": local_step})
    return settings


def augmented(augment: Callable[..., Any], key: mx.array, batch: Any) -> Any:
    """The batch that a task's ``augment`` makes of one."""
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    result = augment(key, *arguments)
    if result is None:
        raise TaskError("Task.augment returned None: it returns the batch to train on.")
    return tuple(result) if isinstance(result, list) else result


def update_step(optimizer: optim.Optimizer) -> Callable[..., Any]:
    """The function ``update(client, counters, grads)``: new parameters, state and counters."""

    def update(client, counters, grads):
        optimizer.state = tree_unflatten([*counters.items(), *client.state.items()])
        after = dict(
            tree_flatten(optimizer.apply_gradients(_nested(grads), _nested(client.parameters)))
        )
        counters, state = split_state(dict(tree_flatten(optimizer.state)), counters)
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


def _optimizers(optimizer: Any, path: str = "") -> Iterator[tuple[str, optim.Optimizer]]:
    """The optimizers that ``Task.optimizer`` returns, alone or in a dictionary or list, by path.

    Raises:
        TaskError: If something else is among them.
    """
    if isinstance(optimizer, optim.Optimizer):
        yield path, optimizer
    elif isinstance(optimizer, (dict, list, tuple)):
        items = optimizer.items() if isinstance(optimizer, dict) else enumerate(optimizer)
        for key, child in items:
            yield from _optimizers(child, f"{path}{key}.")
    else:
        raise TaskError(
            "Task.optimizer must return an mlx.optimizers.Optimizer, not a "
            f"{type(optimizer).__name__}: lambda config: optim.SGD(config['learning-rate'])."
        )


def state_of(optimizer: Any) -> Arrays:
    """The state of one or several optimizers, by path."""
    return {
        f"{path}{name}": array
        for path, each in _optimizers(optimizer)
        for name, array in examples.paths(each.state)
    }


def _set_state(optimizer: optim.Optimizer, path: str, state: Mapping[str, mx.array]) -> None:
    optimizer.state = tree_unflatten(
        [(name.removeprefix(path), a) for name, a in state.items() if name.startswith(path)]
    )


counters_of = state_of
"""A new optimizer's own scalars, the same for all clients that are at one step."""


def initial_state(optimizer: Any) -> Callable[..., Arrays]:
    """The function ``state(counters, parameters)``: what a new optimizer keeps by parameter."""

    def state(counters, parameters):
        optimizer.state = tree_unflatten(list(counters.items()))
        optimizer.init(_nested(parameters))
        return split_state(dict(tree_flatten(optimizer.state)), counters)[1]

    return state


def _nested(arrays: Arrays) -> Any:
    """Arrays as the module nests them: an optimizer's state has these paths."""
    return tree_unflatten(list(arrays.items()))


def split_state(state: Arrays, counters: Arrays) -> tuple[Arrays, Arrays]:
    """An optimizer's state in two: its scalars, and what it keeps by parameter."""
    rest = dict(state)
    return {path: rest.pop(path) for path in counters}, rest


@contextmanager
def running(model: nn.Module, training: bool) -> Iterator[None]:
    """Sets the mode for a forward pass, and puts back afterwards all that the module held.

    Layers that the task's model has in evaluation mode stay there in training, as a frozen
    batch normalization: unless the whole model is.
    """
    frozen = [layer for layer in model.modules() if not layer.training] if model.training else []
    with module_state.preserve(model):
        model.train(training)
        for layer in frozen:
            layer._training = False
        yield


def signature(optimizer: optim.Optimizer) -> Any:
    """What a traced step has baked in of its optimizer: everything but its state.

    The learning rate is part of the state and may change from round to round without a new
    trace; momentum or another schedule may not.
    """
    list(_optimizers(optimizer))  # it is one
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


def loss_and_weight(
    task: Task, output: Any, batch: Any, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The mean over a batch of what a loss returned, and the batch's weight, float32 scalars.

    Raises:
        LossError: If it returned what has no mean.
    """
    if isinstance(output, (tuple, list)):
        if not output:
            raise LossError("Task.loss returned an empty tuple.")
        if task.weight_unit is None:
            second = output[1] if len(output) == 2 else None
            if isinstance(second, mx.array) and mx.issubdtype(second.dtype, mx.integer):
                raise LossError(
                    "Task.loss returned a tuple of a loss and a whole number. If that is the "
                    "weight of a (mean, weight), name what it counts: "
                    'Task(weight_unit="tokens"). If it is not, return the loss alone, and give '
                    "the other value in Task.metrics."
                )
            output = output[0]
        elif len(output) != 2:
            raise LossError(
                f"Task.weight_unit is {task.weight_unit!r}, so Task.loss returns (mean, weight); "
                f"it returned a tuple of {len(output)}."
            )
    return mean_and_weight(output, batch, mask, "Task.loss")


def mean_and_weight(
    output: Any, batch: Any, mask: mx.array | None, what: str
) -> tuple[mx.array, mx.array]:
    """The mean over a batch of what a loss or metric returned, and the batch's weight."""
    weight = None
    if isinstance(output, (tuple, list)):
        output, weight = output
    if not isinstance(output, mx.array):
        raise LossError(
            f"{what} returned a {type(output).__name__}: it returns an mx.array, the mean over the "
            "batch (a scalar) or a value for each example (a vector)."
        )
    output = output.astype(mx.float32)  # a bfloat16 cannot count to 257
    if weight is not None:
        # A whole number by which the loss itself was divided: MLX's compiler takes its conversion
        # for the division's own, and then misses it among the outputs. No weight is below 0.
        weight = weight if isinstance(weight, mx.array) else mx.array(weight)
        return output.mean(), mx.maximum(weight, 0).astype(mx.float32)
    if output.ndim == 0:
        return output, mx.array(examples.count(batch), mx.float32)
    if mask is None:
        return output.mean(), mx.array(len(output), mx.float32)
    weight = mask.sum()
    return (output * mask).sum() / weight, weight
