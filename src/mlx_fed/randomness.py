"""Random keys, each from what it is for and never from global state.

A client's shuffling and dropout depend on (seed, round, client, purpose) alone, so that a
run gives the same bits wherever its clients are and in whatever order they work.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


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


def key(seed: int, *parts: int | str) -> mx.array:
    """An MLX random key, shape (2,) and dtype uint32, from the same parts as :func:`derive`."""
    import mlx.core as mx

    return mx.random.key(derive(seed, *parts))


def seed_mlx(seed: int, *parts: int | str) -> None:
    """Seed MLX's random state of this thread, which layers such as Dropout draw from."""
    import mlx.core as mx

    mx.random.seed(derive(seed, *parts))
