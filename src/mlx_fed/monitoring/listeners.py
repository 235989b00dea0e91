"""Who watches a run as it goes: the terminal, the dashboard, trackers. The run knows of none.

They are listeners of its history, or read its folder. What a node does is told to one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import FedError
from ..runs.history import Listener
from ..system.loading import watched


@contextmanager
def watching(
    runs: Path,
    *,
    dashboard: bool = False,
    dashboard_port: int = 8000,
    track: Sequence[str] | None = None,
    quiet: bool = False,
    json: bool = False,
) -> Iterator[tuple[Listener, ...]]:
    """The listeners that a command's options ask for; they end with the context.

    Args:
        runs (Path): Where runs are kept.
        dashboard (bool): Serve the page of the runs on this machine.
        dashboard_port (int): Its port; 0 takes a free one.
        track (list, optional): Names of trackers.
        quiet (bool): Show nothing but errors.
        json (bool): Show JSON, an object a line.

    Raises:
        FedError: If the options do not go together, or one cannot be had.
    """
    _require_one(quiet, json)
    from .terminal import JsonLines, ServerProgress

    listeners: list[Listener] = []
    with ExitStack() as until_the_end:
        if json:
            listeners.append(JsonLines())
        elif not quiet:
            shown = ServerProgress()
            until_the_end.callback(shown.close)
            listeners.append(shown)
        if track:
            from .trackers import Tracking, find_tracker

            for name in track:
                tracking = Tracking(name, find_tracker(name))
                until_the_end.callback(tracking.close)
                listeners.append(tracking)
        if dashboard:
            from .dashboard import serving

            address = until_the_end.enter_context(serving(runs, port=dashboard_port))
            for listener in listeners:
                listener("dashboard", {"address": address})
        until_the_end.enter_context(watched(*listeners))
        yield tuple(listeners)


def told(quiet: bool = False, json: bool = False) -> Callable[..., None] | None:
    """Whom a node tells what happens, by its command's options; ``None`` is the terminal.

    Raises:
        FedError: If the options do not go together.
    """
    _require_one(quiet, json)
    if quiet:
        return lambda event, **fields: None
    if json:
        from .terminal import JsonLines

        lines = JsonLines()
        return lambda event, **fields: lines(event, fields)
    return None


def _require_one(quiet: bool, json: bool) -> None:
    if quiet and json:
        raise FedError("Choose --quiet or --json: the one shows nothing, the other all.")
