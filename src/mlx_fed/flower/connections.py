"""How many connections there are, and what each may take before anything of it is understood.

uvicorn bounds none of that. Connections are counted as they are accepted, before a TLS handshake,
so that they cannot use up the files that this process may have open. Once there are as many as may
be, a new one takes the place of the oldest stranger's, from the network that has the most of them.
A connection is a stranger's until a request on it was signed by a node that the server knows.

Bodies are bounded by the routes, which know what they are for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import socket
import ssl
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .access import SIGNED

MOST = 4096
"""Connections at once, if the system lets the process have as many open files."""
MOST_OF_PAGE = 64
"""The same of a page that is served beside them."""
_MOST_OF_KEY = 32
"""Connections of one node. Stock SuperNodes have up to 10."""
_OTHERS = 128
"""Open files that are no connections: what waits on disk, checkpoints, the history."""
_HANDSHAKE = 10.0
"""Seconds for a TLS handshake."""
_SECONDS = 20.0
"""For a request's headers to come, from its first byte or the connection's start."""
_OVERHEAD = 64 * 2**10
"""Bytes of a request in a row that are not its body: line, headers, chunk sizes, trailers."""
_PATIENCE = 120.0
"""Seconds in which a peer takes what TLS and the routes may have handed over: 1 MB."""


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, within bounds; one that passes them is closed."""

    visit: Visit | None = None
    _awaited: asyncio.TimerHandle | None = None
    patience = _PATIENCE
    """Seconds in which some of an answer has to be taken."""
    _untaken: asyncio.TimerHandle | None = None
    _overhead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.visit is not None:
            self.visit.transport = transport
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)
        if self.visit is not None:
            self.visit.end()

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._awaited is None:
            self._await_headers()
        super().data_received(data)
        if self._overhead > _OVERHEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.visit is not None:
            self.scope["extensions"] = {SIGNED: {"by": self.visit.vouch}}

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


class Visit:
    """A connection from its first moment to its last.

    Args:
        visits (Visits): All of them.
        opened (socket.socket): The connection's socket.
        owner (Hashable): Who is counted for it: a network, and later a node's key.

    Attributes:
        transport (asyncio.Transport, optional): What HTTP is spoken over, once it is.
    """

    def __init__(self, visits: Visits, opened: socket.socket, owner: Hashable):
        self.visits, self.socket, self.owner = visits, opened, owner
        self.transport: asyncio.Transport | None = None

    def vouch(self, key: bytes) -> None:
        """The connection is a node's, whose key has signed a request on it."""
        self.visits.count_for(self, key)

    def close(self) -> None:
        """Ends the connection at once, in the middle of a handshake as well."""
        if self.transport is not None:
            self.transport.abort()
            return
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """The connection has ended."""
        self.visits.remove(self)


class Visits:
    """The connections there are, by who they are counted for."""

    def __init__(self) -> None:
        self._strangers: dict[Hashable, dict[Visit, None]] = {}
        self._nodes: dict[Hashable, dict[Visit, None]] = {}
        self._all: set[Visit] = set()
        self._closing: set[Visit] = set()
        self._ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, opened: socket.socket, host: str) -> Visit:
        """A connection that has just been accepted."""
        visit = Visit(self, opened, _network(host))
        self._all.add(visit)
        self._strangers.setdefault(visit.owner, {})[visit] = None
        return visit

    def count_for(self, visit: Visit, key: bytes) -> None:
        """Counts a connection for a node; its oldest one is closed where it has too many."""
        if visit.owner == key or visit not in self._all:
            return
        self._discard(visit)
        visit.owner = key
        of_node = self._nodes.setdefault(key, {})
        if len(of_node) >= _MOST_OF_KEY:
            self._close(next(iter(of_node)))
        self._nodes.setdefault(key, {})[visit] = None

    def remove(self, visit: Visit) -> None:
        """A connection has ended."""
        self._discard(visit)
        self._all.discard(visit)
        self._closing.discard(visit)
        self._ended.set()

    async def room(self, most: int) -> None:
        """Waits until there are fewer connections than ``most``; strangers have to make room."""
        while len(self._all) >= most:
            if self._strangers and len(self._all) - len(self._closing) >= most:
                most_of_one = max(self._strangers.values(), key=lambda visits: len(visits))
                self._close(next(iter(most_of_one)))
            self._ended.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ended.wait()

    def _close(self, visit: Visit) -> None:
        self._discard(visit)
        self._closing.add(visit)
        visit.close()

    def _discard(self, visit: Visit) -> None:
        for counted in (self._strangers, self._nodes):
            if visit in (of_owner := counted.get(visit.owner, {})):
                del of_owner[visit]
                if not of_owner:
                    del counted[visit.owner]


class Server(uvicorn.Server):
    """uvicorn's server, of so many connections.

    Args:
        config (uvicorn.Config): Its settings, with :class:`BoundedConnection`.
        most (int): Connections at once.
    """

    def __init__(self, config: uvicorn.Config, most: int):
        super().__init__(config)
        self.most = most

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = []
        self._visits = Visits()
        self._opening: set[asyncio.Task[None]] = set()
        self._accepting = [asyncio.ensure_future(self._accept(each)) for each in sockets or ()]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._accepting, *self._opening):
            task.cancel()
        await asyncio.gather(*self._accepting, *self._opening, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        listening.setblocking(False)
        while True:
            await self._visits.room(self.most)
            try:
                opened, address = await asyncio.get_running_loop().sock_accept(listening)
            except OSError:  # it went before it was accepted, or there are too many open files
                await asyncio.sleep(0.1)
                continue
            task = asyncio.ensure_future(self._open(opened, str(address[0])))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
            await asyncio.sleep(0)  # those that have been accepted have their turn

    async def _open(self, opened: socket.socket, host: str) -> None:
        loop = asyncio.get_running_loop()
        visit = self._visits.add(opened, host)
        secure: dict[str, Any] = {}
        if self.config.ssl is not None:
            secure = {"ssl": self.config.ssl, "ssl_handshake_timeout": _HANDSHAKE}

        def connection() -> asyncio.Protocol:
            made = BoundedConnection(self.config, self.server_state, {}, loop)
            made.visit = visit
            return made

        try:
            await loop.connect_accepted_socket(connection, opened, **secure)
        except (OSError, ssl.SSLError, TimeoutError):
            visit.end()
        except asyncio.CancelledError:
            visit.close()
            raise


def _network(host: str) -> str:
    """Whom an address is counted for: with IPv6 somebody has 2**64 of them, or more."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host


def make_room() -> int:
    """Lets this process have as many files open as connections may come.

    Without a file that it can open, a server could not write its checkpoints any more.

    Returns:
        int: Connections that leave enough of them for everything else.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = _OTHERS + MOST_OF_PAGE
    wanted = MOST + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return min(MOST, max(1, soft - others))
    return MOST
