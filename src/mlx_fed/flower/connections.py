"""Limits on connections, which uvicorn does not have: their number, and time and bytes of headers.

Connections are counted when they are accepted, before a TLS handshake, so that they cannot use up
the open files of the process. At the limit a new one replaces the oldest unauthenticated one of the
network that has most. A connection is authenticated once a known node has signed a request on it.

Bodies are limited by route: :mod:`~mlx_fed.flower.request_limits`.
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

AUTHENTICATED = "mlx-fed.authenticated"
"""The ASGI extension of a connection, whose function ``by`` takes the key that signed a request."""
MAX_CONNECTIONS = 4096
"""Open connections, where the limit on open files allows as many."""
MAX_PAGE_CONNECTIONS = 64
"""Open connections of the dashboard."""
_MAX_OF_NODE = 32
"""Open connections of one node. Stock SuperNodes have up to 10."""
_RESERVED_FILES = 128
"""Open files for everything else: spools, checkpoints, the history."""
_HANDSHAKE_TIMEOUT = 10.0
"""Seconds for a TLS handshake."""
_HEADER_TIMEOUT = 20.0
"""Seconds for a request's headers, from its first byte or the connection's start."""
_MAX_OVERHEAD = 64 * 2**10
"""Consecutive bytes of a request that are not its body: line, headers, chunk sizes, trailers."""
_SEND_TIMEOUT = 120.0
"""Seconds for a peer to receive what TLS and the routes may have buffered: 1 MB."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, which closes a connection beyond the limits."""

    connection: Connection | None = None
    _header_timer: asyncio.TimerHandle | None = None
    send_timeout = _SEND_TIMEOUT
    """Seconds for a peer to receive some of a response."""
    _send_timer: asyncio.TimerHandle | None = None
    _overhead = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.connection is not None:
            self.connection.transport = transport
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_send_timer()
        super().connection_lost(exc)
        if self.connection is not None:
            self.connection.remove()

    def data_received(self, data: bytes) -> None:
        self._overhead += len(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._header_timer is None:
            self._start_header_timer()
        super().data_received(data)
        if self._overhead > _MAX_OVERHEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self.connection is not None:
            self.scope["extensions"] = {AUTHENTICATED: {"by": self.connection.authenticate}}

    def on_headers_complete(self) -> None:
        self._overhead = 0
        self._stop_header_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(_HEADER_TIMEOUT, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


class Connection:
    """An accepted connection, before, during and after its TLS handshake.

    Args:
        table (ConnectionTable): The table that it is in.
        peer (socket.socket): The connection's socket.
        owner (Hashable): What it counts for: a network, later a node's key.

    Attributes:
        transport (asyncio.Transport, optional): HTTP's transport, after the handshake.
    """

    def __init__(self, table: ConnectionTable, peer: socket.socket, owner: Hashable):
        self.table, self.socket, self.owner = table, peer, owner
        self.transport: asyncio.Transport | None = None

    def authenticate(self, key: bytes) -> None:
        """Counts the connection for a node, whose key has signed a request on it."""
        self.table.assign(self, key)

    def close(self) -> None:
        """Ends the connection at once, also during its handshake."""
        if self.transport is not None:
            self.transport.abort()
            return
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def remove(self) -> None:
        """Removes a connection that has ended from the table."""
        self.table.remove(self)


class ConnectionTable:
    """The open connections, by network and by node."""

    def __init__(self) -> None:
        self._of_networks: dict[Hashable, dict[Connection, None]] = {}
        self._of_nodes: dict[Hashable, dict[Connection, None]] = {}
        self._all: set[Connection] = set()
        self._closing: set[Connection] = set()
        self._removal = asyncio.Event()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, peer: socket.socket, host: str) -> Connection:
        """A connection that was just accepted, as an unauthenticated one."""
        connection = Connection(self, peer, _network(host))
        self._all.add(connection)
        self._of_networks.setdefault(connection.owner, {})[connection] = None
        return connection

    def assign(self, connection: Connection, key: bytes) -> None:
        """Counts a connection for a node; the node's oldest is closed where it has too many."""
        if connection.owner == key or connection not in self._all:
            return
        self._discard(connection)
        connection.owner = key
        siblings = self._of_nodes.setdefault(key, {})
        if len(siblings) >= _MAX_OF_NODE:
            self._close(next(iter(siblings)))
        self._of_nodes.setdefault(key, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        """Forgets a connection that has ended."""
        self._discard(connection)
        self._all.discard(connection)
        self._closing.discard(connection)
        self._removal.set()

    async def wait_below(self, limit: int) -> None:
        """Waits until there are fewer than ``limit``; unauthenticated ones are closed for that."""
        while len(self._all) >= limit:
            if self._of_networks and len(self._all) - len(self._closing) >= limit:
                largest = max(self._of_networks.values(), key=lambda connections: len(connections))
                self._close(next(iter(largest)))
            self._removal.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._removal.wait()

    def _close(self, connection: Connection) -> None:
        self._discard(connection)
        self._closing.add(connection)
        connection.close()

    def _discard(self, connection: Connection) -> None:
        for owners in (self._of_networks, self._of_nodes):
            if connection in (connections := owners.get(connection.owner, {})):
                del connections[connection]
                if not connections:
                    del owners[connection.owner]


class LimitedServer(uvicorn.Server):
    """uvicorn's server with a limit on open connections.

    Args:
        config (uvicorn.Config): Its settings, with :class:`LimitedHttpProtocol`.
        max_connections (int): Open connections.
    """

    def __init__(self, config: uvicorn.Config, max_connections: int):
        super().__init__(config)
        self.max_connections = max_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        self.servers = []
        self._table = ConnectionTable()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._acceptors = [
            asyncio.ensure_future(self._accept(listener)) for listener in sockets or ()
        ]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._acceptors, *self._handshakes):
            task.cancel()
        await asyncio.gather(*self._acceptors, *self._handshakes, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            await self._table.wait_below(self.max_connections)
            try:
                peer, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # a peer that hung up before, or too many open files
                await asyncio.sleep(0.1)
                continue
            task = asyncio.ensure_future(self._start(peer, str(address[0])))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)
            await asyncio.sleep(0)  # lets the connections accepted before run

    async def _start(self, peer: socket.socket, host: str) -> None:
        """The TLS handshake of an accepted connection, and the start of its HTTP protocol."""
        loop = asyncio.get_running_loop()
        connection = self._table.add(peer, host)
        tls: dict[str, Any] = {}
        if self.config.ssl is not None:
            tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": _HANDSHAKE_TIMEOUT}

        def make_protocol() -> asyncio.Protocol:
            protocol = LimitedHttpProtocol(self.config, self.server_state, {}, loop)
            protocol.connection = connection
            return protocol

        try:
            await loop.connect_accepted_socket(make_protocol, peer, **tls)
        except (OSError, ssl.SSLError, TimeoutError):
            connection.remove()
        except asyncio.CancelledError:
            connection.close()
            raise


def _network(host: str) -> str:
    """The network that an address counts for: one IPv6 host has 2**64 addresses or more."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host


def raise_file_limit() -> int:
    """Raises the limit on open files of this process, so that connections and files fit.

    Returns:
        int: The limit on connections: the rest is for checkpoints and other files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserve = _RESERVED_FILES + MAX_PAGE_CONNECTIONS
    target = MAX_CONNECTIONS + reserve
    if soft != resource.RLIM_INFINITY and soft < target:
        soft = target if hard == resource.RLIM_INFINITY else min(target, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return min(MAX_CONNECTIONS, max(1, soft - reserve))
    return MAX_CONNECTIONS
