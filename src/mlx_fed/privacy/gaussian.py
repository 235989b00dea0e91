"""Central differential privacy: clipped updates, and Gaussian noise at the server.

DP-FedAvg of McMahan et al. 2018 (https://arxiv.org/abs/1710.06963), around any strategy that needs
no more of a round's updates than their mean.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..arrays.flower_records import array_values, records_in
from ..errors import SettingsError
from ..rounds import strategies
from ..transforms.clipping import SETTING as CLIP
from . import accountant
from .accountant import Release
from .ledger import Ledger
from .noise import add_noise

_EMPTY_SHARE = 1e-3
"""Of delta: the probability that a round samples nobody, at most."""


class Gaussian(Strategy):
    """Differential privacy for clients: what the models reveal of any client is bounded by epsilon.

    Each client clips its update to an L2 norm of ``clip`` and counts as much as any other; the
    server adds normal noise to their sum. If the strategy trains a fraction of the clients
    (``fraction_train``), each is drawn with that probability, by the operating system's random
    numbers (Poisson sampling), which makes epsilon smaller. The server is trusted: it sees each
    clipped update. Running statistics are refused; metrics and numbers of examples are not covered,
    as the run says.

    Args:
        strategy (Strategy): FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad or FedProx.
        clip (float): Largest L2 norm of an update.
        noise (float, optional): Standard deviation of the noise on the sum, in multiples of
            ``clip``. Default: what ``epsilon`` needs over ``num_rounds``.
        epsilon (float, optional): The run ends before it exceeds this.
        delta (float): Probability that epsilon does not hold, below 1 / number of clients.
        num_rounds (int, optional): Rounds for which ``noise`` is computed.

    Raises:
        SettingsError: If an argument is not what it should be, or the strategy needs each update.
        PrivacyBudgetError: If no noise is enough, or dp-accounting is not installed.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> strategy = Gaussian(FedAvg(fraction_train=0.01), clip=1.0, noise=1.0)
    """

    private_noise = True
    """Hooks draw from the operating system."""
    needs_only_mean = True
    train_weighted_by_key = "clients"
    max_weight = 1.0

    def __init__(
        self,
        strategy: Strategy,
        clip: float,
        noise: float | None = None,
        *,
        epsilon: float | None = None,
        delta: float = 1e-5,
        num_rounds: int | None = None,
    ):
        if not strategies.is_linear(strategy):
            raise SettingsError(
                f"Differential privacy covers the mean of the updates, and "
                f"{type(strategy).__name__} needs each of them: take FedAvg, FedAvgM, FedAdam, "
                "FedYogi, FedAdagrad or FedProx."
            )
        values = {"clip": clip, "noise": noise, "epsilon": epsilon, "delta": delta}
        for name, value in values.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise SettingsError(f"{name} is a number above 0, not {value!r}.")
        if delta >= 1:
            raise SettingsError(f"delta is a probability, not {delta!r}.")
        self.strategy, self.clip, self.epsilon, self.delta = strategy, clip, epsilon, delta
        self.fraction = float(strategies.attribute(strategy, "fraction_train") or 0.0)
        if not self.fraction:
            raise SettingsError("fraction_train is 0: no client trains.")
        if noise is None:
            if epsilon is None or num_rounds is None:
                raise SettingsError("Give noise, or epsilon and num_rounds to compute it from.")
            noise = accountant.noise_for(epsilon, delta, self.fraction, num_rounds)
        self.noise = float(noise)
        self.ledger = Ledger(delta)
        self._before: ArrayRecord | None = None
        self._expected = 0.0
        if reason := self.stop_reason():
            raise SettingsError(f"Not one round is possible: {reason}.")

    @property
    def client_config(self) -> dict[str, Any]:
        """Settings that nodes get."""
        return {CLIP: self.clip}

    @property
    def release(self) -> Release:
        """The kind of release of each round."""
        return Release(self.noise, self.fraction)

    def stop_reason(self) -> str | None:
        """Why no further round is possible, or None."""
        if self.epsilon is None:
            return None
        after = self.ledger.epsilon(self.release)
        if after <= self.epsilon:
            return None
        return f"another round would spend epsilon {after:.4g}, and the limit is {self.epsilon:g}"

    def open_folder(self, folder: Path) -> None:
        """Counts the releases of the run in a folder, and records further ones there."""
        self.ledger.open(folder)

    # -- Flower's hooks --------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to clients that are drawn one by one."""
        inner: Any = self.strategy
        inner.fraction_train = 1.0
        try:
            messages = list(inner.configure_train(server_round, arrays, config, grid))
        finally:
            inner.fraction_train = self.fraction
        self._before, self._expected = arrays, self.fraction * len(messages)
        if self.fraction == 1 or not messages:
            return messages
        self._require_many(len(messages))
        draws = random.SystemRandom()
        return [message for message in messages if draws.random() < self.fraction]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's new model from the noisy mean of the updates.

        Args:
            server_round (int): The round.
            replies (list): One reply, the mean of all.
        """
        (reply,) = replies
        if self._before is None:
            raise RuntimeError("aggregate_train is called after configure_train.")
        count = float(str(reply.content.metric_records["metrics"]["clients"]))
        name, mean = next(iter(records_in(reply.content, ArrayRecord).items()))
        reply.content[name] = ArrayRecord(
            {key: self._noisy(array, self._before[key], count) for key, array in mean.items()}
        )
        self._before = None
        self.ledger.add(self.release, round=server_round, clip=self.clip)
        inner: Any = self.strategy
        weighted_by, inner.weighted_by_key = inner.weighted_by_key, "clients"
        try:
            masters, metrics = inner.aggregate_train(server_round, [reply])
        finally:
            inner.weighted_by_key = weighted_by
        return masters, MetricRecord({**(metrics or {}), "epsilon": self.ledger.epsilon()})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """The strategy's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The strategy's."""
        self.strategy.summary()

    def _noisy(self, mean: Array, before: Array, count: float) -> Array:
        start = array_values(before).astype(np.float64)
        total = (array_values(mean).astype(np.float64) - start) * count
        noisy = add_noise(total, self.noise * self.clip)
        return Array((start + noisy / self._expected).astype(np.float32))

    def _require_many(self, num_nodes: int) -> None:
        nobody = (1 - self.fraction) ** num_nodes
        if nobody > _EMPTY_SHARE * self.delta:
            raise SettingsError(
                f"of {num_nodes} clients a fraction of {self.fraction:g} may be none at all "
                f"(probability {nobody:.2g}): train a larger fraction, or all of them "
                "(fraction_train=1.0)"
            )
