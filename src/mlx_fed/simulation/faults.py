"""Injected faults: clients that fail, straggle or attack, drawn from the run's seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import randomness
from ..arrays.examples import Examples, leaves, replace_leaves
from ..arrays.named_arrays import Arrays
from ..errors import FedError
from ..task import Data
from ..training.trainer import ClientUpdate


class FaultsError(FedError, ValueError):
    """Invalid settings of faults."""


@dataclass(frozen=True)
class Faults:
    """Faults of the clients in a simulated federation.

    Args:
        failure_rate (float): The share of messages that a client does not answer. Each one is
            drawn anew. Default: ``0``.
        mean_delay (float): Seconds that a client takes, beyond its training, on average; each
            delay is drawn from an exponential distribution. Nothing waits for it: a reply after
            the ``round_timeout`` is dropped. Default: ``0``.
        hostile (float): The share of clients that attack, the same ones all the run.
            Default: ``0``.
        attack (str): ``"label-flip"`` trains on labels counted from the other end, ``"sign-flip"``
            reverses the update, ``"scale"`` multiplies it.
        scale (float): The factor of ``"sign-flip"`` and ``"scale"``. Default: ``1`` and ``10``.
        num_classes (int, optional): Number of labels, for ``"label-flip"``; labels are
            the last array of a batch.
    """

    failure_rate: float = 0.0
    mean_delay: float = 0.0
    hostile: float = 0.0
    attack: str = "sign-flip"
    scale: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("failure_rate", "hostile"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise FaultsError(f"Faults.{name} is a share between 0 and 1, not {share}.")
        if self.mean_delay < 0:
            raise FaultsError(f"Faults.mean_delay is in seconds, 0 or more, not {self.mean_delay}.")
        if self.attack not in ("label-flip", "sign-flip", "scale"):
            raise FaultsError(
                f'Faults.attack is "label-flip", "sign-flip" or "scale", not {self.attack!r}.'
            )
        if self.hostile and self.attack == "label-flip" and not self.num_classes:
            raise FaultsError('Faults.attack = "label-flip" needs num_classes.')

    def why_silent(self, seed: tuple[int, int, int], phase: str, timeout: float) -> str | None:
        """Reason of a client's missing reply in this phase, or ``None`` if it replies."""
        if not self.failure_rate and not self.mean_delay:
            return None
        draws = np.random.default_rng(randomness.derive(*seed, phase, "faults"))
        if draws.random() < self.failure_rate:
            return "it did not answer (an injected failure)"
        delay = draws.exponential(self.mean_delay) if self.mean_delay else 0.0
        if delay > timeout:
            return f"no reply within {timeout:.0f} seconds (an injected delay of {delay:.0f})"
        return None

    def is_hostile(self, seed: int, client: int) -> bool:
        """Whether a client attacks."""
        if not self.hostile:
            return False
        draws = np.random.default_rng(randomness.derive(seed, client, "hostile"))
        return bool(draws.random() < self.hostile)

    def on_data(self, data: Data) -> Data:
        """Training data of a hostile client."""
        if self.attack != "label-flip" or self.num_classes is None:
            return data
        highest = self.num_classes - 1

        def flip_labels(batch: Examples) -> Examples:
            *inputs, labels = leaves(batch)
            return replace_leaves(batch, [*inputs, (highest - labels).astype(labels.dtype)])

        train = data.train
        if callable(train):
            return Data(lambda key: map(flip_labels, train(key)), data.test)
        return Data(flip_labels(train), data.test)

    def on_update(self, update: ClientUpdate, start: Arrays) -> ClientUpdate:
        """Update of a hostile client that has trained from ``start``."""
        if self.attack == "label-flip":
            return update
        default = 1.0 if self.attack == "sign-flip" else 10.0
        scale = default if self.scale is None else self.scale
        factor = -scale if self.attack == "sign-flip" else scale
        parameters = {
            name: (start[name] + factor * (array - start[name])).astype(array.dtype)
            for name, array in update.parameters.items()
        }
        return update._replace(parameters=parameters)
