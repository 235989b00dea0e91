"""Checks of a task's settings: the values that each takes, and whether anything reads it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from types import CodeType, FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import SettingsError
from .task_settings import LIKENESS, TracedConfig, kebab_case, nearest, to_kebab

if TYPE_CHECKING:
    from .task import Task

_TYPO = 0.8
"""Likeness of names where names are free, and only what is surely a slip is refused."""


# -- values --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes.

    Attributes:
        words (str): For messages: ``"a whole number, 1 or more"``.
        accepts (callable): Whether a value is one of them.
    """

    words: str
    accepts: Callable[[Any], bool]

    def check(self, source: str, name: str, value: Any) -> None:
        """Refuses another value, by the setting's name and where it was set.

        Raises:
            SettingsError: If it is not of the kind.
        """
        if not self.accepts(value):
            where = f"{source}: {name}" if source else name
            raise SettingsError(f"{where} is {self.words}, not {value!r}.")


def whole_number(minimum: int) -> Kind:
    """Integers from ``minimum`` on; neither 2.0 nor True is one."""
    return Kind(f"a whole number, {minimum} or more", lambda v: _is_whole(v) and v >= minimum)


def number(minimum: float, maximum: float = math.inf) -> Kind:
    """Numbers of a range; infinite ones if it is open."""
    is_open = maximum == math.inf
    words = f"{minimum:g} or more" if is_open else f"from {minimum:g} to {maximum:g}"
    return Kind(f"a number, {words}", lambda v: _is_real(v) and minimum <= v <= maximum)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_real(value) and math.isfinite(value)


FINITE = Kind("a finite number", _is_finite)
WHOLE = Kind("a whole number", _is_whole)
SHARE = number(0, 1)
TEXT = Kind(
    "text (in quotes where it looks like a number: '\"12\"')", lambda value: isinstance(value, str)
)
_COUNT = whole_number(1)
_SENT = (bool, int, float, str, bytes)
_SENDABLE = Kind(
    "a number, text, true or false, or a list of one of these, as it is sent to nodes",
    lambda value: (
        isinstance(value, _SENT)
        or (
            isinstance(value, list)
            and len({type(item) for item in value}) <= 1
            and all(isinstance(item, _SENT) for item in value)
        )
    ),
)

KINDS: dict[str, Kind] = {
    "batch-size": _COUNT,
    "compress": TEXT,
    "gradient-accumulation": _COUNT,
    "local-epochs": _COUNT,
    "local-steps": _COUNT,
    "max-grad-norm": Kind("a finite number above 0", lambda v: _is_finite(v) and v > 0),
    "num-rounds": _COUNT,
    "proximal-mu": Kind("a finite number, 0 or more", lambda v: _is_finite(v) and v >= 0),
    "train-loss-key": TEXT,
}
"""The settings that the library itself reads, and their values."""

SET_BY_THE_RUN = ("seed", "server-round", "run-id")
"""Settings that each message has and that the run decides."""


# -- whether anything reads a setting ------------------------------------------------------


def check_config(
    config: TracedConfig,
    task: Task,
    readers: Iterable[Any] = (),
    *,
    previous_config: Mapping[str, Any] | None = None,
    hints: Mapping[str, str] = MappingProxyType({}),
    num_clients: int | None = None,
    are_free: bool = False,
) -> None:
    """Refuses settings that nothing reads, and values of a wrong kind.

    A setting is read if it is one of the library's, the task declares it in ``Task.config``, or it
    was looked up in ``config`` as the task was created. For any other name the code of the task's
    functions and the strategy is searched, with the functions that they call; then the optimizer
    is created, and in a simulation the first client's data, to see whether they look it up.

    Args:
        config (TracedConfig): The settings, after the task was created from them.
        task (Task): The task.
        readers (iterable): The function that creates the task, and the layers of the strategy.
        previous_config (dict, optional): The settings of the run that is resumed, which
            stay as they are.
        hints (dict, optional): Names that are no settings, and where to give the value instead.
        num_clients (int, optional): Of a simulation.
        are_free (bool): Other code may read the settings, too: only slips of the pen are refused.

    Raises:
        SettingsError: With the name, where it was set, and the name that was probably meant.
    """
    metrics = (getattr(metric, "predict", metric) for metric in task.metrics.values())
    readers = [*readers, task.optimizer, task.data, task.loss, task.train_step, *metrics]
    defaults = TracedConfig(task.config, "Task.config")
    previous_config = kebab_case(previous_config or {}, "the run's settings")
    names = KINDS.keys() | config.looked_up | dict.keys(defaults)
    unread = [name for name in dict.keys(config) if name not in names | previous_config.keys()]
    for name in sorted(dict.keys(config) & set(SET_BY_THE_RUN) - config.looked_up):
        _refuse_name(name, config.source, names, hints)
    slips = [
        name for name in dict.keys(defaults) if nearest(name, KINDS, _TYPO) not in (None, name)
    ]
    if unread or slips:
        late_names = _names_looked_up_late({*unread, *slips}, readers, task, config, num_clients)
        for name in unread:
            if name not in late_names:
                _refuse_name(name, config.source, names, hints, are_free)
        for name in slips:
            if name not in late_names | config.looked_up:
                _refuse_name(name, "Task.config", KINDS.keys(), {}, True)
    for settings in (defaults, config):
        for name, value in dict.items(settings):
            if settings is config and name in previous_config and previous_config[name] == value:
                continue
            kind = KINDS.get(name) or _kind_of(defaults.get(name))
            if name != "num-rounds":  # decided, and checked, with all who may say it
                kind.check(settings.source, name, value)


