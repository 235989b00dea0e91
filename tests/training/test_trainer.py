"""Local training and evaluation: the compiled programs against the obvious loops."""

from __future__ import annotations

import platform
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count, islice

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import mlx_fed as fed
from mlx_fed.training import linear_gradients
from mlx_fed.arrays import named_arrays, randomness, weights
from mlx_fed.arrays.randomness import Keys, draw_keys_from
from mlx_fed.training.programs import compiled
from mlx_fed.training.trainer import Trainer, ClientUpdate
from mlx_fed.arrays.examples import ExamplesError
from mlx_fed.arrays.named_arrays import WeightsError
from ..helpers.call_log import call_log
from ..helpers.trainers import (
    MLP,
    OPTIMIZERS,
    OTHERS,
    accuracy,
    divided,
    examples,
    mean,
    noisy,
    trainer,
    vector,
    weighted,
)

# A padded batch is summed in another order than a short one.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def train(of: Trainer, data: fed.Data, *, client: int = 0, **config) -> ClientUpdate:
    config = {name.replace("_", "-"): value for name, value in config.items()}
    return of.train(of.parameters(), of.statistics(), data, config, client=client)


def plain_train(of: Trainer, data: fed.Data, *, client: int = 0, **config) -> ClientUpdate:
    """What ``Trainer.train`` does, as one would write it: uncompiled, and nothing padded.

    Linear layers alone are the trainer's own, which test_linear.py holds to MLX's: some CPUs'
    products round otherwise when they are made the other way round.
    """
    config = {name.replace("_", "-"): value for name, value in config.items()}
    task = of.task
    moment = (config.get("seed", 0), config.get("server-round", 0), client)
    model = weights.build_model(task.model, 0)
    start = model.trainable_parameters()
    optimizer = task.optimizer(config)
    optimizer.init(model.trainable_parameters())
    arrays = [mx.array(array) for array in data.train]
    size = config.get("batch-size", task.batch_size)

    def steps():
        for epoch in count() if task.local_steps else range(task.local_epochs):
            order = np.arange(len(arrays[0]))
            purpose = (moment[0], client) if task.local_steps else moment
            np.random.default_rng(randomness.derive(*purpose, "shuffle", epoch)).shuffle(order)
            order = mx.array(order)
            for at in range(0, len(order), size):
                yield [array[order[at : at + size]] for array in arrays]

    def objective(batch) -> tuple[mx.array, mx.array]:
        output = task.loss(model, *batch)
        if isinstance(output, tuple):
            return output
        return output.mean(), mx.array(len(batch[0]))

    losses, shares = [], []
    keys = Keys(randomness.key(*moment, "layers"))
    model.train()
    steps_before = max(moment[1] - 1, 0) * (task.local_steps or 0)
    for batch in islice(
        steps(), steps_before, steps_before + n if (n := task.local_steps) else None
    ):
        if task.augment:
            batch = task.augment(keys.next(), *batch)
        with (
            draw_keys_from(keys),
            linear_gradients.in_weight_order(linear_gradients.layers(weights.find_slots(model))),
        ):
            (loss, weight), grads = nn.value_and_grad(model, objective)(batch)
        if mu := config.get("proximal-mu"):
            now = model.trainable_parameters()
            grads = tree_map(lambda g, w, w0: g + mu * (w - w0), grads, now, start)
        if task.max_grad_norm:
            grads, _ = optim.clip_grad_norm(grads, task.max_grad_norm)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss, weight)
        losses.append(loss.item())
        shares.append(weight.item())
    slots = weights.find_slots(model)
    metrics = {"num-examples": len(arrays[0]), "loss": float(np.average(losses, weights=shares))}
    return ClientUpdate(weights.get(slots.parameters), weights.get(slots.statistics), metrics)


def assert_close(got: ClientUpdate, expected: ClientUpdate) -> None:
    for name, array in {**expected.parameters, **expected.statistics}.items():
        other = {**got.parameters, **got.statistics}[name]
        np.testing.assert_allclose(np.array(other), np.array(array), **TOLERANCE, err_msg=name)
    assert got.metrics["num-examples"] == expected.metrics["num-examples"]
    assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)


