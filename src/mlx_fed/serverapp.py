"""A task as a Flower ServerApp, for ``flwr run``: the same round loop on Flower's own grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from . import devices, rounds, strategies
from .history import History, new_run_folder
from .progress import server_line
from .settings import Settings, decide_rounds
from .task import Config, TaskSource, make_task
from .training import Trainer

_FLOWER = logging.getLogger("flwr")
_SETTINGS = {
    "seed": int,
    "min-nodes": int,
    "wait": float,
    "round-timeout": float,
    "min-replies": int,
    "max-repeats": int,
    "max-examples": float,
    "max-update-norm": float,
}
_SERVERS_OWN = {*_SETTINGS, "runs", "name"}


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
            settings (``context.run_config``), which stand over ``config``.
        strategy (Strategy or callable): Any Flower strategy, or a function of the settings
            that makes one. Default: FedAvg, of ``min_nodes`` nodes or 2.
        runs (Path, optional): Where runs are kept. Default: the setting ``runs``, or ``runs``;
            below the folder that the SuperLink was started in, unless it is a whole path.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.
        settings: As :class:`~mlx_fed.settings.Settings` has them. In the run's settings
            ``num-rounds`` (unless it is 0), ``seed``, ``min-nodes``, ``wait``,
            ``round-timeout``, ``min-replies``, ``max-repeats``, ``max-examples`` and
            ``max-update-norm`` stand over these, and ``name`` names the run's folder.

    Returns:
        flwr.serverapp.ServerApp: Runs under ``flwr run``, on machines and in simulation.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config)
        if config.get("num-rounds") == 0:
            del config["num-rounds"]  # an app's settings need a default for what may be changed
        config = {**settings.get("config", {}), **config}
        own = {
            key.replace("-", "_"): kind(config[key])
            for key, kind in _SETTINGS.items()
            if key in config
        }
        sent = {key: value for key, value in config.items() if key not in _SERVERS_OWN}
        leading = Settings(**{**settings, **own, "config": sent})
        devices.use(device)
        made = make_task(task, config)
        asked: Any = context.run_config.get("num-rounds") or settings.get("num_rounds")
        decide_rounds(leading, made.config, asked)
        given = strategy(config) if callable(strategy) else strategy
        chosen = given or strategies.default(leading.min_nodes)
        place = Path(runs or str(config.get("runs", "runs"))).expanduser().resolve()
        history = History(new_run_folder(place, _name(config)), (_log,))
        _FLOWER.info("The run's folder: %s", history.folder)
        with _own_lines_only():
            rounds.run(grid, chosen, Trainer(made, leading.seed), leading, history)

    return app


def _name(config: Config) -> str | None:
    name = str(config.get("name", ""))
    return name or None


def _log(event: str, fields: dict[str, Any]) -> None:
    """Flower gathers a ServerApp's log lines and shows them with ``flwr run --stream``."""
    line = server_line(event, fields)
    if line:
        _FLOWER.info("%s", line)


@contextmanager
def _own_lines_only() -> Iterator[None]:
    """Keeps the strategy's four lines a round out of the log, where one of ours says more."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("configure_", "aggregate_"))

    _FLOWER.addFilter(is_wanted)
    try:
        yield
    finally:
        _FLOWER.removeFilter(is_wanted)
