"""Which examples make up each step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.training import batches

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
