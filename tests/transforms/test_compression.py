"""Compression of updates: right on average or with feedback, of any arrays, from any message."""

from __future__ import annotations

import math

import mlx_fed  # noqa: F401, before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_fed import transforms
from mlx_fed.arrays import named_arrays
from mlx_fed.errors import SettingsError
from mlx_fed.transforms.compression import parse_compression
from mlx_fed.transforms.update_transform import UpdateTransform

from ..helpers.random_arrays import noise

UNBIASED = ["int8", "int4", "randk:0.25", "randk:0.5,int8"]
WITH_FEEDBACK = ["int2", "int1", "topk:0.1", "topk:0.1,int4", "randk:0.3,int2"]
SHAPES = st.dictionaries(
    st.text("ab./é", min_size=1, max_size=4),
    st.lists(st.integers(0, 70), max_size=3).map(tuple).filter(lambda s: math.prod(s) < 20_000),
    max_size=4,
)


def make(text: str, update: dict[str, mx.array]) -> UpdateTransform:
    transform = parse_compression(text)
    assert transform is not None
    return transform(named_arrays.spec(update))


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, mx.array]:
    """Updates of layers of very different sizes, some of them mostly zeros."""
    rng = np.random.default_rng(seed)
    update = {}
    for name, shape in shapes.items():
        values = rng.standard_t(3, shape) * 10.0 ** rng.integers(-12, 6)
        values = np.where(rng.random(shape) < rng.random(), values, 0)
        update[name] = mx.array(values.astype(np.float32))
    return update


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    assert one.keys() == other.keys()
    squares = (np.square(np.subtract(one[name], other[name], dtype=np.float64)) for name in one)
    return math.sqrt(sum(float(square.sum()) for square in squares))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(UNBIASED + WITH_FEEDBACK), st.integers(0, 2**32 - 1))
def test_a_message_has_the_stated_arrays_and_any_message_decodes(shapes, text, seed):
    update = draw(shapes, seed)
    transform = make(text, update)
    message, state = transform.encode(update, transform.init(), mx.random.key(seed))
    assert named_arrays.spec(message) == transform.spec
    assert named_arrays.spec(state) == named_arrays.spec(transform.init())
    garbage = {name: noise(array, seed) for name, array in message.items()}
    for sent in (message, garbage):
        decoded = transform.decode(sent)
        assert named_arrays.spec(decoded) == named_arrays.spec(update)
        for name in update:  # each can be decoded by itself
            parts = {part: sent[part] for part in transform.message_names[name]}
            values = transform.decode(parts)[name]
            np.testing.assert_array_equal(np.asarray(values), np.asarray(decoded[name]))


@pytest.mark.parametrize("text", UNBIASED)
def test_the_mean_of_many_messages_is_the_update(text):
    update = draw({"w": (40, 130), "b": (7,), "c": (64,)}, 1)
    transform = make(text, update)
    encode = mx.compile(lambda key: transform.decode(transform.encode(update, {}, key)[0]))
    error = distance(encode(mx.random.key(10**6)), update)
    total = {name: np.zeros(array.shape) for name, array in update.items()}
    for seed in range(400):
        for name, array in encode(mx.random.key(seed)).items():
            total[name] += np.asarray(array)
    mean = {name: values / 400 for name, values in total.items()}
    # Of independent errors the mean's is a 20th.
    assert 0 < distance(mean, update) < error / 20 * 1.3


@pytest.mark.parametrize("text", WITH_FEEDBACK)
def test_what_is_lost_is_sent_later(text):
    """Sums of what was sent and what is still to be sent are the sums of the updates."""
    shapes = {"w": (30, 50), "b": (3,)}
    transform = make(text, draw(shapes, 0))
    state = transform.init()
    sent = {name: np.zeros(shape) for name, shape in shapes.items()}
    true = {name: np.zeros(shape) for name, shape in shapes.items()}
    for seed in range(30):
        update = {
            name: mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
            for name, shape in shapes.items()
        }
        message, state = transform.encode(update, state, mx.random.key(seed))
        for name, array in transform.decode(message).items():
            sent[name] += np.asarray(array)
            true[name] += np.asarray(update[name])
    for name in shapes:
        total = sent[name] + np.asarray(state[f"loss/{name}"])
        np.testing.assert_allclose(total, true[name], atol=1e-3)
    assert distance(sent, true) < distance({name: 0 * true[name] for name in true}, true)


