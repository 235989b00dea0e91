"""Modules and arrays drawn at random, and their bits."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import strategies as st

FLOATS = [mx.float32, mx.float16, mx.bfloat16]


class Tree(nn.Module):
    """A module that holds whatever it is given."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self[name] = child


class LoRA(nn.Module):
    """A frozen layer with two small trainable factors beside it, as mlx-lm's."""

    def __init__(self, rank: int = 2):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.linear.freeze()
        self.lora_a = mx.random.normal((6, rank))
        self.lora_b = mx.zeros((rank, 5))


LAYERS = [
    lambda: nn.Linear(3, 2),
    lambda: nn.Linear(3, 2, bias=False),
    lambda: nn.Embedding(4, 3),
    lambda: nn.Conv1d(2, 3, 2),
    lambda: nn.Conv2d(2, 3, 2, bias=False),
    lambda: nn.LayerNorm(4),
    lambda: nn.RMSNorm(4),
    lambda: nn.BatchNorm(3),
    lambda: nn.GroupNorm(2, 4),
    lambda: nn.MultiHeadAttention(4, 2, bias=True),
    lambda: nn.LSTM(3, 2),
    lambda: nn.PReLU(),
    lambda: nn.ReLU(),
    lambda: nn.QuantizedLinear(64, 8),
    lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm(2), nn.ReLU()),
    LoRA,
]

ARRAYS = [
    lambda: mx.array(1.5),
    lambda: mx.zeros((0, 3)),
    lambda: mx.ones((2, 1, 3), mx.bfloat16),
    lambda: mx.arange(5).astype(mx.int8),
    lambda: mx.array([True, False]),
    lambda: mx.array([1 + 2j]),
]

SETTINGS = [  # no arrays: MLX passes over them
    lambda: 3,
    lambda: "same",
    lambda: (mx.ones(2), 4),
    lambda: [1, 2],
    dict,
]


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    """Modules in lists and dictionaries, tied, partly frozen, of several dtypes."""

    def child(depth: int):
        kind = draw(st.sampled_from(["layer", "array", "setting", "list", "dict", "module"]))
        if kind == "layer" or (depth == 0 and kind in ("list", "dict", "module")):
            layer = draw(st.sampled_from(LAYERS))()
            if draw(st.booleans()):
                layer.set_dtype(draw(st.sampled_from(FLOATS)))
            if draw(st.integers(0, 3)) == 0:
                layer.freeze(keys=draw(st.sampled_from([None, "bias", "weight", "layers"])))
            return layer
        if kind == "array":
            return draw(st.sampled_from(ARRAYS))()
        if kind == "setting":
            return draw(st.sampled_from(SETTINGS))()
        if kind == "list":
            return [child(depth - 1) for _ in range(draw(st.integers(0, 3)))]
        children = {
            name: child(depth - 1)
            for name in draw(st.lists(st.sampled_from("abcé0"), max_size=3, unique=True))
        }
        if kind == "dict":
            return children
        module = Tree(**children)
        if draw(st.integers(0, 2)) == 0:
            module.freeze(recurse=draw(st.booleans()))
        return module

    children = {name: child(depth) for name in "wxyz"[: draw(st.integers(1, 4))]}
    module = Tree(**children, _hidden=mx.ones(2))
    change = draw(st.sampled_from(["none", "none", "freeze", "unfreeze", "one"]))
    if change == "freeze":
        module.freeze()
    elif change == "unfreeze":
        module.unfreeze()
    elif change == "one":
        module.freeze(recurse=False, keys=draw(st.sampled_from(sorted(children))))
    layers = [name for name, c in children.items() if isinstance(c, nn.Module)]
    if layers and draw(st.booleans()):
        module["tied"] = children[draw(st.sampled_from(layers))]
    return module


def bits(array: mx.array) -> tuple:
    whole = mx.contiguous(array).reshape(-1)
    return array.shape, array.dtype, np.array(whole.view(mx.uint8)).tobytes()


def noise(array: mx.array, seed: int) -> mx.array:
    """Random bits, NaNs among them, in an array's shape and dtype."""
    random_bytes = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
    if array.dtype == mx.bool_:
        random_bytes %= 2
    return mx.array(random_bytes).view(array.dtype).reshape(array.shape)
