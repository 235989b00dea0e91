"""One step of training or evaluation as a pure function of arrays.

All state is an argument and a result: parameters, running statistics, the optimizer's state, the
random key. So the same function is compiled for one client, and mapped over many clients at once
for a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..arrays import examples, module_state, named_arrays, weights
from ..arrays.named_arrays import Arrays
from ..arrays.randomness import Keys, draw_keys_from
from ..arrays.weights import Slots
from ..errors import FedError, TaskError
from ..settings_check import KINDS
from ..task import Config, Task
from ..task_settings import TracedConfig
from ..tracebacks import definition
from . import linear_gradients, micro_batches
from .optimizer_state import named_optimizers, set_state, split_state, state_of, update_step


class LossError(FedError, TypeError):
    """A loss whose output has no mean over the examples."""


class TrainState(NamedTuple):
    """Training state of a client, which each step takes and returns.

    ``parameters`` and ``statistics`` are by name, ``optimizer_state`` has the optimizer's arrays by
    path, ``key`` is the random key of the layers. With many clients at once each array has a
    leading axis of clients.
    """

    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    optimizer_state: Mapping[str, mx.array]
    key: mx.array


class StepContext(NamedTuple):
    """Inputs of a step that are the same for all clients.

    ``counters`` are the optimizer's scalars (the step's number, the learning rate) by path,
    ``proximal`` the global parameters and FedProx's factor, if there is one, ``round_and_step``
    the round and the local step, int32 scalars, for a loss that takes the settings.
    """

    counters: Arrays
    proximal: tuple[Arrays, mx.array] | None
    round_and_step: tuple[mx.array, mx.array] | None = None


class StepResult(NamedTuple):
    """Result of a step: the new state and counters, the loss's mean over the batch and the weight
    of that mean, both float32 scalars."""

    state: TrainState
    counters: Arrays
    loss: mx.array
    weight: mx.array


class Gradient(NamedTuple):
    """Gradients of a batch by parameter, and the statistics and the random key after it."""

    grads: Arrays
    statistics: Mapping[str, mx.array]
    key: mx.array
    loss: mx.array
    weight: mx.array


def training_step(
    model: nn.Module, slots: Slots, task: Task, optimizer: Any, config: Config
) -> Callable[..., StepResult]:
    """Training step: the gradient of the loss, then the optimizer's update."""
    return compose_step(gradient_step(model, slots, task, config), update_step(optimizer))


def compose_step(
    gradient: Callable[..., Gradient], update: Callable[..., tuple[Arrays, Arrays, Arrays]]
) -> Callable[..., StepResult]:
    """The function ``step(state, context, batch, mask)`` of a gradient and an update.

    ``batch`` is a tree of arrays, ``mask`` float32 of shape (batch,) or ``None``: see
    :class:`~mlx_fed.training.batches.BatchIndices`.
    """

    def step(state, context, batch, mask):
        result = gradient(state, context, batch, mask)
        parameters, optimizer_state, counters = update(
            state.parameters, state.optimizer_state, context.counters, result.grads
        )
        state = TrainState(parameters, result.statistics, optimizer_state, result.key)
        return StepResult(state, counters, result.loss, result.weight)

    return step


