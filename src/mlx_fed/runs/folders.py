"""Run folders: list, read, compare, export and remove runs, also while they run.

Nothing here writes to a run. Lines that a crash left incomplete are skipped and counted.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FedError, os_errors
from ..system.atomic_files import lock_folder, read_regular_file
from ..system.printable import printable
from . import labels, round_record, status

FILES = ("settings.json", "history.jsonl")
_NOT_COMPARED = ("run-id", "pid", "host")


class RunsError(FedError):
    """A run that does not exist, or that cannot be read or removed."""


class RunRecord(NamedTuple):
    """The content of a run's folder.

    Attributes:
        name (str): The folder's name, or its path where several runs have one name.
        folder (Path): The folder.
        settings (dict): The settings of ``settings.json``.
        rounds (list): The records of ``history.jsonl``.
        damaged (int): The number of its lines that cannot be read.
        status (dict): The status, as :func:`mlx_fed.runs.status.read` returns it.
        checkpoints (list): The rounds with a checkpoint.
        labels (dict, optional): The label counts, as :func:`mlx_fed.runs.labels.read` returns them.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    damaged: int
    status: dict[str, Any]
    checkpoints: list[int]
    labels: dict[str, Any] | None

    @property
    def state(self) -> str:
        """``"waiting"``, ``"running"``, ``"finished"`` or ``"stopped"``; empty for runs of old
        versions, which have no status."""
        return str(self.status.get("state", ""))


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's."""
    return any(_is_regular_file(folder / name) for name in FILES)


def _is_regular_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def list_runs(runs: Path) -> list[Path]:
    """The runs in a folder, the last changed first.

    Raises:
        RunsError: If there is no such folder.
    """
    if not runs.is_dir():
        raise RunsError(f"There is no folder {str(runs)!r}: say with --runs where runs are kept.")
    return sorted(filter(is_run, runs.iterdir()), key=_last_change, reverse=True)


def _last_change(folder: Path) -> tuple[int, str]:
    """The time of the last change in nanoseconds, and the name for runs of one time."""
    times = [0]
    for name in FILES:
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime_ns)
    return max(times), folder.name


def find(runs: Path, name: str) -> Path:
    """The folder of a run, by its name in ``runs`` or by its path.

    Raises:
        RunsError: If there is none, or both exist and differ.
    """
    matches: dict[Path, Path] = {}
    for path in (runs / name, Path(name)):
        if is_run(path):
            matches.setdefault(path.resolve(), path)
    if len(matches) > 1:
        raise RunsError(
            f"{name!r} is a run in {runs}/ and another one here: write "
            f"{' or '.join(map(str, matches))}."
        )
    for path in matches.values():
        return path
    names = ", ".join(path.name for path in list_runs(runs)[:5]) if runs.is_dir() else ""
    hint = f" The newest there: {names}." if names else ""
    raise RunsError(f"There is no run {name!r}, neither in {runs}/ nor as a path.{hint}")


def read(folder: Path, name: str | None = None) -> RunRecord:
    """The content of a run's folder, written by any version of mlx-fed.

    Raises:
        RunsError: If a file cannot be read.
    """
    with os_errors(RunsError, f"Cannot read the run in {folder}"):
        state = read_state(folder)
        rounds, num_damaged = _rounds(folder)
    name = name or folder.resolve().name
    label_counts = labels.read(folder)
    return RunRecord(
        name=name, folder=folder, rounds=rounds, damaged=num_damaged, labels=label_counts, **state
    )


def read_all(folders: Sequence[Path]) -> list[RunRecord]:
    """Several runs with unique names: relative paths, where two folders have one name."""
    paths = list(dict.fromkeys(path.resolve() for path in folders))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        parent = Path(os.path.commonpath([path.parent for path in paths]))
        names = [str(path.relative_to(parent)) for path in paths]
    return [read(path, name) for path, name in zip(paths, names, strict=True)]


def read_state(folder: Path) -> dict[str, Any]:
    """Settings, status and checkpoints of a run, as plain values."""
    return {
        "settings": _settings(folder),
        "status": status.read(folder),
        "checkpoints": checkpoints(folder),
    }


def checkpoints(folder: Path) -> list[int]:
    """The rounds with a checkpoint."""
    path = folder / "checkpoints"
    names = [] if path.is_symlink() else [file.name[:5] for file in path.glob("*.safetensors")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _settings(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError):
        return round_record.read_settings(folder)
    return {}


def _rounds(folder: Path) -> tuple[list[dict[str, Any]], int]:
    path = folder / "history.jsonl"
    rounds: dict[int, dict[str, Any]] = {}
    num_damaged = 0
    try:
        lines = read_regular_file(path).splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            record = round_record.from_line(line)
            rounds[record["round"]] = record  # the last of a repeated round
        except ValueError:
            num_damaged += 1
    return [rounds[number] for number in sorted(rounds)], num_damaged


# -- comparison and export ---------------------------------------------------------------------


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by flat names, such as ``strategy.fraction_train``."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            values |= flatten_settings(value, f"{prefix}{key}.")
        elif key not in _NOT_COMPARED:
            values[f"{prefix}{key}"] = value
    return values


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with the value of each run, or None if it has none."""
    columns = [flatten_settings(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in columns for name in settings)
    rows = {name: [settings.get(name) for settings in columns] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def list_problems(run: RunRecord) -> Iterator[str]:
    """Problems of a run: why it stopped, refused nodes, and failures in a round without a
    record."""
    if run.state == "stopped" and (reason := run.status.get("reason")):
        yield f"Stopped: {reason}"
    if run.state == "finished" and isinstance(stop := run.settings.get("stopped"), dict):
        yield f"Ended after round {stop.get('round')}: {stop.get('reason')}"
    refusals, failures = run.status.get("refused"), run.status.get("failed")
    if isinstance(refusals, dict):
        yield from (f"{node} is not let in: {reason}" for node, reason in refusals.items())
    if isinstance(failures, list) and run.state != "finished":
        for failure in failures:
            if isinstance(failure, dict):
                node, phase, reason = (failure.get(key, "?") for key in ("node", "phase", "reason"))
                yield f"{node} is left out of {phase}: {reason}"


def to_csv(runs: Iterable[RunRecord]) -> str:
    """CSV with a line for each round of each run, and a column for each figure."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        name = printable(run.name)
        for record in run.rounds:
            row = {"run": name, "round": record["round"], **round_record.figures(record)}
            rows.append({printable(name): value for name, value in row.items()})
    columns = dict.fromkeys(name for row in rows for name in row) or {"run": None, "round": None}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(runs: Iterable[RunRecord]) -> str:
    """JSON with the content of the runs' folders, as a list."""
    return round_record.to_json([as_plain(run) for run in runs])


def as_plain(run: RunRecord) -> dict[str, Any]:
    """The content of a run's folder as plain values, without its path."""
    return {key: value for key, value in run._asdict().items() if key != "folder"}


# -- removing ------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    """Removes a run's folder with its content.

    Raises:
        RunsError: If it is no run's folder, a process has locked it, or it cannot be removed.
    """
    if not is_run(folder) or folder.is_symlink():
        raise RunsError(f"{folder} is no run's folder: nothing is removed.")
    running = RunsError(f"The run in {folder} is running: end it first.")
    with os_errors(RunsError, f"Cannot remove {folder}"), lock_folder(folder, running):
        shutil.rmtree(folder)
