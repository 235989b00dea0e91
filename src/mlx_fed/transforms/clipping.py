"""Clipping of updates, for differential privacy."""

from __future__ import annotations

import mlx.core as mx

from ..arrays.named_arrays import Arrays, Spec
from .update_transform import State, Transform, UpdateTransform

SETTING = "dp-clip"
_MARGIN = 1e-5
"""By which the norm stays below the limit, more than float32 sums are wrong by."""


def clip(max_norm: float) -> Transform:
    """The update, made shorter where its L2 norm over all arrays is more than ``max_norm``.

    An update that is not finite becomes not a number, and is refused.
    """

    def make(spec: Spec) -> UpdateTransform:
        def encode(update: Arrays, state: State, key: mx.array) -> tuple[Arrays, State]:
            # Divided first by the largest value: the squares of large ones overflow.
            largest = mx.max(mx.stack([mx.max(mx.abs(a)) for a in update.values() if a.size]))
            unit = mx.where(largest == 0, 1.0, largest)
            squares = [mx.sum(mx.square(array / unit)) for array in update.values()]
            norm = mx.sqrt(mx.sum(mx.stack(squares)))
            scale = mx.minimum(1.0, max_norm * (1 - _MARGIN) / mx.maximum(norm, 1e-30) / unit)
            scale = mx.where(mx.isfinite(largest), scale, mx.nan)
            return {name: array * scale for name, array in update.items()}, state

        message_names = {name: (name,) for name in spec}
        return UpdateTransform(
            spec, message_names, dict, encode, dict, (f"clipped to the norm {max_norm:g}",)
        )

    return make
