"""What a connection may take before anything of it is understood: time, headers, and how many.

uvicorn bounds none of these. Bodies are bounded by the routes, which know what they are for.
"""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST = 4096
"""Connections at once, if the system lets the process have as many open files."""
_OTHERS = 128
"""Open files that are no connections: what waits on disk, checkpoints, the history."""
_SECONDS = 20.0
"""For a request's headers to come, from its first byte or the connection's start."""
_OVERHEAD = 64 * 2**10
"""Bytes of a request in a row that are not its body: line, headers, chunk sizes, trailers."""
_PATIENCE = 120.0
"""Seconds in which a peer takes what TLS and the routes may have handed over: 1 MB."""


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, within bounds; one that passes them is closed."""

    most = _MOST
    """Connections at once, of all servers of this process."""
    _awaited: asyncio.TimerHandle | None = None
    patience = _PATIENCE
    """Seconds in which some of an answer has to be taken."""
    _untaken: asyncio.TimerHandle | None = None
    _overhead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._awaited is None:
            self._await_headers()
        super().data_received(data)
        if self._overhead > _OVERHEAD:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._overhead = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._untaken = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_sending()
        super().resume_writing()

    def _await_headers(self) -> None:
        self._awaited = self.loop.call_later(_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

    def _stop_sending(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None


def make_room() -> None:
    """Lets this process have as many files open as connections may come, or has fewer come.

    Without a file that it can open, a server could not write its checkpoints any more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        BoundedConnection.most = min(_MOST, max(1, soft - _OTHERS))
