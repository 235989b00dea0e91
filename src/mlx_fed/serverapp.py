"""A task as a Flower ServerApp, for ``flwr run``: the same round loop on Flower's own grid."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from . import devices, rounds
from .history import History, new_run_folder
from .progress import server_line
from .task import Config, TaskSource, make_task
from .training import Trainer


def server_app(
    task: TaskSource,
    strategy: Strategy | Callable[[Config], Strategy] | None = None,
    *,
    runs: Path | str | None = None,
    device: str | None = "cpu",
    **settings: Any,
) -> ServerApp:
    """The task as a Flower ServerApp.

    Args:
        task (Task or callable): What is trained, or a function that makes it from the run's
            settings (``context.run_config``).
        strategy (Strategy or callable): Any Flower strategy, or a function of the settings
            that makes one. Default: ``FedAvg()``.
        runs (Path, optional): Where runs are kept. Default: the setting ``runs``, or ``runs``
            below where the SuperLink was started.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.
        settings: As :class:`~mlx_fed.rounds.Settings` has them; ``num-rounds``, ``seed`` and
            ``min-nodes`` in the run's settings stand over these.

    Returns:
        flwr.serverapp.ServerApp: Runs under ``flwr run``, on machines and in simulation.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config)
        leading = rounds.Settings(**settings)
        leading.seed = int(config.get("seed", leading.seed))
        if "min-nodes" in config:
            leading.min_nodes = int(config["min-nodes"])
        leading.config = {**config, **leading.config}
        devices.use(device)
        made = make_task(task, config)
        task_rounds = made.config.get("num-rounds", leading.num_rounds)
        leading.num_rounds = int(config.get("num-rounds", task_rounds))
        chosen = strategy(config) if callable(strategy) else strategy or FedAvg()
        folder = new_run_folder(runs or str(config.get("runs", "runs")), _name(config))
        history = History(folder, (_log,))
        history.write_settings({**asdict(leading), "strategy": type(chosen).__name__})
        rounds.run(grid, chosen, Trainer(made, leading.seed), leading, history)

    return app


def _name(config: Config) -> str | None:
    name = str(config.get("name", ""))
    return name or None


def _log(event: str, fields: dict[str, Any]) -> None:
    """Flower gathers a ServerApp's log lines and shows them with ``flwr run --stream``."""
    line = server_line(event, fields)
    if line:
        logging.getLogger("flwr").info(line)
