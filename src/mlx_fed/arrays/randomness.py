"""Random keys derived from (seed, round, client, purpose), never from global state.

A client's shuffling and dropout depend on these alone, so that a run has the same bits on every
engine and in every order of clients.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import mlx.core as mx

RoundSeed = tuple[int, int, int]
"""Seed, round and partition, from which all of a client's random keys in a round are derived."""


def derive(seed: int, *purpose: int | str) -> int:
    """A 64-bit seed from the run's seed and a purpose, by BLAKE2b.

    Args:
        seed (int): The run's seed.
        purpose (int or str): Round, client, use: together unique in the run.

    Example:
        >>> derive(0, 1, 3, "shuffle") != derive(0, 1, 4, "shuffle")
        True
    """
    text = "/".join(f"{type(item).__name__}:{item}" for item in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def round_seed(config: Mapping[str, Any], client: int) -> RoundSeed:
    """The :data:`RoundSeed` of a client, from the settings of a message: seed and server round."""
    return int(config.get("seed", 0)), int(config.get("server-round", 0)), client


def key(seed: int, *purpose: int | str) -> mx.array:
    """An MLX random key, shape (2,) and dtype uint32, from the arguments of :func:`derive`."""
    import mlx.core as mx

    return mx.random.key(derive(seed, *purpose))


def seed_mlx(seed: int, *purpose: int | str) -> None:
    """Seeds MLX's random state of this thread, from which initial weights are drawn."""
    import mlx.core as mx

    mx.random.seed(derive(seed, *purpose))


@contextmanager
def seed_generators(seed: int, *purpose: int | str) -> Iterator[None]:
    """Seeds the global generators of MLX, NumPy and Python.

    The states of NumPy's and Python's are restored at the end.
    """
    seed_mlx(seed, *purpose)
    with seed_temporarily(derive(seed, *purpose)):
        yield


@contextmanager
def seed_temporarily(seed: int, numpy_seed: bytes | None = None) -> Iterator[None]:
    """Seeds the global generators of Python and NumPy, and restores their states at the end.

    Args:
        seed (int): A result of :func:`derive`.
        numpy_seed (bytes, optional): A seed for NumPy's. Default: ``seed``.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(
        np.frombuffer(numpy_seed, np.uint32)
        if numpy_seed
        else np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    )
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restores the states of the global generators of MLX (this thread's), NumPy and Python."""
    import mlx.core as mx

    high, low = _mlx_key()
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _mlx_key() -> tuple[int, int]:
    """MLX's random state, a key, whose halves are those of the seed that sets it."""
    import mlx.core as mx

    state: Any = mx.random.state
    return tuple(map(int, state[0].tolist()))  # type: ignore[return-value]


class Keys:
    """A sequence of keys split from one, as MLX's random state splits them.

    Attributes:
        state (mx.array): The key from which the next ones are split.
    """

    def __init__(self, state: mx.array):
        self.state = state

    def next(self) -> mx.array:
        """A new key."""
        import mlx.core as mx

        self.state, key = mx.random.split(self.state)
        return key


_KEY_POSITIONS = {
    "bernoulli": 2,
    "categorical": 4,
    "gumbel": 2,
    "laplace": 4,
    "multivariate_normal": 4,
    "normal": 4,
    "permutation": 2,
    "randint": 4,
    "truncated_normal": 4,
    "uniform": 4,
}
"""The functions of ``mlx.core.random`` with a parameter ``key``, and its position."""

_TRACING = threading.RLock()
_current = threading.local()


@contextmanager
def draw_keys_from(keys: Keys) -> Iterator[Keys]:
    """Replaces the default keys of ``mlx.core.random``, which ``nn.Dropout`` uses, by ``keys``.

    MLX's random state cannot be set to an array, so a traced program could not have one for each
    client as an input. Only the thread that traces draws from ``keys``, not one that reads ahead.
    """
    import mlx.core as mx

    with _TRACING:
        before = {name: getattr(mx.random, name) for name in _KEY_POSITIONS}
        for name, function in before.items():
            setattr(mx.random, name, _with_keys(function, _KEY_POSITIONS[name], keys))
        outer_keys, _current.keys = current_keys(), keys
        try:
            yield keys
        finally:
            _current.keys = outer_keys
            for name, function in before.items():
                setattr(mx.random, name, function)


def current_keys() -> Keys | None:
    """The keys of this thread's draws; ``None`` outside :func:`draw_keys_from`."""
    return getattr(_current, "keys", None)


def _with_keys(function: Callable, position: int, keys: Keys) -> Callable:
    tracing_thread = threading.get_ident()

    @wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        is_tracing = threading.get_ident() == tracing_thread
        if is_tracing and len(args) <= position and kwargs.get("key") is None:
            kwargs["key"] = keys.next()
        return function(*args, **kwargs)

    return draw
