"""Settings of a run: rounds, limits, checkpoints, evaluation by the server, early stopping."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..errors import SettingsError
from ..settings_check import KINDS, WHOLE, number, whole_number
from ..task_settings import TracedConfig, nearest, plain, to_kebab
from ..tracebacks import definition, misfit
from ..transforms.compression import parse_compression
from .initial_weights import InitialWeights
from .node_selection import NodeSelectors, parse_selection
from .stopping import StopFn, parse_target

if TYPE_CHECKING:
    from ..training.trainer import Trainer

P = ParamSpec("P")
R = TypeVar("R")
EvaluateFn = Callable[..., Mapping[str, float | str] | None]
"""``evaluate_fn(round, parameters, statistics)``: metrics of the global model."""


def takes_record(evaluate_fn: EvaluateFn) -> bool:
    """Whether a function is called as Flower does: ``evaluate_fn(round, arrays)``."""
    return bool(misfit(evaluate_fn, 1, {}, {})) and misfit(evaluate_fn, 1, {}) is None


VALUES = {
    "num_rounds": whole_number(1),
    "seed": WHOLE,
    "min_nodes": whole_number(1),
    "wait": number(0),
    "round_timeout": number(0),
    "keep": whole_number(0),
    "grace": number(0),
    "min_replies": whole_number(1),
    "max_repeats": whole_number(0),
    "max_examples": number(1),
    "max_update_norm": number(1),
    "patience": whole_number(0),
}
"""The values that settings of a run take."""


@dataclass
class RunSettings:
    """The settings of a run, as :func:`mlx_fed.serve` documents them.

    Raises:
        SettingsError: If a value is not of its kind.
    """

    num_rounds: int = 3
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    min_nodes: int | None = None
    select_nodes: NodeSelectors | None = None
    wait: float = 600.0
    round_timeout: float = 3600.0
    grace: float | None = None
    min_replies: int = 1
    max_repeats: int = 2
    max_examples: float | None = None
    max_update_norm: float | None = None
    compress: str | None = None
    keep: int = 3
    test: Sequence[Any] | None = None
    evaluate_fn: EvaluateFn | None = None
    patience: int | None = None
    target: str | Mapping[str, float] | None = None
    stop: StopFn | None = None
    initial: InitialWeights | None = None
    change: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, kind in VALUES.items():
            value, default = plain(getattr(self, name)), getattr(type(self), name)
            if value is not None or default is not None:
                kind.check("", name, value)
            setattr(self, name, value)
        self.config = TracedConfig.of(self.config)
        if self.compress is not None:
            self.config = self.config.without(())
            self.config["compress"] = self.compress
        parse_compression(dict.get(self.config, "compress", ""))
        parse_target(self.target)
        parse_selection(self.select_nodes)
        for name in ("stop", "evaluate_fn"):
            if (function := getattr(self, name)) is not None and not callable(function):
                raise SettingsError(f"{name} is a function, not {function!r}.")
        function = self.evaluate_fn
        reason = misfit(function, 1, {}, {}) if function is not None else None
        if function is not None and reason and not takes_record(function):
            raise SettingsError(
                f"evaluate_fn{definition(function)} is called as evaluate_fn(round, parameters, "
                f"statistics), or evaluate_fn(round, arrays) as Flower does, and does not take "
                f"that: {reason}."
            )
        if self.test is not None:
            _check_arrays(self.test)

    def for_the_record(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            **vars(self),
            "test": None if self.test is None else len(self.test[0]),
            "evaluate_fn": self.evaluate_fn is not None,
            "stop": self.stop is not None,
            "change": dict(self.change or {}),
            "initial": _describe_weights(self.initial),
        }


def select_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a function's arguments that :class:`RunSettings` has.

    ``num_rounds`` is not among them: where it is None, others say how many there are.
    """
    names = {field.name for field in fields(RunSettings)} - {"num_rounds"}
    return {name: value for name, value in arguments.items() if name in names}


def with_argument_hints(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an unknown argument by name is refused with the one that was probably meant.

    Raises:
        SettingsError: Of the decorated function, in place of a TypeError.
    """
    names = inspect.signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise SettingsError(_unknown_argument(function.__name__, name, sorted(names)))
        return function(*args, **kwargs)

    return call


def _unknown_argument(function: str, name: str, names: Sequence[str]) -> str:
    setting = to_kebab(name)
    problem = f"{function}() has no argument {name!r}."
    if setting in KINDS:
        return f'{problem} Write config={{"{setting}": ...}}.'
    if suggestion := nearest(name, names):
        return f"{problem} Did you mean {suggestion}?"
    return (
        f"{problem} It has {', '.join(names)}. Settings of the task are given as "
        f'config={{"{setting}": ...}}.'
    )


def require_one_model(settings: RunSettings, trainer: Trainer) -> None:
    """Refuses test examples of the server if clients keep arrays of the model to themselves.

    Raises:
        SettingsError: If there are both.
    """
    if settings.test is None:
        return
    if len(trainer.spec) < len(trainer.slots.parameters):
        arrays = "parameters of its own (Task.personal)"
    elif len(trainer.statistics_spec) < len(trainer.slots.statistics):
        arrays = 'running statistics of its own (Task.statistics or Task.buffers is "local")'
    else:
        return
    raise SettingsError(
        f"The server cannot evaluate on test: each client keeps {arrays}, which never travel. "
        "Leave out test; clients evaluate on their own examples."
    )


def _describe_weights(initial: InitialWeights | None) -> str | None:
    if initial is None:
        return None
    return f"{len(initial)} arrays" if isinstance(initial, Mapping) else str(initial)


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
