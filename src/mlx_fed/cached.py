"""The user's cache folder: what is made once on a machine, for all of its processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .whole_files import put


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