def _kind_of(default: Any) -> Kind:
    """The values that a setting takes whose default the task declares."""
    if isinstance(default, bool):
        return Kind("true or false", lambda value: value in (True, False))
    if _is_real(default) and math.isinf(default):
        return Kind(FINITE.words, lambda value: _is_finite(value) or value == default)
    if _is_real(default):
        return FINITE
    if isinstance(default, str):
        return TEXT
    if isinstance(default, list) and default:
        item = _kind_of(default[0])
        return Kind(
            f"a list, each entry {item.words}",
            lambda value: (
                _SENDABLE.accepts(value)
                and isinstance(value, list)
                and all(map(item.accepts, value))
            ),
        )
    return _SENDABLE


def _refuse_name(
    name: str,
    source: str,
    names: Collection[str],
    hints: Mapping[str, str],
    is_free: bool = False,
) -> None:
    problem = f"{source}: there is no setting {name}."
    if name in hints:
        raise SettingsError(f"{problem} Give it as {hints[name]}.")
    if name in SET_BY_THE_RUN:
        raise SettingsError(f"{source}: {name} is not to be set, each run sets its own.")
    if suggestion := nearest(name, {*names, *hints}, _TYPO if is_free else LIKENESS):
        raise SettingsError(f"{problem} Did you mean {hints.get(suggestion, suggestion)}?")
    if is_free:
        return
    raise SettingsError(
        f"{problem} There are {', '.join(sorted(names))}. A task declares its settings, with "
        "the values they have by default, in Task.config."
    )


def _names_looked_up_late(
    names: set[str],
    readers: Collection[Any],
    task: Task,
    config: TracedConfig,
    num_clients: int | None,
) -> set[str]:
    """Settings, of some, that are looked up after the task is created."""
    late_names = {to_kebab(text) for reader in readers for text in _texts_in(reader)}
    if names <= late_names:
        return late_names
    settings = {**task.config, **dict(dict.items(config)), "seed": 0, "server-round": 1}
    trace = TracedConfig({**settings, "run-id": ""})
    with suppress(Exception):  # what is wrong with it is said when it is used
        task.optimizer(trace)
    late_names |= trace.looked_up
    if num_clients is not None and not names <= late_names:
        with suppress(Exception):
            task.data(0, num_clients)
        late_names |= config.looked_up
    return late_names


def _texts_in(reader: Any, codes: set[CodeType] | None = None) -> Iterator[str]:
    """The texts in a function's code, or in that of a class's methods, and in the functions of the
    same package that are called by name."""
    codes = set() if codes is None else codes
    reader = inspect.unwrap(getattr(reader, "func", reader))  # of a partial function
    function = getattr(reader, "__func__", reader)  # of a method
    if isinstance(function, FunctionType):
        if function.__code__ in codes:
            return
        codes.add(function.__code__)
        yield from _constants(function.__code__)
        for callee in _functions_in(function):
            yield from _texts_in(callee, codes)
        if function is reader:
            return
        reader = reader.__self__  # with its other methods
    for kind in reader.__mro__ if isinstance(reader, type) else type(reader).__mro__:
        if kind.__module__.startswith("flwr."):  # Flower's strategies write settings, no more
            continue
        for method in vars(kind).values():
            if isinstance(method, FunctionType):
                yield from _texts_in(method, codes)


def _functions_in(function: FunctionType) -> Iterator[FunctionType]:
    """The functions of its package that a function's code names."""
    package = (function.__module__ or "").partition(".")[0]
    values = [function.__globals__.get(name) for name in _names(function.__code__)]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it has no value yet
            values.append(cell.cell_contents)
    for value in values:
        if isinstance(value, FunctionType) and value.__module__.partition(".")[0] == package:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _constants(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _constants(constant)
        elif isinstance(constant, (tuple, frozenset)):
            yield from (item for item in constant if isinstance(item, str))
