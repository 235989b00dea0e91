"""Which examples make up each step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed import batches, randomness

examples = st.integers(0, 40)
sizes = st.integers(1, 50)


@settings(max_examples=50, deadline=None)
@given(examples, sizes, st.booleans(), st.none() | st.integers(0, 9))
def test_an_epoch_has_every_example_once(num_examples, batch_size, padded, seed):
    key = None if seed is None else randomness.key(seed)
    steps = list(batches.epoch(num_examples, batch_size, padded, key))
    seen = []
    for number, (index, mask) in enumerate(steps):
        left = num_examples - number * batch_size
        real = min(batch_size, left)
        assert index.dtype == mx.uint32
        if padded:
            assert index.shape == mask.shape == (batch_size,)
            assert mask.tolist() == [1.0] * real + [0.0] * (batch_size - real)
            assert max(index.tolist()) < num_examples  # padding is made of real examples
        else:
            assert mask is None
            assert index.shape == (real,)
        seen += index.tolist()[:real]
    assert key is not None or seen == list(range(num_examples))
    assert sorted(seen) == list(range(num_examples))


def test_the_order_comes_from_the_key():
    def order(key: mx.array) -> list:
        return [i for rows in batches.epoch(20, 4, False, key) for i in rows.indices.tolist()]

    assert order(randomness.key(1)) == order(randomness.key(1))
    assert order(randomness.key(1)) != order(randomness.key(2))


def test_arrays_of_mlx_are_not_copied():
    mine = mx.ones(3)
    converted, theirs = batches.as_arrays((np.arange(3, dtype=np.uint8), mine))
    assert theirs is mine
    assert converted.dtype == mx.uint8
    assert converted.tolist() == [0, 1, 2]
