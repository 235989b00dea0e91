"""What a run looks like in a terminal: a live line where it is one, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from . import records

if TYPE_CHECKING:
    from .history import Listener

_LONGEST = 1000
"""Characters of a line."""
_MOST_FAILURES = 10
"""Lines about nodes that are left out of a phase."""
_STYLES = {
    "serving": "bold",
    "dashboard": "bold",
    "finished": "bold",
    "resumed": "bold",
    "note": "yellow",
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
            how = "  (encrypted; nodes are known by their keys)" if fields["secure"] else ""
            return f"Server ready on {fields['address']}{how}"
        case "dashboard":
            return f"Dashboard on {fields['address']}"
        case "invited":
            return f"{fields['node']} joins with:  {fields['command']} {fields['token']}"
        case "waiting":
            return f"Waiting for nodes: {fields['nodes']} of {fields['needed']}"
        case "joined":
            return f"{fields['node']} joined ({fields['nodes']} in all)"
        case "left":
            return f"{fields['node']} left"
        case "refused":
            return f"{fields['node']} refused: {fields['reason']}"
        case "resumed":
            done = fields["round"]
            return f"Going on after round {done}" if done else "Starting over: no round was done"
        case "note":
            return f"Note: {fields['text']}"
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
        case "note":
            return f"Note: {fields['text']}"
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
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", style="cyan", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)
        self.phase: dict[str, Any] = {}
        self.replies = 0
        self.failures = 0
        self.rounds: list[dict[str, Any]] = []

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("phase", "round"):
            self._count_failures()
        if event == "failed":
            self.failures += 1
            if self.failures > _MOST_FAILURES:
                return
        if event == "phase":
            self.phase, self.replies = fields, 0
        elif event == "reply":
            self.replies += 1
        elif event == "replies":
            self.replies += fields["count"]
        elif event == "round":
            self.rounds.append(fields)
            fields = {**fields, "of": self.phase.get("of", 0)}
        elif event == "finished":
            self.close()
            if line := _summary(self.rounds):
                _print(self.console, line, "bold")
        if event in ("phase", "reply", "replies"):
            done, of = self.phase["round"] - 1, self.phase["of"]
            nodes = max(1, self.phase["nodes"])
            part = (self.phase["phase"] == "evaluate") + min(1.0, self.replies / nodes)
            self._show(
                f"round {done + 1}/{of}  {self.phase['phase']}  "
                f"{self.replies} of {self.phase['nodes']} nodes{self._so_far(of - done)}",
                done + part / 2,
                of,
            )
        elif event == "waiting" and not self.bar.disable:
            self._show(server_line(event, fields))
        elif line := server_line(event, fields):
            _print(self.console, line, _STYLES.get(event, ""))
            for name, text in fields.get("central", {}).items():
                if isinstance(text, str):  # such as a sample of what a model writes
                    _print(self.console, f"{name}: {text}", "dim")

    def _so_far(self, left: int) -> str:
        """The bytes that have travelled, and the time that the rounds still take."""
        if not self.rounds:
            return ""
        moved = sum(sum(record.get("bytes", {}).values()) for record in self.rounds)
        # The first round may compile and load.
        lately = self.rounds[1:][-5:] or self.rounds
        each = sum(sum(record["seconds"].values()) for record in lately) / len(lately)
        return f"  {size_text(moved)}  about {seconds_text(left * each)} left"

    def _show(self, text: str, done: float | None = None, of: int | None = None) -> None:
        self.bar.update(self.task, description=text, completed=done, total=of)
        self.bar.start()

    def _count_failures(self) -> None:
        """A line for the nodes left out of a phase that had none of their own."""
        more, self.failures = self.failures - _MOST_FAILURES, 0
        if more > 0:
            line = f"{more} more left out of {self.phase['phase']}: history.jsonl says why"
            _print(self.console, line, _STYLES["failed"])

    def close(self) -> None:
        """Takes the live line off the terminal."""
        self._count_failures()
        self.bar.stop()


@contextmanager
def listeners_or_terminal(
    listeners: tuple[Listener, ...] | None,
) -> Iterator[tuple[Listener, ...]]:
    """The listeners that were given, or if none were the terminal for as long as the context
    lasts."""
    if listeners is not None:
        yield tuple(listeners)
        return
    shown = ServerProgress()
    try:
        yield (shown,)
    finally:
        shown.close()


class JsonLines:
    """Listens to a history and prints what happens as JSON, an object a line, for programs.

    Args:
        file (file, optional): Where to. Default: the standard output.
    """

    def __init__(self, file: IO[str] | None = None):
        self.file = file or sys.stdout

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in ("reply", "replies", "labels"):
            print(records.to_json({"event": event, **fields}), file=self.file, flush=True)


def size_text(size: float) -> str:
    """Bytes as people write them: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def seconds_text(seconds: float) -> str:
    """A time as people write it: ``"2 min 5 s"``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
    # As wide as the last round's, so that the figures stand below each other.
    number = f"round {record['round']}".ljust(len(f"round {record.get('of', 0)}"))
    figures = [f"{name} {value:.4f}" for name, value in _figures(record).items()]
    return "   ".join([number, *figures, f"{sum(record['seconds'].values()):.2f} s"])


def _summary(rounds: list[dict[str, Any]]) -> str:
    """What the rounds changed; empty where there is nothing to compare."""
    if len(rounds) < 2:
        return ""
    first, last = _figures(rounds[0]), _figures(rounds[-1])
    changes = [f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in last if name in first]
    return f"In {len(rounds)} rounds: {', '.join(changes)}" if changes else ""


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """A round's losses and metrics, by the names that they are shown with."""
    named = {"train loss": record["train"].get("loss")} | record["evaluate"]
    named |= {f"central {name}": value for name, value in record.get("central", {}).items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, float) and not name.startswith("num-")
    }


def _floats(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]


def _what(fields: dict[str, Any]) -> str:
    return f"round {fields['round']} {fields['kind']}" if fields["round"] else str(fields["kind"])
