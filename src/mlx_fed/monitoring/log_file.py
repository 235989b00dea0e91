"""Log file of a run or a node: its events with time and level, as text or as JSON Lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from .. import events
from ..errors import FedError
from ..events import Event, Listener
from ..runs import round_record
from ..system.printable import printable
from .output import print_failure

_LEVELS = {
    **dict.fromkeys(("left", "refused", "failed", "lost", "waiting"), logging.WARNING),
    **dict.fromkeys(("stopped", "traceback"), logging.ERROR),
}
"""By event; the others are INFO."""
_OMITTED = (
    *(events.PhaseProgress, events.LabelsCounted, events.LoadProgress, events.LoadFinished),
    events.MessageReceived,
)
"""Events of progress, and of content that the run's folder has."""


@contextmanager
def log_lines(path: Path, line_of: Callable[[Event], str]) -> Iterator[Listener]:
    """Listener that appends each event to a file, which other programs may rotate.

    A file whose name ends in ``.json`` or ``.jsonl`` has an object a line. Tokens are not written.
    The exception that ends the context is the last line.

    Args:
        path (Path): The file.
        line_of (callable): An event as text; empty for events without any.

    Raises:
        FedError: If the file cannot be opened.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _Handler(path, encoding="utf-8")
    except OSError as error:
        raise FedError(f"Cannot write the log file {path}: {error.strerror or error}.") from error
    is_json = path.suffix in (".json", ".jsonl")
    handler.setFormatter(_JsonFormatter() if is_json else _TextFormatter())
    logger = logging.Logger("mlx_fed")
    logger.addHandler(handler)

    def log(event: Event) -> None:
        fields = event.to_dict()
        if isinstance(event, events.NodeInvited):
            fields, text = {"node": event.node}, f"{event.node} is invited"
        elif isinstance(event, events.RunStarted):
            text = f"The run's folder: {event.folder}"
        elif isinstance(event, events.RunAborted):
            text = f"The run ends: {event.reason}"
        else:
            text = line_of(event)
        if isinstance(event, _OMITTED) or not (is_json or text):
            return
        level = _LEVELS.get(event.name, logging.INFO)
        logger.log(level, "%s", text, extra={"content": {"event": event.name, **fields}})

    try:
        yield log
    except BaseException as error:
        text = f"Ended by {type(error).__name__}: {error}".rstrip(": ")
        content = {"event": "ended", "reason": text}
        logger.error("%s", text, extra={"content": content})
        raise
    finally:
        handler.close()


class _Handler(WatchedFileHandler):
    """Appends to a file; one that fails is given up, and the run goes on."""

    works = True

    def emit(self, record: logging.LogRecord) -> None:
        if self.works:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.works = False
        error = sys.exc_info()[1]
        print_failure(
            f"The log file {self.baseFilename} failed and has no more lines; the run continues",
            error if isinstance(error, Exception) else RuntimeError(str(error)),
        )


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_time_of(record)} {record.levelname:<7} {printable(record.getMessage())}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = vars(record)["content"]
        head = {"time": _time_of(record), "level": record.levelname}
        return round_record.to_json({**head, **content})
