"""Random keys, each from what it is for."""

from __future__ import annotations

import itertools
import threading

import mlx.core as mx
import mlx.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed.arrays import randomness

parts = st.lists(st.integers(-(2**63), 2**63) | st.text(max_size=4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63), parts, parts)
def test_seeds_are_equal_only_for_the_same_purpose(seed, first, second):
    one, other = randomness.derive(seed, *first), randomness.derive(seed, *second)
    assert 0 <= one < 2**64
    assert (one == other) == (first == second)


def test_a_seed_is_the_same_on_every_machine():
    assert randomness.derive(0, 1, 3, "shuffle") == 2790366819311727116


def test_seed_round_client_and_purpose_each_count():
    moments = itertools.product(range(3), range(3), range(3), ["shuffle", "augment"])
    keys = {tuple(randomness.key(*moment).tolist()) for moment in moments}
    assert len(keys) == 3 * 3 * 3 * 2


def test_a_number_and_its_text_differ():
    assert randomness.derive(0, 1) != randomness.derive(0, "1")


def test_a_key_does_not_touch_the_global_state():
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(7)
    key = randomness.key(1, 2, "shuffle")
    assert (key.shape, key.dtype) == ((2,), mx.uint32)
    assert mx.random.uniform(shape=(3,)).tolist() == expected


def test_the_state_that_layers_draw_from_is_seeded():
    def draw(*parts) -> list:
        randomness.seed_mlx(*parts)
        return mx.random.uniform(shape=(3,)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert draw(1, 2, 3) != draw(1, 2, 4)


def test_layers_draw_from_the_keys_what_they_would_from_a_seed():
    layers = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.2))
    randomness.seed_mlx(7, "layers")
    seeded = [layers(mx.ones((4, 8))).tolist() for _ in range(2)]
    keys = randomness.Keys(randomness.key(7, "layers"))
    with randomness.draw_keys_from(keys):
        drawn = [layers(mx.ones((4, 8))).tolist() for _ in range(2)]
    assert drawn == seeded
    assert mx.random.uniform.__module__ == mx.random.normal.__module__  # all are put back


def test_a_key_that_is_given_is_used():
    key = mx.random.key(1)
    expected = mx.random.uniform(0, 1, (3,), mx.float32, key).tolist()
    with randomness.draw_keys_from(randomness.Keys(mx.random.key(2))):
        assert mx.random.uniform(0, 1, (3,), mx.float32, key).tolist() == expected
        assert mx.random.uniform(shape=(3,), key=key).tolist() == expected


def test_another_thread_draws_from_its_own_state():
    drawn = []

    def draw() -> None:
        mx.random.seed(7)
        drawn.append(mx.random.uniform(shape=(3,)).tolist())

    draw()
    keys = randomness.Keys(mx.random.key(2))
    with randomness.draw_keys_from(keys):
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    assert drawn[0] == drawn[1]
    assert keys.state.tolist() == mx.random.key(2).tolist()


def test_every_function_that_draws_is_known():
    """A release of MLX that draws in a new way fails here: add it to _KEY_POSITIONS."""
    for name in dir(mx.random):
        head = (getattr(mx.random, name).__doc__ or "").splitlines()[:1]
        if head and "key: array | None" in head[0]:
            arguments = head[0].partition("(")[2].split("key: array | None")[0]
            assert randomness._KEY_POSITIONS[name] == arguments.count(": "), name
