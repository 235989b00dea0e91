"""Settings with which a run was started before it is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import round_record


class Previous(NamedTuple):
    """Settings with which the resumed run was last started, from its ``settings.json``.

    Attributes:
        num_rounds (int): Its rounds; 0 if it was never started.
        config (dict): The settings that its nodes were sent.
        patience (int, optional): As :class:`~mlx_fed.rounds.settings.RunSettings` has it.
        target (str or dict, optional): The same.
        select_nodes (str or list, optional): The same.
        stopped (str, optional): Why it ended before its last round, if it did.
        went_on_after (int): The round after which it had ended early before.
        changes (list): Changed settings, as :mod:`mlx_fed.rounds.changes` records them.
        initial (str, optional): The initial weights that it was started with, if any.
        versions (dict): The versions of the server's packages then.
    """

    num_rounds: int = 0
    config: Mapping[str, Any] = MappingProxyType({})
    patience: int | None = None
    target: str | dict[str, float] | None = None
    select_nodes: str | list[Any] | None = None
    stopped: str | None = None
    went_on_after: int = 0
    initial: str | None = None
    changes: Sequence[dict[str, Any]] = ()
    versions: Mapping[str, str] = MappingProxyType({})


def previous_of(folder: Path) -> Previous:
    """Previous settings of the run in a folder, without those that cannot be read."""
    settings: Any = {}
    with suppress(OSError, ValueError):
        settings = round_record.read_settings(folder)
    stopped = settings.get("stopped")
    settings["stopped"] = stopped.get("reason") if isinstance(stopped, dict) else None
    changes = settings.get("changes")
    settings["changes"] = [
        item
        for item in (changes if isinstance(changes, list) else ())
        if isinstance(item, dict) and {"name", "value", "before", "from"} <= item.keys()
    ]
    kinds: dict[str, Any] = {
        "config": dict,
        "target": (str, dict),
        "select_nodes": (str, list),
        "stopped": str,
        "initial": str,
        "changes": list,
        "versions": dict,
    }
    return Previous(
        **{
            name: settings[name]
            for name in Previous._fields
            if isinstance(settings.get(name), kinds.get(name, int))
        }
    )
