"""How a process that moves large arrays uses the system's memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt
_LARGEST = 32 * 2**20
"""Bytes of a block that may be used again: the most that glibc allows."""
_SPARE = 128 * 2**20
"""Bytes that stay with the process beyond what it uses."""


def keep_what_is_freed() -> None:
    """Lets the process use again what it frees, rather than give it back to the system.

    The messages of a round are megabytes that come and go. glibc by itself returns such blocks at
    once, and half of a round's time went to the system's giving them out again, page by page.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _SPARE)
