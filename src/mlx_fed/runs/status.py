"""Current state of a run, in its folder's ``status.json``, for other processes.

It is a listener of the history like any other. Its file is small and written in place of itself a
few times a second at most; a run goes on without it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import events
from ..system.atomic_files import atomic_write, read_regular_file
from . import round_record

_PAUSE = 0.5
"""Seconds until what comes often, such as replies, is written again."""
_GLANCE = 0.1
"""Seconds until another phase is written: to write costs as much as a short one takes."""
_LARGEST = 2**24
"""Bytes of the file."""
_MOST_NOTICES = 100
_MOST_REFUSED = 100
_FREQUENT = (events.RepliesArrived, events.ReplyRefused, events.NodeJoined, events.NodeLeft)
_NOTICES = (
    *(events.NodeJoined, events.NodeLeft, events.NodeRefused),
    *(events.Notice, events.RunResumed),
)
"""Events that are kept. What is secret, such as an invitation's token, is not among them."""


class Status:
    """Writes ``status.json`` as the run goes on.

    Args:
        folder (Path): The run's.
    """

    def __init__(self, folder: Path):
        self.path = folder / "status.json"
        self.notices: list[dict[str, Any]] = []
        self.written = self.phase_written = -math.inf
        self.begun = False
        self.refused: dict[str, str] = {}
        self.failed: list[dict[str, str]] = []
        self.now: dict[str, Any] = {
            "state": "waiting",
            "pid": os.getpid(),
            "host": platform.node(),
            "started": time.time(),
        }

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, _NOTICES):
            fields = event.to_dict()
            notice: dict[str, Any] = {"time": time.time(), "event": event.name}
            notice |= {key: fields[key] for key in ("node", "reason", "text") if key in fields}
            self.notices.append(notice)
            del self.notices[:-_MOST_NOTICES]
        match event:
            case events.NodesAwaited():
                self.now |= {"state": "waiting", "nodes": event.nodes, "of": event.needed}
            case events.PhaseProgress():
                self.now |= {"state": "running", **event.to_dict()}
            case events.RunFinished():
                self.now["state"] = "finished"
                if event.stopped:
                    self.now["reason"] = event.stopped
            case events.RunAborted():
                self.now |= {"state": "stopped", "reason": event.reason}
            case events.NodeRefused():
                self.refused.pop(event.node, None)
                if len(self.refused) < _MOST_REFUSED:
                    self.refused[event.node] = event.reason
            case events.NodeJoined():
                self.refused.pop(event.node, None)
            case events.ReplyRefused():
                if len(self.failed) < _MOST_REFUSED:
                    self.failed.append(event.to_dict())
            case events.RoundFinished():
                self.failed.clear()  # its record has them
                return
            case events.NodeLeft() | events.Notice() | events.RunResumed() | events.RunStarted():
                pass
            case _:
                return
        # A run that is refused before it goes on stays as it was.
        self.begun = self.begun or isinstance(event, events.RunStarted)
        if not self.begun:
            return
        current_time = time.monotonic()
        if isinstance(event, _FREQUENT) and current_time - self.written < _PAUSE:
            return
        if isinstance(event, events.PhaseStarted):
            if current_time - self.phase_written < _GLANCE:
                return
            self.phase_written = current_time
        self._write()

    def _write(self) -> None:
        self.written = time.monotonic()
        details = {"refused": self.refused, "failed": self.failed, "notices": self.notices}
        text = json.dumps({**self.now, "time": time.time(), **details}, default=str)
        with suppress(OSError), atomic_write(self.path, durable=False) as temporary_path:
            temporary_path.write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Current state of the run in a folder; empty without a readable file.

    A run whose process is gone without a word is ``"stopped"``.
    """
    try:
        status = round_record.from_json(read_regular_file(folder / "status.json", _LARGEST))
        for name, kind in (("refused", dict), ("failed", list), ("notices", list)):
            if not isinstance(status.get(name, kind()), kind):
                return {}
        is_here = status["host"] == platform.node()
        if status["state"] in ("waiting", "running") and is_here and not _lives(status["pid"]):
            status |= {"state": "stopped", "reason": "its process is gone"}
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(status)


def _lives(pid: int) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
