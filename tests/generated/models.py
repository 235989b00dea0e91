"""Layers that random models are made of: each maps (examples, width) to the same shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

WIDTH = 6
VOCABULARY = 7

Function = Callable[[mx.array], mx.array]


class Apply(nn.Module):
    """A layer, then a function; without a layer the function alone."""

    def __init__(self, function: Function, layer: nn.Module | None = None):
        super().__init__()
        self.layer = layer or nn.Identity()
        self._function = function

    def __call__(self, x: mx.array) -> mx.array:
        return self._function(self.layer(x))


class Residual(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.layer(x)


class Tied(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = self.first

    def __call__(self, x: mx.array) -> mx.array:
        return self.again(mx.tanh(self.first(x)))


class Nested(nn.Module):
    """Arrays and modules in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [
            {"scale": mx.ones(WIDTH), "layers": [nn.Linear(WIDTH, WIDTH), nn.Tanh()]},
            {"bias": [mx.zeros(WIDTH), mx.array(0.5)]},
        ]

    def __call__(self, x: mx.array) -> mx.array:
        block, other = self.blocks
        for layer in block["layers"]:
            x = layer(x)
        return x * block["scale"] + other["bias"][0] * other["bias"][1]


class Private(nn.Module):
    """A part that MLX does not see among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(mx.tanh(self._hidden(x)))


class Frozen(nn.Module):
    """A part that is not trained, and whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.freeze()
        self.order = mx.arange(WIDTH)[::-1]
        self.freeze(keys=["order"], recurse=False)
        self.low = mx.zeros((WIDTH, 2))  # as LoRA's are
        self.high = mx.random.normal((2, WIDTH)) * 0.3

    def __call__(self, x: mx.array) -> mx.array:
        low, high = (a.astype(x.dtype) for a in (self.low, self.high))
        return self.base(x)[..., self.order] + x @ low @ high


