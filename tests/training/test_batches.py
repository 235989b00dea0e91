"""Which examples make up each step."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_fed as fed
from mlx_fed.errors import SettingsError, TaskError
from mlx_fed.lm.texts import TextBatches
from mlx_fed.training import batches
from mlx_fed.training.trainer import Trainer

examples = st.integers(0, 40)
sizes = st.integers(1, 50)


@settings(max_examples=50, deadline=None)
@given(examples, sizes, st.booleans(), st.none() | st.integers(0, 9))
def test_an_epoch_has_every_example_once(num_examples, batch_size, padded, seed):
    steps = list(batches.epoch(num_examples, batch_size, padded, seed))
    seen = []
    for number, rows in enumerate(steps):
        real = min(batch_size, num_examples - number * batch_size)
        size = len(rows.indices)
        assert rows.indices.dtype == np.uint32
        assert rows.size == real
        assert real <= size <= batch_size
        if size == real:
            assert rows.mask() is None
        else:
            assert padded
            assert rows.mask().tolist() == [1.0] * real + [0.0] * (size - real)
            assert max(rows.indices) < num_examples  # padding is made of real examples
        seen += rows.indices.tolist()[:real]
    assert seed is not None or seen == list(range(num_examples))
    assert sorted(seen) == list(range(num_examples))


@given(st.integers(0, 100), st.integers(1, 12))
def test_a_last_batch_of_one_example_joins_the_batch_before(num_examples, batch_size):
    plain = [rows.size for rows in batches.epoch(num_examples, batch_size, False, None)]
    merged = list(batches.epoch(num_examples, batch_size, False, None, merge_single=True))
    if batch_size > 1 and len(plain) > 1 and plain[-1] == 1:
        plain = [*plain[:-2], batch_size + 1]
    assert [rows.size for rows in merged] == plain
    assert [i for rows in merged for i in rows.indices] == list(range(num_examples))


@given(st.integers(1, 300))
def test_padded_batches_have_eight_sizes_at_most(batch_size):
    sizes = {batches.padded_size(count, batch_size) for count in range(1, batch_size + 1)}
    assert len(sizes) <= 8
    assert max(sizes) == batch_size


def test_the_order_comes_from_the_seed():
    def order(seed: int) -> list:
        return [i for rows in batches.epoch(20, 4, False, seed) for i in rows.indices.tolist()]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_arrays_of_mlx_are_not_copied():
    mine = mx.ones(3)
    converted, theirs = batches.as_arrays((np.arange(3, dtype=np.uint8), mine))
    assert theirs is mine
    assert converted.dtype == mx.uint8
    assert converted.tolist() == [0, 1, 2]


# -- passes over rounds --------------------------------------------------------------------


def pass_task(data, **settings) -> fed.Task:
    return fed.Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, x, *_: model(x[:, :1].astype(mx.float32))[:, 0],
        optimizer=lambda config: optim.SGD(0.0),
        data=data,
        **settings,
    )


def numbers(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32)[:, None]


def batches_of_rounds(data, num_rounds: int, client: int = 0, **settings) -> list[list[float]]:
    """Examples of each training step of a client, over all rounds."""
    loader = Trainer(pass_task(lambda *_: data, **settings)).batches
    steps = []
    for server_round in range(1, num_rounds + 1):
        for (x, *_), mask, size in loader.training(data, {}, (7, server_round, client)):
            assert mask is None or mask.sum().item() == size
            steps.append(x[:size, 0].tolist())
    return steps


class NumberStream:
    """A stream of the numbers from 0 on, in batches."""

    def __init__(self, size: int, batch_size: int, num_batches: int | None):
        self.size, self.batch_size = size, batch_size
        if num_batches is not None:
            self.num_batches = num_batches

    def __call__(self, key):
        order = np.random.default_rng(np.array(key)).permutation(self.size)
        for start in range(0, self.size, self.batch_size):
            yield (numbers(self.size)[order[start : start + self.batch_size]],)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_passes_go_on_from_round_to_round(size, batch_size, local_steps, streamed):
    per_pass = -(-size // batch_size)
    data = fed.Data(
        NumberStream(size, batch_size, per_pass) if streamed else (numbers(size),),
    )
    steps = batches_of_rounds(data, 8, batch_size=batch_size, local_steps=local_steps)
    assert len(steps) == 8 * local_steps
    orders = []
    for start in range(0, len(steps), per_pass):
        seen = [x for step in steps[start : start + per_pass] for x in step]
        assert len(set(seen)) == len(seen)
        if start + per_pass <= len(steps):
            assert sorted(seen) == list(range(size))
        orders.append(seen)
    if size > 12 and len(orders) > 1:
        assert orders[0] != orders[1][: len(orders[0])]  # each pass in an order of its own


@pytest.mark.parametrize("num_rounds", [5, 10, 20, 50])
def test_iterations_of_one_pass_see_every_text(num_rounds):
    lengths = np.random.default_rng(0).integers(2, 60, 400)
    tokens = [np.full(length, number, np.int32) for number, length in enumerate(lengths)]
    texts = SimpleNamespace(tokens=tokens, starts=[0] * 400)
    data = fed.Data(TextBatches(texts, 4))
    steps = batches_of_rounds(data, num_rounds, local_steps=100 // num_rounds)
    assert sorted(x for step in steps for x in step) == list(range(400))


def test_a_stream_without_a_number_of_batches_begins_anew_in_each_round():
    data = fed.Data(NumberStream(12, 4, None))
    steps = batches_of_rounds(data, 20, local_steps=2)
    assert {len(set(steps[at] + steps[at + 1])) for at in range(0, 40, 2)} == {8}
    assert any(set(steps[at]) & set(steps[0] + steps[1]) for at in (2, 4, 6))


@pytest.mark.parametrize("num_batches", [2, 4])
def test_a_stream_with_another_number_of_batches_is_refused(num_batches):
    data = fed.Data(NumberStream(12, 4, num_batches))
    with pytest.raises(TaskError, match=f"num_batches {num_batches}, and gave 3"):
        batches_of_rounds(data, 3, local_steps=3)


@pytest.mark.parametrize("num_batches", [0, 2.0, "3"])
def test_a_number_of_batches_is_a_whole_number(num_batches):
    data = fed.Data(NumberStream(12, 4, num_batches))
    with pytest.raises(SettingsError, match="num_batches of a stream is a whole number"):
        batches_of_rounds(data, 1, local_steps=3)


def test_a_client_that_is_not_asked_skips_its_batches_of_the_round(tmp_path):
    def run(fraction: float) -> dict[tuple[int, int], list[list[float]]]:
        steps: dict[tuple[int, int], list[list[float]]] = {}

        def record(model, optimizer, batch, key, config):
            client = int(batch[0][0, 0].item()) // 100
            values = batch[0][:, 0].tolist()
            steps.setdefault((client, config["server-round"]), []).append(values)
            return mx.array(0.0)

        task = pass_task(
            lambda client, _: fed.Data((100 * client + numbers(21),)),
            batch_size=4,
            local_steps=2,
            train_step=record,
        )
        strategy = FedAvg(fraction_train=fraction, fraction_evaluate=0.0)
        fed.simulate(
            task,
            strategy,
            num_clients=4,
            num_rounds=6,
            workers=0,
            runs=tmp_path,
            listeners=(),
        )
        return steps

    everyone, sampled = run(1.0), run(0.5)
    assert len(everyone) == 24
    assert len(sampled) == 12
    assert sampled == {moment: everyone[moment] for moment in sampled}
    for client in range(4):  # 3 rounds of 2 steps are a pass of 6
        for first in (1, 4):
            rounds = (everyone[client, number] for number in range(first, first + 3))
            seen = [x for steps in rounds for step in steps for x in step]
            assert sorted(seen) == [100 * client + x for x in range(21)]