def bits(update: ClientUpdate) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in update.parameters.items()}


# -- against the plain loop ----------------------------------------------------------------


@pytest.mark.parametrize("loss", [vector, mean, weighted], ids=["vector", "mean", "weighted"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_the_plain_loop(optimizer, loss):
    of = trainer(loss=loss, optimizer=optimizer, local_epochs=2)
    data = fed.Data(examples(21))  # the last batch has 5 of 8
    for server_round in (1, 2):
        moment = {"seed": 3, "server_round": server_round, "client": 5}
        assert_close(train(of, data, **moment), plain_train(of, data, **moment))


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="elsewhere a compiler may round a * b + c once where the plain loop does twice",
)
@pytest.mark.parametrize("optimizer", (OPTIMIZERS | OTHERS).values(), ids=OPTIMIZERS | OTHERS)
def test_full_batches_train_to_the_bits_of_the_plain_loop(optimizer):
    of = trainer(partial(MLP, dropout=0.2), optimizer=optimizer, augment=noisy, local_epochs=2)
    data = fed.Data(examples(24))
    update, plain = (run(of, data, seed=3, client=1) for run in (train, plain_train))
    assert bits(update) == bits(plain)
    assert update.metrics == plain.metrics


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (3, {}),  # less than a batch
        (1, {}),
        (8, {}),  # just one
        (21, {"local_steps": 2}),  # less than a pass
        (21, {"local_steps": 8}),  # 3 a pass: into the third
        (21, {"max_grad_norm": 0.05}),
        (21, {"loss": mean, "max_grad_norm": 0.05}),
        (21, {"model": partial(MLP, norm=True)}),
        (21, {"model": partial(MLP, norm=True), "loss": mean, "local_epochs": 2}),
        (24, {"augment": noisy}),
        (21, {"augment": noisy, "loss": mean}),
    ],
)
def test_training_of_other_sizes_is_the_plain_loop(number, settings):
    of = trainer(**settings)
    data = fed.Data(examples(number))
    assert_close(train(of, data, seed=1), plain_train(of, data, seed=1))


@pytest.mark.parametrize("mu", [0.1, 2.0])
def test_fedprox_pulls_towards_the_start(mu):
    of = trainer(local_epochs=3)
    data = fed.Data(examples(24))
    update = train(of, data, proximal_mu=mu)
    assert_close(update, plain_train(of, data, proximal_mu=mu))

    def distance(update: ClientUpdate) -> float:
        pairs = [(update.parameters[n], w0) for n, w0 in of.parameters().items()]
        return sum(((w - w0) ** 2).sum().item() for w, w0 in pairs)

    assert distance(update) < 0.99 * distance(train(of, data))


def test_fedprox_gradient_by_hand():
    """One weight, loss (w x)^2 / 2, two steps: w1 = w0 - r w0, w2 = w1 - r (w1 + mu (w1 - w0))."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = mx.array([2.0])

        def __call__(self, x):
            return self.w * x

    of = trainer(One, lambda model, x: model(x) ** 2 / 2, local_steps=2)
    update = train(of, fed.Data((np.ones(1, np.float32),)), proximal_mu=0.5, learning_rate=0.1)
    first = 2.0 - 0.1 * 2.0
    second = first - 0.1 * (first + 0.5 * (first - 2.0))
    assert update.parameters["w"].item() == pytest.approx(second, rel=1e-6)


def test_a_padded_batch_counts_as_the_short_one_that_it_is():
    """A vector is padded and masked; a mean of the same cannot be, so its batch is short."""
    data = fed.Data(examples(11))
    assert_close(train(trainer(loss=vector), data), train(trainer(loss=mean), data))


def test_running_statistics_are_those_of_the_examples_alone():
    of = trainer(partial(MLP, norm=True))
    x, y = examples(3)  # in a batch of 8
    update = train(of, fed.Data((x, y)), learning_rate=0.0)
    hidden = of.model.first(mx.array(x))
    expected = 0.9 * 0 + 0.1 * hidden.mean(axis=0)
    np.testing.assert_allclose(update.statistics["norm.running_mean"], expected, **TOLERANCE)
    assert update.statistics.keys() == {"norm.running_mean", "norm.running_var"}
    assert not update.statistics.keys() & update.parameters.keys()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_mean_of_a_large_half_precision_batch_is_exact(dtype):
    """Bfloat16 cannot count to 257, so means are taken in float32."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = mx.ones(1, dtype)

    of = trainer(Constant, lambda model, x: model.w * x, batch_size=4096)
    update = train(of, fed.Data((mx.ones(3001, dtype),)), learning_rate=0.0)
    assert update.metrics["loss"] == 1.0
    assert update.parameters["w"].dtype == dtype


