"""Changes to an audit log of several lines, each of which must be found: functions of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

Change = Callable[[bytes], bytes]


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    """The log with other lines."""
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


def rehashed(place: int, /, **changes: Any) -> Change:
    """The log with a changed line whose own hash fits again."""

    def change(content: bytes) -> bytes:
        all_lines = content.splitlines(keepends=True)
        fields = json.loads(all_lines[place])
        del fields["hash"]
        text = json.dumps({**fields, **changes})
        digest = hashlib.sha256(text.encode()).hexdigest()
        all_lines[place] = f'{text[:-1]}, "hash": "{digest}"}}\n'.encode()
        return b"".join(all_lines)

    return change


def replaced(old: bytes, new: bytes) -> Change:
    """The log with other bytes."""
    return lambda content: content.replace(old, new)


def _swapped(all_lines: list[bytes]) -> list[bytes]:
    return [all_lines[1], all_lines[0], *all_lines[2:]]


ACTS: dict[str, Change] = {
    "the first line is gone": lines(lambda all_lines: all_lines[1:]),
    "a line is gone": lines(lambda all_lines: [*all_lines[:2], *all_lines[3:]]),
    "two lines have changed places": lines(_swapped),
    "the lines are backwards": lines(lambda all_lines: all_lines[::-1]),
    "a line is there twice": lines(lambda all_lines: [*all_lines[:2], *all_lines[1:]]),
    "the log is there twice": lambda content: content + content,
    "a line without its end": lambda content: content[:-20],
    "without the last line break": lambda content: content[:-1],
    "with other line breaks": replaced(b"\n", b"\r\n"),
    "an empty line": lines(lambda all_lines: [all_lines[0], b"\n", *all_lines[1:]]),
    "a line of another's": lines(lambda all_lines: [*all_lines, b'{"event": "sent"}\n']),
    "bytes at the start": lambda content: b"\xef\xbb\xbf" + content,
    "bytes at the end": lambda content: content + b"\0" * 10,
    "a megabyte in a line": replaced(b'"run-1"', b'"' + b"r" * 2**21 + b'"'),
    "another number of bytes": replaced(b'"bytes": 1', b'"bytes": 0'),
    "another event": replaced(b'"refused"', b'"allowed"'),
    "another time": replaced(b'"time": "2', b'"time": "1'),
    "a space more": replaced(b'"run": ', b'"run":  '),
    "a field twice": replaced(b'"fields": {', b'"fields": {"bytes": 0, '),
    "a field more": replaced(b'"event"', b'"extra": 1, "event"'),
    "a hash in capitals": lambda content: content.upper(),
    "a hash of zeros": replaced(b'"hash": "', b'"hash": "0'),
    "a line with its hash made anew": rehashed(1, fields={"bytes": 0}),
    "a number with its hash made anew": rehashed(1, number=7),
    "a link with its hash made anew": rehashed(1, before="0" * 64),
    "fields that are none": rehashed(2, fields=[1]),
    "a time that is none": rehashed(2, time="yesterday"),
}
