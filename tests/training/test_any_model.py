"""What trains in a plain MLX loop trains here, alone and many at once, with the loop's result."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.core.random import normal
from mlx.utils import tree_flatten, tree_map

from mlx_fed.arrays import examples, randomness
from mlx_fed.training import padding
from mlx_fed.training.probe import Probe
from mlx_fed.training.trainer import Trainer

from ..helpers.call_log import call_log

ROUNDS, CLIENTS, RATE = 2, 4, 0.1


def load(partition_id: int, num_partitions: int | None) -> fed.Data:
    x = np.random.default_rng(partition_id).standard_normal((20, 6), dtype=np.float32)
    return fed.Data(train=(x, x.sum(1)), test=(x, x.sum(1)))


def squares(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return (model(x).squeeze(-1) - y) ** 2


def task(**fields: Any) -> fed.Task:
    defaults: dict[str, Any] = {
        "model": lambda: nn.Linear(6, 1),
        "loss": squares,
        "optimizer": lambda config: optim.SGD(RATE),
        "data": load,
        "batch_size": 20,
    }
    return fed.Task(**{**defaults, **fields})


def simulate(of: fed.Task, folder: Path, **options: Any) -> tuple[fed.Result, list[str]]:
    """A simulation's result, and the notes that it gave."""
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    options = {"workers": 0, "num_clients": CLIENTS, "num_rounds": ROUNDS, **options}
    return fed.simulate(of, runs=folder, listeners=(listen,), **options), notes


def plain_loop(
    model: Callable[[], nn.Module], loss: Callable, buffers: tuple[str, ...] = ()
) -> dict[str, mx.array]:
    """Federated averaging as one would write it for clients of equal size: no library of ours."""
    module = model()
    masters = {name: array + 0 for name, array in tree_flatten(module.parameters())}
    for _ in range(ROUNDS):
        ends = []
        for client in range(CLIENTS):
            module = model()
            module.load_weights(list(masters.items()))
            step = nn.value_and_grad(module, loss)
            optimizer = optim.SGD(RATE)
            x, y = map(mx.array, load(client, None).train)
            # Full batches: the order of the examples changes nothing but roundings.
            _, gradients = step(module, x, y)
            optimizer.update(module, gradients)
            mx.eval(module.parameters())
            ends.append(dict(tree_flatten(module.parameters())))
        masters = {name: sum(end[name] for end in ends) / CLIENTS for name in masters}
    return masters


def hold_to_the_loop(result: fed.Result, expected: dict[str, mx.array]) -> None:
    for name, array in {**result.parameters, **result.statistics}.items():
        np.testing.assert_allclose(np.array(array), np.array(expected[name]), 1e-4, 1e-5, name)


def seeded(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A model with the same initial values wherever it is made."""

    def make() -> nn.Module:
        mx.random.seed(3)
        return model()

    return make


# -- arrays that are written in place: mx.vmap gets them wrong --------------------------------


class Written(nn.Module):
    """Writes a constant, or another part, into a slice in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 6), nn.Linear(6, 1), how

    def __call__(self, x):
        h = self.first(x)
        if self.how == "constant":
            h[:, 0] = 0.0
        elif self.how == "add":
            h = h.at[:, 1].add(3.0)
        elif self.how == "multiply":
            h = h.at[:, :2].multiply(0.1)
        elif self.how == "maximum":
            h = h.at[:, 2].maximum(0.5)
        elif self.how == "gradient":
            h[..., 1:3] = h[..., 3:5]
        elif self.how == "update":
            h = mx.slice_update(h, mx.zeros((len(x), 2)), mx.array([1]), (1,))
        return self.last(h)


@pytest.mark.parametrize("how", ["constant", "add", "multiply", "maximum", "gradient", "update"])
def test_writing_into_a_slice_trains_as_alone(how, tmp_path):
    model = seeded(lambda: Written(how))
    result, _ = simulate(task(model=model), tmp_path)
    hold_to_the_loop(result, plain_loop(model, lambda *args: squares(*args).mean()))


def test_what_vmap_gets_wrong_is_named_with_the_parameter(tmp_path):
    _, notes = simulate(task(model=lambda: Written("constant")), tmp_path)
    (note,) = notes
    assert "one after another" in note
    assert "mx.vmap" in note
    assert "first.weight" in note


