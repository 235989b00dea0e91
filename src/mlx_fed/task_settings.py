"""A task's settings (``config``): how they are spelled, which there are, and what values they take.

Imports nothing of ours but the exceptions: tasks are made with it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from types import CodeType, FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any

from .errors import SettingsError

if TYPE_CHECKING:
    from .task import Task

_NEAR = 0.6
"""Likeness of a name to the one that was probably meant, as difflib's ratio."""
_TYPO = 0.8
"""The same where names are free, and only what is surely a slip is refused."""


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


def whole_number(least: int) -> Kind:
    """Integers from ``least`` on; neither 2.0 nor True is one."""
    return Kind(f"a whole number, {least} or more", lambda v: _is_whole(v) and v >= least)


def number(least: float, most: float = math.inf) -> Kind:
    """Numbers of a range; infinite ones if it is open."""
    words = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
    return Kind(f"a number, {words}", lambda v: _is_real(v) and least <= v <= most)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_real(value) and math.isfinite(value)


FINITE = Kind("a finite number", _is_finite)
WHOLE = Kind("a whole number", _is_whole)
SHARE = number(0, 1)
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
    "local-epochs": _COUNT,
    "local-steps": _COUNT,
    "max-grad-norm": Kind("a finite number above 0", lambda v: _is_finite(v) and v > 0),
    "num-rounds": _COUNT,
    "proximal-mu": Kind("a finite number, 0 or more", lambda v: _is_finite(v) and v >= 0),
    "train-loss-key": Kind("text", lambda value: isinstance(value, str)),
}
"""The settings that the library itself reads, and their values."""

SET_BY_THE_RUN = ("seed", "server-round", "run-id")
"""Settings that each message has and that the run decides."""


# -- names ---------------------------------------------------------------------------------


def kebab_case(settings: Mapping[str, Any], source: str = "config") -> dict[str, Any]:
    """Settings by their names in kebab-case, NumPy's and MLX's scalars as Python's.

    Args:
        settings (dict): ``{"learning_rate": 0.1}`` or ``{"learning-rate": 0.1}``.
        source (str): Where they are set, for messages.

    Raises:
        SettingsError: If they are no dictionary, or both spellings of a name have values, and
            these differ.
    """
    if not isinstance(settings, Mapping):
        raise SettingsError(
            f'{source} is a dictionary, {{"learning-rate": 0.1}}, not {settings!r}.'
        )
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str):
            raise SettingsError(f"{source}: the name of a setting is text, not {key!r}.")
        name, value = _kebab(key), plain(value)
        if name in renamed and renamed[name] != value:
            raise SettingsError(
                f"{source}: {name} and {name.replace('-', '_')} are one setting, with two values "
                f"here, {renamed[name]!r} and {value!r}: leave one out."
            )
        renamed[name] = value
    return renamed


