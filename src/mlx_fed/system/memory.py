"""Memory allocator of a process that moves large arrays."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's names for mallopt
_SPARE = 2**30
"""Freed bytes that stay with the process."""


def retain_freed_memory() -> None:
    """Retains freed memory in the process for the next allocation (glibc's ``mallopt``).

    Messages and sums are megabytes that are allocated in each round. glibc by default returns such
    blocks to the system at once, and new pages take several times as long as the sums in them.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)  # a mapped block would be returned when it is freed
        mallopt(_TRIM_THRESHOLD, _SPARE)
        mallopt(_ARENA_MAX, 1)  # each thread would retain its own
