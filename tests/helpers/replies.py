"""Replies that are changed on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from flwr.app import Message

from mlx_fed.rounds import messages

from .federated import WEIGHT


def with_arrays(change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Message], None]:
    def changed(reply: Message) -> None:
        arrays = messages.unpack(reply.content["arrays"])
        change(arrays)
        reply.content["arrays"] = messages.pack(arrays)

    return changed


def with_weight(change: Callable[[mx.array], mx.array]) -> Callable[[Message], None]:
    return with_arrays(lambda arrays: arrays.update({WEIGHT: change(arrays[WEIGHT])}))


def with_metrics(**changed: Any) -> Callable[[Message], None]:
    values = {name.replace("_", "-"): value for name, value in changed.items()}
    return lambda reply: reply.content["metrics"].update(values)
