"""How a run is led."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .weights import Arrays

EvaluateFn = Callable[[int, Arrays, Arrays], Mapping[str, float | str] | None]


@dataclass
class Settings:
    """How a run is led.

    Args:
        num_rounds (int): Rounds to train.
        seed (int): Decides initial weights, sampling, shuffling and dropout.
        config (dict): Sent to clients with every message, over the task's own settings.
        min_nodes (int, optional): Nodes to wait for before each round; at least what the
            strategy itself asks for.
        wait (float): Seconds to wait for them. Default: ``600``.
        round_timeout (float): Seconds a phase may take; later replies are dropped.
            Default: ``3600``.
        keep (int): Checkpoints to keep, beside the best; 0 writes none. Default: ``3``.
        test (tuple, optional): Held-out examples of the server's own, as ``Data.test``: the
            task's loss and metrics of the global model on them are recorded each round.
        evaluate_fn (callable, optional): ``evaluate_fn(round, parameters, statistics)`` returns
            other metrics of the global model, or text such as a sample of what it writes.
    """

    num_rounds: int = 3
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    min_nodes: int | None = None
    wait: float = 600.0
    round_timeout: float = 3600.0
    keep: int = 3
    test: Sequence[Any] | None = None
    evaluate_fn: EvaluateFn | None = None

    def for_the_record(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            **vars(self),
            "test": None if self.test is None else len(self.test[0]),
            "evaluate_fn": self.evaluate_fn is not None,
        }