def gradient_step(
    model: nn.Module, slots: Slots, task: Task, config: Config, is_mapped: bool = False
) -> Callable[..., Gradient]:
    """The function ``gradient(state, context, batch, mask)``: a step without the update.

    ``is_mapped`` makes one that ``mx.vmap`` can map over clients.
    """
    max_norm = config.get("max-grad-norm", task.max_grad_norm)
    num_micro_batches = gradient_accumulation(task, config)
    smallest = 2 if has_batch_norm(model) else 1
    layers = linear_gradients.layers(slots)

    def gradient(state, context, batch, mask):
        keys = Keys(state.key)
        settings = with_round_and_step(config, context.round_and_step)

        def objective(parameters, statistics, batch, mask):
            weights.put(slots.parameters, parameters)
            weights.put(slots.statistics, statistics)
            output = examples.call(task.loss, model, batch, settings)
            loss, weight = loss_and_weight(task, output, batch, mask)
            return loss, weight, weights.get(slots.statistics), keys.state

        def batch_gradient(statistics, batch, mask):
            (loss, weight, statistics, keys.state), grads = mx.value_and_grad(objective)(
                parameters, statistics, batch, mask
            )
            return micro_batches.BatchGradient(grads, loss, weight, statistics)

        parameters = state.parameters
        # All of it: a checkpointed module runs its forward pass again for the gradient.
        with (
            forward_mode(model, training=True),
            linear_gradients.in_weight_order(layers),
            draw_keys_from(keys),
        ):
            if task.augment:
                batch = augment_batch(task.augment, keys.next(), batch)
            if num_micro_batches == 1:
                result = batch_gradient(state.statistics, batch, mask)
            else:
                result = micro_batches.accumulated_gradient(
                    batch_gradient,
                    state.statistics,
                    batch,
                    mask,
                    num_micro_batches,
                    smallest,
                    in_order=not is_mapped,
                )
        grads = result.grads
        if context.proximal:
            global_parameters, mu = context.proximal
            for name, array in global_parameters.items():  # personal parameters have none
                grads[name] += mu.astype(grads[name].dtype) * (parameters[name] - array)
        if max_norm is not None:
            grads, _ = optim.clip_grad_norm(grads, float(max_norm))
        return Gradient(grads, result.statistics, keys.state, result.loss, result.weight)

    return gradient


def custom_step(
    model: nn.Module, slots: Slots, task: Task, optimizer: Any, config: Config
) -> Callable[..., StepResult]:
    """The function ``step(state, context, batch, mask)`` of a task with a ``train_step``.

    It updates the module and the optimizers, and their arrays afterwards are the new state.
    """
    optimizers = dict(named_optimizers(optimizer))
    assert task.train_step is not None
    train_step = task.train_step

    def step(state, context, batch, mask):
        if context.proximal:
            raise FedError(
                "The strategy asks for a proximal term (proximal-mu), which belongs in the "
                'gradient, and Task.train_step computes that itself: use config["proximal-mu"] '
                "there with a strategy of your own, or a strategy other than FedProx."
            )
        keys = Keys(state.key)
        optimizer_state = {**context.counters, **state.optimizer_state}
        for path, child in optimizers.items():
            set_state(child, path, optimizer_state)
        with forward_mode(model, training=True), draw_keys_from(keys):
            weights.put(slots.parameters, state.parameters)
            weights.put(slots.statistics, state.statistics)
            if task.augment:
                batch = augment_batch(task.augment, keys.next(), batch)
            server_round, local_step = (int(number.item()) for number in context.round_and_step)
            numbers = {"server-round": server_round, "local-step": local_step}
            settings = TracedConfig({**config, **numbers})
            output = train_step(model, optimizer, batch, keys.next(), settings)
            loss, weight = loss_and_weight(task, output, batch, mask)
            parameters, statistics = weights.get(slots.parameters), weights.get(slots.statistics)
        named_arrays.check(named_arrays.spec(state.parameters), named_arrays.spec(parameters))
        counters, optimizer_state = split_state(state_of(optimizer), context.counters)
        state = TrainState(parameters, statistics, optimizer_state, keys.state)
        return StepResult(state, counters, loss, weight)

    return step