@pytest.mark.parametrize("workers", [0, 2])
def test_columns_of_one_shape_are_two_columns(workers, tmp_path):
    def data(partition_id, num_partitions):
        x = np.random.default_rng(partition_id).standard_normal((20, 4), dtype=np.float32)
        return fed.Data(train=(x, 3 * x, x - 1), test=(x, 3 * x, x - 1))

    of = task(
        model=lambda: nn.Linear(4, 4),
        loss=lambda model, x, y, z: ((model(x) - y + z) ** 2).mean(-1),
        data=data,
        batch_size=6,
    )
    together, _ = simulate(of, tmp_path, workers=workers)
    alone, _ = simulate(of, tmp_path, batched=False)
    for name, array in alone.parameters.items():
        assert np.array_equal(np.array(together.parameters[name]), np.array(array))


# -- losses whose examples depend on each other: no padding ------------------------------------


def in_batch(model, x, y):
    logits = model(x) @ y[:, None].T
    return nn.losses.cross_entropy(logits, mx.arange(len(x)))


def batch_norm_by_hand(model, x, y):
    h = (x - x.mean(0)) / mx.sqrt(x.var(0) + 1e-5)
    return squares(model, h, y)


def share_of_the_batch(model, x, y):
    return squares(model, x, y) / mx.abs(y).sum()


def unlike_pairs(model, x, y, kinds, force):
    """A loss that pushes apart near outputs of examples of different kinds."""
    out = 0.1 * mx.concatenate([model(x), model(x[:, ::-1]), x[:, :2]], axis=1)
    away = mx.square(out[:, None] - out[None]).mean(-1)
    return squares(model, x, y) + mx.where(kinds[:, None] != kinds[None], force(away), 0).sum(1)


def pairs_of_unlike_losses(model, x, y):
    out = mx.concatenate([model(x), model(x[:, ::-1])], axis=1)
    losses = mx.square(out - 0.3).mean(-1)
    kinds = losses > 1
    away = mx.square(out[:, None] - out[None]).mean(-1)
    return losses + mx.where(kinds[:, None] != kinds[None], mx.exp(-away), 0).sum(axis=1)


def pairs_of_unlike_signs(model, x, y):
    return unlike_pairs(model, x, y, model(x)[:, 0] > 2, lambda away: mx.exp(-away))


def pairs_within_a_margin(model, x, y):
    return unlike_pairs(model, x, y, mx.abs(y) > 1, lambda away: mx.maximum(0, 0.1 - away))


@pytest.mark.parametrize(
    "loss",
    [
        *(in_batch, batch_norm_by_hand, share_of_the_batch),
        *(pairs_of_unlike_losses, pairs_of_unlike_signs, pairs_within_a_margin),
    ],
)
def test_examples_that_depend_on_each_other_are_not_padded(loss):
    of = Trainer(task(loss=loss, batch_size=64))  # which would pad 20 examples to 24
    (data,) = [load(0, None)]
    x, y = map(mx.array, data.train)
    update = of.train(of.parameters(), {}, data, {"seed": 1})
    order = np.arange(20, dtype=np.uint32)
    np.random.default_rng(randomness.derive(1, 0, 0, "shuffle", 0)).shuffle(order)
    module = nn.Linear(6, 1)
    module.load_weights(list(of.parameters().items()))
    step, optimizer = nn.value_and_grad(module, lambda *a: loss(*a).mean()), optim.SGD(RATE)
    index = mx.array(order)
    optimizer.update(module, step(module, x[index], y[index])[1])
    for name, array in tree_flatten(module.parameters()):
        assert mx.allclose(update.parameters[name], array, 1e-5, 1e-6), name


# -- what is refused, and what is taken ----------------------------------------------------------


class Decayed(optim.SGD):
    def update(self, model, gradients):
        super().update(model, gradients)
        model.update(tree_map(lambda p: 0.9 * p, model.trainable_parameters()))


