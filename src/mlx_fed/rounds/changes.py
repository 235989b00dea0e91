"""Settings that are changed on purpose when a run is resumed.

``settings.json`` has them under ``changes``, a dictionary each: ``name``, ``value``, ``before``
(the value until then) and ``from``, the first round with the new value. A later resumption keeps
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SettingsError
from ..runs.previous import Previous
from ..task_settings import TracedConfig, kebab_case

_FIXED = {"num-rounds": "--rounds", "seed": "", "run-id": "", "server-round": ""}


def changed_config(
    config: TracedConfig, change: Mapping[str, Any] | None, previous: Previous | None
) -> TracedConfig:
    """The settings of a resumed run: those of its start, with earlier changes and new ones.

    Args:
        config (TracedConfig): The settings as given at the start.
        change (dict, optional): The new changes.
        previous (Previous, optional): The run that is resumed; None for a new run.

    Raises:
        SettingsError: If a new run is to change, or what is no setting of ``config``, or a setting
            has a value that is neither that of an earlier change nor the one before it.
    """
    if previous is None:
        if change:
            raise SettingsError(
                "change= (--change) is for a run that is resumed: give the settings of a new run "
                "by config= (-c)."
            )
        return config
    values = kebab_case(change or {}, "change")
    for name in values.keys() & _FIXED.keys():
        hint = f" Use {_FIXED[name]}." if _FIXED[name] else ""
        raise SettingsError(f"change: {name} cannot be changed in this way.{hint}")
    earlier = {item["name"]: item["value"] for item in previous.changes}
    for name, value in earlier.items():
        known_values = [value, *(e["before"] for e in previous.changes if e["name"] == name)]
        if name in values or name not in dict.keys(config):
            continue
        if dict.get(config, name) not in known_values:
            raise SettingsError(
                f"{config.source}: {name} is {value!r} in this run, by an earlier change: to give "
                f"it another value, write --change {name}={dict.get(config, name)}."
            )
    result = TracedConfig({**dict(dict.items(config)), **earlier, **values}, config.source)
    result.looked_up = config.looked_up
    return result


def record_changes(
    previous: Previous, change: Mapping[str, Any] | None, first_round: int
) -> list[dict[str, Any]]:
    """The changes of a run for its ``settings.json``: the earlier ones, and the new ones."""
    changes = [*previous.changes]
    for name, value in kebab_case(change or {}, "change").items():
        before = previous.config.get(name)
        if value != before:
            changes.append({"name": name, "value": value, "before": before, "from": first_round})
    return changes


def names_of(changes: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of changed settings."""
    return {str(item["name"]) for item in changes}