def test_a_model_that_was_loaded_in_evaluation_mode_trains():
    of = trainer(lambda: MLP(norm=True).eval())
    update = train(of, fed.Data(examples(16)))
    assert update.statistics["norm.running_mean"].any().item()
    assert not any(module.training for module in of.model.modules())


def test_only_the_factors_of_a_frozen_base_change():
    def model() -> nn.Module:
        model = MLP()
        model.freeze()
        model.layers[1].unfreeze()
        return model

    of = trainer(model)
    before = dict(tree_flatten(of.model.parameters()))
    update = train(of, fed.Data(examples(16)))
    assert update.parameters.keys() == {"layers.1.weight", "layers.1.bias"}
    weights.load(of.slots.parameters, update.parameters)
    after = dict(tree_flatten(of.model.parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == update.parameters.keys()


# -- randomness ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"model": partial(MLP, dropout=0.5)},
        {"augment": noisy},
        {},
    ],
    ids=["dropout", "augment", "shuffle"],
)
def test_a_round_is_the_same_whatever_came_before(settings):
    of = trainer(**settings)
    data = fed.Data(examples(24))
    moment = {"seed": 1, "server_round": 2, "client": 3}
    first = bits(train(of, data, **moment))
    for other in ({"seed": 9}, {"server_round": 9}, {"client": 9}):
        assert bits(train(of, data, **moment | other)) != first
    mx.random.seed(12345)
    assert bits(train(of, data, **moment)) == first
    assert bits(train(trainer(**settings), data, **moment)) == first


def test_dropout_alone_differs_between_clients_and_rounds():
    """With one batch of equal examples nothing else does."""
    x, y = examples(1)
    data = fed.Data((np.repeat(x, 8, axis=0), np.repeat(y, 8)))
    of = trainer(partial(MLP, dropout=0.5))
    moments = [{"seed": s, "server_round": r, "client": c} for s, r, c in np.ndindex(2, 2, 2)]
    assert len({str(bits(train(of, data, **moment))) for moment in moments}) == 8
    of = trainer()
    assert len({str(bits(train(of, data, **moment))) for moment in moments}) == 1


def test_each_step_has_another_dropout():
    of = trainer(partial(MLP, dropout=0.5), local_steps=2)
    data = fed.Data(tuple(np.repeat(array, 8, axis=0) for array in examples(1)))
    losses = [
        train(trainer(partial(MLP, dropout=0.5), local_steps=n), data, learning_rate=0.0)
        for n in (1, 2)
    ]
    assert losses[0].metrics["loss"] != losses[1].metrics["loss"]
    assert_close(train(of, data), plain_train(of, data))


def test_another_thread_trains_alike():
    of = trainer(partial(MLP, dropout=0.5))
    data = fed.Data(examples(24))
    here, there = bits(train(of, data, seed=1)), {}
    thread = threading.Thread(target=lambda: there.update(bits(train(of, data, seed=1))))
    thread.start()
    thread.join()
    assert there == here


# -- data ----------------------------------------------------------------------------------


