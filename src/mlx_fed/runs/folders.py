"""Run folders as they are read afterwards, or while the run goes on: list, compare, export, remove.

Nothing here writes to a run. What a crash left half-written is passed over and counted.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FedError
from ..system.atomic_files import read_plain
from ..system.printable import printable
from . import labels, round_record, status

FILES = ("settings.json", "history.jsonl")
_NOT_COMPARED = ("run-id", "pid", "host")


class RunsError(FedError):
    """A run that is not there, or not one to do that with."""


class Recorded(NamedTuple):
    """What a run's folder tells.

    ``damaged`` counts lines of its history that cannot be read, ``checkpoints`` are the rounds
    that have one, and ``status`` is as :func:`mlx_fed.runs.status.read` gives it.
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
        """``"waiting"``, ``"running"``, ``"finished"`` or ``"stopped"``; empty of old runs that
        never said."""
        return str(self.status.get("state", ""))


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's."""
    return any(_is_plain(folder / name) for name in FILES)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def folders(runs: Path) -> list[Path]:
    """The runs below a folder, the newest first.

    Raises:
        RunsError: If there is no such folder.
    """
    if not runs.is_dir():
        raise RunsError(f"There is no folder {str(runs)!r}: say with --runs where runs are kept.")
    found = [path for path in runs.iterdir() if is_run(path)]
    return sorted(found, key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    times = [0.0]
    for name in FILES:
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def find(runs: Path, name: str) -> Path:
    """The folder of a run, by its name below ``runs`` or by its path.

    Raises:
        RunsError: If there is none, or one of each.
    """
    found: dict[Path, Path] = {}
    for path in (runs / name, Path(name)):
        if is_run(path):
            found.setdefault(path.resolve(), path)
    if len(found) > 1:
        raise RunsError(
            f"{name!r} is a run in {runs}/ and another one here: write "
            f"{' or '.join(str(path.resolve()) for path in found.values())}."
        )
    for path in found.values():
        return path
    near = ", ".join(path.name for path in folders(runs)[:5]) if runs.is_dir() else ""
    known = f" The newest there: {near}." if near else ""
    raise RunsError(f"There is no run {name!r}, neither in {runs}/ nor as a path.{known}")


def read(folder: Path, name: str | None = None) -> Recorded:
    """All that a run's folder tells, of a run of any version.

    Raises:
        RunsError: If a file cannot be read.
    """
    try:
        known = about(folder)
        rounds, damaged = _rounds(folder)
    except OSError as error:
        raise RunsError(f"Cannot read the run in {folder}: {error.strerror or error}.") from error
    name = name or folder.resolve().name
    found = labels.read(folder)
    return Recorded(name=name, folder=folder, rounds=rounds, damaged=damaged, labels=found, **known)


def read_all(found: Sequence[Path]) -> list[Recorded]:
    """Several runs, each with a name of its own: by their paths, where two have one name."""
    paths = list(dict.fromkeys(path.resolve() for path in found))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        shared = Path(os.path.commonpath([path.parent for path in paths]))
        names = [str(path.relative_to(shared)) for path in paths]
    return [read(path, name) for path, name in zip(paths, names, strict=True)]


def about(folder: Path) -> dict[str, Any]:
    """What a run's folder tells beside its rounds and labels, as plain values."""
    return {
        "settings": _settings(folder),
        "status": status.read(folder),
        "checkpoints": checkpoints(folder),
    }


def checkpoints(folder: Path) -> list[int]:
    """The rounds that have a checkpoint."""
    place = folder / "checkpoints"
    names = [] if place.is_symlink() else [path.name[:5] for path in place.glob("*.safetensors")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    try:
        found = round_record.from_json(read_plain(path))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rounds(folder: Path) -> tuple[list[dict[str, Any]], int]:
    path = folder / "history.jsonl"
    rounds: dict[int, dict[str, Any]] = {}
    damaged = 0
    try:
        lines = read_plain(path).splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            record = round_record.from_line(line)
            rounds[record["round"]] = record  # of a repeated round, the last
        except ValueError:
            damaged += 1
    return [rounds[number] for number in sorted(rounds)], damaged


# -- what runs have in common, and what not --------------------------------------------------


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by flat names, such as ``strategy.fraction_train``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif key not in _NOT_COMPARED:
            found[f"{prefix}{key}"] = value
    return found


def differences(runs: Sequence[Recorded]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with each one's value, or None where it has none."""
    each = [flat(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    rows = {name: [settings.get(name) for settings in each] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def troubles(run: Recorded) -> Iterator[str]:
    """Why a run stopped, who was not let in, and who was left out of a round that has no record."""
    if run.state == "stopped" and (reason := run.status.get("reason")):
        yield f"Stopped: {reason}"
    if run.state == "finished" and isinstance(stopped := run.settings.get("stopped"), dict):
        yield f"Ended after round {stopped.get('round')}: {stopped.get('reason')}"
    refused, failed = run.status.get("refused"), run.status.get("failed")
    if isinstance(refused, dict):
        yield from (f"{node} is not let in: {why}" for node, why in refused.items())
    if isinstance(failed, list) and run.state != "finished":
        for each in failed:
            if isinstance(each, dict):
                node, phase, reason = (each.get(name, "?") for name in ("node", "phase", "reason"))
                yield f"{node} is left out of {phase}: {reason}"


def to_csv(runs: Iterable[Recorded]) -> str:
    """A line for each round of each run, a column for each of its figures."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        name = printable(run.name)
        for record in run.rounds:
            row = {"run": name, "round": record["round"], **round_record.figures(record)}
            rows.append({printable(name): value for name, value in row.items()})
    columns = dict.fromkeys(name for row in rows for name in row) or {"run": None, "round": None}
    written = io.StringIO()
    writer = csv.DictWriter(written, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def to_json(runs: Iterable[Recorded]) -> str:
    """All that the runs' folders tell, as a list."""
    return round_record.to_json([as_plain(run) for run in runs])


def as_plain(run: Recorded) -> dict[str, Any]:
    """What a run's folder tells as plain values, without where it is."""
    return {key: value for key, value in run._asdict().items() if key != "folder"}


# -- removing ------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    """Removes a run's folder with all that is in it.

    Raises:
        RunsError: If it is no run's, is led by a process, or cannot be removed.
    """
    if not is_run(folder) or folder.is_symlink():
        raise RunsError(f"{folder} is no run's folder: nothing is removed.")
    for opened in _opened(folder):
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunsError(f"The run in {folder} is going on: end it first.") from error
        except OSError:  # some network drives hold nothing for anyone
            pass
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise RunsError(f"Cannot remove {folder}: {error.strerror or error}.") from error


def _opened(folder: Path) -> Iterator[int]:
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunsError(f"Cannot open {folder}: {error.strerror or error}.") from error
    try:
        yield opened
    finally:
        os.close(opened)