def gradient_accumulation(task: Task, config: Config) -> int:
    """Micro-batches of a training step, from the server's settings and the task's.

    Raises:
        SettingsError: If the setting is not a whole number of 1 or more.
        TaskError: If the task has a training step of its own.
    """
    number = config.get("gradient-accumulation", task.gradient_accumulation)
    KINDS["gradient-accumulation"].check("", "The setting gradient-accumulation", number)
    if number > 1 and task.train_step is not None:
        raise TaskError(
            "gradient-accumulation sums gradients between loss and update, which Task.train_step "
            "computes itself: sum them there, or leave the setting out."
        )
    return int(number)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model normalizes over its batch, for which MLX needs two examples in training."""
    return any(isinstance(layer, nn.BatchNorm) for layer in model.modules())


def with_round_and_step(
    config: Config, round_and_step: tuple[mx.array, mx.array] | None
) -> Config | None:
    """Settings for a loss, with the round and the step as arrays, which change without a new
    trace; ``None`` for a loss that takes none."""
    if round_and_step is None:
        return None
    server_round, local_step = round_and_step
    settings = TracedConfig(config)
    settings.update({"server-round": server_round, "local-step": local_step})
    return settings


def augment_batch(augment: Callable[..., Any], key: mx.array, batch: Any) -> Any:
    """Augmented batch, by ``Task.augment``."""
    arguments = batch if isinstance(batch, (tuple, list)) else (batch,)
    result = augment(key, *arguments)
    if result is None:
        raise TaskError("Task.augment returned None: it returns the batch to train on.")
    return tuple(result) if isinstance(result, list) else result


@contextmanager
def forward_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a forward pass; all arrays of the module are restored.

    Layers that the task's model has in evaluation mode stay so in training, as a frozen batch
    normalization does, unless the whole model is in evaluation mode.
    """
    frozen = [layer for layer in model.modules() if not layer.training] if model.training else []
    with module_state.preserve(model):
        model.train(training)
        for layer in frozen:
            layer._training = False
        yield


def loss_and_weight(
    task: Task, output: Any, batch: Any, mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Mean loss of a batch and its weight, two float32 scalars, from ``Task.loss``'s output.

    Raises:
        LossError: If the output is not a scalar, a value for each example, or (mean, weight).
    """
    if isinstance(output, (tuple, list)):
        if not output:
            raise LossError(f"Task.loss{definition(task.loss)} returned an empty tuple.")
        if task.weight_unit is None:
            second = output[1] if len(output) == 2 else None
            if isinstance(second, mx.array) and mx.issubdtype(second.dtype, mx.integer):
                raise LossError(
                    f"Task.loss{definition(task.loss)} returned a tuple of a loss and a whole "
                    "number. If that is the weight of a (mean, weight), name what it counts: "
                    'Task(weight_unit="tokens"). If it is not, return the loss alone, and give '
                    "the other value in Task.metrics."
                )
            output = output[0]
        elif len(output) != 2:
            raise LossError(
                f"Task.weight_unit is {task.weight_unit!r}, so Task.loss returns (mean, weight); "
                f"it returned a tuple of {len(output)}."
            )
    weight = None
    if isinstance(output, (tuple, list)):
        output, weight = output
    if not isinstance(output, mx.array):
        raise LossError(
            f"Task.loss{definition(task.loss)} returned a {type(output).__name__}: it returns an "
            "mx.array, the mean over the batch (a scalar) or a value for each example (a vector)."
        )
    if output.ndim > 1 and output.size != len(output):
        raise LossError(
            f"Task.loss{definition(task.loss)} returned the shape {output.shape} for a batch of "
            f"{examples.count(batch)} examples: it returns the mean over the batch, a scalar, or a "
            "value for each example, shape (batch,). Outputs of shape (batch, 1) and targets of "
            "shape (batch,) broadcast to (batch, batch): squeeze the outputs. Of several values "
            "for each example return their mean."
        )
    output = output.astype(mx.float32)  # a bfloat16 cannot count to 257
    if weight is not None:
        # A whole number by which the loss itself was divided: MLX's compiler takes its conversion
        # for the division's, and then misses it among the outputs. No weight is below 0.
        weight = weight if isinstance(weight, mx.array) else mx.array(weight)
        return output.mean(), mx.maximum(weight, 0).astype(mx.float32)
    num_rows = examples.count(batch)
    if output.size == 1 and mask is None:
        return output.reshape(()), mx.array(num_rows, mx.float32)
    if len(output) != num_rows:
        raise LossError(
            f"Task.loss{definition(task.loss)} returned the shape {output.shape} for a batch of "
            f"{num_rows} examples: it returns the mean over the batch, a scalar, or a value for "
            "each example, shape (batch,). For a mean over other things, such as tokens, return "
            '(mean, weight) and name what the weight counts: Task(weight_unit="tokens").'
        )
    if mask is None:
        return output.mean(), mx.array(num_rows, mx.float32)
    weight = mask.sum()
    return (output * mask).sum() / weight, weight
