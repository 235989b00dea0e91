"""Audit log: append-only JSON lines, each with the hash of the line before it.

Whoever changes, removes or inserts a line has to compute all later hashes anew; a copy of one later
hash, kept elsewhere, shows that. What no chain shows by itself is that its last lines are missing:
compare the last hash, or the number of lines, with what was noted before.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .. import events
from ..errors import FedError

_FIRST = "0" * 64
_LONGEST_LINE = 2**20
"""Bytes of a line."""


class AuditError(FedError):
    """An audit log that cannot be written, or that was changed."""


class Entry(NamedTuple):
    """A line of an audit log."""

    number: int
    time: datetime
    event: str
    fields: dict[str, Any]
    hash: str


class AuditLog:
    """An audit log on disk, which several processes may append to.

    Args:
        path (Path): The file, which only its owner may read; it is created with its first line.

    Raises:
        AuditError: If what is there is no audit log, or it was changed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).expanduser()
        self._number, self._hash, self._end = 0, _FIRST, 0
        self._read_on(_content(self.path))

    def append(self, event: str, **fields: Any) -> None:
        """Appends a line with the time.

        Raises:
            AuditError: If it cannot be written: what is to be audited must not go on then.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self.path, flags, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                size = file.seek(0, os.SEEK_END)
                if size < self._end:
                    raise AuditError(
                        f"The audit log {self.path} has become shorter: it was changed."
                    )
                file.seek(self._end)
                self._read_on(file.read())  # what another process has appended
                line, digest = _line(self._number + 1, event, fields, self._hash)
                file.write(line)
                file.flush()
                self._number, self._hash = self._number + 1, digest
                self._end = size + len(line)
        except OSError as error:
            raise AuditError(
                f"Cannot write the audit log {self.path}: {error.strerror or error}."
            ) from error

    def _read_on(self, content: bytes) -> None:
        for entry in _entries(self.path, content, self._number, self._hash):
            self._number, self._hash = entry.number, entry.hash
        self._end += len(content)


def entries(path: Path) -> Iterator[Entry]:
    """The lines of an audit log, each checked against the one before it; none without a file.

    Args:
        path (Path): The log.

    Raises:
        AuditError: At the first line that is not as it was written, with its number.
    """
    return _entries(path, _content(path))


def _entries(path: Path, content: bytes, number: int = 0, digest: str = _FIRST) -> Iterator[Entry]:
    """The lines after the one of this number and hash."""
    for line in content.splitlines(keepends=True):
        entry = _checked(path, line, number + 1, digest)
        number, digest = entry.number, entry.hash
        yield entry


def _content(path: Path) -> bytes:
    """The bytes of a log, while nobody appends to it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise AuditError(f"Cannot read the audit log {path}: {error.strerror or error}.") from error


def _line(number: int, event: str, fields: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = {
        "number": number,
        "time": timestamp,
        "event": event,
        "fields": fields,
        "before": before,
    }
    text = json.dumps(content, default=str, ensure_ascii=True)
    if len(text) > _LONGEST_LINE - 100:
        raise AuditError(f"A line of the audit log would have {len(text)} bytes: {event}.")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]}, "hash": "{digest}"}}\n'.encode(), digest


def _checked(path: Path, line: bytes, number: int, before: str) -> Entry:
    """A line as an entry, if its bytes are those that were written after the line before."""
    head, _, tail = line.rpartition(b', "hash": "')
    digest = hashlib.sha256(head + b"}").hexdigest()
    try:
        if tail != f'{digest}"}}\n'.encode():
            raise ValueError
        content = json.loads(line)
        if (content["number"], content["before"]) != (number, before):
            raise ValueError
        time, event = datetime.fromisoformat(content["time"]), str(content["event"])
        fields = dict(content["fields"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AuditError(
            f"{path}, line {number}, is not as it was written: it, or one before it, was changed, "
            "removed or inserted. The lines before it are as they were."
        ) from None
    return Entry(number, time, event, fields, digest)


class AuditListener:
    """Listener of a run that records its events: who joined, what was asked, refused and received.

    Args:
        log (AuditLog): Where.
    """

    def __init__(self, log: AuditLog):
        self.log = log
        self._run: str | None = None

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                config = event.settings.get("config", {})
                self._run = str(config.get("run-id"))
                self._record(
                    "started",
                    folder=str(event.folder),
                    strategy=event.settings.get("strategy"),
                    settings=config,
                )
            case events.NodeJoined() | events.NodeLeft() | events.NodeRefused():
                fields = event.to_dict()
                fields.pop("nodes", None)
                self._record(event.name, **fields)
            case events.ReplyRefused():
                self._record("reply-refused", **event.to_dict())
            case events.RoundFinished():
                record = event.record
                self._record(
                    "round",
                    round=record["round"],
                    train=record["train"].get("nodes", []),
                    evaluate=record["evaluate"].get("nodes", []),
                    excluded=record.get("left_out", []),
                    bytes=record["bytes"],
                )
            case events.RunFinished():
                self._record("finished", model=str(event.model), stopped=event.stopped)
            case events.RunAborted():
                self._record("aborted", reason=event.reason, user=getpass.getuser())

    def _record(self, name: str, **fields: Any) -> None:
        self.log.append(name, run=self._run, **fields)
