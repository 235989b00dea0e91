"""Progress of loading: downloads, decoding and tokenization, reported to this process's listeners.

They happen deep in a task's functions, which know no run, so the listeners are a context variable.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from ..events import Event, Listener, LoadFinished, LoadProgress

_LONG = 1.0
"""Seconds before the first report."""
_PAUSE = 0.1
"""Seconds between reports."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def set_listeners(listeners: Sequence[Listener]) -> None:
    """Replaces the listeners from now on."""
    _listeners.set(tuple(listeners))


@contextmanager
def loading_listeners(*listeners: Listener) -> Iterator[None]:
    """Replaces the listeners within the context.

    Each is called, perhaps from another thread, with a :class:`~mlx_fed.events.LoadProgress` after
    a second and then repeatedly, and with a :class:`~mlx_fed.events.LoadFinished` at the end.
    """
    token = _listeners.set(listeners)
    try:
        yield
    finally:
        _listeners.reset(token)


class LoadingProgress:
    """The progress of one loading: ``count`` of ``total`` in a ``unit``."""

    def __init__(self, what: str, total: int | None, unit: str, listeners: tuple[Listener, ...]):
        self.what, self.total, self.unit, self.listeners = what, total, unit, listeners
        self.count = 0
        self.start_time = time.monotonic()
        self.next_report = self.start_time + _LONG
        self.is_reported = self.is_over = False
        self.lock = threading.Lock()

    def update(self, count: int, total: int | None = None, unit: str | None = None) -> None:
        """Sets the count, and the total and unit if they become known."""
        self.count = count
        if total is not None or unit is not None:
            self.total, self.unit = total, unit or ""
        if self.listeners and time.monotonic() >= self.next_report:
            self.report()

    def report(self) -> None:
        with self.lock:
            if self.is_over:
                return
            self.is_reported, self.next_report = True, time.monotonic() + _PAUSE
            self._notify(LoadProgress(self.what, self.count, self.total, self.unit))

    def end(self) -> None:
        with self.lock:
            self.is_over = True
            if self.is_reported:
                self._notify(LoadFinished(self.what, time.monotonic() - self.start_time))

    def _notify(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


@contextmanager
def loading(what: str, total: int | None = None, unit: str = "") -> Iterator[LoadingProgress]:
    """Reports the progress of the context to the listeners, if it takes longer than a second.

    Args:
        what (str): The activity, as the beginning of a line: ``"Decoding 'image'"``.
        total (int, optional): The final count. Default: unknown.
        unit (str): Of the count: ``"B"`` for bytes, or a plural. Default: ``""``.

    Example:
        >>> with loading("Reading files", len(paths), "files") as progress:
        ...     for number, path in enumerate(paths, 1):
        ...         read(path)
        ...         progress.update(number)
    """
    listeners = _listeners.get()
    progress = LoadingProgress(what, total, unit, listeners)
    timer = threading.Timer(_LONG, progress.report)  # the context may never call update
    timer.daemon = True
    if listeners:
        timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
        progress.end()
