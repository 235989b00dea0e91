"""A run's progress in a notebook: one output with a bar, the metrics so far and their curves."""

from __future__ import annotations

import sys
import time
from collections import deque
from html import escape
from pathlib import Path
from typing import Any

from .. import events
from ..events import Event
from ..runs import curves, folders
from .output import Output, stops_at_failure
from .server_terminal import phase_text, server_line

_PAUSE = 0.5
"""Seconds between two drawings."""
_MAX_LINES = 20
"""Lines of text that stay, such as nodes that joined or were left out."""


class NotebookDisplay(Output):
    """Listener of a :class:`~mlx_fed.runs.history.History` that updates one output of a cell."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        super().__init__(sys.stderr)
        self.handle = DisplayHandle()
        self.folder: Path | None = None
        self.num_rounds = 0
        self.rounds: list[dict[str, Any]] = []
        self.lines: deque[str] = deque(maxlen=_MAX_LINES)
        self.progress, self.text = 0.0, ""
        self.drawn: float | None = None

    @stops_at_failure
    def __call__(self, event: Event) -> None:
        match event:
            case events.LoadProgress():
                self.text = f"{event.what} ..."
            case events.NodesAwaited():
                self.text = server_line(event)
            case events.RunStarted():
                self.folder = event.folder
                self.num_rounds = event.settings.get("num_rounds", 0)
                self.rounds = folders.read(event.folder).rounds
            case events.PhaseProgress():
                self.text = phase_text(event)
            case events.RoundFinished():
                self.rounds.append(event.record)
                self.progress = event.record["round"] / max(self.num_rounds, 1)
            case events.RunFinished():
                self.text, self.progress = server_line(event), 1.0
            case events.RunAborted():
                self.text = f"Stopped: {event.reason}"
            case events.ClientTraceback():
                self.lines.extend(event.text.splitlines())
            case _:
                self.lines.extend(filter(None, [server_line(event)]))
        is_last = isinstance(event, (events.RunFinished, events.RunAborted))
        current_time = time.monotonic()
        if self.drawn is None or is_last or current_time - self.drawn >= _PAUSE:
            self._draw(current_time)

    def _draw(self, now: float) -> None:
        from IPython.display import HTML

        bar = f'<progress value="{self.progress:.3f}" style="width: 20em"></progress>'
        table = curves.to_html(str(self.folder), self.rounds) if self.rounds else ""
        lines = "".join(f"<div>{escape(line)}</div>" for line in self.lines)
        html = HTML(f"<div>{bar} {escape(self.text)}</div>{table}{lines}")
        if self.drawn is None:
            self.handle.display(html)
        else:
            self.handle.update(html)
        self.drawn = now
