"""Audit log: append-only JSON lines, each with the hash of the line before it.

Whoever changes, removes or inserts a line has to compute all later hashes anew; a copy of one later
hash, kept elsewhere, shows that. What no chain shows by itself is that its last lines are missing:
compare the last hash, or the number of lines, with what was noted before. A line that a crash has
cut off is kept as an entry of its own, ``torn``, when the log goes on.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, NamedTuple

from .. import events
from ..errors import FedError, os_errors

_FIRST = "0" * 64
_LONGEST_LINE = 2**21
"""Bytes of a line."""
_LARGEST_FIELD = 2**16
"""Characters of a field as JSON."""


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

    Attributes:
        count (int): Lines that were read or written so far.
        observe (callable): Called with each further entry, whoever wrote it.

    Raises:
        AuditError: If what is there is no audit log, or it was changed.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).expanduser()
        self.observe: Callable[[Entry], None] = lambda entry: None
        self.count, self._hash, self._end = 0, _FIRST, 0
        self._read_on(_lines(self.path))

    def append(self, event: str, check: Callable[[], None] | None = None, **fields: Any) -> None:
        """Appends a line with the time.

        Args:
            event (str): What happened.
            check (callable, optional): Called when all lines of others have been observed, and
                before they can write another one; nothing is written if it raises.
            fields: What belongs to it. One of more than 64 KiB is recorded by its beginning and
                its digest.

        Raises:
            AuditError: If it cannot be written: what is to be audited must not go on then.
        """
        with os_errors(AuditError, f"Cannot write the audit log {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            with os.fdopen(os.open(self.path, flags, 0o600), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.seek(0, os.SEEK_END) < self._end:
                    raise AuditError(
                        f"The audit log {self.path} has become shorter: it was changed."
                    )
                file.seek(self._end)
                torn = self._read_on(BytesIO(file.readall()))
                if torn:  # a process or the machine stopped in the middle of a line
                    file.truncate(self._end)
                    self._write(file, "torn", {"line": torn.decode("utf-8", "replace")})
                if check is not None:
                    check()
                self._write(file, event, fields)

    def _write(self, file: FileIO, event: str, fields: Mapping[str, Any]) -> None:
        line = _line(self.count + 1, event, fields, self._hash)
        num_bytes = 0
        try:
            while num_bytes < len(line):
                num_bytes += file.write(line[num_bytes:])
        except OSError:
            with suppress(OSError):
                file.truncate(self._end)  # the disk is full: part of a line may be there
            raise
        self._read_on([line])

    def _read_on(self, lines: Iterable[bytes]) -> bytes:
        """Takes in the lines after those that are known; the bytes of one that has no end."""
        for line in lines:
            if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                return line
            entry = _checked(self.path, line, self.count + 1, self._hash)
            self.count, self._hash = entry.number, entry.hash
            self._end += len(line)
            self.observe(entry)
        return b""


def entries(path: Path) -> Iterator[Entry]:
    """The lines of an audit log, each checked against the one before it; none without a file.

    Args:
        path (Path): The log.

    Raises:
        AuditError: At the first line that is not as it was written, with its number.
    """
    number, digest = 0, _FIRST
    for line in _lines(path):
        if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            raise AuditError(
                f"{path} ends in the middle of line {number + 1}: a process or the machine stopped "
                "there, or the end was removed. The lines before it are as they were. The next "
                "process that writes to the log goes on after them."
            )
        entry = _checked(path, line, number + 1, digest)
        number, digest = entry.number, entry.hash
        yield entry


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that are there now, also while others are appended."""
    reading = os_errors(AuditError, f"Cannot read the audit log {path}")
    with reading, suppress(FileNotFoundError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # no line is half written
        size = os.fstat(file.fileno()).st_size
        fcntl.flock(file, fcntl.LOCK_UN)
        while (remaining := size - file.tell()) > 0:
            if not (line := file.readline(min(remaining, _LONGEST_LINE))):
                break
            yield line


def _line(number: int, event: str, fields: Mapping[str, Any], before: str) -> bytes:
    content = {
        "number": number,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "fields": {name: _bounded(value) for name, value in fields.items()},
        "before": before,
    }
    text = json.dumps(content, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]}, "hash": "{digest}"}}\n'.encode()


def _bounded(value: Any) -> Any:
    """A field, or the beginning, the size and the digest of one that is too large for a line."""
    text = json.dumps(value, default=str)
    if len(text) <= _LARGEST_FIELD:
        return value
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"start": text[:1000], "bytes": len(text), "sha256": digest}


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
        if time.utcoffset() is None or not 1970 <= time.year < 9999:
            raise ValueError
        fields = dict(content["fields"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AuditError(
            f"{path}, line {number}, is not as it was written: it, or one before it, was changed, "
            "removed or inserted. The lines before it are as they were."
        ) from None
    return Entry(number, time, event, fields, digest)


def user_name() -> str:
    """The user of this process, also where the system has no name for it, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


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
                self._record("aborted", reason=event.reason, user=user_name())

    def _record(self, name: str, **fields: Any) -> None:
        self.log.append(name, run=self._run, **fields)