def plain(value: Any) -> Any:
    """A scalar of NumPy's or MLX's as Python's; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def nearest(name: str, names: Iterable[str], likeness: float = _NEAR) -> str | None:
    """The one of some names that was probably meant, whatever its case and hyphens."""
    folded = {_kebab(each).casefold(): each for each in sorted(names)}
    close = difflib.get_close_matches(_kebab(name).casefold(), folded, n=1, cutoff=likeness)
    return folded[close[0]] if close else None


class TracedConfig(dict[str, Any]):
    """Settings that remember which names were looked up in them.

    They are found by their names in kebab-case and in snake_case. Whoever takes all of them, as
    ``dict(config)`` does, has looked each up.

    Args:
        settings (dict): The settings.
        source (str): Where they are set, for messages.

    Attributes:
        looked_up (set): Names in kebab-case, also of settings that there were not.
    """

    def __init__(self, settings: Mapping[str, Any], source: str = "config"):
        super().__init__(kebab_case(settings, source))
        self.source = source
        self.looked_up: set[str] = set()

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, source: str = "config") -> TracedConfig:
        """The same settings, traced; those that are stay the ones they are."""
        return (
            settings
            if isinstance(settings, cls)
            else cls({} if settings is None else settings, source)
        )

    def _look_up(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        self.looked_up.add(_kebab(key))
        return _kebab(key)

    def _look_up_all(self) -> None:
        self.looked_up.update(super().keys())

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._look_up(key))

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"no setting {name}: give it a value in Task.config, or with -c {name}=...")

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._look_up(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._look_up(key), default)

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(self._look_up(key), *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        return super().setdefault(self._look_up(key), default)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_kebab(key), value)

    def __iter__(self) -> Iterator[str]:
        self._look_up_all()
        return super().__iter__()

    def keys(self) -> Any:
        self._look_up_all()
        return super().keys()

    def items(self) -> Any:
        self._look_up_all()
        return super().items()

    def values(self) -> Any:
        self._look_up_all()
        return super().values()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other


# -- what a run is started with ------------------------------------------------------------


def check_config(
    config: TracedConfig,
    task: Task,
    readers: Iterable[Any] = (),
    *,
    stored: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    num_clients: int | None = None,
    are_free: bool = False,
) -> None:
    """Refuses settings that nothing reads, and values that cannot be.

    A setting is read if it is one of the library's, the task declares it in ``Task.config``, or it
    was looked up in ``config`` as the task was made of it. Of a name that is none of these the
    code of the task's functions and the strategy is searched, with the functions that they call;
    then the optimizer is made, and in a simulation the first client's data, to see whether they
    look it up.

    Args:
        config (TracedConfig): The settings, after the task was made of them.
        task (Task): The task.
        readers (iterable): The function that made the task, and the layers of the strategy.
        stored (dict, optional): The settings of the run that is resumed: they stay as they are.
        elsewhere (dict, optional): Names that are no settings, and where the value is given.
        num_clients (int, optional): Of a simulation.
        are_free (bool): Others may read the settings, too: only slips of the pen are refused.

    Raises:
        SettingsError: With the name, where it was set, and the name that was probably meant.
    """
    metrics = (getattr(metric, "predict", metric) for metric in task.metrics.values())
    readers = [*readers, task.optimizer, task.data, task.loss, task.train_step, *metrics]
    declared = TracedConfig(task.config, "Task.config")
    stored = kebab_case(stored or {}, "the run's settings")
    names = KINDS.keys() | config.looked_up | dict.keys(declared)
    unread = [name for name in dict.keys(config) if name not in names | stored.keys()]
    for name in sorted(dict.keys(config) & set(SET_BY_THE_RUN) - config.looked_up):
        _refuse_name(name, config.source, names, elsewhere)
    slips = [
        name for name in dict.keys(declared) if nearest(name, KINDS, _TYPO) not in (None, name)
    ]
    if unread or slips:
        read = _looked_up_late({*unread, *slips}, readers, task, config, num_clients)
        for name in unread:
            if name not in read:
                _refuse_name(name, config.source, names, elsewhere, are_free)
        for name in slips:
            if name not in read | config.looked_up:
                _refuse_name(name, "Task.config", KINDS.keys(), {}, True)
    for settings in (declared, config):
        for name, value in dict.items(settings):
            if settings is config and name in stored and stored[name] == value:
                continue
            kind = KINDS.get(name) or _kind_of(declared.get(name)) or _SENDABLE
            if name != "num-rounds":  # decided, and checked, with all who may say it
                kind.check(settings.source, name, value)


def _kind_of(declared: Any) -> Kind | None:
    """The values that a setting takes which the task declares with this one."""
    if isinstance(declared, bool):
        return Kind("true or false", lambda value: value in (True, False))
    if _is_real(declared) and math.isinf(declared):
        return Kind(FINITE.words, lambda value: _is_finite(value) or value == declared)
    return FINITE if _is_real(declared) else None


def _refuse_name(
    name: str,
    source: str,
    names: Collection[str],
    elsewhere: Mapping[str, str],
    is_free: bool = False,
) -> None:
    there_is_none = f"{source}: there is no setting {name}."
    if name in elsewhere:
        raise SettingsError(f"{there_is_none} Give it as {elsewhere[name]}.")
    if name in SET_BY_THE_RUN:
        raise SettingsError(f"{source}: {name} is not to be set, each run sets its own.")
    if meant := nearest(name, {*names, *elsewhere}, _TYPO if is_free else _NEAR):
        raise SettingsError(f"{there_is_none} Did you mean {elsewhere.get(meant, meant)}?")
    if is_free:
        return
    raise SettingsError(
        f"{there_is_none} There are {', '.join(sorted(names))}. A task declares its settings, with "
        "the values they have by default, in Task.config."
    )


def _looked_up_late(
    names: set[str],
    readers: Collection[Any],
    task: Task,
    config: TracedConfig,
    num_clients: int | None,
) -> set[str]:
    """Which of some settings are looked up later than when the task is made."""
    read = {_kebab(text) for reader in readers for text in _texts_in(reader)}
    if names <= read:
        return read
    sent = {**task.config, **dict(dict.items(config)), "seed": 0, "server-round": 1, "run-id": ""}
    traced = TracedConfig(sent)
    with suppress(Exception):  # what is wrong with it is said when it is used
        task.optimizer(traced)
    read |= traced.looked_up
    if num_clients is not None and not names <= read:
        with suppress(Exception):
            task.data(0, num_clients)
        read |= config.looked_up
    return read


def _texts_in(reader: Any, seen: set[CodeType] | None = None) -> Iterator[str]:
    """The texts in a function's code, or in that of a class's methods, and in the functions of the
    same package that are called by name."""
    seen = set() if seen is None else seen
    reader = inspect.unwrap(getattr(reader, "func", reader))  # of a partial function
    function = getattr(reader, "__func__", reader)  # of a method
    if isinstance(function, FunctionType):
        if function.__code__ in seen:
            return
        seen.add(function.__code__)
        yield from _constants(function.__code__)
        for called in _functions_in(function):
            yield from _texts_in(called, seen)
        if function is reader:
            return
        reader = reader.__self__  # with its other methods
    for kind in reader.__mro__ if isinstance(reader, type) else type(reader).__mro__:
        if kind.__module__.startswith("flwr."):  # Flower's strategies write settings, no more
            continue
        for method in vars(kind).values():
            if isinstance(method, FunctionType):
                yield from _texts_in(method, seen)


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
