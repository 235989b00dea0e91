"""A node's events as lines on its terminal, and a live line with its current work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from ..system.loading import loading_listeners
from .loading_bars import LoadingBars
from .output import RUN_BAR, STYLES, TerminalOutput, print_line, stops_at_failure


def node_line(event: str, fields: dict[str, Any]) -> str:
    """A node's event as a line of text; empty for events without one."""
    match event:
        case "ready":
            return f"Data ready (node id {fields['partition']}), computing on {fields['device']}"
        case "waiting":
            return (
                f"No server at {fields['server']} yet: trying again "
                f"for {fields['wait']:.0f} seconds ({fields['reason']})"
            )
        case "note":
            return f"Note: {fields['text']}"
        case "joined":
            return f"Joined {fields['server']}"
        case "lost":
            return f"Lost {fields['server']} ({fields['reason']}): trying again"
        case "failed":
            return f"{_work(fields)} failed: {fields['reason']}"
        case "answered":
            metrics = [
                f"{name} {value:.4f}"
                for name, value in fields["metrics"].items()
                if isinstance(value, float)
            ]
            if not metrics:
                return ""
            return "   ".join([_work(fields), *metrics, f"{fields['seconds']:.2f} s"])
        case "finished":
            return "The run is over."
    return ""


def _work(fields: dict[str, Any]) -> str:
    return f"round {fields['round']} {fields['kind']}" if fields["round"] else str(fields["kind"])


class NodeTerminal(TerminalOutput):
    """Listener of a node that prints its events."""

    def __init__(self, console: Console | None = None):
        super().__init__(console)
        self.loading = LoadingBars(self.console, self.bars)

    @stops_at_failure
    def __call__(self, event: str, **fields: Any) -> None:
        if event in ("loading", "loaded"):
            self.loading(event, fields)
        elif event == "working":
            self.bars.update(RUN_BAR, _work(fields))
        else:
            if event in ("joined", "answered"):
                self.bars.update(RUN_BAR, "waiting for the server")
            if line := node_line(event, fields):
                print_line(self.console, line, STYLES.get(event, ""))


@contextmanager
def node_listener_or_terminal(
    listener: Callable[..., None] | None,
) -> Iterator[Callable[..., None]]:
    """A node's listener, or the terminal where there is none, until the context ends.

    It gets loading events, too.
    """
    terminal = NodeTerminal() if listener is None else None
    notify = listener or terminal
    assert notify is not None
    try:
        with loading_listeners(lambda event, fields: notify(event, **fields)):
            yield notify
    finally:
        if terminal:
            terminal.close()
