"""Random keys, each from what it is for and never from global state.

A client's shuffling and dropout depend on (seed, round, client, purpose) alone, so that a
run gives the same bits wherever its clients are and in whatever order they work.
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

Moment = tuple[int, int, int]
"""Seed, round and partition: what all of a client's random keys in a round come from."""


def derive(seed: int, *parts: int | str) -> int:
    """A 64-bit seed from the run's seed and what it is for.

    Args:
        seed (int): The run's seed.
        parts (int or str): Round, client, purpose: whatever tells this use from others.

    Example:
        >>> derive(0, 1, 3, "shuffle") != derive(0, 1, 4, "shuffle")
        True
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def moment_of(config: Mapping[str, Any], client: int) -> Moment:
    """When a client draws, from the settings that it is sent: they have the seed and the round."""
    return int(config.get("seed", 0)), int(config.get("server-round", 0)), client


def key(seed: int, *parts: int | str) -> mx.array:
    """An MLX random key, shape (2,) and dtype uint32, from the same parts as :func:`derive`."""
    import mlx.core as mx

    return mx.random.key(derive(seed, *parts))


def seed_mlx(seed: int, *parts: int | str) -> None:
    """Seed MLX's random state of this thread, which initial weights are drawn from."""
    import mlx.core as mx

    mx.random.seed(derive(seed, *parts))


@contextmanager
def generators_seeded(seed: int, *parts: int | str) -> Iterator[None]:
    """Seeds the generators that draw without a key: MLX's, NumPy's and Python's.

    NumPy's and Python's go on afterwards as if nothing had been drawn.
    """
    seed_mlx(seed, *parts)
    with seeded(derive(seed, *parts)):
        yield


@contextmanager
def seeded(derived: int, for_numpy: bytes | None = None) -> Iterator[None]:
    """Seeds the global generators of Python and NumPy for a while, and puts their states back.

    Args:
        derived (int): From :func:`derive`.
        for_numpy (bytes, optional): What NumPy's is seeded with instead.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(derived)
    np.random.seed(
        np.frombuffer(for_numpy, np.uint32)
        if for_numpy
        else np.array([derived >> 32, derived & 0xFFFFFFFF], np.uint32)
    )
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Keys:
    """A sequence of keys split off one, as MLX's own random state splits them.

    Attributes:
        state (mx.array): The key that the next ones come from.
    """

    def __init__(self, state: mx.array):
        self.state = state

    def next(self) -> mx.array:
        """A key that was not given before."""
        import mlx.core as mx

        self.state, key = mx.random.split(self.state)
        return key


_KEY_PLACES = {
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
"""The functions of ``mlx.core.random`` that may be given a key, and its place among arguments."""

_TRACING = threading.RLock()
_drawn_from = threading.local()


@contextmanager
def drawing_from(keys: Keys) -> Iterator[Keys]:
    """Lets what draws without a key, as ``nn.Dropout`` does, draw from ``keys``.

    MLX's random state cannot be set to an array, so a traced program could not be given one of
    its own for each client. While a program is traced, ``mlx.core.random`` gets its default
    keys from here, in the thread that traces it: another, which reads ahead, draws as ever.
    """
    import mlx.core as mx

    with _TRACING:
        before = {name: getattr(mx.random, name) for name in _KEY_PLACES}
        for name, function in before.items():
            setattr(mx.random, name, _with_keys(function, _KEY_PLACES[name], keys))
        outer, _drawn_from.keys = drawn_from(), keys
        try:
            yield keys
        finally:
            _drawn_from.keys = outer
            for name, function in before.items():
                setattr(mx.random, name, function)


def drawn_from() -> Keys | None:
    """The keys that this thread's draws come from; ``None`` outside :func:`drawing_from`."""
    return getattr(_drawn_from, "keys", None)


def _with_keys(function: Callable, place: int, keys: Keys) -> Callable:
    tracing = threading.get_ident()

    @wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        ours = threading.get_ident() == tracing
        if ours and len(args) <= place and kwargs.get("key") is None:
            kwargs["key"] = keys.next()
        return function(*args, **kwargs)

    return draw