def test_a_program_is_never_taken_for_one_that_went_before():
    """MLX itself does that once another thread has run a program: see steps.compiled."""

    def scaled_by(factor: float) -> Callable[[mx.array], mx.array]:
        return compiled(lambda x: x * factor)

    x = mx.ones(4)
    for factor in range(6):  # a machine that is new to each of these compiles it for a while
        program = scaled_by(factor)
        assert program(x)[0].item() == factor
        thread = threading.Thread(target=lambda program=program: mx.eval(program(x)))
        thread.start()
        thread.join()
        del program, thread


def test_a_stream_of_batches_is_trained_on_as_it_comes():
    x, y = (mx.array(array) for array in examples(20))
    keys = []

    def stream(key):
        keys.append(key.tolist())
        for at in range(0, 20, 7):  # 7, 7 and 6: shapes may differ
            yield x[at : at + 7], y[at : at + 7]

    of = trainer(loss=mean, local_epochs=2)
    update = train(of, fed.Data(stream), seed=1)
    assert len(set(map(tuple, keys))) == 2  # one a pass
    assert update.metrics["num-examples"] == 40

    model = weights.build_model(MLP, 0)
    optimizer = optim.SGD(0.1)
    for _ in range(2):
        for at in range(0, 20, 7):
            _, grads = nn.value_and_grad(model, mean)(model, x[at : at + 7], y[at : at + 7])
            optimizer.update(model, grads)
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_allclose(update.parameters[name], array, **TOLERANCE)

    metrics = trainer(metrics={"accuracy": accuracy}).evaluate(of.parameters(), {}, stream).metrics
    whole = trainer(metrics={"accuracy": accuracy}).evaluate(of.parameters(), {}, (x, y)).metrics
    assert metrics == pytest.approx(whole, rel=1e-5)


def test_a_stream_may_give_numpy_arrays():
    x, y = examples(8)
    of = trainer()
    ours, numpys = (
        train(of, fed.Data(lambda key, batch=batch: [batch]))
        for batch in ((mx.array(x), mx.array(y)), (x, y))
    )
    assert bits(ours) == bits(numpys)


@pytest.mark.parametrize("settings", [{}, {"local_steps": 3}, {"loss": mean}])
@pytest.mark.parametrize("split", [examples(0), lambda key: iter(())], ids=["arrays", "stream"])
def test_no_examples_are_an_error(split, settings):
    of = trainer(**settings)
    with pytest.raises(ValueError, match="no training examples"):
        train(of, fed.Data(split))
    with pytest.raises(ValueError, match="no examples to evaluate on"):
        of.evaluate(of.parameters(), {}, split)


def test_a_split_is_converted_once():
    class Counting:
        """Examples that tell how often they are read."""

        def __init__(self, array: np.ndarray):
            self.array, self.reads = array, 0
            self.shape, self.dtype = array.shape, array.dtype

        def __len__(self) -> int:
            return len(self.array)

        def __getitem__(self, rows):
            return self.array[rows]

        def __array__(self, *arguments, **settings):
            self.reads += 1
            return self.array

        def __mlx_array__(self):
            self.reads += 1
            return mx.array(self.array)

    split = {name: tuple(map(Counting, examples(16, seed=i))) for i, name in enumerate("ab")}
    data = fed.Data(split["a"], split["b"])
    of = trainer()
    of.warm_up(data, {})
    for server_round in range(4):
        train(of, data, server_round=server_round)
        of.evaluate(of.parameters(), {}, data.test)
    reads = {name: max(array.reads for array in arrays) for name, arrays in split.items()}
    assert reads == {"a": 1, "b": 1}


def test_augmented_examples_may_have_another_shape():
    def crop(key, x, y):
        return x[:, :4], y

    x, y = examples(11)
    wide = fed.Data((np.concatenate([x, x], axis=1), y))
    cropped = train(trainer(augment=crop), wide)
    assert bits(cropped) == bits(train(trainer(), fed.Data((x, y))))


