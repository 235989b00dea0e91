"""What worker processes are loading, told to those who watch the run."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..runs.history import Listener

_SOCKET = "loading"
_LONGEST = 2**16


def sender(folder: Path) -> Listener:
    """A listener of this process that sends what it is told to the run's process.

    Args:
        folder (Path): The run's folder for its workers.
    """
    outgoing = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    outgoing.setblocking(False)

    def send(event: str, fields: dict[str, Any]) -> None:
        with suppress(OSError):  # it is told for the eye only
            told = json.dumps([os.getpid(), event, fields]).encode()
            outgoing.sendto(told, str(folder / _SOCKET))

    return send


@contextmanager
def received(folder: Path, listeners: Sequence[Listener]) -> Iterator[None]:
    """Tells listeners what is sent, from a thread, for as long as the context lasts."""
    path = str(folder / _SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as incoming:
        try:
            incoming.bind(path)
        except OSError:  # a path that is too long: the run goes on without
            yield
            return
        thread = threading.Thread(target=_tell, args=(incoming, listeners), daemon=True)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", path)
            thread.join()


def _tell(incoming: socket.socket, listeners: Sequence[Listener]) -> None:
    first: dict[str, int] = {}
    while told := incoming.recv(_LONGEST):
        worker, event, fields = json.loads(told)
        # Workers load the same at one time: the first of them speaks for all.
        if first.setdefault(fields["what"], worker) == worker:
            for listener in listeners:
                listener(event, fields)
