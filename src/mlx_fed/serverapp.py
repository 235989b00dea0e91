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

from .events import Event
from .monitoring.server_terminal import server_line
from .rounds import loop, named_strategies, strategies
from .rounds.settings import VALUES, decide_rounds, settings_of
from .runs.history import History, new_run_folder
from .settings_check import check_config
from .system import devices
from .task import Config, TaskSource, make_task
from .task_settings import TracedConfig, kebab_case
from .training.trainer import Trainer

_SOURCE = "The run's config"
"""What ``flwr run --run-config`` and the app's pyproject.toml set, for messages."""
_FLOWER = logging.getLogger("flwr")
_SETTINGS = (
    "seed",
    "min-nodes",
    "wait",
    "round-timeout",
    "min-replies",
    "max-repeats",
    "max-examples",
    "max-update-norm",
    "patience",
    "target",
)
_SERVERS_OWN = {*_SETTINGS, "runs", "name"}


def server_app(
    task: TaskSource,
    strategy: Strategy | str | Callable[[Config], Strategy] | None = None,
    *,
    runs: Path | str | None = None,
    device: str | None = "cpu",
    **settings: Any,
) -> ServerApp:
    """The task as a Flower ServerApp.

    Args:
        task (Task or callable): What is trained, or a function that makes it from the run's
            settings (``context.run_config``), which stand over ``config``.
        strategy (Strategy, str or callable): Any Flower strategy, the name of one, or a function
            of the settings that makes one. Default: FedAvg, of ``min_nodes`` nodes or 2.
        runs (Path, optional): Where runs are kept. Default: the setting ``runs``, or ``runs``;
            below the folder that the SuperLink was started in, unless it is a whole path.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.
        settings: As :class:`~mlx_fed.rounds.settings.Settings` has them. In the run's settings
            ``num-rounds`` (unless it is 0), ``seed``, ``min-nodes``, ``wait``,
            ``round-timeout``, ``min-replies``, ``max-repeats``, ``max-examples``,
            ``max-update-norm``, ``patience`` and ``target`` stand over these, and ``name`` names
            the run's folder.

    Returns:
        flwr.serverapp.ServerApp: Runs under ``flwr run``, on machines and in simulation.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_config = kebab_case(context.run_config, _SOURCE)
        if run_config.get("num-rounds") == 0:
            del run_config["num-rounds"]  # an app's settings need a default for what may change
        values = {**kebab_case(settings.get("config", {})), **run_config}
        overrides = {key.replace("-", "_"): values[key] for key in _SETTINGS if key in values}
        for name in overrides.keys() & VALUES.keys():
            VALUES[name].check(_SOURCE, name.replace("_", "-"), overrides[name])
        leading = settings_of(server_app, {**settings, **overrides, "config": values})
        config = TracedConfig(values, _SOURCE)
        devices.use(device)
        made = make_task(task, config)
        from_config = strategy(config) if callable(strategy) else strategy
        chosen = named_strategies.find(from_config, leading.min_nodes or 2)
        sent = {key: value for key, value in values.items() if key not in _SERVERS_OWN}
        leading.config = TracedConfig(sent, _SOURCE)
        leading.config.looked_up = config.looked_up
        readers = [each for each in (task, strategy) if callable(each)]
        check_config(
            leading.config,
            made,
            [*readers, *strategies.layers(chosen)],
            hints={key: key for key in _SERVERS_OWN},
            are_free=True,
        )
        decide_rounds(
            leading, made.config, run_config.get("num-rounds", settings.get("num_rounds"))
        )
        place = Path(runs or str(values.get("runs", "runs"))).expanduser().resolve()
        history = History(new_run_folder(place, _name(values)), (_log,))
        _FLOWER.info("The run's folder: %s", history.folder)
        with _own_lines_only():
            loop.run(grid, chosen, Trainer(made, leading.seed), leading, history)

    return app


def _name(config: Config) -> str | None:
    name = str(config.get("name", ""))
    return name or None


def _log(event: Event) -> None:
    """Flower gathers a ServerApp's log lines and shows them with ``flwr run --stream``."""
    line = server_line(event)
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