# -- programs ------------------------------------------------------------------------------


def counted(loss=vector) -> tuple[Callable, list]:
    """A loss, and a list that grows each time that a compiled program of it is traced."""
    calls, record = call_log()

    def counting(model, x, y):
        try:
            mx.eval(x)  # which a trace refuses, and a comparison with the plain step allows
        except ValueError:
            record()
        return loss(model, x, y)

    return counting, calls


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rounds_share_a_program(optimizer):
    loss, calls = counted()
    of = trainer(loss=loss, optimizer=optimizer, metrics={"accuracy": accuracy})
    data = fed.Data(examples(21), examples(9))
    of.warm_up(data, {})
    train(of, data, server_round=1)
    traces = len(calls)
    for server_round in range(2, 5):
        train(of, data, server_round=server_round, seed=server_round, client=server_round)
        of.evaluate(of.parameters(), {}, data.test)
    train(of, fed.Data(examples(13), None))  # another client, with another number of examples
    assert len(calls) == traces


def test_a_partial_schedule_needs_a_new_program_only_with_other_values():
    loss, calls = counted()

    def decay(rate: float, step: mx.array) -> mx.array:
        return rate / (1 + step)

    of = trainer(loss=loss, optimizer=lambda config: optim.SGD(partial(decay, config["rate"])))

    def traces(rate: float) -> int:
        before = len(calls)
        train(of, fed.Data(examples(8)), rate=rate)
        return len(calls) - before

    assert traces(0.1) > 0
    assert traces(0.1) == 0
    assert traces(0.2) > 0


def test_a_learning_rate_needs_no_new_program_and_momentum_does():
    loss, calls = counted()
    of = trainer(loss=loss)
    data = fed.Data(examples(16))

    def traces(**config) -> int:
        before = len(calls)
        assert_close(train(of, data, **config), plain_train(trainer(), data, **config))
        return len(calls) - before

    assert traces(learning_rate=0.1) > 0
    assert traces(learning_rate=0.3, server_round=2) == 0
    assert traces(learning_rate=0.3, momentum=0.5) > 0
    assert traces(learning_rate=0.3, momentum=0.9) > 0
    assert traces(learning_rate=0.2, momentum=0.9) == 0


def test_another_schedule_needs_a_new_program():
    loss, calls = counted()

    def optimizer(config: dict) -> optim.Optimizer:
        return optim.SGD(optim.linear_schedule(config["start"], 0.0, 10))

    of = trainer(loss=loss, optimizer=optimizer)
    data = fed.Data(examples(16))
    for start, new in ((0.1, True), (0.1, False), (0.5, True), (0.5, False)):
        before = len(calls)
        update = train(of, data, start=start)
        assert (len(calls) > before) == new
        assert_close(update, plain_train(trainer(optimizer=optimizer), data, start=start))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_model_is_left_as_it_was(norm, training):
    of = trainer(partial(MLP, dropout=0.5, norm=norm))
    of.model.train(training)
    x, y = examples(16)
    before = {name: np.array(a) for name, a in tree_flatten(of.model.parameters())}
    train(of, fed.Data((x, y)))
    assert of.model.training == of.model.dropout.training == training
    of.evaluate(of.parameters(), of.statistics(), (x, y))
    assert of.model.training == of.model.dropout.training == training
    for name, array in tree_flatten(of.model.parameters()):
        np.testing.assert_array_equal(np.array(array), before[name])
    assert np.isfinite(np.array(of.model(mx.array(x)))).all()
    nn.value_and_grad(of.model, mean)(of.model, mx.array(x), mx.array(y))


def test_a_loss_that_raises_leaves_no_tracers():
    def broken(model, x, y):
        if model.training:
            raise RuntimeError("a bug in the loss")
        return vector(model, x, y)

    of = trainer(loss=broken)
    of.model.eval()
    with pytest.raises(RuntimeError, match="a bug in the loss"):
        train(of, fed.Data(examples(16)))
    assert np.isfinite(np.array(of.model(mx.ones((1, 4))))).all()


