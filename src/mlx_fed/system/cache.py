"""Cache folder of the user, and the state of files as part of a cache key."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR

from .atomic_files import atomic_write

FileStates = tuple[tuple[str, int, int, int, int], ...]
"""Of each file its path, size in bytes, inode, and mtime and ctime in nanoseconds."""

_TICK = 20_000_000
"""Nanoseconds in which two changes of a file may have the same time: two ticks of a kernel."""
_COARSE_TICK = 2_000_000_000
"""The same where a file system stores whole seconds, as FAT and HFS+ do."""
_MAX_ATTEMPTS = 5


def file_states(*paths: Path) -> FileStates:
    """States of files without reading them, as a cache key: equal states, equal content.

    If a file has just changed, the states are read again a moment later, so that the next write to
    it has another time.

    Args:
        paths (Path): Files, and folders for all files below them but the hidden ones.
    """
    for _ in range(_MAX_ATTEMPTS):
        states = tuple(sorted(_stats(paths, set())))
        last_change = max((times[-1] for times in states), default=0)
        tick = _TICK if last_change % 10**9 else _COARSE_TICK
        if not 0 <= time.time_ns() - last_change < tick:
            break
        time.sleep(tick / 1e9)
    return states


def _stats(
    paths: Iterable[Path], visited_folders: set[tuple[int, int]]
) -> Iterator[tuple[str, int, int, int, int]]:
    for path in paths:
        try:
            stat = path.stat()
            folder_id = stat.st_dev, stat.st_ino
            if not S_ISDIR(stat.st_mode):
                times = stat.st_mtime_ns, stat.st_ctime_ns
                yield str(path), stat.st_size, stat.st_ino, *times
            elif folder_id not in visited_folders:  # links may form a cycle
                visited_folders.add(folder_id)
                children = (p for p in path.iterdir() if not p.name.startswith("."))
                yield from _stats(children, visited_folders)
        except FileNotFoundError:  # removed meanwhile; the next attempt has another state
            continue


def cache_path(name: str) -> Path:
    """The path of a file in the cache folder: ``MLX_FED_CACHE``, or the user's cache folder.

    Raises:
        OSError: If the user has no home.
    """
    if folder := os.environ.get("MLX_FED_CACHE"):
        return Path(folder, name)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlx-fed", name)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Atomic write of a file of the cache, also while other processes write the same.

    Args:
        path (Path): A path of :func:`cache_path`.
        save (callable): ``save(temporary)`` writes to a path in the same folder, with the same
            suffix.

    Raises:
        OSError: If the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    with atomic_write(path, path.with_name(f".{writer}-{path.name}")) as temporary:
        save(temporary)
