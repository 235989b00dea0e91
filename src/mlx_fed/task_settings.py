"""A task's settings (``config``): their spelling, and which names were looked up.

Imports nothing of ours but the exceptions: tasks are made with it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from .errors import SettingsError

LIKENESS = 0.6
"""Likeness of a name to the one that was probably meant, as difflib's ratio."""


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
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str):
            raise SettingsError(f"{source}: the name of a setting is text, not {key!r}.")
        name, value = to_kebab(key), plain(value)
        if name in result and result[name] != value:
            raise SettingsError(
                f"{source}: {name} and {name.replace('-', '_')} are one setting, with two values "
                f"here, {result[name]!r} and {value!r}: leave one out."
            )
        result[name] = value
    return result


def plain(value: Any) -> Any:
    """A scalar of NumPy's or MLX's as Python's; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def to_kebab(name: str) -> str:
    """A name in kebab-case."""
    return name.replace("_", "-")


def nearest(name: str, names: Iterable[str], likeness: float = LIKENESS) -> str | None:
    """The most similar of some names, whatever its case and hyphens, if one is similar enough."""
    candidates = {to_kebab(candidate).casefold(): candidate for candidate in sorted(names)}
    matches = difflib.get_close_matches(to_kebab(name).casefold(), candidates, 1, likeness)
    return candidates[matches[0]] if matches else None


class TracedConfig(dict[str, Any]):
    """Settings that remember which names were looked up in them.

    Names are in kebab-case or snake_case. Code that takes all of them, as ``dict(config)`` does,
    has looked each up.

    Args:
        settings (dict): The settings.
        source (str): Where they are set, for messages.

    Attributes:
        looked_up (set): Names in kebab-case, also of settings that are absent.
    """

    def __init__(self, settings: Mapping[str, Any], source: str = "config"):
        super().__init__(kebab_case(settings, source))
        self.source = source
        self.looked_up: set[str] = set()

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, source: str = "config") -> TracedConfig:
        """Settings, traced; the same object if they are already."""
        return (
            settings
            if isinstance(settings, cls)
            else cls({} if settings is None else settings, source)
        )

    def without(self, names: Collection[str]) -> TracedConfig:
        """The settings without some, which shares the record of what is looked up."""
        config = TracedConfig({k: v for k, v in super().items() if k not in names}, self.source)
        config.looked_up = self.looked_up
        return config

    def _look_up(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        self.looked_up.add(to_kebab(key))
        return to_kebab(key)

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
        super().__setitem__(to_kebab(key), value)

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

    def __or__(self, settings: Any) -> Any:
        return dict(self) | settings
