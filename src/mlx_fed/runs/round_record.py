"""A round's record as a line of a file, and as plain figures: nothing grows faster than it must.

A thousand nodes a round would be most of a history. Where many took part, their names are written
as the numbers that they end in, and those that were left out for one reason stand together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..system.atomic_files import read_regular_file
from . import matrices

MANY = 32
"""Nodes of a phase up to which each is written by its name and with its own metrics."""
_DETAIL = re.compile(r".+/(median|accuracy-of-[0-9]+)", re.DOTALL)
_SHARES = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_PHASES = ("train", "evaluate")
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]{0,8})", re.DOTALL)
_NUMBERS = 10**9
_MOST_NAMES = 10**6
"""Nodes in one record."""
_DEEPEST = 32
_LONGEST_NUMBER = 20
_LONGEST_PREFIX = 200


@dataclass
class Refusal:
    """A reply that does not count.

    Attributes:
        node (str): The node's name.
        phase (str): ``"train"`` or ``"evaluate"``.
        reason (str): Why it does not count.
        missing (bool): The node sent nothing.
        excused (bool): It is not counted against the node: see :mod:`mlx_fed.rounds.exclusion`.
    """

    node: str
    phase: str
    reason: str
    missing: bool = False
    excused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``refused`` in a record's line: flags that are not set are absent."""
        return {key: value for key, value in vars(self).items() if value is not False}


@dataclass
class RoundRecord:
    """A round, as it is recorded while it runs.

    Attributes:
        round (int): The round's number.
        train (dict): Aggregated metrics of training, and ``nodes``, the names of those that count.
        evaluate (dict): The same of the federated evaluation.
        seconds (dict): Duration of ``train``, ``check``, ``aggregate``, ``evaluate``, ``central``.
        bytes (dict): Bytes of arrays to nodes (``down``) and from them (``up``).
        refused (list): Replies that do not count.
        left_out (list): Names of nodes that are excluded from later rounds.
        repeats (int): How often training was repeated, for lack of replies.
        each (dict): By phase and node, the node's metrics, if the phase has few nodes.
        spread (dict): By phase and metric, the quantiles over nodes, if it has many.
        undefined (dict): By phase and metric, the number of nodes for which it is undefined.
        versions (dict): By node that joined, the versions that differ from the server's.
        central (dict, optional): Metrics of the server's evaluation, if it has one.
    """

    round: int
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: {"down": 0, "up": 0})
    refused: list[Refusal] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    repeats: int = 0
    each: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    spread: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    undefined: dict[str, dict[str, int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    central: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, as in ``history.jsonl`` and for users."""
        record = {**vars(self), "refused": [refusal.to_dict() for refusal in self.refused]}
        for key in ("left_out", "repeats", "each", "spread", "undefined", "versions"):
            if not record[key]:
                del record[key]
        if self.central is None:
            del record["central"]
        return record


def to_line(record: Mapping[str, Any]) -> str:
    """A round's record as one line of JSON, without its end."""
    line_values = dict(record)
    for phase in _PHASES:
        if isinstance(nodes := record.get(phase, {}).get("nodes"), list):
            line_values[phase] = {**record[phase], "nodes": _pack(nodes)}
    for phase in ("evaluate", "central"):
        if metrics := line_values.get(phase):
            line_values[phase] = matrices.pack(metrics)
    refusals = record.get("refused", ())
    if len(refusals) > MANY:
        line_values["refused"] = _together(refusals)
    return to_json(line_values)


def to_json(value: Any) -> str:
    """JSON as every reader takes it: what is not finite, such as a loss of NaN, becomes null."""
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), default=_plain)


def _plain(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_line(line: str | bytes) -> dict[str, Any]:
    """The record that :func:`to_line` wrote, or a version before it had.

    Raises:
        ValueError: If it is not one.
    """
    record = from_json(line)
    try:
        record["round"] = int(record["round"])
        for phase in _PHASES:
            if "nodes" in (metrics := record.get(phase, {})):
                metrics["nodes"] = _unpack(metrics["nodes"])
        for phase in ("evaluate", "central"):
            if metrics := record.get(phase):
                record[phase] = matrices.unpack(metrics)
        if "refused" in record:
            record["refused"] = [
                refusal for entry in record["refused"] for refusal in _apart(entry)
            ]
            if len(record["refused"]) > _MOST_NAMES:
                raise ValueError("too many nodes")
        figures(record)
        for kind in ("seconds", "bytes"):
            sum(record.get(kind, {}).values())
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"not a round's record: {error!r}") from error
    return record


