"""The user's cache folder, and the state of files on which what is cached depends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR

from .atomic_files import put

State = tuple[tuple[str, int, int, int, int], ...]
"""Of each file its path, size in bytes, inode, and the times of its last change in nanoseconds."""

_TICK = 20_000_000
"""Nanoseconds in which two changes of a file may be given one time: two ticks of a kernel."""
_COARSE_TICK = 2_000_000_000
"""The same where a file system keeps whole seconds, as FAT and HFS+ do."""
_LOOKS = 5


def state_of(*paths: Path) -> State:
    """What tells one content of files from another without reading them: equal states, equal
    content.

    A file that has just changed is looked at again a moment later, once whatever is written to it
    next has another time.

    Args:
        paths (Path): Files, and folders for all files below them but the hidden ones.
    """
    for _ in range(_LOOKS):
        state = tuple(sorted(_stats(paths, set())))
        changed = max((times[-1] for times in state), default=0)
        tick = _TICK if changed % 10**9 else _COARSE_TICK
        if not 0 <= time.time_ns() - changed < tick:
            break
        time.sleep(tick / 1e9)
    return state


def _stats(
    paths: Iterable[Path], seen: set[tuple[int, int]]
) -> Iterator[tuple[str, int, int, int, int]]:
    for path in paths:
        try:
            stat = path.stat()
            folder = stat.st_dev, stat.st_ino
            if not S_ISDIR(stat.st_mode):
                times = stat.st_mtime_ns, stat.st_ctime_ns
                yield str(path), stat.st_size, stat.st_ino, *times
            elif folder not in seen:  # links may go round in a circle
                seen.add(folder)
                yield from _stats((p for p in path.iterdir() if not p.name.startswith(".")), seen)
        except FileNotFoundError:  # removed meanwhile, which another look tells
            continue


def path_of(name: str) -> Path:
    """Where a file of the folder lies: below ``MLX_FED_CACHE``, or else in the user's own cache.

    Raises:
        OSError: If the user has no home.
    """
    if own := os.environ.get("MLX_FED_CACHE"):
        return Path(own, name)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mlx-fed", name)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def make(path: Path, write: Callable[[Path], object]) -> None:
    """Makes a file, which is there as a whole or not at all, also after a crash and while other
    processes make it as well.

    Args:
        path (Path): One of :func:`path_of`.
        write (Callable[[Path], object]): Is given a path beside it, of the same name.

    Raises:
        OSError: If the folder cannot be written.
    """
    import tempfile  # which costs a sixth of our own import

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        part = Path(folder, path.name)
        write(part)
        put(part, path)