def plain_quantized(values: np.ndarray, uniform: np.ndarray, bits: int) -> np.ndarray:
    """What :func:`mlx_fed.transforms.quantize` means, group after group."""
    maximum, result = 2 ** (bits - 1) - 1, []
    for group, draws in zip(values.reshape(-1, 64), uniform.reshape(-1, 64), strict=True):
        largest = mx.array(np.abs(group).max() * np.float32(1 + 2**-7))
        scale = np.float32(largest.astype(mx.bfloat16).item())
        levels = np.floor(group / scale * np.float32(maximum) + draws)
        result.append(levels / np.float32(maximum) * scale)
    return np.concatenate(result)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_is_that_of_a_plain_loop(bits):
    values = np.random.default_rng(3).normal(size=64 * 40).astype(np.float32)
    transform = transforms.quantize(bits)(named_arrays.spec({"w": mx.array(values)}))
    key = mx.random.key(5)
    message, _ = transform.encode({"w": mx.array(values)}, {}, key)
    uniform = mx.random.uniform(shape=(40, 64), key=mx.random.split(key, 1)[0])
    plain = plain_quantized(values, np.asarray(uniform), bits)
    np.testing.assert_allclose(np.asarray(transform.decode(message)["w"]), plain, rtol=1e-6)
    assert message["w/codes"].nbytes == values.size * bits // 8


@pytest.mark.parametrize("fraction", [0.01, 0.2, 1.0])
def test_the_largest_values_are_kept(fraction):
    values = np.random.default_rng(4).normal(size=(3, 5000)).astype(np.float32)
    transform = transforms.top_k(fraction)(named_arrays.spec({"w": mx.array(values)}))
    message, _ = transform.encode({"w": mx.array(values)}, {}, mx.random.key(0))
    decoded = np.asarray(transform.decode(message)["w"])
    blocks = np.pad(values.reshape(-1), (0, -values.size % 4096)).reshape(-1, 4096)
    least = np.sort(np.abs(blocks))[:, ::-1][:, round(fraction * 4096) - 1]
    plain = np.where(np.abs(blocks) >= least[:, None], blocks, 0).reshape(-1)[: values.size]
    np.testing.assert_array_equal(decoded, plain.reshape(values.shape))


@pytest.mark.parametrize("text", UNBIASED + WITH_FEEDBACK)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 4999])
def test_an_update_that_is_not_finite_stays_so(text, value, position):
    values = np.zeros(5000, np.float32)
    values[position] = value
    update = {"w": mx.array(values)}
    transform = make(text, update)
    message, _ = transform.encode(update, transform.init(), mx.random.key(0))
    floating = [array for array in message.values() if mx.issubdtype(array.dtype, mx.floating)]
    assert not named_arrays.are_finite(floating)


@pytest.mark.parametrize("text", UNBIASED + WITH_FEEDBACK)
def test_compiled_and_mapped_over_clients_it_is_the_same(text):
    updates = [draw({"w": (33, 70), "b": (5,)}, seed) for seed in range(3)]
    transform = make(text, updates[0])
    keys = mx.stack([mx.random.key(seed) for seed in range(3)])
    stack = {name: mx.stack([update[name] for update in updates]) for name in updates[0]}
    state = {name: mx.stack([a, a, a]) for name, a in transform.init().items()}
    messages, _ = mx.vmap(transform.encode)(stack, state, keys)
    compiled = mx.compile(transform.encode)
    for row, update in enumerate(updates):
        alone, _ = transform.encode(update, transform.init(), keys[row])
        together, _ = compiled(update, transform.init(), keys[row])
        for name, array in alone.items():
            assert mx.array_equal(array, messages[name][row]), name
            assert mx.array_equal(array, together[name]), name


@pytest.mark.parametrize("text", ["int3", "int8:2", "topk", "topk:0", "topk:2", "randk:x", "zip"])
def test_an_unknown_compression_is_refused(text):
    with pytest.raises(SettingsError, match=r"compress is int8, int4.* not 'int8,"):
        parse_compression(f"int8,{text}")


@pytest.mark.parametrize("text", ["", " , "], ids=["empty", "a comma"])
def test_without_a_name_there_is_none(text):
    assert parse_compression(text) is None
