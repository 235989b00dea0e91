"""Progress of loading in worker processes, for the run's listeners."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..events import Event, Listener, LoadFinished, LoadProgress

_SOCKET = "loading"
_LONGEST = 2**16
_KINDS: dict[str, type[Event]] = {kind.name: kind for kind in (LoadProgress, LoadFinished)}


def sender(folder: Path) -> Listener:
    """Listener of this process that sends its events to the run's process.

    Args:
        folder (Path): The run's folder for its workers.
    """
    outgoing = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    outgoing.setblocking(False)

    def send(event: Event) -> None:
        with suppress(OSError):  # it is told for the eye only
            data = json.dumps([os.getpid(), event.name, event.to_dict()]).encode()
            outgoing.sendto(data, str(folder / _SOCKET))

    return send


@contextmanager
def received(folder: Path, listeners: Sequence[Listener]) -> Iterator[None]:
    """Context in which a thread passes the events that workers send to listeners."""
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
    while data := incoming.recv(_LONGEST):
        worker, name, fields = json.loads(data)
        # Workers load the same at one time: the first of them speaks for all.
        if first.setdefault(fields["what"], worker) == worker:
            for listener in listeners:
                listener(_KINDS[name](**fields))
