"""Sums by block: the same bits whoever takes them, and as near the mean as float32 is."""

from __future__ import annotations

import random

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.rounds import messages
from mlx_fed.arrays import named_arrays, weighted_mean
from mlx_fed.arrays.spool import Spool
from mlx_fed.arrays.weighted_mean import Counted

ALL = 300
BLOCK = weighted_mean.block_size(ALL)


def blocks(updates) -> list[weighted_mean.Block]:
    return list(weighted_mean.blocks(updates, ALL))


def mean_of(parts) -> weighted_mean.Mean:
    """The mean over blocks that come in this order."""
    total = weighted_mean.Total()
    for block in parts:
        total.add(block)
    return total.mean()


DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def update(place: int, dtype: mx.Dtype = mx.float32) -> tuple[Counted, dict, dict]:
    rng = np.random.default_rng(place)
    arrays = {"w": rng.normal(size=(3, 4)), "b": rng.normal(3, 0.1, 4)}
    parameters = {name: mx.array(a.astype(np.float32)).astype(dtype) for name, a in arrays.items()}
    weight = int(rng.integers(1, 1000))
    running = {"mean": mx.array(rng.normal(size=2).astype(np.float32))}
    return Counted(place, weight, {"num-examples": weight}), parameters, running


def by_hand(updates: list) -> tuple[dict, dict]:
    """The means in float64."""
    weights = np.array([counted.weight for counted, *_ in updates], np.float64)
    columns = []
    for column in (1, 2):
        stacks = {
            name: np.stack([np.array(each[column][name].astype(mx.float32)) for each in updates])
            for name in updates[0][column]
        }
        columns.append(
            {
                name: np.tensordot(weights, stack.astype(np.float64), 1) / weights.sum()
                for name, stack in stacks.items()
            }
        )
    return columns[0], columns[1]


PLACES = st.sets(st.integers(0, 5 * BLOCK), min_size=1, max_size=60).map(sorted)


@settings(max_examples=60, deadline=None)
@given(PLACES, st.sampled_from(sorted(DTYPES)))
def test_a_mean_is_as_near_as_float32_is(places, dtype):
    updates = [update(place, DTYPES[dtype]) for place in places]
    mean = mean_of(blocks(updates))
    for got, expected in zip(mean[:2], by_hand(updates), strict=True):
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert got[name].dtype == np.float32
            # Each addition within a block may be off by half a unit in the last place.
            np.testing.assert_allclose(got[name], array, rtol=0, atol=BLOCK * 2**-24 * 6)
    assert mean.weight == sum(counted.weight for counted, *_ in updates)
    assert [counted.place for counted in mean.counted] == places


