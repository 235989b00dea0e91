"""Gradient accumulation: a step on micro-batches against the step on the larger batch."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_fed as fed
from mlx_fed.errors import TaskError
from mlx_fed.training.micro_batches import (
    BatchGradient,
    accumulated_gradient,
    micro_batch_bounds,
)
from mlx_fed.training.trainer import ClientUpdate, Trainer

from ..helpers.trainers import (
    MLP,
    OPTIMIZERS,
    divided,
    examples,
    mean,
    noisy,
    trainer,
    vector,
    weighted,
)

UNCOMPILED = pytest.mark.usefixtures("uncompiled")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def train(of: Trainer, number: int = 40, **config) -> ClientUpdate:
    settings = {name.replace("_", "-"): value for name, value in config.items()}
    data = fed.Data(examples(number))
    return of.train(of.parameters(), of.statistics(), data, {"seed": 1, **settings})


def assert_equal(update: ClientUpdate, reference: ClientUpdate) -> None:
    for name, array in reference.parameters.items():
        np.testing.assert_allclose(update.parameters[name], array, **TOLERANCE, err_msg=name)
    assert update.metrics["loss"] == pytest.approx(reference.metrics["loss"], rel=1e-5)
    counts = [name for name in reference.metrics if name.startswith("num-")]
    assert {n: update.metrics[n] for n in counts} == {n: reference.metrics[n] for n in counts}


@UNCOMPILED
@pytest.mark.parametrize(
    ("loss", "number"),
    # The mean of ``divided`` over no examples is no number on the larger batch, either.
    [
        *((vector, 40), (vector, 37), (vector, 5), (vector, 1), (mean, 37), (mean, 5)),
        *((weighted, 40), (weighted, 5), (weighted, 1), (divided, 40), (divided, 37)),
    ],
)
def test_micro_batches_train_as_the_larger_batch(loss, number):
    larger = trainer(loss=loss, batch_size=16, local_epochs=2)
    micro = trainer(loss=loss, batch_size=4, gradient_accumulation=4, local_epochs=2)
    assert_equal(train(micro, number), train(larger, number))


@UNCOMPILED
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_optimizer_counts_steps_not_micro_batches(optimizer):
    larger = trainer(optimizer=optimizer, batch_size=12)
    micro = trainer(optimizer=optimizer, batch_size=4, gradient_accumulation=3)
    assert_equal(train(micro, local_steps=5), train(larger, local_steps=5))


@UNCOMPILED
@pytest.mark.parametrize(
    "settings", [{"max_grad_norm": 0.05}, {"proximal_mu": 0.5}, {"local_steps": 3}]
)
def test_what_follows_the_gradient_sees_the_whole_step(settings):
    assert_equal(
        train(trainer(batch_size=4), gradient_accumulation=4, **settings),
        train(trainer(batch_size=16), **settings),
    )


@UNCOMPILED
def test_the_batch_is_augmented_before_it_is_divided():
    micro = trainer(batch_size=4, gradient_accumulation=4, augment=noisy)
    assert_equal(train(micro), train(trainer(batch_size=16, augment=noisy)))


@UNCOMPILED
@pytest.mark.parametrize("empty", [[0], [1], [0, 2]])
def test_a_micro_batch_without_weight_counts_nothing(empty):
    """As a micro-batch of texts without a token to train on: its mean is not a number."""
    x, y = (mx.array(array) for array in examples(12))
    y = mx.maximum(y, 1)
    for number in empty:
        y[4 * number : 4 * number + 4] = 0
    of = trainer(loss=divided)

    def gradient(statistics, batch, mask):
        def loss(parameters):
            of.model.load_weights([*parameters.items()])
            return divided(of.model, *batch)

        (value, weight), grads = mx.value_and_grad(loss)(of.parameters())
        return BatchGradient(grads, value, weight.astype(mx.float32), statistics)

    whole = gradient({}, (x, y), None)
    result = accumulated_gradient(gradient, {}, (x, y), None, 3)
    assert result.weight.item() == whole.weight.item() > 0
    np.testing.assert_allclose(result.loss, whole.loss, rtol=1e-6)
    for name, array in whole.grads.items():
        np.testing.assert_allclose(result.grads[name], array, **TOLERANCE, err_msg=name)


def test_half_precision_gradients_are_summed_in_float32():
    """300 gradients of 0.01 in bfloat16 end at 0.01; summed in bfloat16 they would stop growing."""

    def gradient(statistics, batch, mask):
        array = mx.full((1,), 0.01, mx.bfloat16)
        return BatchGradient({"weight": array}, mx.array(1.0), mx.array(1.0), statistics)

    result = accumulated_gradient(gradient, {}, (mx.zeros((300,)),), None, 300)
    assert result.grads["weight"].dtype == mx.bfloat16
    assert result.grads["weight"].item() == mx.array(0.01, mx.bfloat16).item()


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        ((8, 4), [0, 2, 4, 6, 8]),
        ((9, 4), [0, 3, 5, 7, 9]),
        ((3, 4), [0, 1, 2, 3]),
        ((5, 4, 2), [0, 3, 5]),
        ((1, 4, 2), [0, 1]),
    ],
)
def test_micro_batches_differ_by_one_example_at_most(arguments, bounds):
    assert micro_batch_bounds(*arguments) == bounds


@UNCOMPILED
def test_batch_normalization_has_two_examples_in_each():
    """Its statistics are those of micro-batches, one after another."""
    micro = trainer(partial(MLP, norm=True), batch_size=2, gradient_accumulation=4)
    update = train(micro, 13)
    assert all(mx.isfinite(array).all() for array in update.statistics.values())
    start = micro.statistics()
    assert any(not mx.array_equal(update.statistics[name], start[name]) for name in start)


@pytest.mark.parametrize("compile", [True, False])
def test_one_micro_batch_is_in_memory(compile):
    def model() -> nn.Module:
        layers = [layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.Tanh())]
        return nn.Sequential(nn.Linear(4, 128), *layers, nn.Linear(128, 3))

    peaks = {}
    for number in (1, 16):
        of = trainer(
            model, batch_size=2048 // number, gradient_accumulation=number, compile=compile
        )
        train(of, 2048)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        train(of, 2048)
        peaks[number] = mx.get_peak_memory() - before
    assert peaks[16] < 0.5 * peaks[1]


@UNCOMPILED
def test_a_streams_batches_are_divided():
    x, y = examples(24)

    def stream(key):
        return [(x[start : start + 8], y[start : start + 8]) for start in range(0, 24, 8)]

    updates = []
    for number in (1, 4):
        of = trainer(gradient_accumulation=number)
        arguments = of.parameters(), of.statistics(), fed.Data(stream), {}
        updates.append(of.train(*arguments))
    assert_equal(updates[1], updates[0])


def test_a_batch_with_an_array_of_another_length_is_refused():
    def stream(key):
        yield mx.zeros((8, 4)), mx.zeros((3,), mx.int32)

    def loss(model, x, edges):
        return mx.square(model(x)).mean() + edges.sum()

    of = trainer(loss=loss, gradient_accumulation=2)
    with pytest.raises(TaskError, match=r"the shapes \[\(8, 4\), \(3,\)\]"):
        of.train(of.parameters(), of.statistics(), fed.Data(stream), {})


def test_a_training_step_of_its_own_sums_its_own_gradients():
    def step(model, optimizer, batch, key, config):
        return mx.array(0.0)

    with pytest.raises(ValueError, match=r"Task\.train_step computes itself"):
        trainer(train_step=step, gradient_accumulation=2)
    with pytest.raises(TaskError, match="leave the setting out"):
        train(trainer(train_step=step), gradient_accumulation=2)


def test_settings_stand_over_the_task():
    """In one process the steps of both are traced: a number is part of what a program is."""
    of = trainer(batch_size=4, gradient_accumulation=2, optimizer=lambda config: optim.SGD(0.1))
    assert_equal(train(of, gradient_accumulation=4), train(trainer(batch_size=16)))
    assert_equal(train(of), train(trainer(batch_size=8)))
