"""How a run is led."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..arrays.named_arrays import Arrays
from ..errors import SettingsError
from ..settings_check import KINDS, WHOLE, check_config, number, whole_number
from ..task import Config, Task, TaskSource, make_task
from ..task_settings import TracedConfig, kebab_case, nearest, plain
from . import strategies
from .named_strategies import arguments_of
from .stopping import StopFn, parse_target

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..training.trainer import Trainer

EvaluateFn = Callable[[int, Arrays, Arrays], Mapping[str, float | str] | None]


_DEFAULT_ROUNDS = 3
VALUES = {
    "num_rounds": whole_number(1),
    "seed": WHOLE,
    "min_nodes": whole_number(1),
    "wait": number(0),
    "round_timeout": number(0),
    "keep": whole_number(0),
    "min_replies": whole_number(1),
    "max_repeats": whole_number(0),
    "max_examples": number(1),
    "max_update_norm": number(1),
    "patience": whole_number(0),
}
"""The values that settings of a run take."""


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
        min_replies (int): Training replies that have to count for a round to be whole. With fewer
            it is repeated. Default: ``1``.
        max_repeats (int): How often a round is repeated before the run stops, to be resumed when
            more nodes are well. Default: ``2``.
        max_examples (float, optional): Examples that a node may say it has trained or evaluated on:
            they weigh its reply. Default: 1,000 times the median of the others in the round, or
            100,000, where there are three replies or more; in a simulation any number.
        max_update_norm (float, optional): How many times the median of all updates' norms one of
            at least three may have; ``math.inf`` for no limit. Default: 100 times the median of
            the others', or as much as the norm of the model where that is more; in a simulation
            no limit.
        keep (int): Checkpoints to keep, beside the best; 0 writes none. Default: ``3``.
        test (tuple, optional): Held-out examples of the server's own, as ``Data.test``: the
            task's loss and metrics of the global model on them are recorded each round.
        evaluate_fn (callable, optional): ``evaluate_fn(round, parameters, statistics)`` returns
            other metrics of the global model, or text such as a sample of what it writes.
        patience (int, optional): The run ends after so many rounds without a new lowest loss, the
            loss by which the best round is chosen; 0 is no limit. Default: no limit.
        target (str or dict, optional): The run ends when a metric is reached:
            ``"accuracy=0.95"`` or more, ``"loss=0.1"`` or less, ``"ppl<=12"``, or all of
            ``{"accuracy": 0.95, "loss": 0.1}``. Default: none.
        stop (callable, optional): ``stop(rounds)`` sees the records of the rounds so far after
            each one, and ends the run with a reason, a text, or True.
    """

    num_rounds: int = _DEFAULT_ROUNDS
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    min_nodes: int | None = None
    wait: float = 600.0
    round_timeout: float = 3600.0
    min_replies: int = 1
    max_repeats: int = 2
    max_examples: float | None = None
    max_update_norm: float | None = None
    keep: int = 3
    test: Sequence[Any] | None = None
    evaluate_fn: EvaluateFn | None = None
    patience: int | None = None
    target: str | Mapping[str, float] | None = None
    stop: StopFn | None = None

    def __post_init__(self) -> None:
        for name, kind in VALUES.items():
            if (value := plain(getattr(self, name))) is not None:
                kind.check("", name, value)
            setattr(self, name, value)
        self.config = TracedConfig.of(self.config)
        parse_target(self.target)
        for name in ("stop", "evaluate_fn"):
            if (function := getattr(self, name)) is not None and not callable(function):
                raise SettingsError(f"{name} is a function, not {function!r}.")
        if self.test is not None:
            _check_arrays(self.test)

    def for_the_record(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            **vars(self),
            "test": None if self.test is None else len(self.test[0]),
            "evaluate_fn": self.evaluate_fn is not None,
            "stop": self.stop is not None,
        }


