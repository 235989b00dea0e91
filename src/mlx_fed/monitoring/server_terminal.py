"""A run's events as lines on the server's terminal, and a live line with the current round."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console

from .. import events
from ..events import Event, Listener
from ..runs import folders, round_record
from ..system.loading import loading_listeners
from ..tracebacks import is_exception, is_same_failure
from .loading_bars import LoadingBars
from .output import RUN_BAR, STYLES, TerminalOutput, print_line, stops_at_failure
from .units import format_seconds

_MAX_FAILURES = 10
"""Lines about nodes that are left out of a phase; an exception is shown once."""


def server_line(event: Event, num_rounds: int = 0) -> str:
    """A run's event as a line of text; empty for events without one."""
    match event:
        case events.ServerReady():
            security = "  (encrypted; nodes are known by their keys)" if event.secure else ""
            return f"Server ready on {event.address}{security}"
        case events.DashboardReady():
            return f"Dashboard on {event.address}"
        case events.NodeInvited():
            return f"{event.node} joins with:  {event.command} {event.token}"
        case events.NodesAwaited():
            return f"Waiting for nodes: {event.nodes} of {event.needed}"
        case events.NodeJoined():
            return f"{event.node} joined ({event.nodes} in all)"
        case events.NodeLeft():
            return f"{event.node} left"
        case events.NodeRefused():
            return f"{event.node} refused: {event.reason}"
        case events.RunResumed(round=number):
            return f"Resuming after round {number}" if number else "Starting again from round 1"
        case events.Notice():
            return f"Note: {event.text}"
        case events.ReplyRefused():
            return f"{event.node} left out of {event.phase}: {event.reason}"
        case events.RoundFinished():
            return _round_line(event.record, num_rounds)
        case events.RunFinished():
            reason = f" ({event.stopped})" if event.stopped else ""
            return f"Finished in {event.seconds:.1f} s{reason}. The model: {event.model}"
    return ""


def phase_text(event: events.PhaseProgress) -> str:
    """The round and phase, the nodes that have replied, the bytes sent and the time left."""
    texts = [f"round {event.round}/{event.of}", event.phase]
    if event.nodes:
        texts.append(f"{event.answered} of {event.nodes} nodes")
    if event.seconds_left is not None:
        remaining_time = format_seconds(event.seconds_left)
        texts += [filesize.decimal(event.bytes), f"about {remaining_time} left"]
    return "  ".join(texts)


def _round_line(record: dict[str, Any], num_rounds: int) -> str:
    # As wide as the last round's, so that the figures of all rounds are in columns.
    number = f"round {record['round']}".ljust(len(f"round {num_rounds}"))
    figures = round_record.figures(record)
    metrics = [
        f"{name} {value:.4f}{_median(figures, name, value)}"
        for name, value in _metrics(record).items()
    ]
    return "   ".join([number, *metrics, f"{sum(record['seconds'].values()):.2f} s"])


def _median(figures: dict[str, float], name: str, mean: float) -> str:
    """The nodes' median of a metric if their mean is far from it: one node may be the cause."""
    key = "train/loss" if name == "train loss" else f"evaluate/{name}"
    median = figures.get(f"{key}/median", mean)
    return f" (median {median:.4f})" if abs(mean - median) > abs(median) / 2 else ""


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    """A round's losses and metrics, by the names that lines show."""
    metrics = {"train loss": record["train"].get("loss")} | record["evaluate"]
    metrics |= {f"central {name}": value for name, value in record.get("central", {}).items()}
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, float) and not name.startswith("num-")
    }


class ServerTerminal(TerminalOutput):
    """Listener of a :class:`~mlx_fed.runs.history.History` that prints the run's events."""

    def __init__(self, console: Console | None = None):
        super().__init__(console)
        self.loading = LoadingBars(self.console, self.bars)
        self.folder: Path | None = None
        self.num_rounds = 0
        self.failures: dict[str, list[str]] = defaultdict(list)

    @stops_at_failure
    def __call__(self, event: Event) -> None:
        match event:
            case events.LoadProgress() | events.LoadFinished():
                self.loading(event)
            case events.PhaseProgress():
                self._show_phase(event)
            case events.NodesAwaited() if self.bars.is_shown:
                self.bars.update(RUN_BAR, server_line(event))
            case events.ReplyRefused(phase=phase, reason=reason):
                reasons = self.failures[phase]
                is_repeated = any(is_same_failure(reason, one) for one in reasons)
                is_repeated = is_repeated and is_exception(reason)
                if len(reasons) < _MAX_FAILURES and not is_repeated:
                    reasons.append(reason)
                    self._print(event)
            case events.ClientTraceback():
                for line in event.text.splitlines():
                    print_line(self.console, line, STYLES["failed"])
            case events.RunStarted():
                self.folder = event.folder
                self.num_rounds = event.settings.get("num_rounds", 0)
            case events.RoundFinished():
                self._print_num_failures(event.record)
                self._print(event)
                for name, text in event.record.get("central", {}).items():
                    if isinstance(text, str):  # such as a sample of a model's text
                        print_line(self.console, f"{name}: {text}", "dim")
            case events.RunFinished():
                self.close()
                if line := self._summary():
                    print_line(self.console, line, "bold")
                self._print(event)
            case _:
                self._print(event)

    def _print(self, event: Event) -> None:
        if line := server_line(event, self.num_rounds):
            print_line(self.console, line, STYLES.get(event.name, ""))

    def _show_phase(self, event: events.PhaseProgress) -> None:
        # Training counts as the first half of a round, evaluation as the second.
        half = 0.0 if event.phase == "train" else 1.0
        share = min(1.0, event.answered / event.nodes) if event.nodes else 1.0
        position = event.round - 1 + (half + share) / 2
        self.bars.update(RUN_BAR, phase_text(event), position, event.of)

    def _print_num_failures(self, record: dict[str, Any]) -> None:
        """Prints how many nodes were left out of a round beyond those with a line."""
        num_lines = {phase: len(reasons) for phase, reasons in self.failures.items()}
        self.failures.clear()
        phases = Counter(failure["phase"] for failure in record.get("refused", ()))
        for phase, count in phases.items():
            if difference := count - num_lines.get(phase, 0):
                line = f"{difference} more left out of {phase}: the reasons are in history.jsonl"
                print_line(self.console, line, STYLES["failed"])

    def _summary(self) -> str:
        """The change of each metric over the run; empty where there is one round only."""
        rounds = folders.read(self.folder).rounds if self.folder else []
        if len(rounds) < 2:
            return ""
        first, last = _metrics(rounds[0]), _metrics(rounds[-1])
        changes = [
            f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in last if name in first
        ]
        return f"In {len(rounds)} rounds: {', '.join(changes)}" if changes else ""


@contextmanager
def listeners_or_terminal(
    listeners: tuple[Listener, ...] | None,
) -> Iterator[tuple[Listener, ...]]:
    """A run's listeners, or the terminal or a notebook's output where there are none, until the
    context ends.

    They get loading events, too.
    """
    with ExitStack() as stack:
        if listeners is None:
            terminal = stack.enter_context(closing(ServerTerminal()))
            listeners = (terminal,)
            if terminal.console.is_jupyter:
                from .notebook_display import NotebookDisplay

                listeners = (NotebookDisplay(),)
        stack.enter_context(loading_listeners(*listeners))
        yield tuple(listeners)
