"""How a process that moves large arrays uses the system's memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's names for mallopt
_SPARE = 2**30
"""Bytes that stay with the process beyond what it uses."""


def keep_what_is_freed() -> None:
    """Lets the process use again what it frees, rather than give it back to the system.

    Messages and sums are megabytes that come and go with each round. glibc by itself returns such
    blocks at once, and the system takes several times as long to give out their pages again as it
    takes to add numbers up in them.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)  # what is mapped by itself is returned when it is freed
        mallopt(_TRIM_THRESHOLD, _SPARE)
        mallopt(_ARENA_MAX, 1)  # or each thread would keep its own