@settings(max_examples=60, deadline=None)
@given(PLACES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_whoever_sums_a_block_the_mean_has_the_same_bits(
    places, workers: int, order: random.Random
):
    """Blocks are dealt out to workers, and come back in any order."""
    updates = [update(place) for place in places]
    expected = mean_of(blocks(updates))
    numbers = sorted({place // BLOCK for place in places})
    order.shuffle(numbers)
    dealt = [set(numbers[k::workers]) for k in range(workers)]
    order.shuffle(dealt)
    parts = [
        block
        for mine in dealt
        for block in blocks(u for u in updates if u[0].place // BLOCK in mine)
    ]
    mean = mean_of(parts)
    for got, wanted in zip(mean[:2], expected[:2], strict=True):
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert mean[2:] == expected[2:]


def on_disk(update: tuple[Counted, dict, dict], place: Spool) -> tuple:
    """The same update, read from disk as it is summed."""

    def waiting(arrays: dict[str, mx.array]) -> named_arrays.LazyArrays:
        record = place.put_record(messages.pack(arrays).items())
        found = {name: part for part, held in messages.shards(record) for name in held}
        return messages.lazy_arrays(record, named_arrays.spec(arrays), found)

    counted, parameters, running = update
    return counted, waiting(parameters), waiting(running)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_updates_that_are_read_in_pieces_have_the_same_sum(dtype, tmp_path):
    def long(place: int) -> tuple[Counted, dict, dict]:
        counted, parameters, running = update(place, dtype)
        rng = np.random.default_rng(place)
        values = mx.array(rng.normal(size=(3, named_arrays.PIECE // 2)).astype(np.float32))
        odd = mx.array([-0.0, 1e-45, 65504.0]).astype(dtype)
        return counted, {"long": values.astype(dtype), **parameters, "odd": odd}, running

    updates = [long(place) for place in (0, 1, 5, BLOCK, BLOCK + 3, 3 * BLOCK)]
    plain = mean_of(
        weighted_mean.sum_block(number, (u for u in updates if u[0].place // BLOCK == number))
        for number in range(4)
    )
    place = Spool(tmp_path)
    read = weighted_mean.in_order(
        weighted_mean.blocks((on_disk(u, place) for u in updates), ALL)
    ).mean()
    for got, expected in zip(read[:2], plain[:2], strict=True):
        assert list(got) == list(expected)
        for name, array in expected.items():
            assert got[name].shape == array.shape
            assert got[name].tobytes() == array.tobytes()


def test_who_is_missing_leaves_the_blocks_of_the_others_as_they_are():
    updates = [update(place) for place in range(3 * BLOCK)]
    whole = blocks(updates)
    some = blocks(updates[:BLOCK] + updates[2 * BLOCK :])
    assert [block.number for block in some] == [0, 2]
    for block, same in zip(some, (whole[0], whole[2]), strict=True):
        one, other = mean_of([block]), mean_of([same])
        assert all(np.array_equal(one.parameters[k], other.parameters[k]) for k in ("w", "b"))


def test_running_statistics_are_averaged_by_examples():
    def client(place: int, examples: float, mean: float, variance: float) -> tuple:
        running = {"mean": mx.array([mean]), "variance": mx.array([variance], mx.bfloat16)}
        return Counted(place, examples, {}), {}, running

    mean = mean_of(blocks([client(0, 30, 0, 1), client(BLOCK, 10.0, 4, 3)]))
    average = mean.running_statistics({"mean": ((1,), "float32"), "variance": ((1,), "bfloat16")})
    assert average["mean"].tolist() == [1.0]
    assert average["variance"].tolist() == [1.5]
    assert average["variance"].dtype == mx.bfloat16


def test_nobody_is_no_mean():
    empty = weighted_mean.sum_block(3, [])
    assert mean_of([empty])[:] == ({}, {}, 0, [])
    one = mean_of([empty, *blocks([update(1)])])
    assert [counted.place for counted in one.counted] == [1]


def test_blocks_in_order_do_not_wait_for_one_without_updates():
    updates = [update(place) for place in (BLOCK, BLOCK + 1, 3 * BLOCK)]
    total = weighted_mean.in_order(weighted_mean.blocks(updates, ALL))
    assert not total.early
    mean, expected = total.mean(), mean_of(blocks(updates))
    assert np.array_equal(mean.parameters["w"], expected.parameters["w"])
    assert mean.counted == expected.counted


def test_only_blocks_that_come_early_are_kept():
    parts = blocks(update(place) for place in range(5 * BLOCK))
    expected = mean_of(parts)
    total = weighted_mean.Total()
    kept = []
    for number in (1, 0, 2, 4, 3):
        total.add(parts[number])
        kept.append(len(total.early))
    assert kept == [1, 0, 0, 1, 0]
    mean = total.mean()
    assert np.array_equal(mean.parameters["w"], expected.parameters["w"])
    assert mean.counted == expected.counted


def test_a_block_that_is_summed_twice_is_left_as_it_is():
    parts = blocks(update(place) for place in range(2 * BLOCK))
    first, second = mean_of(parts), mean_of(parts)
    assert np.array_equal(first.parameters["w"], second.parameters["w"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equal_updates_have_themselves_as_mean(dtype):
    """The sum is over far more than a half-precision number can count."""
    _, parameters, running = update(0, dtype)
    same = [(Counted(place, 600.0, {}), parameters, running) for place in range(1000)]
    mean = mean_of(blocks(same))
    for name, array in parameters.items():
        assert mx.array_equal(mx.array(mean.parameters[name]).astype(dtype), array) or (
            dtype == mx.float32
        )
        np.testing.assert_allclose(
            mean.parameters[name], np.array(array.astype(mx.float32)), rtol=1e-6
        )
