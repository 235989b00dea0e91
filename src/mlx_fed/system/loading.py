"""What takes long before anything trains: told, as it goes, to whoever watches in this process.

Downloads, decoding and the like are deep in what a task calls, and know no run. Where nobody
watches, nothing is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..runs.history import Listener

_LONG = 1.0
"""Seconds that something takes before it is worth telling."""
_PAUSE = 0.1
"""Seconds until it is told again how far it has come."""

_watching: ContextVar[tuple[Listener, ...]] = ContextVar("watching", default=())


def watch(listeners: Sequence[Listener]) -> None:
    """Tells these listeners from now on, in place of those before."""
    _watching.set(tuple(listeners))


@contextmanager
def watched(*listeners: Listener) -> Iterator[None]:
    """Tells these listeners for as long as the context lasts, in place of those before.

    Each is called ``listener(event, fields)``, perhaps from another thread: with ``"loading"``
    once something has taken a while and as it goes on, and with ``"loaded"`` when that is over.
    ``fields`` has ``what``; ``done``, ``of`` (None where it is not known) and their ``unit``, or
    the ``seconds`` it took.
    """
    before = _watching.set(listeners)
    try:
        yield
    finally:
        _watching.reset(before)


class Loading:
    """Something that takes long, and how far it has come."""

    def __init__(self, what: str, of: int | None, unit: str, listeners: tuple[Listener, ...]):
        self.what, self.of, self.unit, self.listeners = what, of, unit, listeners
        self.done = 0
        self.began = time.monotonic()
        self.next = self.began + _LONG
        self.told = self.over = False
        self.lock = threading.Lock()

    def reached(self, done: int, of: int | None = None, unit: str | None = None) -> None:
        """Says how far it has come, of how much if that is known only now."""
        self.done = done
        if of is not None or unit is not None:
            self.of, self.unit = of, unit or ""
        if self.listeners and time.monotonic() >= self.next:
            self.tell()

    def tell(self) -> None:
        with self.lock:
            if self.over:
                return
            self.told, self.next = True, time.monotonic() + _PAUSE
            fields = {"what": self.what, "done": self.done, "of": self.of, "unit": self.unit}
            for listener in self.listeners:
                listener("loading", fields)

    def end(self) -> None:
        with self.lock:
            self.over = True
            if self.told:
                fields = {"what": self.what, "seconds": time.monotonic() - self.began}
                for listener in self.listeners:
                    listener("loaded", fields)


@contextmanager
def loading(what: str, of: int | None = None, unit: str = "") -> Iterator[Loading]:
    """Tells of something for as long as the context lasts, if that is longer than a moment.

    Args:
        what (str): What is done, as the beginning of a line: ``"Decoding 'image'"``.
        of (int, optional): How much there is to do. Default: that is not known.
        unit (str): Of what: ``"B"`` for bytes, or a plural. Default: ``""``.

    Example:
        >>> with loading("Reading files", len(paths), "files") as progress:
        ...     for number, path in enumerate(paths, 1):
        ...         read(path)
        ...         progress.reached(number)
    """
    listeners = _watching.get()
    started = Loading(what, of, unit, listeners)
    # Something may be long without a word of how far it has come.
    alarm = threading.Timer(_LONG, started.tell)
    alarm.daemon = True
    if listeners:
        alarm.start()
    try:
        yield started
    finally:
        alarm.cancel()
        started.end()
