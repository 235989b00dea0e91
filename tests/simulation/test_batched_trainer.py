"""Many clients' training at once, held to what each reaches alone."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_fed as fed
from mlx_fed.simulation import batched_trainer as batched_module
from mlx_fed.simulation.batched_trainer import BatchedTrainer, ClientInput
from mlx_fed.training.trainer import Trainer, ClientUpdate
from ..helpers.call_log import call_log
from ..helpers.trainers import (
    MLP,
    OPTIMIZERS,
    OTHERS,
    accuracy,
    examples,
    mean,
    noisy,
    sgd,
    trainer,
    vector,
    weighted,
)

SIZES = [21, 8, 3, 16, 29, 2, 21, 40]
SAME_BITS = sys.platform == "linux" and platform.machine() == "x86_64"
"""Elsewhere a matrix product of many may be another program than one of its own."""


def members(of: Trainer, sizes=SIZES) -> list[ClientInput]:
    made = []
    for client, size in enumerate(sizes):
        arrays = tuple(mx.array(array) for array in examples(size, seed=client))
        made.append(ClientInput(client, arrays))
    return made


def hold_equal(of: Trainer, clients: list[ClientInput], tolerance: float = 0.0, **config) -> None:
    """Trains clients together and alone, for two rounds, each with what it kept of the first."""
    config = {name.replace("_", "-"): value for name, value in config.items()}
    together = BatchedTrainer(of)
    for number in (1, 2):
        config |= {"seed": 3, "server-round": number}
        updates = together.train(of.parameters(), of.statistics(), clients, config)
        assert len(updates) == len(clients)
        for member, update in zip(clients, updates, strict=True):
            data = fed.Data(member.examples)
            start = of.parameters(), of.statistics()
            alone = of.train(
                *start, data, config, client=member.client, client_state=member.client_state
            )
            compare(update, alone, tolerance)
        clients = [
            member._replace(client_state=update.client_state or None)
            for member, update in zip(clients, updates, strict=True)
        ]


def compare(update: ClientUpdate, alone: ClientUpdate, tolerance: float) -> None:
    for got, expected in (
        (update.parameters, alone.parameters),
        (update.statistics, alone.statistics),
        (update.client_state, alone.client_state),
    ):
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert got[name].dtype == array.dtype
            one, other = (np.array(a.astype(mx.float32)) for a in (got[name], array))
            if SAME_BITS and not tolerance:
                np.testing.assert_array_equal(one, other, err_msg=name)
            else:
                atol = tolerance or 1e-6
                np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4, err_msg=name)
    assert update.metrics["num-examples"] == alone.metrics["num-examples"]
    figures = [
        {name: value for name, value in metrics.items() if not name.endswith("-per-second")}
        for metrics in (update.metrics, alone.metrics)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


@pytest.fixture(params=["traced anew", pytest.param("compiled", marks=pytest.mark.slow)])
def program(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dozens of programs would be compiled here, for half a second or more each where they are new:
    that is for the slow tests. Without it the same step is mapped over clients in the same way."""
    if request.param == "traced anew":
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("optimizer", (OPTIMIZERS | OTHERS).values(), ids=OPTIMIZERS | OTHERS)
def test_clients_reach_together_what_they_reach_alone(optimizer):
    of = trainer(optimizer=optimizer, local_epochs=2)
    hold_equal(of, members(of))


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("loss", [mean, weighted], ids=["mean", "weighted"])
def test_losses_that_cannot_be_masked(loss):
    of = trainer(loss=loss)
    hold_equal(of, members(of))


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(
    "task",
    [
        {"model": partial(MLP, dropout=0.4)},
        {"model": partial(MLP, dropout=0.4), "augment": noisy},
        {"model": partial(MLP, norm=True)},
        {"max_grad_norm": 0.05},
        {"local_steps": 7},
        {"local_epochs": 3, "batch_size": 16},
        {"personal": lambda name: name.startswith("layers.1")},
        {"model": partial(MLP, norm=True), "statistics": "local"},
        {"batch_size": 3, "gradient_accumulation": 4},
        {"model": partial(MLP, norm=True), "batch_size": 3, "gradient_accumulation": 4},
    ],
    ids=[
        *("dropout", "augment", "norm", "clip", "steps", "epochs", "personal", "local"),
        *("micro-batches", "normalized micro-batches"),
    ],
)
def test_what_a_task_asks_for_holds_for_each_client(task):
    of = trainer(**task)
    hold_equal(of, members(of))


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize(
    "config",
    [
        {"proximal_mu": 0.5},
        {"learning_rate": 0.3, "momentum": 0.9},
        {"local_epochs": 2, "batch_size": 5},
        {"max_grad_norm": 0.1},
        {"batch_size": 2, "gradient_accumulation": 3},
    ],
    ids=["proximal", "optimizer", "lengths", "clip", "micro-batches"],
)
def test_the_servers_settings_hold(config):
    of = trainer()
    hold_equal(of, members(of), **config)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_parameters_of_half_precision(dtype):
    def model() -> nn.Module:
        module = MLP()
        module.set_dtype(dtype)
        return module

    def loss(model, x, y):
        return vector(model, x.astype(dtype), y)

    of = trainer(model, loss)
    hold_equal(of, members(of))


