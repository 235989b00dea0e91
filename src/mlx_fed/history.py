"""A run's folder: its settings, one line of history a round, and the model.

The record is append-only JSON lines, readable while the run goes on. Whoever wants to watch (a
progress display, a tracker) listens here and keeps no books of its own.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import FedError
from .weights import Arrays

Listener = Callable[[str, dict[str, Any]], None]


class HistoryError(FedError):
    """A run's folder that cannot be made or written."""


class History:
    """The record of one run.

    Args:
        folder (Path): Where the run is kept, from :func:`new_run_folder`.
        listeners (tuple): Each is called ``listener(event, fields)`` for what happens, with
            the events ``joined``, ``left``, ``refused``, ``waiting``, ``phase``, ``reply``,
            ``failed``, ``round`` and ``finished``. Only rounds are written down.
    """

    def __init__(self, folder: Path, listeners: tuple[Listener, ...] = ()):
        self.folder = folder
        self.listeners = listeners
        self.rounds: list[dict[str, Any]] = []

    def notify(self, event: str, **fields: Any) -> None:
        """Tells the listeners."""
        for listener in self.listeners:
            listener(event, fields)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes ``settings.json``.

        Raises:
            HistoryError: If it cannot be written.
        """
        text = json.dumps(settings, indent=2, default=str) + "\n"
        with _replacing(self.folder / "settings.json") as half_written:
            half_written.write_text(text, encoding="utf-8")

    def add_round(self, record: dict[str, Any]) -> None:
        """Appends a round to ``history.jsonl``.

        Raises:
            HistoryError: If it cannot be written. The rounds before it stay as they are.
        """
        line = json.dumps(record, default=float) + "\n"
        path = self.folder / "history.jsonl"
        with _errors_named(path):
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                with suppress(OSError):  # half a line would make the rest unreadable
                    os.truncate(path, size)
                raise
        self.rounds.append(record)
        self.notify("round", **record)

    def save_model(self, arrays: Arrays) -> Path:
        """Writes ``model.safetensors``: the whole model, which ``load_weights`` reads.

        Raises:
            HistoryError: If it cannot be written. A model saved before stays as it is.
        """
        path = self.folder / "model.safetensors"
        # Through a file of Python's, whose errors say what was wrong.
        with _replacing(path) as half_written, half_written.open("wb") as file:
            mx.save_safetensors(file, arrays, {"format": "mlx"})
        return path

    def save_with(self, save: Callable[[Path], Path]) -> Path:
        """Lets ``save(folder)`` write the model, in a form of its own.

        Raises:
            HistoryError: If it cannot be written.
        """
        with _errors_named(self.folder):
            return save(self.folder)


@dataclass
class Result:
    """What a run ends with.

    Attributes:
        parameters (dict): The global model's parameters, by name.
        statistics (dict): Its running statistics.
        rounds (list): One record a round, as in ``history.jsonl``.
        folder (Path): The run's folder.
        model (Path): The whole model as safetensors.
    """

    parameters: Arrays
    statistics: Arrays
    rounds: list[dict[str, Any]]
    folder: Path
    model: Path


def new_run_folder(runs: Path | str = "runs", name: str | None = None) -> Path:
    """Makes a new folder for a run, named by the time unless it has a name.

    Raises:
        HistoryError: If the name is not a plain one, is in use, or the folder cannot be made.
    """
    if name is not None and not re.fullmatch(r"[\w][\w.-]*", name):
        raise HistoryError(f"A run's name has letters, digits, '.', '_' and '-': not {name!r}.")
    base = name or time.strftime("%Y-%m-%d-%H%M%S")
    candidates = [base] if name else [base, *(f"{base}-{number}" for number in range(2, 100))]
    for candidate in candidates:
        folder = Path(runs) / candidate
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise HistoryError(
                f"Cannot make the run's folder {folder}: {error.strerror or error}. "
                "Choose another place with --runs."
            ) from error
        return folder
    raise HistoryError(f"There is a run named {base!r} in {runs}/ already: choose another name.")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path``: all of it or nothing."""
    half_written = path.with_suffix(f".part{path.suffix}")
    with _errors_named(path):
        try:
            yield half_written
            half_written.replace(path)
        finally:
            with suppress(OSError):
                half_written.unlink(missing_ok=True)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HistoryError(
            f"Cannot write {path}: {error.strerror or error}. Make room or choose another place "
            "with --runs; what was written before is kept."
        ) from error
