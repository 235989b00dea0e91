"""Set-up of a run, the same for a server, a simulation and a ServerApp."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from flwr.serverapp.strategy import Strategy

from ..errors import SettingsError
from ..events import Listener, Notice
from ..runs.history import History
from ..runs.previous import Previous, previous_of
from ..runs.run_folder import run_folder
from ..settings_check import KINDS, check_config
from ..system import devices
from ..task import Config, Task, TaskSource, make_task
from ..task_settings import TracedConfig, kebab_case
from ..training.trainer import Trainer
from . import named_strategies, strategies
from .changes import changed_config
from .initial_weights import load_initial_weights
from .settings import RunSettings

StrategySource = Strategy | str | Callable[[Config], Strategy]
"""A strategy, the name of one of Flower's, or a function of the settings that returns one."""


class RunSetup(NamedTuple):
    """A run before its first round, in the order of :func:`mlx_fed.rounds.loop.run`'s arguments."""

    strategy: Strategy
    trainer: Trainer
    settings: RunSettings
    history: History


def set_up_run(
    source: TaskSource,
    strategy: StrategySource | None,
    settings: RunSettings,
    num_rounds: int | None,
    *,
    runs: Path | str,
    name: str | None,
    resume: Path | str | None = None,
    device: str | None,
    listeners: Sequence[Listener],
    description: dict[str, Any] | None = None,
    num_clients: int | None = None,
    server_names: Collection[str] = (),
) -> RunSetup:
    """Checks what a run is started with, builds its model and opens its folder, in this order.

    Args:
        source (Task or callable): The task, or a function of ``settings.config`` that returns it.
        strategy (Strategy, str or callable, optional): The strategy. Default: FedAvg.
        settings (RunSettings): The run's.
        num_rounds (int, optional): Rounds to train. Default: ``num-rounds`` of the config, of the
            run that is resumed, or of the task; else ``settings.num_rounds``.
        runs (Path): Where runs are kept.
        name (str, optional): The run's name.
        resume (str or Path, optional): The run to resume.
        device (str, optional): ``"cpu"`` or ``"gpu"``.
        listeners (sequence): Of the history.
        description (dict, optional): Facts about the run for its record.
        num_clients (int, optional): Of a simulation.
        server_names (collection): Of ``settings.config``: names that are not sent to nodes. If
            there are any, other code may read the config, too, and only slips of the pen in other
            names are refused.

    Raises:
        FedError: If a setting, the task, the strategy or the run to resume does not fit. No folder
            is created then.
    """
    if resume is not None and settings.initial is not None:
        raise SettingsError(
            "A resumed run continues from its own weights: leave out initial= (--weights), or "
            "start a new run with it."
        )
    device_name = devices.use(device)
    config = TracedConfig.of(settings.config)
    previous = previous_of(run_folder(runs, name, resume)) if resume is not None else Previous()
    config = changed_config(config, settings.change, previous if resume is not None else None)
    task = make_task(source, config)
    readers: list[Any] = [function for function in (source, strategy) if callable(function)]
    if callable(strategy) and not isinstance(strategy, type):
        strategy = strategy(config)
    min_nodes = 1 if num_clients is not None else settings.min_nodes or 2
    strategy = named_strategies.find(strategy, min_nodes)
    readers += strategies.layers(strategy)
    config = config.without(server_names)
    check_config(
        config,
        task,
        readers,
        previous_config=previous.config,
        hints={name: name for name in server_names} or _hints(strategy),
        num_clients=num_clients,
        are_free=bool(server_names),
    )
    num_rounds = _num_rounds(settings, num_rounds, config, previous, task)
    selectors = settings.select_nodes
    settings = replace(
        settings,
        config=config,
        num_rounds=num_rounds,
        select_nodes=previous.select_nodes if selectors is None else selectors,
    )
    trainer = Trainer(task, settings.seed)
    notes = [] if settings.initial is None else load_initial_weights(trainer, settings.initial)
    history = History(run_folder(runs, name, resume), tuple(listeners), description)
    if open_folder := strategies.attribute(strategy, "open_folder"):
        open_folder(history.folder)
    for note in notes:
        history.notify(Notice(note))
    if devices.is_slow(device_name):
        history.notify(Notice(f"computing on {device_name}"))
    return RunSetup(strategy, trainer, settings, history)


def _hints(strategy: Strategy) -> dict[str, str]:
    """Hints for names that are no settings of the task: the argument or option to use instead."""
    hints = {field.name: f"a field of the task, Task({field.name}=...)" for field in fields(Task)}
    for layer in strategies.layers(strategy):
        for argument in named_strategies.arguments_of(type(layer))[0]:
            option = f"-s {argument.replace('_', '-')}=..."
            hints[argument] = f"an argument of the strategy, {option}"
    for field in fields(RunSettings):
        flag = f"--{field.name.replace('_', '-')}"
        hints[field.name] = f"{flag}, or {field.name}= in Python"
    return kebab_case(hints)


def _num_rounds(
    settings: RunSettings,
    argument: int | None,
    config: TracedConfig,
    previous: Previous,
    task: Task,
) -> int:
    """The number of rounds, by the first who gives one; all are checked.

    Raises:
        SettingsError: If it is not a whole number of 1 or more.
    """
    key = "num-rounds"
    sources = {
        "num_rounds": argument,
        f"{config.source}: {key}": config.get(key),
        "num_rounds of the run": previous.num_rounds or None,
        f"Task.config: {key}": task.config.get(key),
        "num_rounds of the settings": settings.num_rounds,
    }
    values = {source: value for source, value in sources.items() if value is not None}
    for source, value in values.items():
        KINDS[key].check("", source, value)
    return next(iter(values.values()))