def settings_of(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Settings:
    """The settings among a function's arguments, all that are no parameters of its own.

    Args:
        function (callable): Such as :func:`mlx_fed.simulate`.
        arguments (dict): By name, as it was called with them.

    Raises:
        SettingsError: If there is no such argument, or its value cannot be.
    """
    names = {item.name for item in fields(Settings)}
    for name in arguments:
        if name in names:
            continue
        there_is_none = f"{function.__name__}() has no argument {name!r}."
        names |= inspect.signature(function).parameters.keys() - {"settings"}
        (setting,) = kebab_case({name: None})
        if setting in KINDS:
            raise SettingsError(f'{there_is_none} Write config={{"{setting}": ...}}.')
        if meant := nearest(name, names):
            raise SettingsError(f"{there_is_none} Did you mean {meant}?")
        raise SettingsError(
            f"{there_is_none} It has {', '.join(sorted(names))}. Settings of the task are given as "
            f'config={{"{setting}": ...}}.'
        )
    return Settings(**arguments)


def make_checked_task(
    source: TaskSource,
    settings: Settings,
    strategy: Strategy,
    stored: Mapping[str, Any] | None = None,
    num_clients: int | None = None,
) -> Task:
    """The task, made of ``settings.config``, all of which has to be read by something.

    Args:
        source (Task or callable): The task, or a function that makes it.
        settings (Settings): What the run is started with.
        strategy (Strategy): Its strategy.
        stored (dict, optional): The settings of the run that is resumed, as they were sent.
        num_clients (int, optional): Of a simulation.

    Raises:
        SettingsError: If nothing reads a setting, or its value cannot be.
    """
    config = TracedConfig.of(settings.config)
    task = make_task(source, config)
    layers = list(strategies.layers(strategy))
    elsewhere = {
        **{item.name: f"a field of the task, Task({item.name}=...)" for item in fields(Task)},
        **{
            name: f"an argument of the strategy, -s {name.replace('_', '-')}=..."
            for layer in layers
            for name in arguments_of(type(layer))[0]
        },
        **{
            item.name: f"--{item.name.replace('_', '-')}, or {item.name}= in Python"
            for item in fields(Settings)
        },
    }
    readers = layers if isinstance(source, Task) else [source, *layers]
    check_config(
        config,
        task,
        readers,
        previous_config=stored,
        hints=kebab_case(elsewhere),
        num_clients=num_clients,
    )
    return task


def decide_rounds(
    settings: Settings, task: Config, num_rounds: int | None = None, recorded: int | None = None
) -> None:
    """Settles how many rounds there are, for the server and in what is sent to clients.

    Args:
        settings (Settings): Gets the number, and its ``config`` as ``num-rounds``.
        task (dict): The task's own settings.
        num_rounds (int, optional): The argument, which stands over all else; ``num-rounds`` in
            ``settings.config`` comes next.
        recorded (int, optional): What a run that is resumed was last asked for, which stands
            over the task's.

    Raises:
        SettingsError: If it is not a whole number of 1 or more.
    """
    key = "num-rounds"
    sources = (
        ("num_rounds", num_rounds),
        (f"{getattr(settings.config, 'source', 'config')}: {key}", settings.config.get(key)),
        ("num_rounds of the run", recorded),
        (f"Task.config: {key}", task.get(key)),
    )
    for name, rounds in sources:
        if rounds is not None:
            KINDS[key].check("", name, rounds)
    settings.num_rounds = next(
        (rounds for _, rounds in sources if rounds is not None), settings.num_rounds
    )
    settings.config = {**settings.config, key: settings.num_rounds}


def require_one_model(settings: Settings, trainer: Trainer) -> None:
    """Says where the server cannot evaluate: what clients keep to themselves never gets there.

    Raises:
        SettingsError: If there are test examples and clients keep a part of the model.
    """
    if settings.test is None:
        return
    if len(trainer.spec) < len(trainer.slots.parameters):
        kept = "parameters of its own (Task.personal)"
    elif len(trainer.statistics_spec) < len(trainer.slots.statistics):
        kept = 'running statistics of its own (Task.statistics or Task.buffers is "local")'
    else:
        return
    raise SettingsError(
        f"The server cannot evaluate on test: each client keeps {kept}, which never travel. "
        "Leave out test; clients evaluate on their own examples."
    )


def _check_arrays(test: Any) -> None:
    if not isinstance(test, (tuple, list)) or not test:
        kind = "a stream" if callable(test) else type(test).__name__
        raise SettingsError(
            f"test is a tuple of arrays that share their leading axis, not {kind}: "
            "test=(images, labels)."
        )
    sizes = [len(array) if getattr(array, "shape", ()) else None for array in test]
    if None in sizes or len(set(sizes)) != 1:
        raise SettingsError(f"test takes arrays of one length; these have {sizes}.")
    if not sizes[0]:
        raise SettingsError("test has no examples: leave it out, or give some.")
