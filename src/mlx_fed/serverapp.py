"""A task as a Flower ServerApp, for ``flwr run``: the same round loop on Flower's grid."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .events import Event
from .monitoring.server_terminal import server_line
from .rounds import loop
from .rounds.initial_weights import InitialWeights
from .rounds.node_selection import NodeSelectors
from .rounds.run_setup import StrategySource, set_up_run
from .rounds.settings import VALUES, EvaluateFn, RunSettings, select_settings, with_argument_hints
from .rounds.stopping import StopFn
from .task import TaskSource
from .task_settings import TracedConfig, kebab_case, to_kebab

_SOURCE = "The run's config"
"""What ``flwr run --run-config`` and the app's pyproject.toml set, for messages."""
_FLOWER = logging.getLogger("flwr")
_OVERRIDES = (VALUES.keys() - {"num_rounds"}) | {"target", "select_nodes"}
"""Settings that the run's config may have, in place of the arguments."""
_SERVER_NAMES = {to_kebab(name) for name in _OVERRIDES} | {"runs", "name"}


@with_argument_hints
def server_app(
    task: TaskSource,
    strategy: StrategySource | None = None,
    num_rounds: int | None = None,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    min_nodes: int | None = None,
    select_nodes: NodeSelectors | None = None,
    wait: float = 600.0,
    round_timeout: float = 3600.0,
    grace: float | None = None,
    min_replies: int = 1,
    max_repeats: int = 2,
    max_examples: float | None = None,
    max_update_norm: float | None = None,
    compress: str | None = None,
    keep: int = 3,
    test: Sequence[Any] | None = None,
    evaluate_fn: EvaluateFn | None = None,
    patience: int | None = None,
    target: str | Mapping[str, float] | None = None,
    stop: StopFn | None = None,
    initial: InitialWeights | None = None,
    runs: Path | str | None = None,
    device: str | None = "cpu",
) -> ServerApp:
    """The task as a Flower ServerApp.

    Args:
        task (Task or callable): What is trained, or a function that returns it for the run's
            settings (``context.run_config``), which stand over ``config``.
        strategy (Strategy, str or callable, optional): As :func:`mlx_fed.serve` has it.
        num_rounds (int, optional): As :func:`mlx_fed.serve` has it, and the other settings that
            are not listed here. In the run's config ``num-rounds`` (unless it is 0), ``target``,
            ``select-nodes`` and all others that are numbers stand over these, and ``name`` names
            the run's folder.
        runs (Path, optional): Where runs are kept. Default: the setting ``runs``, or ``runs``;
            below the folder that the SuperLink was started in, unless it is a whole path.
        device (str, optional): ``"cpu"`` or ``"gpu"``, where the server aggregates.

    Returns:
        flwr.serverapp.ServerApp: Runs under ``flwr run``, on machines and in simulation.
    """
    arguments = select_settings(locals())
    RunSettings(**arguments)  # what is wrong with them is said now
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_config = kebab_case(context.run_config, _SOURCE)
        if run_config.get("num-rounds") == 0:
            del run_config["num-rounds"]  # an app's settings need a default for what may change
        values = {**kebab_case(config or {}), **run_config}
        overrides = {n: values[to_kebab(n)] for n in _OVERRIDES if to_kebab(n) in values}
        for name in overrides.keys() & VALUES.keys():
            VALUES[name].check(_SOURCE, to_kebab(name), overrides[name])
        overrides["config"] = TracedConfig(values, _SOURCE)
        if "compress" in values:
            overrides["compress"] = None
        setup = set_up_run(
            task,
            strategy,
            RunSettings(**arguments | overrides),
            run_config.get("num-rounds", num_rounds),
            runs=Path(runs or str(values.get("runs", "runs"))).expanduser().resolve(),
            name=str(values.get("name", "")) or None,
            device=device,
            listeners=(_log,),
            server_names=_SERVER_NAMES,
        )
        _FLOWER.info("The run's folder: %s", setup.history.folder)
        with _own_lines_only():
            loop.run(grid, *setup)

    return app


def _log(event: Event) -> None:
    """Flower gathers a ServerApp's log lines and shows them with ``flwr run --stream``."""
    line = server_line(event)
    if line:
        _FLOWER.info("%s", line)


@contextmanager
def _own_lines_only() -> Iterator[None]:
    """Context in which the strategy's four lines a round are not logged: one line of ours replaces
    them."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("configure_", "aggregate_"))

    _FLOWER.addFilter(is_wanted)
    try:
        yield
    finally:
        _FLOWER.removeFilter(is_wanted)
