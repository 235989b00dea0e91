"""Requests of a server that a node's policy forbids, with the words of the refusal.

Each gives the type of the message and its settings, over those that the policy allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

POLICY = """
[server]
runs = ["run-1"]
strategies = ["FedAvg"]

[settings]
local-epochs = { max = 2 }
learning-rate = { min = 1e-4, max = 0.1 }
batch-size = [16, 32]
others = false

[data]
min-examples = 40

[replies]
metrics = ["loss"]
max-update-norm = 0.01
"""
ALLOWED: dict[str, Any] = {
    "run-id": "run-1",
    "strategy": "FedAvg",
    "local-epochs": 1,
    "learning-rate": 0.1,
    "batch-size": 32,
    "server-round": 1,
    "seed": 0,
}


class Asked(NamedTuple):
    """What a server asks: the type of the message, and settings by name; None leaves one out."""

    kind: str
    settings: dict[str, Any]


def asks(kind: str = "train", **settings: Any) -> Callable[[], Asked]:
    """A request with these settings."""
    return lambda: Asked(kind, {name.replace("_", "-"): v for name, v in settings.items()})


def spelled(name: str, value: Any, kind: str = "train") -> Callable[[], Asked]:
    """A request with a setting of exactly this name."""
    return lambda: Asked(kind, {name: value})


_RANGES = {
    "local-epochs": (3, 10**9, 2**62, 2.5, math.inf, math.nan, True, "2", b"2", [1], [3]),
    "learning-rate": (0.2, 0.0, -0.1, 1e308, math.inf, -math.inf, math.nan, True, "0.1", [0.1]),
    "batch-size": (1, 8, 64, 32.0, True, "32", [32], math.nan),
}

ACTS: dict[str, Callable[[], Asked]] = {
    **{
        f"{name} is {value!r}": spelled(name, value)
        for name, values in _RANGES.items()
        for value in values
    },
    **{
        f"{kind}: local-epochs is 9": asks(kind, local_epochs=9)
        for kind in ("train.default", "evaluate", "evaluate.default", "query.roll_call")
    },
    "local_epochs is 9": spelled("local_epochs", 9),
    "local_epochs is 9, and local-epochs 1": lambda: Asked(
        "train", {"local_epochs": 9, "local-epochs": 1}
    ),
    "local-steps is 1": asks(local_steps=1),
    "local_steps is 10**9": spelled("local_steps", 10**9),
    "Local-Epochs is 9": spelled("Local-Epochs", 9),
    "local\u2010epochs is 9": spelled("local\u2010epochs", 9),
    "local-epochs with a space is 9": spelled("local-epochs ", 9),
    "settings.local-epochs is 9": spelled("settings.local-epochs", 9),
    "an empty name": spelled("", 9),
    "max-grad-norm is 1e9": asks(max_grad_norm=1e9),
    "proximal-mu is 1e9": asks(proximal_mu=1e9),
    "momentum is 0.9": asks(momentum=0.9),
    "300 settings": lambda: Asked("train", {f"s{n}": n for n in range(300)}),
    "a name of a megabyte": spelled("s" * 2**20, 1),
    "a name with escapes": spelled("\x1b[2J", 1),
    "another run": asks(run_id="run-2"),
    "no run": asks(run_id=None),
    "a list of runs": asks(run_id=["run-1"]),
    "a run with a space": asks(run_id="run-1 "),
    "a run of a megabyte": asks(run_id="r" * 2**20),
    "another strategy": asks(strategy="FedSgd"),
    "no strategy": asks(strategy=None),
    "a strategy in small letters": asks(strategy="fedavg"),
    "a list of strategies": asks(strategy=["FedAvg"]),
    "the loss as num-examples": asks(train_loss_key="num-examples"),
    "the loss as accuracy": asks(train_loss_key="accuracy"),
    **{
        f"a request of the kind {kind}": asks(kind)
        for kind in ("query", "query.x", "train.x", "evaluate.x", "train.train")
    },
}