# -- evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("number", [1, 5, 8, 21])
def test_evaluation_is_the_plain_one(number, norm):
    metrics = {
        "accuracy": accuracy,  # booleans
        "error": lambda model, x, y: mx.mean(accuracy(model, x, y) == 0),  # a mean
        "margin": lambda model, x, y: mx.max(model(x), axis=1),  # a vector
        "hits": lambda model, x, y: accuracy(model, x, y).astype(mx.int32),
    }
    of = trainer(partial(MLP, dropout=0.5, norm=norm), metrics=metrics, eval_batch_size=8)
    x, y = examples(number)
    got = of.evaluate(of.parameters(), of.statistics(), (x, y)).metrics
    model = weights.build_model(of.task.model, 0)
    model.eval()
    hits = np.array(accuracy(model, mx.array(x), mx.array(y)))
    expected = {
        "num-examples": number,
        "loss": mean(model, mx.array(x), mx.array(y)).item(),
        "accuracy": hits.mean(),
        "error": 1 - hits.mean(),
        "margin": np.array(model(mx.array(x))).max(axis=1).mean(),
        "hits": hits.mean(),
    }
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert list(got) == list(expected)
    assert {type(value) for value in list(got.values())[1:]} == {float}


def test_evaluation_weighs_batches_as_the_loss_does():
    of = trainer(loss=weighted, eval_batch_size=4)
    x, y = examples(18)
    model = weights.build_model(MLP, 0)
    expected, _ = weighted(model, mx.array(x), mx.array(y))
    got = of.evaluate(of.parameters(), {}, (x, y)).metrics
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_uses_the_arrays_it_is_given():
    of = trainer(partial(MLP, norm=True))
    data = examples(16)
    update = train(of, fed.Data(data), learning_rate=1.0)
    model = weights.build_model(of.task.model, 0)
    model.update(tree_unflatten(list({**update.parameters, **update.statistics}.items())))
    model.eval()
    expected = mean(model, *map(mx.array, data)).item()
    got = of.evaluate(update.parameters, update.statistics, data).metrics["loss"]
    assert got == pytest.approx(expected, rel=1e-5)
    assert got != of.evaluate(update.parameters, of.statistics(), data).metrics["loss"]


# -- what does not fit ---------------------------------------------------------------------


def test_an_array_without_a_tuple_is_refused():
    x, _ = examples(4)
    for lone in (x, mx.array(x)):
        with pytest.raises(TypeError, match=r"Data.test takes a tuple .* \(array,\)"):
            fed.Data((x,), lone)


@pytest.mark.parametrize("setting", ["batch-size", "local-epochs", "local-steps"])
def test_a_setting_of_no_steps_is_refused(setting: str):
    of = trainer()
    with pytest.raises(ValueError, match=f"{setting} is a whole number, 1 or more, not 0"):
        of.train(of.parameters(), {}, fed.Data(examples(4)), {setting: 0})


@pytest.mark.parametrize("name", ["loss", "num-examples"])
def test_a_metric_with_the_name_of_another_figure_is_refused(name: str):
    with pytest.raises(ValueError, match=f"Task.metrics has '{name}'"):
        trainer(metrics={name: accuracy})


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(WeightsError, match="nothing to federate"):
        trainer(lambda: MLP().freeze())


def test_arrays_that_do_not_fit_are_refused():
    of = trainer()
    parameters = {**of.parameters(), "first.bias": mx.zeros(7)}
    data = fed.Data(examples(4))
    complaint = r"'first.bias' has shape \(7,\), expected \(8,\)"
    with pytest.raises(WeightsError, match=complaint):
        of.train(parameters, {}, data, {})
    with pytest.raises(WeightsError, match=complaint):
        of.evaluate(parameters, {}, data.train)


# -- what a client keeps -------------------------------------------------------------------


