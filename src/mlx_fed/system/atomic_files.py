"""Files that are there as a whole or not at all, whatever ends the process that writes them.

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

_LARGEST = 2**30
"""Bytes of a file that is read whole."""


@contextmanager
def replacing(path: Path, part: Path | None = None, on_disk: bool = True) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` when the context ends; if that raises, it
    is removed, and what was there stays.

    Args:
        path (Path): The file that is to be.
        part (Path, optional): What is written first, in the same folder. Default: the name with
            ``.part``, for files that one process writes; another one's half is written over.
        on_disk (bool): Whether the file is on disk when the context has ended. If not, it outlives
            the process, and after the machine's own end it may be empty. Default: ``True``.

    Raises:
        OSError: If it cannot be written.
    """
    part = part or path.with_name(f"{path.name}.part")
    try:
        yield part
        if on_disk:
            put(part, path)
        else:
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def open_plain(path: Path, largest: int = _LARGEST) -> BinaryIO:
    """Opens a file for reading in which a run was written down.

    Whoever can write into a run's folder may have put something else there: a link leads out of
    it, and a pipe or a device has no end.

    Args:
        path (Path): The file.
        largest (int): Bytes that it may have.

    Raises:
        OSError: If there is none, it is no plain file, or it is larger.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    about = os.fstat(file.fileno())
    if not stat.S_ISREG(about.st_mode) or about.st_size > largest:
        file.close()
        why = "it is too large" if stat.S_ISREG(about.st_mode) else "it is no plain file"
        raise OSError(errno.EINVAL, why, str(path))
    return file


def read_plain(path: Path, largest: int = _LARGEST) -> bytes:
    """The bytes of a file that :func:`open_plain` opens."""
    with open_plain(path, largest) as file:
        return file.read(largest)


def put(part: Path, path: Path) -> None:
    """Gives a file that was written its name, once all of it is on disk; then that is, too.

    Raises:
        OSError: If it cannot be brought to disk. There is nothing of that name then, or what was
            there before.
    """
    with part.open("rb") as file:
        sync(file)
    part.replace(path)
    sync_folder(path.parent)


def sync(file: IO) -> None:
    """Brings a file to disk, past the system's memory."""
    file.flush()
    # macOS leaves it in the drive's memory unless it is asked for more, which not all drives do.
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        with suppress(OSError):
            fcntl.fcntl(file, full)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
