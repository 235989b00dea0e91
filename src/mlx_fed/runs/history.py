"""A run's record: its settings, one line of history a round, and the models it ends with.

The record is append-only JSON lines, readable while the run goes on. Whoever wants to watch (a
progress display, a tracker) listens here and keeps no books of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arrays.named_arrays import Arrays
from ..errors import FedError, os_errors
from ..events import Event, Listener, RoundFinished, RunAborted, RunResumed, RunStarted
from ..system.atomic_files import atomic_write, lock_folder, read_regular_file, sync
from . import round_record
from .status import Status

_LATELY = 5
"""Rounds by which the time of those to come is told."""


class HistoryError(FedError):
    """A run's folder that cannot be made or written."""


class History:
    """The record of one run.

    Args:
        folder (Path): Where the run is kept, from :func:`new_run_folder`.
        listeners (tuple): Each is called with the run's events, of :mod:`mlx_fed.events`. Only
            rounds are written down, and in ``status.json`` what the run is doing now: a listener
            that wants earlier events reads it there.
        run_info (dict, optional): What is known of the run beside its settings, for the record.
    """

    def __init__(
        self,
        folder: Path,
        listeners: tuple[Listener, ...] = (),
        run_info: dict[str, Any] | None = None,
    ):
        self.folder = folder
        self.listeners: tuple[Listener, ...] = (Status(folder), *listeners)
        self.about = run_info or {}
        self.settings: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self.moved = 0

    def notify(self, event: Event) -> None:
        """Calls the listeners with an event."""
        for listener in self.listeners:
            listener(event)

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Writes ``settings.json``.

        Raises:
            HistoryError: If it cannot be written.
        """
        self.settings = {**settings, **self.about}
        self._write_settings()
        self.notify(RunStarted(self.folder, self.settings))

    def write_end(self, reason: str) -> None:
        """Adds to ``settings.json`` why the run ended after this round, before its last.

        Raises:
            HistoryError: If it cannot be written.
        """
        self.settings["stopped"] = {"round": self.rounds[-1]["round"], "reason": reason}
        self._write_settings()

    def _write_settings(self) -> None:
        text = json.dumps(self.settings, indent=2, default=str) + "\n"
        path = self.folder / "settings.json"
        with errors_named(path), atomic_write(path) as temporary_path:
            temporary_path.write_text(text, encoding="utf-8")

    def add_round(self, record: dict[str, Any]) -> None:
        """Appends a round to ``history.jsonl``.

        Raises:
            HistoryError: If it cannot be written. The rounds before it stay as they are.
        """
        record["time"] = round(time.time(), 3)
        line = round_record.to_line(record) + "\n"
        path = self.folder / "history.jsonl"
        with errors_named(path):
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                with suppress(OSError):  # half a line would make the rest unreadable
                    os.truncate(path, size)
                raise
        self.rounds.append(record)
        self.moved += _bytes(record)
        self.notify(RoundFinished(record))

    def so_far(self, num_remaining: int) -> tuple[int, float | None]:
        """The bytes that the rounds so far moved, and about how many seconds those to come take,
        or None while there is none to go by.

        Args:
            num_remaining (int): How many rounds are to come.
        """
        last_rounds = self.rounds[1:][-_LATELY:] or self.rounds  # the first may compile and load
        took = [sum(record.get("seconds", {}).values()) for record in last_rounds]
        seconds = num_remaining * sum(took) / len(took) if took else None
        return self.moved, seconds

    def sync(self) -> None:
        """Writes the rounds so far to disk, past the system's memory.

        Raises:
            HistoryError: If they cannot be written.
        """
        path = self.folder / "history.jsonl"
        with errors_named(path), path.open("rb") as file:
            sync(file)

    def go_on_after(self, number: int) -> None:
        """Resumes after a round: reads the rounds up to it, and drops later ones.

        Raises:
            HistoryError: If ``history.jsonl`` cannot be read or written.
        """
        path = self.folder / "history.jsonl"
        with errors_named(path):
            lines = read_regular_file(path).splitlines() if path.exists() else []
        rounds = {}
        for line in lines:
            with suppress(ValueError):  # half a line of a run that was killed
                record = round_record.from_line(line)
                rounds[record["round"]] = record
        self.rounds = [rounds[n] for n in sorted(rounds) if n <= number]
        self.moved = sum(map(_bytes, self.rounds))
        text = "".join(round_record.to_line(record) + "\n" for record in self.rounds)
        with errors_named(path), atomic_write(path) as temporary_path:
            temporary_path.write_text(text, encoding="utf-8")
        self.notify(RunResumed(number))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which no other process can run the same run.

        Raises:
            HistoryError: If one does.
        """
        running = HistoryError(
            f"The run in {self.folder} is being led by another process: end it first."
        )
        with ExitStack() as stack:
            with errors_named(self.folder):
                stack.enter_context(lock_folder(self.folder, running))
            try:
                yield
            except BaseException as error:
                self.notify(RunAborted(str(error) or type(error).__name__))
                raise

    def save_model(self, arrays: Arrays, name: str = "model.safetensors") -> Path:
        """Writes the whole model, in a file which ``load_weights`` reads.

        Raises:
            HistoryError: If it cannot be written. A model saved before stays as it is.
        """
        path = self.folder / name
        # Through a file of Python's, whose errors say what was wrong.
        with (
            errors_named(path),
            atomic_write(path) as temporary_path,
            temporary_path.open("wb") as file,
        ):
            mx.save_safetensors(file, arrays, {"format": "mlx"})
        return path

    def save_with(self, save: Callable[[Path], Path | None], name: str = "model") -> Path:
        """Writes the model by ``save(folder)``, in the run's folder or, for another than the last
        model, in a folder NAME below it.

        Returns:
            Path: What ``save`` returns, or the folder where it returns none.

        Raises:
            HistoryError: If it cannot be written.
        """
        folder = self.folder if name == "model" else self.folder / name
        with errors_named(folder):
            folder.mkdir(exist_ok=True)
            return Path(save(folder) or folder)


def _bytes(record: dict[str, Any]) -> int:
    return sum(record.get("bytes", {}).values())


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Context in which an OSError becomes a HistoryError with the file and what to do."""
    advice = "Make room or choose another place with --runs; what was written before is kept."
    with os_errors(HistoryError, f"Cannot write {path}", advice):
        yield
