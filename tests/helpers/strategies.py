"""Every strategy of Flower, with settings for the task of seven clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

import mlx_fed as fed
from mlx_fed.rounds import loop

from .federated import CLIENT, TASK, federate

FIXED, ADAPTIVE = (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
)

MODS = {FIXED: fixedclipping_mod, ADAPTIVE: adaptiveclipping_mod}

CLIPPING = [
    DifferentialPrivacyServerSideFixedClipping,
    FIXED,
    DifferentialPrivacyServerSideAdaptiveClipping,
    ADAPTIVE,
]


def clipped(kind: type[Strategy], noise: float = 0.0) -> Strategy:
    """FedAvg with clipping at norms that some updates of this task are above."""
    if "Fixed" in kind.__name__:
        return kind(FedAvg(), noise, clipping_norm=0.3, num_sampled_clients=7)
    return kind(FedAvg(), noise, 7, initial_clipping_norm=0.2, clipped_count_stddev=noise)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": partial(FedAvgM, server_learning_rate=0.7, server_momentum=0.9),
    "FedProx": partial(FedProx, proximal_mu=0.5),
    "FedAdam": FedAdam,
    "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi,
    "QFedAvg": partial(QFedAvg, client_learning_rate=0.2, q=0.5),
    "FedMedian": FedMedian,
    "FedTrimmedAvg": FedTrimmedAvg,
    "Krum": partial(Krum, num_malicious_nodes=1),
    "MultiKrum": partial(MultiKrum, num_malicious_nodes=1, num_nodes_to_select=4),
    "Bulyan": partial(Bulyan, num_malicious_nodes=1),
    **{kind.__name__: partial(clipped, kind) for kind in CLIPPING},
}


def run_ours(strategy: Strategy, folder: Path, task: fed.Task = TASK, **settings) -> loop.Result:
    mods = [MODS[type(strategy)]] if type(strategy) in MODS else None
    app = fed.client_app(task, mods) if mods or task is not TASK else CLIENT
    return federate(strategy, folder, [app] * 7, task=task, **settings)


class Wrapper(Strategy):
    """A strategy of one's own around another, in the manner of Flower's."""

    def __init__(self, strategy: Strategy):
        self.strategy = strategy

    def configure_train(self, *arguments: Any) -> Iterable[Message]:
        return self.strategy.configure_train(*arguments)

    def aggregate_train(self, *arguments: Any) -> Any:
        return self.strategy.aggregate_train(*arguments)

    def configure_evaluate(self, *arguments: Any) -> Iterable[Message]:
        return self.strategy.configure_evaluate(*arguments)

    def aggregate_evaluate(self, *arguments: Any) -> Any:
        return self.strategy.aggregate_evaluate(*arguments)

    def summary(self) -> None: ...
