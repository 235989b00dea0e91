"""A list of calls that a function writes to and does not read: no Python state of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable


def call_log() -> tuple[list[str], Callable[[], None]]:
    """The list, and a function that adds an entry to it by a logger."""
    calls: list[str] = []
    logger, handler = logging.Logger("calls"), logging.Handler()
    handler.emit = lambda record: calls.append(record.msg)  # type: ignore[method-assign]
    logger.addHandler(handler)
    return calls, lambda: logger.critical("called")
