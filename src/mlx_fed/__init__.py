"""Federated learning for MLX models, on Flower's engine.

Import it before ``mlx.core`` on Linux: it brings a fast BLAS. Everything else is imported when
it is first used, so that ``import mlx_fed`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import FedError
from .system import blas, devices
from .task import Data, DatasetMetric, Task

if TYPE_CHECKING:
    from .clientapp import client_app
    from .fleet.node import join
    from .fleet.server import serve
    from .runs.model_file import load_model
    from .runs.result import Result
    from .serverapp import server_app
    from .simulation.faults import Faults
    from .simulation.simulate import simulate
    from .training.confusion_matrix import ConfusionMatrix

__version__ = "0.1.0"

__all__ = [
    "ConfusionMatrix",
    "Data",
    "DatasetMetric",
    "Faults",
    "FedError",
    "Result",
    "Task",
    "client_app",
    "join",
    "load_model",
    "serve",
    "server_app",
    "simulate",
]

_LATE = {
    "ConfusionMatrix": "training.confusion_matrix",
    "Faults": "simulation.faults",
    "Result": "runs.result",
    "client_app": "clientapp",
    "join": "fleet.node",
    "load_model": "runs.model_file",
    "serve": "fleet.server",
    "server_app": "serverapp",
    "simulate": "simulation.simulate",
}

blas.load_fast_blas()
devices.require_backend()


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LATE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
