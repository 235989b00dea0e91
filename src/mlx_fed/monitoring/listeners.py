"""Listeners that a command's options name: the terminal, JSON Lines, the dashboard, trackers.

A run knows none of them. They get the events of its history, or read its folder. A node has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FedError
from ..events import DashboardReady, Event, Listener, RunStarted
from ..system.loading import loading_listeners

if TYPE_CHECKING:
    from .node_terminal import NodeTerminal
    from .server_terminal import ServerTerminal


class StartedRun:
    """Listener that remembers the folder of the run."""

    folder: Path | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.folder = event.folder


@contextmanager
def run_listeners(
    runs: Path,
    *,
    dashboard: bool = False,
    dashboard_port: int = 8000,
    track: Sequence[str] | None = None,
    metrics: str | None = None,
    hook: Sequence[str] | None = None,
    quiet: bool = False,
    json: bool = False,
    log_file: Path | None = None,
) -> Iterator[tuple[Listener, ...]]:
    """Listeners of a run, by the options of a command. They are closed with the context.

    A KeyboardInterrupt or SystemExit gets a note with the run's folder, if the run has started.

    Args:
        runs (Path): The folder of runs.
        dashboard (bool): Serve the dashboard on this machine.
        dashboard_port (int): Its port; 0 is any free port.
        track (list, optional): Names of trackers.
        metrics (str, optional): ``HOST:PORT``, or a port on this machine, at which ``/metrics`` is
            served for Prometheus, and ``/healthz``.
        hook (list, optional): Commands or URLs for events, each ``EVENT=COMMAND`` or ``EVENT=URL``.
        quiet (bool): Print errors only.
        json (bool): Print JSON Lines.
        log_file (Path, optional): Append lines with time and level to this file.

    Raises:
        FedError: If options exclude each other, or a listener cannot start.
    """
    _require_one(quiet, json)
    from .server_terminal import ServerTerminal, server_line

    run = StartedRun()
    listeners: list[Listener] = [run]
    with ExitStack() as stack:
        terminal = None if quiet or json else ServerTerminal()
        listeners += _output_listeners(stack, terminal, json, log_file, server_line)
        if track:
            from .trackers import Tracking, find_tracker

            for name in track:
                tracking = Tracking(name, find_tracker(name))
                stack.callback(tracking.close)
                listeners.append(tracking)
        if hook:
            from .hooks import run_hooks

            listeners += stack.enter_context(run_hooks(hook))
        if metrics:
            from .prometheus import serve_metrics

            listeners.append(stack.enter_context(serve_metrics(metrics)))
        if dashboard:
            from .dashboard import serving

            address = stack.enter_context(serving(runs, port=dashboard_port))
            for listener in listeners:
                listener(DashboardReady(address))
        stack.enter_context(loading_listeners(*listeners))
        try:
            yield tuple(listeners)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            if run.folder is not None:
                interrupt.add_note(str(run.folder))
            raise


@contextmanager
def node_listener(
    quiet: bool = False, json: bool = False, log_file: Path | None = None
) -> Iterator[Listener]:
    """The listener of a node, by the options of a command. It is closed with the context.

    Args:
        quiet (bool): Print errors only.
        json (bool): Print JSON Lines.
        log_file (Path, optional): Append lines with time and level to this file.

    Raises:
        FedError: If options exclude each other, or the file cannot be opened.
    """
    _require_one(quiet, json)
    from .node_terminal import NodeTerminal, node_line

    with ExitStack() as stack:
        terminal = None if quiet or json else NodeTerminal()
        listeners = _output_listeners(stack, terminal, json, log_file, node_line)

        def notify(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield notify


def _output_listeners(
    stack: ExitStack,
    terminal: ServerTerminal | NodeTerminal | None,
    json: bool,
    log_file: Path | None,
    to_line: Callable[[Event], str],
) -> list[Listener]:
    """Listeners of a command's output and its log file, which the stack closes."""
    from .json_lines import JsonLines
    from .log_file import log_lines

    listeners: list[Listener] = []
    if json:
        listeners.append(JsonLines())
    if terminal is not None:
        stack.callback(terminal.close)
        listeners.append(terminal)
    if log_file:
        listeners.append(stack.enter_context(log_lines(log_file, to_line)))
    return listeners


def _require_one(quiet: bool, json: bool) -> None:
    if quiet and json:
        raise FedError("Choose --quiet or --json, not both.")
