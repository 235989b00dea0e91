"""Secret files: written atomically with mode 600, refused where others may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import FedError, os_errors


class SecretFileError(FedError):
    """A secret file that others can read, or that cannot be written."""


def make_folder(folder: Path) -> None:
    """Creates a folder of mode 700 where there is none.

    Raises:
        SecretFileError: If it cannot be made.
    """
    with os_errors(SecretFileError, f"Cannot make {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file of mode 600 atomically.

    Raises:
        SecretFileError: If it cannot be written.
    """
    replace(path, content, 0o600)


def publish(path: Path, content: bytes) -> None:
    """Writes a file of mode 644 atomically.

    Raises:
        SecretFileError: If it cannot be written.
    """
    replace(path, content, 0o644)


def replace(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file atomically; the new one has its mode from the first byte."""
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os_errors(SecretFileError, f"Cannot write {path}"):
        descriptor = os.open(temporary_path, flags, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            temporary_path.replace(path)
        finally:
            temporary_path.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """The content of a file that only its owner may read.

    Raises:
        SecretFileError: If it cannot be read, or others can read it too.
    """
    with os_errors(SecretFileError, f"Cannot read {path}"), path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SecretFileError(f"{path} is secret, and others can read it: chmod 600 {path}")
        return file.read()
