"""Policy file: what a node's owner allows, in TOML.

It is read when the node starts. Each request is checked before anything of it is done,
and each reply before it leaves; the server has no part in either. All keys are optional::

    [server]
    allowed = ["fed.example.org:8080"]    # addresses that the node may join
    runs = ["5f0c..."]                    # ids of runs; a run's settings.json has its run-id
    strategies = ["FedAvg", "FedProx"]    # as the server states them

    [settings]                            # of training, as the server sends them
    local-epochs = { max = 5 }
    learning-rate = { min = 1e-4, max = 0.1 }
    batch-size = [16, 32]
    others = false                        # refuse settings that are not in this table

    [task]
    digest = "sha256:..."                 # of the task's fingerprint: `mlx-fed audit show` has it

    [data]
    min-examples = 100                    # the node does not train or evaluate on fewer

    [replies]
    metrics = ["loss", "accuracy"]        # beside num-examples; others do not leave
    max-update-norm = 10.0                # a larger update is clipped before it leaves

    [limits]
    rounds-per-day = 50                   # as many evaluations, too
    bytes-per-day = 2_000_000_000         # of arrays that leave
    hours = ["22:00-06:00", "12:30-13:00"]    # local time

    [approval]
    ask = true                            # ask a person before a run's first training or evaluation
"""

from __future__ import annotations

import math
import tomllib
from datetime import datetime, time
from pathlib import Path
from typing import Any

from ..errors import FedError, os_errors
from ..settings_check import KINDS
from ..task_settings import kebab_case, nearest
from .audit import AuditLog
from .policy import Policy, Range

_TYPO = 0.9
"""Likeness of a name to a setting of the library's, from which on it is a slip of the pen."""


class PolicyError(FedError):
    """A policy file that cannot be used."""


def load_policy(path: Path | str) -> Policy:
    """Reads a policy file.

    Args:
        path (Path): The file.

    Raises:
        PolicyError: If it cannot be read, or has a key or a value that no policy has.
    """
    path = Path(path).expanduser()
    try:
        with os_errors(PolicyError, f"Cannot read the policy {path}"):
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} is not TOML: {error}.") from error
    reader = _Reader(path, tables)
    policy = Policy(
        servers=reader.texts("server", "allowed"),
        runs=reader.texts("server", "runs"),
        strategies=reader.texts("server", "strategies"),
        other_settings=reader.value("settings", "others", bool, True),
        task_digest=reader.value("task", "digest", str, None),
        min_examples=reader.value("data", "min-examples", int, 0),
        metrics=reader.texts("replies", "metrics"),
        max_update_norm=reader.value("replies", "max-update-norm", float, None),
        rounds_per_day=reader.value("limits", "rounds-per-day", int, None),
        bytes_per_day=reader.value("limits", "bytes-per-day", int, None),
        hours=reader.hours(),
        ask=reader.value("approval", "ask", bool, False),
        settings={
            name: reader.range(name, value)
            for name, value in kebab_case(reader.rest("settings"), str(path)).items()
        },
    )
    reader.require_empty()
    return policy


def policy_and_log(
    policy: Policy | Path | str | None, log: Path | str | None
) -> tuple[Policy, AuditLog | None]:
    """The policy and the audit log of a node.

    Args:
        policy (Policy or Path, optional): The policy or its file. Default: all is allowed.
        log (Path, optional): The log's file. Default: beside the policy's file, if there is one.

    Raises:
        PolicyError: If the policy cannot be used, or its daily limits have no log to count by.
        AuditError: If the log cannot be read, or was changed.
    """
    if isinstance(policy, Path | str):
        path = Path(policy).expanduser()
        log = log or path.with_name(f"{path.stem}.audit.jsonl")
        policy = load_policy(path)
    policy = policy or Policy()
    if log is None and (policy.rounds_per_day or policy.bytes_per_day):
        raise PolicyError("Daily limits are counted by an audit log: name one (audit=, --audit).")
    return policy, AuditLog(log) if log else None


class _Reader:
    """Reader of a policy file's tables, which removes each known value: the rest is unknown."""

    def __init__(self, path: Path, tables: dict[str, Any]):
        self.path, self.tables = path, tables
        self.names: dict[str, list[str]] = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise PolicyError(f"{path}: {name} is not in a table, such as [limits].")

    def value(self, table: str, key: str, kind: type, default: Any) -> Any:
        self.names.setdefault(table, []).append(key)
        value = self.tables.get(table, {}).pop(key, default)
        if value is default:
            return default
        types: tuple[type, ...] = (int, float) if kind is float else (kind,)
        is_number = kind in (int, float)
        if type(value) not in types or (is_number and not 0 <= value < math.inf):
            words = {bool: "true or false", str: "text", int: "a whole number, 0 or more"}
            raise PolicyError(
                f"{self.path}: {key} of [{table}] is {words.get(kind, 'a number, 0 or more')}, "
                f"not {value!r}."
            )
        return value

    def texts(self, table: str, key: str) -> tuple[str, ...] | None:
        self.names.setdefault(table, []).append(key)
        value = self.tables.get(table, {}).pop(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PolicyError(f"{self.path}: {key} of [{table}] is a list of texts, not {value!r}.")
        return tuple(value)

    def rest(self, table: str) -> dict[str, Any]:
        self.names.setdefault(table, [])
        return self.tables.pop(table, {})

    def range(self, name: str, value: Any) -> Range:
        if (likely := nearest(name, KINDS, _TYPO)) not in (None, name):
            raise PolicyError(
                f"{self.path}: [settings] has {name}, which limits nothing. Did you mean {likely}?"
            )
        if isinstance(value, list):
            return Range(values=tuple(value))
        numbers = value.values() if isinstance(value, dict) else ()
        is_range = isinstance(value, dict) and value and value.keys() <= {"min", "max"}
        if not is_range or not all(type(number) in (int, float) for number in numbers):
            raise PolicyError(
                f"{self.path}: {name} of [settings] is a list of values or a range such as "
                f"{{ min = 1, max = 5 }}, not {value!r}."
            )
        allowed_range = Range(**value)
        if not allowed_range.min <= allowed_range.max:
            raise PolicyError(f"{self.path}: no value of {name} is in the range {value!r}.")
        return allowed_range

    def hours(self) -> tuple[tuple[time, time], ...] | None:
        texts = self.texts("limits", "hours")
        return None if texts is None else tuple(map(self._span, texts))

    def _span(self, text: str) -> tuple[time, time]:
        try:
            start, end = (
                datetime.strptime(clock_time.strip(), "%H:%M") for clock_time in text.split("-")
            )
        except ValueError:
            raise PolicyError(
                f'{self.path}: hours of [limits] are such as "22:00-06:00", not {text!r}.'
            ) from None
        return start.time(), end.time()

    def require_empty(self) -> None:
        for table, values in self.tables.items():
            if table not in self.names:
                hint = _hint(table, self.names)
                raise PolicyError(f"{self.path}: a policy has no table [{table}]. {hint}")
            for key in values:
                hint = _hint(key, self.names[table])
                raise PolicyError(f"{self.path}: [{table}] has no key {key}. {hint}")


def _hint(name: str, names: Any) -> str:
    likely = nearest(name, names)
    return f"Did you mean {likely}?" if likely else f"There are {', '.join(names)}."