def test_an_optimizer_that_overrides_update_is_refused(tmp_path):
    with pytest.raises(
        fed.FedError, match=r"Decayed, whose own update\(model, gradients\) would not"
    ):
        simulate(task(optimizer=lambda config: Decayed(RATE)), tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layers = [self.first]
        self.last = nn.Linear(6, 1)

    def __call__(self, x):
        return self.last(self.layers[0](self.first(x)))


@pytest.mark.parametrize("prefix", ["first", "layers.0"])
def test_tied_weights_are_personal_by_any_of_their_names(prefix, tmp_path):
    of = task(model=Tied, personal=lambda name: name.startswith(prefix))
    assert list(Trainer(of).spec) == ["last.weight", "last.bias"]


@pytest.mark.parametrize("kind", ["swapped", "reversed", "fortran", "strided"])
def test_arrays_of_any_layout_are_taken(kind):
    x, y = load(0, None).train
    change = {
        "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
        "reversed": lambda a: np.array(a[::-1])[::-1],
        "fortran": np.asfortranarray,
        "strided": lambda a: np.repeat(a, 2, axis=0)[::2],
    }[kind]
    taken, labels = examples.as_arrays((change(x), change(y)))
    np.testing.assert_array_equal(taken, x)
    np.testing.assert_array_equal(labels, y)


# -- random numbers without a key ---------------------------------------------------------------


def by_name(model, x, y):
    return squares(model, x + normal(x.shape), y)


def by_numpy(model, x, y):
    return squares(model, x * mx.array(np.random.normal(size=6).astype(np.float32)), y)


def by_python(model, x, y):
    return squares(model, x * random.random(), y)


_HIDDEN = np.random.default_rng(5)


def by_a_generator(model, x, y):
    return squares(model, x * float(_HIDDEN.normal()), y)


@pytest.mark.parametrize("loss", [by_name, by_numpy, by_python])
def test_random_numbers_without_a_key_are_new_in_each_step_and_follow_from_the_seed(loss, tmp_path):
    of = task(loss=loss, batch_size=5, local_epochs=1)
    first, notes = simulate(of, tmp_path, num_rounds=1)
    again, _ = simulate(of, tmp_path, num_rounds=1)
    other, _ = simulate(of, tmp_path, num_rounds=1, seed=1)
    workers, _ = simulate(of, tmp_path, num_rounds=1, workers=2)
    assert any("not compiled" in note for note in notes)
    weights = [np.array(r.parameters["weight"]) for r in (first, again, other, workers)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
    assert np.array_equal(weights[0], weights[3])


def test_a_hidden_generator_is_noticed(tmp_path):
    _, notes = simulate(task(loss=by_a_generator), tmp_path, batched=False)
    assert any("not compiled" in note for note in notes)


def test_an_optimizer_that_draws_is_not_compiled(tmp_path):
    class Noisy(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            noise = mx.random.normal(gradient.shape)
            return super().apply_single(gradient + noise, parameter, state)

    of = task(optimizer=lambda config: Noisy(RATE), batch_size=5)
    result, notes = simulate(of, tmp_path, num_rounds=1)
    again, _ = simulate(of, tmp_path, num_rounds=1, workers=2)
    assert any("not compiled" in note for note in notes)
    assert np.array_equal(np.array(result.parameters["bias"]), np.array(again.parameters["bias"]))


# -- tuples -------------------------------------------------------------------------------------


def test_of_a_tuple_the_first_value_is_the_loss(tmp_path):
    def with_accuracy(model, x, y):
        loss = squares(model, x, y).mean()
        return loss, (loss < 0).astype(mx.float32)  # an accuracy of 0 is no weight

    expected, _ = simulate(task(), tmp_path)
    result, notes = simulate(task(loss=with_accuracy), tmp_path)
    assert not result.rounds[0]["refused"]
    assert any("tuple" in note for note in notes)
    assert mx.allclose(
        mx.array(result.parameters["weight"]), mx.array(expected.parameters["weight"]), 1e-5, 1e-6
    )


def test_a_whole_number_beside_a_loss_has_to_be_named(tmp_path):
    def with_count(model, x, y):
        return squares(model, x, y).mean(), mx.array(len(x))

    with pytest.raises(fed.FedError, match="all 4 nodes failed with the same error: LossError"):
        simulate(task(loss=with_count), tmp_path, max_repeats=0)
    of = Trainer(task(loss=with_count))
    with pytest.raises(fed.FedError, match="weight_unit"):
        of.train(of.parameters(), {}, load(0, None), {})


# -- modules that change themselves --------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 6) for _ in range(3)]
        self.out = nn.Linear(6, 1)

    def __call__(self, x):
        for layer in self.layers:
            x = nn.utils.checkpoint(layer)(mx.tanh(x))
        return self.out(x)


def test_a_checkpointed_module_trains(tmp_path):
    model = seeded(Checkpointed)
    result, _ = simulate(task(model=model), tmp_path)
    hold_to_the_loop(result, plain_loop(model, lambda *args: squares(*args).mean()))
    assert result.model.exists()


class Watched(nn.Module):
    """Keeps what it computed last, under names that it did not have before."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def __call__(self, x):
        self.last = x.mean(0)
        self._hidden = [x * 2]
        return self.linear(x)


def test_what_a_forward_pass_leaves_in_a_module_does_no_harm(tmp_path):
    model = seeded(Watched)
    result, notes = simulate(task(model=model), tmp_path)
    assert not notes
    assert set(mx.load(str(result.model))) == {"linear.weight", "linear.bias"}


class Centred(nn.Module):
    """A running mean of one's own; its square counts in the loss."""

    def __init__(self, key: str = "mean"):
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.key = key
        self[key] = mx.zeros(6)

    def __call__(self, x):
        if self.training:
            self[self.key] = 0.9 * self[self.key] + 0.1 * mx.stop_gradient(x.mean(0))
        return self.linear(x - self[self.key])


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("key", ["mean", "_mean"])
def test_buffers_are_averaged_as_running_statistics_are(batched, key, tmp_path):
    of = task(model=lambda: Centred(key), buffers=lambda name: "average" if name == key else None)
    result, notes = simulate(of, tmp_path, batched=batched)
    assert not notes
    expected = np.zeros(6, np.float32)
    mean = np.mean([load(client, None).train[0].mean(0) for client in range(CLIENTS)], 0)
    for _ in range(ROUNDS):
        expected = 0.9 * expected + 0.1 * mean
    np.testing.assert_allclose(np.array(result.statistics[key]), expected, rtol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_local_buffers_stay_with_their_clients(batched, tmp_path):
    of = task(model=Centred, buffers=lambda name: "local" if name == "mean" else None)
    result, _ = simulate(of, tmp_path, batched=batched)
    assert not result.statistics
    for client in range(CLIENTS):
        files = sorted((result.folder / "clients" / str(client)).glob("*.safetensors"))
        local = mx.load(str(files[-1]))["statistics/mean"]
        mean = load(client, None).train[0].mean(0)
        np.testing.assert_allclose(np.array(local), (0.1 + 0.09) * mean, rtol=1e-4)


@pytest.mark.parametrize("key", ["mean", "_mean"])
def test_a_buffer_that_is_not_named_is_refused_by_name(key):
    of = Trainer(task(model=lambda: Centred(key)))
    with pytest.raises(fed.FedError, match=rf"'{key}'.*Task\(buffers="):
        of.train(of.parameters(), {}, load(0, None), {})


def test_whole_numbers_are_not_averaged():
    class Queue(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.position = nn.Linear(6, 1), mx.array(0)

    with pytest.raises(fed.FedError, match=r"position.*local"):
        Trainer(task(model=Queue, buffers=lambda name: "average" if name == "position" else None))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm(6), nn.Linear(6, 1)
        self.norm.eval()

    def __call__(self, x):
        return self.linear(self.norm(x))


def test_a_normalization_in_evaluation_mode_stays_there(tmp_path):
    result, _ = simulate(task(model=Frozen), tmp_path)
    assert mx.array_equal(mx.array(result.statistics["norm.running_mean"]), mx.zeros(6))
    model = seeded(lambda: nn.Sequential(nn.BatchNorm(6), nn.Linear(6, 1)).eval())
    whole, _ = simulate(task(model=model), tmp_path)  # as mlx-lm's loaded models are
    assert not mx.array_equal(mx.array(whole.statistics["layers.0.running_mean"]), mx.zeros(6))


# -- control flow, settings, steps of one's own --------------------------------------------------


def branching(model, x, y):
    loss = squares(model, x, y).mean()
    return loss * 2 if loss.item() > 1 else loss


def test_control_flow_on_values_trains_uncompiled(tmp_path):
    model = seeded(lambda: nn.Linear(6, 1))
    result, notes = simulate(task(model=model, loss=branching), tmp_path)
    hold_to_the_loop(result, plain_loop(model, branching))
    assert any("not compiled" in note for note in notes)
    quiet, notes = simulate(task(model=model, loss=branching, compile=False), tmp_path)
    assert not notes
    assert np.array_equal(np.array(quiet.parameters["bias"]), np.array(result.parameters["bias"]))


@pytest.mark.parametrize("batched", [True, False])
def test_a_loss_takes_the_settings_the_round_and_the_step(batched, tmp_path):
    calls, record = call_log()

    def loss(model, x, y, config):
        record()
        moment = 10 * config["server-round"] + config["local-step"]
        return (model.weight.sum() + 0 * x.sum()) * moment * config["some_scale"]

    of = task(
        loss=loss,
        config={"some-scale": 0.01},
        batch_size=5,
        model=lambda: nn.Linear(6, 1, bias=False),
    )
    result, notes = simulate(of, tmp_path, batched=batched, num_rounds=3)
    assert not notes
    moments = [10 * number + step for number in (1, 2, 3) for step in (1, 2, 3, 4)]
    start = Trainer(of).parameters()["weight"]
    expected = start - RATE * 0.01 * sum(moments)
    assert mx.allclose(mx.array(result.parameters["weight"]), expected, 1e-5, 1e-6)
    assert len(calls) < 40  # a round is no new program


class Adversaries(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(6, 6), nn.Linear(6, 1)
        self.queue, self.position = mx.zeros((4, 6)), mx.array(0)

    def __call__(self, x):
        return self.critic(self.generator(x))


def adversarial_step(model, optimizer, batch, key, config):
    x, _ = batch
    noise = mx.random.normal(x.shape, key=key)

    def critic_loss(critic):
        return (critic(model.generator(noise)) - critic(x)).mean()

    def generator_loss(generator):
        return -model.critic(generator(noise)).mean()

    loss, gradients = nn.value_and_grad(model.critic, critic_loss)(model.critic)
    optimizer["critic"].update(model.critic, gradients)
    _, gradients = nn.value_and_grad(model.generator, generator_loss)(model.generator)
    optimizer["generator"].update(model.generator, gradients)
    model.queue[model.position % 4] = x.mean(0)
    model.position = model.position + config["local-step"]
    return loss


ADVERSARIAL = task(
    model=Adversaries,
    optimizer=lambda config: {"critic": optim.Adam(0.01), "generator": optim.SGD(0.1, 0.9)},
    train_step=adversarial_step,
    buffers=lambda name: {"queue": "average", "position": "local"}.get(name),
    batch_size=5,
)


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_of_ones_own_is_the_same_everywhere_and_resumes(keep, tmp_path):
    of = replace(ADVERSARIAL, keep_optimizer=keep)
    whole, _ = simulate(of, tmp_path, num_rounds=3)
    workers, _ = simulate(of, tmp_path, num_rounds=3, workers=2)
    half, _ = simulate(of, tmp_path, num_rounds=2, name="half")
    resumed, _ = simulate(of, tmp_path, num_rounds=3, resume=half.folder)
    for other in (workers, resumed):
        for name, array in {**whole.parameters, **whole.statistics}.items():
            same = {**other.parameters, **other.statistics}[name]
            assert np.array_equal(np.array(array), np.array(same)), name


def test_a_step_of_ones_own_is_the_plain_loop():
    of = Trainer(ADVERSARIAL)
    data = load(0, None)
    update = of.train(of.parameters(), of.statistics(), data, {"seed": 2, "server-round": 1})
    module = Adversaries()
    module.load_weights([*of.parameters().items(), *of.statistics().items()], strict=False)
    optimizer = ADVERSARIAL.optimizer({})
    order = np.arange(20, dtype=np.uint32)
    np.random.default_rng(randomness.derive(2, 1, 0, "shuffle", 0)).shuffle(order)
    keys = randomness.Keys(randomness.key(2, 1, 0, "layers"))
    for step, start in enumerate(range(0, 20, 5), 1):
        index = mx.array(order[start : start + 5])
        batch = tuple(mx.array(array)[index] for array in data.train)
        adversarial_step(module, optimizer, batch, keys.next(), {"local-step": step})
    for name, array in tree_flatten(module.parameters()):
        if name in update.parameters:
            assert mx.allclose(update.parameters[name], array, 1e-5, 1e-6), name
    assert mx.allclose(update.statistics["queue"], module.queue, 1e-5, 1e-6)


def test_fedprox_says_that_it_needs_the_gradient(tmp_path):
    of = Trainer(ADVERSARIAL)
    with pytest.raises(fed.FedError, match="proximal-mu"):
        of.train(of.parameters(), of.statistics(), load(0, None), {"proximal-mu": 0.1})


# -- batches of other forms ----------------------------------------------------------------------


def dictionary(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train
    return fed.Data(train={"x": x, "y": y}, test={"x": x, "y": y})


def from_dictionary(model, batch):
    return squares(model, batch["x"], batch["y"])


def nested(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train
    return fed.Data(train=({"left": x, "right": (x,)}, y), test=({"left": x, "right": (x,)}, y))


def from_nested(model, inputs, y):
    return squares(model, (inputs["left"] + inputs["right"][0]) / 2, y)


def lists(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train
    return fed.Data(train=[x.tolist(), y.tolist()], test=[x.tolist(), y.tolist()])


def frames(partition_id, num_partitions):
    import pandas

    x, y = load(partition_id, num_partitions).train
    return fed.Data(train=(pandas.DataFrame(x), pandas.Series(y)), test=(x, y))


def stream(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train

    def batches(key):
        yield {"x": x, "y": y}

    return fed.Data(train=batches, test={"x": x, "y": y})


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        (dictionary, from_dictionary),
        (nested, from_nested),
        (lists, squares),
        (frames, squares),
        (stream, from_dictionary),
    ],
    ids=["dictionary", "nested", "lists", "pandas", "stream"],
)
@pytest.mark.parametrize("batched", [True, False])
def test_batches_of_any_form_train(data, loss, batched, tmp_path):
    expected, _ = simulate(task(), tmp_path)
    result, notes = simulate(task(data=data, loss=loss), tmp_path, batched=batched)
    assert not notes
    assert result.rounds[-1]["evaluate"]["loss"] == pytest.approx(
        expected.rounds[-1]["evaluate"]["loss"], rel=1e-4
    )
    for name, array in expected.parameters.items():
        np.testing.assert_allclose(np.array(result.parameters[name]), np.array(array), 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((np.array(["a", "b"]), np.zeros(2)), r"Data.train\[0\].*tokens"),
        (([[1.0], [1.0, 2.0]], np.zeros(2)), r"Data.train\[0\]"),
        (np.zeros((2, 2)), "tuple of arrays"),
        ((np.zeros(2), 3), "has a int"),
        ((np.zeros(2), np.zeros(3)), r"\[2, 3\]"),
        ("text", "not a str"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_in_words(train, message):
    from mlx_fed.training import batches

    with pytest.raises((fed.FedError, TypeError, ValueError), match=message):
        batches.load(task(data=lambda *_: fed.Data(train=train)), 0, 1)


# -- what a fast path or a probe could miss ------------------------------------------------------


def mixed(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train
    return fed.Data(train=((x,), y), test=((x,), y))


def mixed_dictionary(partition_id, num_partitions):
    x, y = load(partition_id, num_partitions).train
    return fed.Data(train=({"x": x}, y), test=({"x": x}, y))


@pytest.mark.parametrize(("data", "key"), [(mixed, 0), (mixed_dictionary, "x")])
def test_a_batch_of_as_many_entries_as_arrays_keeps_its_form(data, key, tmp_path):
    # One that was laid flat would be read as its first example here.
    of = task(data=data, loss=lambda model, inputs, y: squares(model, inputs[key], y), batch_size=6)
    together, notes = simulate(of, tmp_path)
    alone, _ = simulate(of, tmp_path, batched=False)
    assert not notes
    for name, array in alone.parameters.items():
        np.testing.assert_allclose(np.array(together.parameters[name]), np.array(array), 1e-5, 1e-6)


class Gated(nn.Module):
    """A factor of zero hides at the start that mx.vmap gets a gradient wrong."""

    def __init__(self, power: int):
        super().__init__()
        self.layer, self.out, self.factor = nn.Linear(6, 6), nn.Linear(6, 1), mx.zeros(1)
        self.power = power

    def __call__(self, x):
        h = mx.tanh(self.layer(x))
        h[..., 1:3] = h[..., 3:5]
        return self.out(x + self.factor * mx.stop_gradient(x) + self.factor**self.power * h)


@pytest.mark.parametrize("power", [1, 2])
def test_a_gradient_that_is_zero_at_first_is_compared_as_well(power, tmp_path):
    model = seeded(lambda: Gated(power))
    result, notes = simulate(task(model=model), tmp_path)
    hold_to_the_loop(result, plain_loop(model, lambda *args: squares(*args).mean()))
    assert any("layer.weight" in note and "mx.vmap" in note for note in notes)


def test_values_that_are_not_finite_hide_no_other_difference():
    from mlx_fed.training.programs import find_difference

    plain = {"a": mx.array([mx.inf, 1.0, mx.nan]), "b": mx.array([1.0])}
    assert find_difference(plain, plain) is None
    assert find_difference({**plain, "a": mx.array([mx.inf, 2.0, mx.nan])}, plain)
    assert find_difference({**plain, "b": mx.array([2.0])}, plain)
    assert find_difference({**plain, "a": mx.array([-mx.inf, 1.0, mx.nan])}, plain)
    assert find_difference({"c": mx.array([1 + 2j])}, {"c": mx.array([1 + 1j])})


class Noisy(optim.SGD):
    """Draws from a generator of its own: the loss of a step shows nothing of it."""

    def __init__(self, rate: float, momentum: float):
        super().__init__(rate, momentum)
        self._generator = np.random.default_rng(0)

    def apply_single(self, gradient, parameter, state):
        noise = mx.array(self._generator.normal(size=gradient.shape).astype(np.float32))
        return super().apply_single(gradient + noise, parameter, state)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_update_that_differs_when_compiled_is_noticed(momentum, tmp_path):
    of = task(optimizer=lambda config: Noisy(RATE, momentum), batch_size=5)
    _, notes = simulate(of, tmp_path, num_rounds=1, batched=False)
    assert any("not compiled" in note for note in notes)


def in_batch_and_small(model, x, y):
    return 1e-7 * batch_norm_by_hand(model, x, y)


def in_the_gradient_alone(model, x, y):
    extra = (model(x).mean() - 1) ** 2
    return squares(model, x, y) + extra - mx.stop_gradient(extra)


@pytest.mark.parametrize("loss", [in_batch_and_small, in_the_gradient_alone])
def test_dependence_between_examples_is_found_where_it_is_small_or_in_the_gradient(loss):
    of = Trainer(task(loss=loss, batch_size=32, optimizer=lambda config: optim.Adam(0.1, eps=0.0)))
    data = load(0, None)
    update = of.train(of.parameters(), {}, data, {})
    module, optimizer = nn.Linear(6, 1), optim.Adam(0.1, eps=0.0)
    module.load_weights(list(of.parameters().items()))
    step = nn.value_and_grad(module, lambda *arrays: loss(*arrays).mean())
    optimizer.update(module, step(module, *map(mx.array, data.train))[1])
    for name, array in tree_flatten(module.parameters()):
        assert mx.allclose(update.parameters[name], array, 1e-3, 1e-4), name


# -- linear layers in complex numbers and in forward mode ----------------------------------------


def with_tangents(model, x, y):
    _, (slope,) = mx.jvp(model, [x], [mx.ones_like(x)])
    return squares(model, x, y) + slope.squeeze(-1) ** 2


def with_the_input_s_gradient(model, x, y):
    slope = mx.grad(lambda inputs: mx.tanh(model(inputs)).sum())(x)
    return squares(model, x, y) + (slope**2).sum(-1)


def with_tangents_of_the_weights(model, x, y):
    names = list(model.parameters())

    def call(*arrays):
        return mx.tanh(model.update(dict(zip(names, arrays, strict=True)))(x))

    arrays = [model[name] for name in names]
    outputs, tangents = mx.jvp(call, arrays, [mx.ones_like(array) for array in arrays])
    model.update(dict(zip(names, arrays, strict=True)))
    return (outputs[0].squeeze(-1) - y) ** 2 + tangents[0].squeeze(-1) ** 2


def of_complex_numbers(model, x, y):
    return mx.abs(model(x + 2j * x[:, ::-1]).squeeze(-1) - y) ** 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "loss",
    [
        with_tangents,
        with_the_input_s_gradient,
        with_tangents_of_the_weights,
        of_complex_numbers,
    ],
)
def test_a_linear_layer_has_every_derivative_of_mlx(loss, batched, bias, tmp_path):
    model = seeded(lambda: nn.Linear(6, 1, bias))
    result, _ = simulate(task(model=model, loss=loss), tmp_path, batched=batched)
    hold_to_the_loop(result, plain_loop(model, lambda *args: loss(*args).mean()))


# -- what a forward pass remembers -----------------------------------------------------------------


class Later(nn.Module):
    """Creates its running mean in the first forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def __call__(self, x):
        mean = mx.stop_gradient(x.mean(0))
        self._mean = 0.9 * self._mean + 0.1 * mean if "_mean" in self else mean
        return self.linear(x - self._mean)


def test_what_is_created_in_a_forward_pass_and_used_in_the_next_is_refused():
    of = Trainer(task(model=Later))
    with pytest.raises(fed.FedError, match=r"creates '_mean'.*__init__"):
        of.train(of.parameters(), {}, load(0, None), {})


class Attributes:
    """An object that is no module."""

    def __init__(self):
        self.mean = mx.zeros(6)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.running = nn.Linear(6, 1), Attributes()

    def __call__(self, x):
        if self.training:
            mean = mx.stop_gradient(x.mean(0))
            self.running.mean = 0.9 * self.running.mean + 0.1 * mean
        return self.linear(x - self.running.mean)


def test_an_array_of_an_object_that_is_no_module_is_refused_by_name():
    of = Trainer(task(model=Holder))
    with pytest.raises(fed.FedError, match=r"'running\.mean'.*Task\(buffers="):
        of.train(of.parameters(), {}, load(0, None), {})


@pytest.mark.parametrize("batched", [True, False])
def test_an_array_of_an_object_that_is_no_module_may_be_a_buffer(batched, tmp_path):
    buffers = {"running.mean": "average"}
    result, notes = simulate(task(model=Holder, buffers=buffers.get), tmp_path, batched=batched)
    assert not notes
    mean = np.mean([load(client, None).train[0].mean(0) for client in range(CLIENTS)], 0)
    np.testing.assert_allclose(np.array(result.statistics["running.mean"]), 0.19 * mean, rtol=1e-4)


def test_a_loss_that_counts_its_calls_is_noticed(tmp_path):
    calls: list[int] = []

    def loss(model, x, y):
        calls.append(1)
        return squares(model, x, y) * (1 + len(calls) % 5)

    _, notes = simulate(task(loss=loss, compile=False), tmp_path)
    assert any("same examples again" in note for note in notes)


class Clipped(nn.Linear):
    def __call__(self, x):
        self.weight = mx.clip(self.weight, -0.1, 0.1)
        return super().__call__(x)


def test_a_parameter_that_a_forward_pass_assigns_is_refused():
    of = Trainer(task(model=lambda: Clipped(6, 1)))
    with pytest.raises(fed.FedError, match=r"'weight'.*must not be assigned.*train_step"):
        of.train(of.parameters(), {}, load(0, None), {})


class Unready(nn.Module):
    def __init__(self):
        self.linear = nn.Linear(6, 1)


def test_a_module_without_its_base_is_named():
    with pytest.raises(fed.FedError, match=r"Unready \(layers.1\).*super\(\).__init__\(\)"):
        Trainer(task(model=lambda: nn.Sequential(nn.Linear(6, 6), Unready())))


def test_settings_that_a_loss_has_already_are_left_alone(tmp_path):
    def loss(model, x, y, config):
        return squares(model, x, y) * config["scale"]

    bound = partial(loss, config={"scale": 0.5})
    model = seeded(lambda: nn.Linear(6, 1))
    result, _ = simulate(task(model=model, loss=bound), tmp_path)
    hold_to_the_loop(result, plain_loop(model, lambda *args: bound(*args).mean()))


# -- the class of layers ---------------------------------------------------------------------------


class Asks(nn.Module):
    """Looks at the class of its layers, as code that replaces some of them does."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 6), nn.Linear(6, 1)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
            if type(layer) is nn.Linear and repr(type(layer)) == repr(nn.Linear):
                x = mx.tanh(x)
        return x


@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_has_the_class_that_it_had(batched, tmp_path):
    model = seeded(Asks)
    result, _ = simulate(task(model=model), tmp_path, batched=batched)
    hold_to_the_loop(result, plain_loop(model, lambda *args: squares(*args).mean()))


def class_losses(model, x, y):
    valid = y != -100
    return nn.losses.cross_entropy(model(x), mx.where(valid, y, 0)) * valid


def error_of_observed(model, x, y):
    return mx.where(mx.isnan(y), 0, (model(x)[:, 0] - mx.where(mx.isnan(y), 0, y)) ** 2)


def centred_bright(model, x, y):
    x = x.astype(mx.float32) / 255
    bright = x > 0.5
    return class_losses(model, mx.where(bright, x - (x * bright).mean(), x), y)


CLASSES = mx.zeros((4, 6)), mx.array([0, 1, 2, 3])
TARGETS = mx.zeros((4, 6)), mx.zeros(4)
PIXELS = mx.zeros((4, 6), mx.uint8), mx.array([0, 1, 2, 3])
RARE = {
    "labels left out": (lambda *a: class_losses(*a) / (a[2] != -100).mean(), CLASSES, False),
    "targets of NaN": (lambda *a: error_of_observed(*a) / mx.isnan(a[2]).mean(), TARGETS, False),
    "a class": (lambda *a: class_losses(*a) * (1 + (a[2] == 3).mean()), CLASSES, False),
    "outliers": (lambda *a: class_losses(*a) * (1 + (a[1] > 60).mean()), CLASSES, False),
    "bright pixels": (centred_bright, PIXELS, False),
    "classes alone": (class_losses, CLASSES, True),
    "observed targets alone": (error_of_observed, TARGETS, True),
    "pixels alone": (lambda m, x, y: class_losses(m, x / 255, y), PIXELS, True),
}


@pytest.mark.parametrize("case", RARE)
def test_padding_is_judged_by_rare_values_too(case: str):
    loss, batch, is_paddable = RARE[case]
    of = Trainer(task(model=lambda: nn.Linear(6, 4), loss=loss))
    for training in (True, False):
        probe = Probe(of.model, of.slots, None, None, training)
        assert padding.is_paddable(probe, (loss,), batch) == is_paddable


def test_padding_is_judged_on_tokens_that_an_embedding_has():
    def loss(model, tokens):
        targets = tokens[:, 1:]
        return nn.losses.cross_entropy(model(tokens[:, :-1]), targets).mean(axis=1)

    of = Trainer(task(model=lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3)), loss=loss))
    batch = (mx.zeros((4, 5), mx.int32),)
    probe = Probe(of.model, of.slots, None, None, True)
    assert padding.is_paddable(probe, (loss,), batch)