def from_json(text: str | bytes) -> Any:
    """JSON that we wrote, which is neither deep nor has numbers that no computer counts with.

    Raises:
        ValueError: If it is not such.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is too deep") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [
            item for container in inner for item in container if isinstance(item, (dict, list))
        ]
        if not level:
            return value
    raise ValueError("it is too deep")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, of its ``settings.json``; empty if they are no dictionary.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON that we wrote.
    """
    settings = from_json(read_regular_file(folder / "settings.json"))
    return settings if isinstance(settings, dict) else {}


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError("a number is too large")
    return int(text)


def spread(each: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Least, lower quartile, median, upper quartile and most of each metric of many nodes."""
    rows = [*each]
    columns: dict[str, list[float]] = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        values = [
            v for row in rows if isinstance(v := row.get(name), (int, float)) and math.isfinite(v)
        ]
        if values:
            columns[name] = values
    return {
        name: [float(f"{value:.6g}") for value in _quantiles(np.sort(values))]
        for name, values in columns.items()
    }


def _quantiles(sorted_values: np.ndarray) -> np.ndarray:
    """Quantiles of ``np.quantile``, in a third of its time."""
    at = _SHARES * (len(sorted_values) - 1)
    low = at.astype(int)
    lower, upper = sorted_values[low], sorted_values[np.minimum(low + 1, len(sorted_values) - 1)]
    quantiles: np.ndarray = lower + (upper - lower) * (at - low)
    return quantiles


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A round's numbers by flat names, such as ``train/loss`` and ``seconds/train``.

    They are what a table, a tracker or a curve shows: the aggregated metrics, the server's own,
    the median of nodes, seconds, bytes, and how many nodes counted and were left out.
    """
    flat_figures: dict[str, float] = {}
    for kind in (*_PHASES, "central", "seconds", "bytes"):
        for name, value in record.get(kind, {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if math.isfinite(value):  # or there is none, as where no node has a metric
                    flat_figures[f"{kind}/{name}"] = value
            elif name == "nodes":
                flat_figures[f"{kind}/nodes"] = len(value)
    for phase in _PHASES:
        quantiles = record.get("spread", {}).get(phase)
        if quantiles is None:
            quantiles = spread(record.get("each", {}).get(phase, {}).values())
        medians = {f"{phase}/{name}/median": values[2] for name, values in quantiles.items()}
        flat_figures |= {
            name: value for name, value in medians.items() if isinstance(value, (int, float))
        }
    flat_figures |= dict(matrices.figures(record))
    flat_figures["refused"] = len(record.get("refused", ()))
    return flat_figures


def is_detail(name: str) -> bool:
    """Whether a figure is the nodes' median of a metric or the accuracy of a class: tables and
    curves have those only where they are asked for."""
    return _DETAIL.fullmatch(name) is not None


# -- names ---------------------------------------------------------------------------------


def _pack(nodes: Sequence[str]) -> Sequence[str] | dict[str, str]:
    """``{"node-": "0-3,5"}`` for many names that differ in a rising number; others as they are."""
    first = _NUMBERED.fullmatch(nodes[0]) if len(nodes) > MANY else None
    if first is None:
        return nodes
    prefix, start = first[1], len(first[1])
    try:
        numbers = [int(node[start:]) for node in nodes]
    except ValueError:
        return nodes
    if numbers[-1] >= _NUMBERS or [f"{prefix}{number}" for number in numbers] != [*nodes]:
        return nodes
    steps = np.diff(numbers)
    if steps.min() < 1:
        return nodes
    ends = [-1, *np.flatnonzero(steps > 1).tolist(), len(numbers) - 1]
    runs = ((numbers[before + 1], numbers[end]) for before, end in pairwise(ends))
    return {prefix: ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)}


def _unpack(nodes: Any) -> list[str]:
    if not isinstance(nodes, dict):
        return list(nodes)
    names: list[str] = []
    for prefix, ranges in nodes.items():
        for run in ranges.split(","):
            first, _, last = run.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if len(names) + len(numbers) > _MOST_NAMES or len(prefix) > _LONGEST_PREFIX:
                raise ValueError("too many nodes")
            names += [f"{prefix}{number}" for number in numbers]
    return names


def _together(refusals: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each phase and reason, with the nodes that share it."""
    nodes: dict[tuple[Any, ...], list[str]] = {}
    for entry in refusals:
        nodes.setdefault(tuple(_why(entry).items()), []).append(entry["node"])
    return [{"nodes": _pack(names), **dict(why)} for why, names in nodes.items()]


def _apart(entry: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    why = _why(entry)
    return ({"node": node, **why} for node in _unpack(entry.get("nodes", [entry.get("node")])))


def _why(entry: Mapping[str, Any]) -> dict[str, Any]:
    flags = {flag: True for flag in ("missing", "excused") if entry.get(flag)}
    return {"phase": entry["phase"], "reason": entry["reason"], **flags}