class Text(nn.Module):
    """An embedding, attention with a mask, a norm, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.attention = nn.MultiHeadAttention(16, 2)
        self.norm = nn.LayerNorm(16)

    def __call__(self, x: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1])
        h = self.embedding(x)
        h = h + self.attention(h, h, h, mask)
        return self.embedding.as_linear(self.norm(h))


def next_token(model, x):
    return nn.losses.cross_entropy(model(x[:, :-1]), x[:, 1:]).mean(axis=1)


def text(size: int, seed: int) -> tuple[mx.array, ...]:
    return (mx.array(np.random.default_rng(seed).integers(0, 11, (size, 7)).astype(np.int32)),)


@pytest.mark.usefixtures("program")
def test_a_transformer_on_tokens():
    of = trainer(Text, next_token, lambda config: optim.Adam(0.01))
    clients = [ClientInput(k, text(size, k)) for k, size in enumerate(SIZES)]
    # Attention of many is another kernel than of one: sums are in another order.
    hold_equal(of, clients, tolerance=2e-5)


def test_frozen_parts_and_lora_like_layers():
    def model() -> nn.Module:
        module = MLP()
        module.freeze()
        module.layers[0].unfreeze()
        return module

    of = trainer(model)
    hold_equal(of, members(of))


def test_the_loss_before_training_is_each_clients_own():
    of = trainer()
    updates = BatchedTrainer(of).train(
        of.parameters(), {}, members(of), {"train-loss-key": "train_loss"}
    )
    losses = [update.metrics["train_loss"] for update in updates]
    assert losses == [
        of.evaluate(of.parameters(), {}, member.examples).metrics["loss"] for member in members(of)
    ]


def test_the_devices_own_gather_gives_the_same(monkeypatch):
    monkeypatch.setattr(batched_module, "host_can_read", lambda examples: False)
    of = trainer(local_epochs=2)
    hold_equal(of, members(of))


def test_examples_that_numpy_cannot_read():
    of = trainer(loss=lambda model, x, y: vector(model, x.astype(mx.float32), y))
    clients = [
        member._replace(examples=(member.examples[0].astype(mx.bfloat16), member.examples[1]))
        for member in members(of)
    ]
    hold_equal(of, clients)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sampled_from([1, 3, 8, 12]),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_any_sizes_in_any_company(sizes, batch_size, local_epochs, random):
    of = trainer(partial(MLP, dropout=0.3), batch_size=batch_size, local_epochs=local_epochs)
    clients = members(of, sizes)
    random.shuffle(clients)
    hold_equal(of, clients)


@pytest.mark.usefixtures("program")
def test_a_model_is_left_as_it_was():
    of = trainer(partial(MLP, norm=True))
    before = {name: np.array(a) for name, a in {**of.parameters(), **of.statistics()}.items()}
    BatchedTrainer(of).train(of.parameters(), of.statistics(), members(of), {})
    after = {**of.parameters(), **of.statistics()}
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    assert accuracy(of.model, *members(of)[0].examples).shape == (21,)


def test_clients_that_train_together_share_the_time():
    """Else each would seem as much slower than alone as there are clients."""
    of = trainer(loss=weighted, weight_unit="words")
    clients = members(of, [24] * 16)
    began = time.perf_counter()
    updates = BatchedTrainer(of).train(of.parameters(), {}, clients, {})
    seconds = time.perf_counter() - began
    took = sum(u.metrics["num-words"] / u.metrics["words-per-second"] for u in updates)
    assert 0 < took <= seconds


def test_a_new_learning_rate_needs_no_new_program():
    traced, record = call_log()

    def loss(model, x, y):
        record()
        return vector(model, x, y)

    of = trainer(loss=loss, optimizer=sgd)
    together = BatchedTrainer(of)
    clients = members(of, [16, 16])
    together.train(of.parameters(), {}, clients, {"learning-rate": 0.1})
    first = len(traced)
    together.train(of.parameters(), {}, clients, {"learning-rate": 0.2})
    assert len(traced) == first
    together.train(of.parameters(), {}, clients, {"learning-rate": 0.2, "momentum": 0.5})
    assert len(traced) > first
