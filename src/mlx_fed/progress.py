"""What a run looks like in a terminal: a live line where it is one, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

_LONGEST = 1000
"""Characters of a line."""
_STYLES = {
    "serving": "bold",
    "finished": "bold",
    "joined": "dim",
    "left": "yellow",
    "waiting": "yellow",
    "lost": "yellow",
    "refused": "red",
    "failed": "red",
}


def server_line(event: str, fields: dict[str, Any]) -> str:
    """One event of a run as a line of text; empty for those not worth a line."""
    match event:
        case "serving":
            open_ = "  (not encrypted: --insecure)" if fields["insecure"] else ""
            return f"Server ready on {fields['address']}{open_}"
        case "waiting":
            return f"Waiting for nodes: {fields['nodes']} of {fields['needed']}"
        case "joined":
            return f"{fields['node']} joined ({fields['nodes']} in all)"
        case "left":
            return f"{fields['node']} left"
        case "refused":
            return f"{fields['node']} refused: {fields['reason']}"
        case "failed":
            return f"{fields['node']} left out of {fields['phase']}: {fields['reason']}"
        case "round":
            return _round_line(fields)
        case "finished":
            return f"Finished in {fields['seconds']:.1f} s. The model: {fields['model']}"
    return ""


def node_line(event: str, fields: dict[str, Any]) -> str:
    """One event of a node's life as a line of text; empty for those not worth a line."""
    match event:
        case "ready":
            return f"Data ready (node id {fields['partition']}), computing on {fields['device']}"
        case "waiting":
            return (
                f"No server at {fields['server']} yet: trying again "
                f"for {fields['wait']:.0f} seconds ({fields['reason']})"
            )
        case "joined":
            return f"Joined {fields['server']}"
        case "lost":
            return f"Lost {fields['server']} ({fields['reason']}): trying again"
        case "failed":
            return f"{_what(fields)} failed: {fields['reason']}"
        case "answered":
            metrics = _floats(fields["metrics"])
            if not metrics:
                return ""
            return "   ".join([_what(fields), *metrics, f"{fields['seconds']:.2f} s"])
        case "finished":
            return "The run is over."
    return ""


class ServerProgress:
    """Listens to a :class:`~mlx_fed.history.History` and shows the run."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.status = self.console.status("") if self.console.is_terminal else None
        self.phase: dict[str, Any] = {}
        self.replies = 0

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event == "phase":
            self.phase, self.replies = fields, 0
        elif event == "reply":
            self.replies += 1
        if event in ("phase", "reply"):
            self._show(
                f"round {self.phase['round']}/{self.phase['of']}  {self.phase['phase']}  "
                f"{self.replies} of {self.phase['nodes']} nodes"
            )
        elif event == "waiting" and self.status is not None:
            self._show(server_line(event, fields))
        elif line := server_line(event, fields):
            if event == "finished":
                self.close()
            _print(self.console, line, _STYLES.get(event, ""))

    def _show(self, text: str) -> None:
        if self.status is not None:
            self.status.update(Text(text, style="cyan"))
            self.status.start()

    def close(self) -> None:
        """Takes the live line off the terminal."""
        if self.status is not None:
            self.status.stop()


def node_progress(console: Console | None = None) -> Callable[..., None]:
    """A function that prints a line for what happens on a node."""
    console = console or Console(highlight=False)

    def show(event: str, **fields: Any) -> None:
        if line := node_line(event, fields):
            _print(console, line, _STYLES.get(event, ""))

    return show


def quiet_flower() -> None:
    """Keeps Flower's log lines out of ours."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def printable(text: str) -> str:
    """One line that is safe to show: what the other side sends may steer a terminal.

    Line breaks become spaces, other control characters a mark, and what is very long is cut.
    """
    line = " ".join(text.replace("\t", " ").splitlines())
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "..."


def _print(console: Console, line: str, style: str) -> None:
    # What a node sends (names, reasons) is shown as text, never read as markup.
    console.print(Text(printable(line), style=style), soft_wrap=True)
    console.file.flush()


def _round_line(record: dict[str, Any]) -> str:
    parts = [f"round {record['round']}"]
    if "loss" in record["train"]:
        parts.append(f"train loss {record['train']['loss']:.4f}")
    parts += _floats(record["evaluate"])
    parts += [f"central {metric}" for metric in _floats(record.get("central", {}))]
    parts.append(f"{sum(record['seconds'].values()):.2f} s")
    return "   ".join(parts)


def _floats(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]


def _what(fields: dict[str, Any]) -> str:
    return f"round {fields['round']} {fields['kind']}" if fields["round"] else str(fields["kind"])
