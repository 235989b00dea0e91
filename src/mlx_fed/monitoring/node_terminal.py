"""A node's events as lines on its terminal, and a live line with its current work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from rich import filesize
from rich.console import Console

from .. import events
from ..events import Event, Listener
from ..system.loading import loading_listeners
from .loading_bars import LoadingBars
from .output import RUN_BAR, STYLES, TerminalOutput, print_line, stops_at_failure

_LINE_PAUSE = 60.0
"""Seconds between two lines in a file on the steps of a training."""


def node_line(event: Event) -> str:
    """A node's event as a line of text; empty for events without one."""
    match event:
        case events.NodeReady():
            return f"Data ready (node id {event.partition}), computing on {event.device}"
        case events.ServerAwaited():
            return (
                f"No server at {event.server} yet: trying again "
                f"for {event.wait:.0f} seconds ({event.reason})"
            )
        case events.Notice():
            return f"Note: {event.text}"
        case events.ServerJoined():
            return f"Joined {event.server}"
        case events.ServerLost():
            return f"Lost {event.server} ({event.reason}): trying again"
        case events.MessageFailed():
            return f"{_work(event)} failed: {event.reason}"
        case events.MessageAnswered():
            metrics = [
                f"{name} {value:.4f}"
                for name, value in event.metrics.items()
                if isinstance(value, float)
            ]
            if not metrics:
                return ""
            return "   ".join([_work(event), *metrics, f"{event.seconds:.2f} s"])
        case events.TrainingProgress():
            return f"round {event.round} train: {_steps(event)}"
        case events.NodeFinished():
            return "The run is over."
    return ""


def _steps(event: events.TrainingProgress) -> str:
    """Steps of a training in words: ``"step 40 of 200   loss 1.2345   5.20 steps/s"``."""
    texts = [f"step {event.step}" + (f" of {event.of}" if event.of else "")]
    if event.loss is not None:
        texts.append(f"loss {event.loss:.4f}")
    texts.append(f"{event.steps_per_second:.3g} steps/s")
    if event.units_per_second is not None:
        texts.append(f"{event.units_per_second:.0f} {event.unit}/s")
    return "   ".join([*texts, f"at most {filesize.decimal(event.peak_memory)} of memory"])


def _work(event: events.MessageEvent) -> str:
    kind = event.kind.removeprefix("query.").replace("_", " ")
    return f"round {event.round} {kind}" if event.round else kind


class NodeTerminal(TerminalOutput):
    """Listener of a node that prints its events."""

    def __init__(self, console: Console | None = None):
        super().__init__(console)
        self.loading = LoadingBars(self.console, self.bars)
        self.line_time = -_LINE_PAUSE

    @stops_at_failure
    def __call__(self, event: Event) -> None:
        if isinstance(event, (events.LoadProgress, events.LoadFinished)):
            self.loading(event)
        elif isinstance(event, events.MessageReceived):
            self.bars.update(RUN_BAR, _work(event))
        elif isinstance(event, events.TrainingProgress) and not self._needs_line(event):
            self.bars.update(RUN_BAR, node_line(event), event.step, event.of)
        else:
            if isinstance(event, (events.ServerJoined, events.MessageAnswered)):
                self.bars.update(RUN_BAR, "waiting for the server")
            if isinstance(event, events.MessageFailed):
                for line in event.traceback.splitlines():
                    print_line(self.console, line, STYLES["failed"])
            if line := node_line(event):
                print_line(self.console, line, STYLES.get(event.name, ""))

    def _needs_line(self, event: events.TrainingProgress) -> bool:
        """Whether a report on steps is a line: each that was asked for, and in a file one a minute
        of the others."""
        if event.by_steps:
            return True
        if self.bars.is_shown or time.monotonic() < self.line_time + _LINE_PAUSE:
            return False
        self.line_time = time.monotonic()
        return True


@contextmanager
def node_listener_or_terminal(listener: Listener | None) -> Iterator[Listener]:
    """A node's listener, or the terminal where there is none, until the context ends.

    It gets loading events, too.
    """
    with ExitStack() as stack:
        listener = listener or stack.enter_context(closing(NodeTerminal()))
        stack.enter_context(loading_listeners(listener))
        yield listener