def test_an_optimizer_goes_on_where_it_stopped():
    """Two rounds of an epoch each are as one of two, but for the order of the examples."""
    settings = {"optimizer": lambda config: optim.Adam(optim.cosine_decay(0.05, 8))}
    kept = trainer(keep_optimizer=True, **settings)
    data = fed.Data(examples(8))  # one batch: no order to speak of
    first = kept.train(kept.parameters(), {}, data, {"server-round": 1})
    assert {name.partition("/")[0] for name in first.client_state} == {"counters", "state"}
    second = kept.train(
        first.parameters, {}, data, {"server-round": 2}, client_state=first.client_state
    )
    through = trainer(local_epochs=2, **settings)
    assert_close(
        second._replace(metrics={**second.metrics, "loss": 0.0}),
        train(through, data)._replace(metrics={**second.metrics, "loss": 0.0}),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: optim.SGD(rate, momentum=0.9),
        lambda rate: optim.MultiOptimizer(
            [optim.SGD(rate, momentum=0.9), optim.Adam(rate)],
            [lambda name, _: name.startswith("layers.1")],
        ),
    ],
    ids=["one", "several"],
)
def test_an_optimizer_that_goes_on_has_the_learning_rate_of_its_round(make):
    """By the server's settings, a strategy's or the round's number."""
    kept = trainer(keep_optimizer=True, optimizer=lambda config: make(config["learning-rate"]))
    data = fed.Data(examples(8))
    first = kept.train(kept.parameters(), {}, data, {"learning-rate": 0.1})
    second = kept.train(
        first.parameters, {}, data, {"learning-rate": 0.01}, client_state=first.client_state
    )
    through = trainer(
        optimizer=lambda config: make(lambda step: mx.where(step < 1, 0.1, 0.01)), local_epochs=2
    )
    expected = train(through, data)
    assert_close(second._replace(metrics=expected.metrics), expected)


def test_personal_parameters_stay():
    of = trainer(personal=lambda name: name.startswith("layers"))
    assert list(of.spec) == ["first.weight", "first.bias"]
    data = fed.Data(examples(24))
    update = of.train(of.parameters(), {}, data, {})
    assert list(update.parameters) == list(of.spec)
    assert set(update.client_state) == {
        f"parameters/layers.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    }
    again = of.train(update.parameters, {}, data, {}, client_state=update.client_state)
    assert again.metrics["loss"] < update.metrics["loss"]
    first = of.evaluate(update.parameters, {}, data.train).metrics["loss"]
    assert (
        of.evaluate(update.parameters, {}, data.train, update.client_state).metrics["loss"] != first
    )


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda m, x, y: mx.square(m(x)[:, :1] - y), "(8, 8)"),  # (batch, 1) - (batch,)
        (lambda m, x, y: mx.square(m(x)), "(8, 3)"),
        (lambda m, x, y: vector(m, x, y)[None], "(1, 8)"),
        (lambda m, x, y: mx.square(m(x)).reshape(-1), "(24,)"),  # its weight would be 24
        (lambda m, x, y: vector(m, x, y)[:2], "(2,)"),
    ],
)
def test_a_loss_of_another_shape_is_refused(loss: Callable, shape: str):
    of = trainer(loss=loss)
    data = fed.Data(examples(24))
    with pytest.raises(fed.FedError, match=re.escape(f"the shape {shape} for a batch of 8")):
        train(of, data)
    with pytest.raises(fed.FedError, match="returned the shape"):
        of.evaluate(of.parameters(), {}, data.train)


def test_a_loss_may_have_a_second_axis_of_one():
    data = fed.Data(examples(24))
    column = train(trainer(loss=lambda m, x, y: vector(m, x, y)[:, None]), data)
    assert column.metrics == pytest.approx(train(trainer(), data).metrics)