class Codes(nn.Module):
    """An embedding of whole numbers that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.table(mx.stop_gradient(mx.argmax(x, axis=-1)))


class Average(nn.Module):
    """Takes away a running mean that the forward pass assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.average = mx.zeros(WIDTH)
        self.freeze(keys=["average"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            mean = mx.stop_gradient(0.7 * self.average + 0.3 * x.mean(axis=0))
            self.average = mean.astype(x.dtype)
        return x - self.average


class Memory(nn.Module):
    """Adds the last example of the batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = mx.zeros(WIDTH)
        self.freeze(keys=["memory"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        h = x + 0.5 * self.memory
        if self.training:
            self.memory = mx.stop_gradient(x[-1])
            self._last_output = h  # nobody asks to keep it
        return h


class Hidden(nn.Module):
    """Takes away a running mean in a private array."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden = mx.zeros(WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        out = x - self._hidden
        if self.training:
            mean = mx.stop_gradient(x.astype(mx.float32).mean(axis=0))
            self._hidden = 0.6 * self._hidden + 0.4 * mean
        return out.astype(x.dtype)


class Count(nn.Module):
    """Counts its steps, in a whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = mx.array(0)
        self.freeze(keys=["count"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        if self.training:
            self.count = self.count + 1
        return x / (1 + 0.1 * self.count).astype(x.dtype)


BUFFERS = {"average": Average, "memory": Memory, "_hidden": Hidden, "count": Count}


class Recurrent(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.cell = kind(2, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        out = self.cell(x.reshape(-1, WIDTH // 2, 2))
        return (out[0] if isinstance(out, tuple) else out)[:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiHeadAttention(2, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = x.reshape(-1, WIDTH // 2, 2)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(WIDTH // 2, h.dtype)
        return x + self.attention(h, h, h, mask).reshape(x.shape)


class Convolution(nn.Module):
    """Along the features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 2, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.tanh(self.convolution(x[..., None]).mean(axis=-1))


class Windows(nn.Module):
    """What lies along the features: pools, a transposed and a depthwise convolution, a norm."""

    def __init__(self, kind: str):
        super().__init__()
        if kind == "transposed":
            self.layer = nn.ConvTranspose1d(1, 2, 3, padding=1)
        if kind == "depthwise":
            self.layer = nn.Conv1d(2, 2, 3, padding=1, groups=2)
        if kind == "instance norm":
            self.layer = nn.InstanceNorm(2, affine=True)
        if kind == "pool":
            self.layer = nn.MaxPool1d(2, 1, padding=1)
        self._kind = kind

    def __call__(self, x: mx.array) -> mx.array:
        h = x[..., None]
        h = h if self._kind in ("transposed", "pool") else mx.concatenate([h, mx.sin(h)], axis=-1)
        return self.layer(h)[:, :WIDTH].mean(axis=-1)


class Experts(nn.Module):
    """Layers in lists of lists, of which each example has one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = [[nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)], [nn.Linear(WIDTH, 2)]]

    def __call__(self, x: mx.array) -> mx.array:
        (one, other), (gate,) = self.experts
        which = mx.softmax(gate(x), axis=-1)
        return one(x) * which[:, :1] + other(x) * which[:, 1:]


class TiedWeight(nn.Module):
    """One array under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        order = mx.stop_gradient(mx.argmin(x, axis=-1))
        return self.embedding.as_linear(mx.tanh(x + self.embedding(order)))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        return self.bilinear(x, mx.tanh(x))


# -- functions: what mx.vmap has to map, each of (examples, width) ---------------------------


def write_zero(x: mx.array) -> mx.array:
    h = x * 1.5
    h[:, 0] = 0
    return h


def write_slice(x: mx.array) -> mx.array:
    h = x * 1.0
    h[..., 1:3] = 0.25
    return h


def write_last(x: mx.array) -> mx.array:
    h = x * 1.0
    h[:, -1:] = mx.array([0.5], x.dtype)
    return h


def write_from_itself(x: mx.array) -> mx.array:
    h = x * 1.0
    h[..., 1:3] = h[..., 3:5]
    return h


def at_add(x: mx.array) -> mx.array:
    return x.at[:, 1:3].add(0.5)


def at_multiply(x: mx.array) -> mx.array:
    return x.at[..., 2:].multiply(0.5)


def at_maximum(x: mx.array) -> mx.array:
    return x.at[:, :2].maximum(0.1)


def slice_update(x: mx.array) -> mx.array:
    return mx.slice_update(x, mx.zeros((x.shape[0], 2), x.dtype), mx.array([0, 1]), (0, 1))


def write_where(x: mx.array) -> mx.array:
    return mx.where(x > 0.3, x, 0.1 * x)


def write_by_index(x: mx.array) -> mx.array:
    h = x * 1.0
    h[:, mx.array([0, 2])] = 0.5
    return h


WRITES = {
    f.__name__: f
    for f in (
        *(write_zero, write_slice, write_last, write_from_itself, at_add, at_multiply, at_maximum),
        *(slice_update, write_where, write_by_index),
    )
}


def _topk(x: mx.array) -> mx.array:
    return x + mx.topk(x, 2, axis=-1).sum(axis=-1, keepdims=True)


def _take_along(x: mx.array) -> mx.array:
    order = mx.stop_gradient(mx.argsort(x, axis=-1))
    return mx.take_along_axis(x, order[:, ::-1], axis=-1)


def _split(x: mx.array) -> mx.array:
    return mx.concatenate(mx.split(x, 3, axis=-1)[::-1], axis=-1)


def _pad(x: mx.array) -> mx.array:
    return mx.pad(x[:, :-2], [(0, 0), (1, 1)], constant_values=0.5)


def _gram(x: mx.array) -> mx.array:
    h = x.reshape(-1, 2, WIDTH // 2)
    return x + (h @ h.swapaxes(1, 2) @ h).reshape(x.shape) * 0.1


def _einsum(x: mx.array) -> mx.array:
    h = x.reshape(-1, 2, WIDTH // 2)
    return x + 0.1 * mx.einsum("bij,bkj->bik", h, h).sum(axis=2).sum(axis=1, keepdims=True)


OPERATIONS: dict[str, Function] = {
    "sort": lambda x: mx.sort(x, axis=-1),
    "cumsum": lambda x: mx.cumsum(x, axis=-1) * 0.5,
    "cummax": lambda x: mx.cummax(x, axis=-1),
    "cumprod": lambda x: mx.cumprod(mx.tanh(x), axis=-1, reverse=True),
    "logcumsumexp": lambda x: mx.logcumsumexp(x, axis=-1) * 0.5,
    "softmax": lambda x: mx.softmax(x, axis=-1) * 3,
    "logsumexp": lambda x: x - mx.logsumexp(x, axis=-1, keepdims=True),
    "roll": lambda x: mx.roll(x, 2, axis=-1) + x,
    "flip": lambda x: x[:, ::-1] * 0.9,
    "topk": _topk,
    "take along": _take_along,
    "split": _split,
    "pad": _pad,
    "gram": _gram,
    "einsum": _einsum,
    "take": lambda x: mx.take(x, mx.array([5, 0, 1, 1, 2, 4]), axis=1),
    "repeat": lambda x: mx.repeat(x[:, :2], WIDTH // 2, axis=1) + x,
    "tile": lambda x: mx.tile(x[:, :2], (1, WIDTH // 2)) - x,
    "minimum": lambda x: mx.minimum(x, x[:, ::-1]),
    "max": lambda x: x - x.max(axis=-1, keepdims=True),
    "norm": lambda x: x / (1 + mx.linalg.norm(x + 0.01, axis=-1, keepdims=True)),
    "stop gradient": lambda x: x + mx.stop_gradient(mx.tanh(x)),
    "clip": lambda x: mx.clip(x, -0.7, 0.9),
    "tril": lambda x: x + mx.tril(x[:, :, None] * x[:, None, :]).sum(axis=-1) * 0.1,
    "outer": lambda x: (x[:, :, None] * mx.softmax(x, axis=-1)[:, None, :]).sum(axis=1),
    "var": lambda x: x / mx.sqrt(0.5 + x.var(axis=-1, keepdims=True)),
    "erf": lambda x: mx.erf(x) + mx.sigmoid(x),
    "arithmetic": lambda x: mx.sin(x) * mx.exp(-mx.abs(x)) + mx.square(x) / (1 + mx.square(x)),
    "transpose": lambda x: x.T.T + x.reshape(-1, 2, 3).swapaxes(1, 2).reshape(x.shape),
    "stack": lambda x: mx.stack([x, mx.tanh(x)], axis=0).mean(axis=0),
    "round": lambda x: x + mx.stop_gradient(mx.round(x * 4) / 4 - x),
    "convolve": lambda x: mx.conv1d(x[..., None], mx.ones((1, 3, 1), x.dtype), padding=1)[..., 0],
    "strided": lambda x: mx.concatenate([x[:, ::2], x[:, 1::2]], axis=1),
    "put along": lambda x: mx.put_along_axis(
        x, mx.stop_gradient(mx.argmax(x, axis=-1, keepdims=True)), mx.array(0.5, x.dtype), axis=-1
    ),
    "rope": lambda x: nn.RoPE(2)(x.reshape(-1, 3, 2)).reshape(x.shape),
    "positions": lambda x: x + nn.SinusoidalPositionalEncoding(WIDTH)(mx.arange(1)).astype(x.dtype),
    "attention": lambda x: mx.fast.scaled_dot_product_attention(
        *[x.reshape(-1, 1, 3, 2)] * 3, scale=0.7
    ).reshape(x.shape),
    "glu": lambda x: nn.glu(mx.concatenate([x, x], axis=-1), axis=-1),
    "masked": lambda x: mx.where(mx.arange(WIDTH) % 2 == 0, x, 0),
    "argsort": lambda x: x * (1 + mx.stop_gradient(mx.argsort(x, axis=-1)).astype(x.dtype) / WIDTH),
}


def hand_norm(x: mx.array) -> mx.array:
    return (x - x.mean(axis=0)) / mx.sqrt(x.var(axis=0) + 0.1)


def attend_to_others(x: mx.array) -> mx.array:
    return x + mx.softmax(x @ x.T, axis=-1) @ x


def center(x: mx.array) -> mx.array:
    return x - 0.5 * x.mean(axis=0, keepdims=True)


def first_of_batch(x: mx.array) -> mx.array:
    return x + 0.3 * x[:1]


INTERACTIONS = {f.__name__: f for f in (hand_norm, attend_to_others, center, first_of_batch)}


def linear(function: Function | None = None) -> nn.Module:
    return Apply(function or (lambda x: x), nn.Linear(WIDTH, WIDTH))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "tanh": lambda: linear(mx.tanh),
    "relu": lambda: linear(nn.relu),
    "gelu": lambda: linear(nn.gelu),
    "silu": lambda: linear(nn.silu),
    "residual": lambda: Residual(linear(mx.tanh)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "prelu": nn.PReLU,
    "tied": Tied,
    "nested": Nested,
    "private": Private,
    "frozen": Frozen,
    "codes": Codes,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": Attention,
    "convolution": Convolution,
    "bilinear": Heads,
    **{
        kind: partial(Windows, kind)
        for kind in ("transposed", "depthwise", "instance norm", "pool")
    },
    "experts": Experts,
    "tied weight": TiedWeight,
    "sequential": lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.SELU(), nn.Linear(4, WIDTH)),
}


# -- what makes (examples, width) of one array of a batch ------------------------------------


class Tokens(nn.Module):
    """Whole numbers, or one for each example, by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.embedding(x)
        return h if h.ndim == 2 else h.mean(axis=tuple(range(1, h.ndim - 1)))


class Flat(nn.Module):
    """Any shape, laid out flat."""

    def __init__(self, size: int, dtype: mx.Dtype):
        super().__init__()
        self.linear = nn.Linear(size, WIDTH)
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x.astype(self._dtype).reshape(len(x), -1))


class Series(nn.Module):
    """(examples, time, channels), by a recurrent layer, a convolution or attention."""

    def __init__(self, kind: str, channels: int, dtype: mx.Dtype):
        super().__init__()
        self.layer = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}.get(kind, nn.Linear)(
            channels, WIDTH
        )
        if kind == "conv":
            self.layer = nn.Conv1d(channels, WIDTH, 2)
        if kind == "attention":
            self.attention = nn.MultiHeadAttention(WIDTH, 2)
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        h = self.layer(x.astype(self._dtype))
        h = h[0] if isinstance(h, tuple) else h
        if "attention" in self:
            h = self.attention(h, h, h)
        return h.mean(axis=1)


class Image(nn.Module):
    """(examples, height, width, channels), by a convolution and a pool."""

    def __init__(self, channels: int, pool: str, dtype: mx.Dtype):
        super().__init__()
        self.convolution = nn.Conv2d(channels, WIDTH, 2)
        self.pool = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}[pool](2)
        self._dtype = dtype

    def __call__(self, x: mx.array) -> mx.array:
        return self.pool(mx.tanh(self.convolution(x.astype(self._dtype)))).mean(axis=(1, 2))


class Model(nn.Module):
    """An encoder for each array of a batch, layers of what they add up to, and a head.

    Args:
        encoders (list): Functions that make the module of each input.
        layers (list): Functions that make the layers.
        outputs (int): Size of what comes out.
        zero_input (bool): Write into the input itself.
    """

    def __init__(
        self,
        encoders: list[Callable[[], nn.Module]],
        layers: list[Callable[[], nn.Module]],
        outputs: int,
        zero_input: bool = False,
    ):
        super().__init__()
        self.encoders = {f"input{n}": make() for n, make in enumerate(encoders)}
        self.layers = [make() for make in layers]
        self.head = nn.Linear(WIDTH, outputs)
        self._zero_input = zero_input

    def features(self, *inputs: mx.array) -> mx.array:
        if self._zero_input:
            inputs[0][:, 0] = 0
        scale = 1.0
        h = 0.0
        for encoder, x in zip(self.encoders.values(), inputs, strict=True):
            h = h + scale * encoder(x)
            scale *= 0.7  # inputs that are mixed up are seen
        for layer in self.layers:
            h = layer(h)
        return h

    def __call__(self, *inputs: mx.array) -> mx.array:
        return self.head(self.features(*inputs))
