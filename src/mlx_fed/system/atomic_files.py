"""Atomic files: complete or absent, also after a crash while they are written.

Secrets are not written here: see :mod:`mlx_fed.fleet.private_files`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

_MAX_SIZE = 2**30
"""Bytes of a file, at most."""


@contextmanager
def atomic_write(path: Path, temporary: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """Atomic write: yields a temporary file, which replaces ``path`` at the end of the context.

    If the context raises, the temporary file is removed and ``path`` is unchanged.

    Args:
        path (Path): The file to write.
        temporary (Path, optional): The temporary file, in the same folder. Default: the name with
            ``.part``, for files that one process writes; one left by a crash is overwritten.
        durable (bool): Whether the file is on disk at the end of the context (``fsync``). If not,
            it survives the process, and may be empty after a power failure. Default: ``True``.

    Raises:
        OSError: If it cannot be written.
    """
    temporary = temporary or path.with_name(f"{path.name}.part")
    try:
        yield temporary
        if durable:
            commit(temporary, path)
        else:
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def open_regular_file(path: Path, max_size: int = _MAX_SIZE) -> BinaryIO:
    """Opens a regular file of a run's folder for reading.

    Whoever can write into the folder may have put something else there: a link leads out of it, and
    a pipe or a device has no end.

    Args:
        path (Path): The file.
        max_size (int): Bytes that it may have.

    Raises:
        OSError: If there is none, it is no regular file, or it is larger.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    status = os.fstat(file.fileno())
    is_regular = stat.S_ISREG(status.st_mode)
    if not is_regular or status.st_size > max_size:
        file.close()
        reason = "it is too large" if is_regular else "it is no regular file"
        raise OSError(errno.EINVAL, reason, str(path))
    return file


def read_regular_file(path: Path, max_size: int = _MAX_SIZE) -> bytes:
    """The bytes of a file that :func:`open_regular_file` opens."""
    with open_regular_file(path, max_size) as file:
        return file.read(max_size)


def commit(temporary: Path, path: Path) -> None:
    """Renames a temporary file to ``path`` once it is on disk, and brings the name to disk.

    Raises:
        OSError: If the file cannot be brought to disk; ``path`` is unchanged then.
    """
    with temporary.open("rb") as file:
        sync(file)
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def lock_folder(folder: Path, locked: Exception) -> Iterator[None]:
    """Lock of a folder against other processes within the context.

    Args:
        folder (Path): The folder.
        locked (Exception): What is raised if another process has locked it.

    Raises:
        OSError: If the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network drives have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise locked from error
        yield
    finally:
        os.close(descriptor)


def sync(file: IO) -> None:
    """Writes a file from the system's memory to disk (``fsync``)."""
    file.flush()
    # On macOS fsync may leave it in the drive's cache. Not all drives support the full one.
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        with suppress(OSError):
            fcntl.fcntl(file, full)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder's files to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