def test_a_mean_with_an_axis_of_one_weighs_as_a_scalar():
    data = fed.Data(examples(20))  # batches of 8, 8 and 4
    scalar, vector_of_one = (
        trainer(loss=lambda m, x, y, keep=keep: vector(m, x, y).mean(keepdims=keep))
        for keep in (False, True)
    )
    assert train(vector_of_one, data).metrics == train(scalar, data).metrics
    evaluations = [
        of.evaluate(of.parameters(), {}, data.train).metrics for of in (vector_of_one, scalar)
    ]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize(
    "kept", [{"personal": lambda name: name.startswith("layers")}, {"keep_optimizer": True}]
)
def test_nothing_is_kept_of_an_update_that_is_not_finite(kept):
    of = trainer(**kept)
    data = fed.Data(examples(24))
    assert of.train(of.parameters(), {}, data, {"momentum": 0.9}).client_state
    diverged = of.train(of.parameters(), {}, data, {"momentum": 0.9, "learning-rate": 1e38})
    assert not named_arrays.are_finite(diverged.parameters.values())
    assert not diverged.client_state


def test_an_optimizer_can_read_the_round_from_the_start():
    of = trainer(optimizer=lambda config: optim.SGD(0.1 * 0.99 ** config["server-round"]))
    of.warm_up(fed.Data(examples(24)), {})


def test_a_model_that_is_all_personal_is_refused():
    with pytest.raises(WeightsError, match="Every parameter is personal"):
        trainer(personal=lambda name: True)


# -- what a task says of itself ------------------------------------------------------------


def test_a_loss_divided_by_its_whole_weight_is_the_plain_loop():
    of = trainer(loss=divided)
    data = fed.Data(examples(21))
    assert_close(train(of, data), plain_train(of, data))
    expected = trainer(loss=weighted).evaluate(of.parameters(), {}, examples(21)).metrics
    assert of.evaluate(of.parameters(), {}, examples(21)).metrics["loss"] == pytest.approx(
        expected["loss"]
    )


def test_a_client_reports_what_weights_count():
    of = trainer(loss=weighted, weight_unit="words", local_epochs=2)
    words = int((examples(21)[1] > 0).sum())
    metrics = train(of, fed.Data(examples(21))).metrics
    assert metrics["num-words"] == 2 * words
    assert metrics["words-per-second"] > 0
    assert of.evaluate(of.parameters(), {}, examples(21)).metrics["num-words"] == words


def test_further_metrics_follow_from_the_means():
    of = trainer(
        metrics={"accuracy": accuracy}, derived=lambda known: {"error": 1 - known["accuracy"]}
    )
    metrics = of.evaluate(of.parameters(), {}, examples(21)).metrics
    assert metrics["error"] == 1 - metrics["accuracy"]


def test_a_stream_may_say_how_many_examples_it_has():
    class Stream:
        def __len__(self):
            return 21

        def __call__(self, key):
            x, y = map(mx.array, examples(21))
            yield from ((x[at : at + 8], y[at : at + 8]) for at in range(0, 21, 8))

    steps = train(trainer(), fed.Data(Stream()), local_steps=7)
    assert steps.metrics["num-examples"] == 21
    nameless = train(trainer(), fed.Data(lambda key: Stream()(key)), local_steps=1)
    assert nameless.metrics["num-examples"] == 8


@pytest.mark.parametrize("label", [3, 100_000, -4])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_label_without_an_output_is_refused_in_each_batch_of_a_stream(number: int, label: int):
    """Batches 3 and 4 are of a second pass, whose labels are other ones."""
    passes = []

    def stream(key: mx.array):
        passes.append(key)
        for batch in range(3 * len(passes) - 3, 3 * len(passes)):
            yield mx.ones((4, 4)), mx.array([0, 1, 2, label if batch == number else 0])

    trainer = Trainer(
        fed.Task(
            model=lambda: nn.Linear(4, 3),
            loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
            optimizer=lambda config: optim.SGD(0.1),
            data=lambda partition, num_partitions: fed.Data(train=stream),
            local_epochs=2,
        )
    )
    with pytest.raises(ExamplesError, match=f"entry {label} of 3"):
        trainer.train(trainer.parameters(), {}, fed.Data(stream), {"seed": 0, "server-round": 1})
