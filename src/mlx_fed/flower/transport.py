"""HTTP of a node's Fleet API requests: one kept-alive connection a thread, and signed headers."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError

from . import headers as ours
from . import keys
from .proxies import Proxy, connection_to

Context = ssl.SSLContext | Callable[[], ssl.SSLContext | None] | None
REGISTER, PULL_OBJECT = "/v1/fleet/register-node", "/v1/fleet/pull-object"
LONG_POLLS = {"/v1/fleet/pull-messages": 20.0, "/v1/fleet/send-node-heartbeat": 5.0}
"""Seconds for which one of our servers may delay its response, by path."""
CONNECT_TIMEOUT = 10.0
"""Seconds for the response to a node that the server does not know yet."""
TIMEOUT = 60.0
"""Seconds for any other response."""
BLOCK = 2**18
"""Bytes that have to be sent within the timeout: a slow connection is not a broken one."""
MAX_RESPONSE = 64 * 2**20
"""Bytes of a response."""

_MIN_SPEED = 16 * 2**10
"""Bytes a second of a request's body for which one of our servers waits."""
_POLL_MARGIN = 15.0
"""Seconds beyond a long poll, after which its response counts as lost."""
_SIGNATURE_AGE = 5.0
_MAX_DETAIL = 500
_RETRYABLE = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses after which the same request may succeed: a slow body, a clock that is off."""
_DEAD_PEER = 45
"""Seconds without an acknowledgement, after which the system ends a connection."""
_RXT_CONNDROPTIME = 0x80
"""macOS's twin of TCP_USER_TIMEOUT, which Python has no name for."""


class Unreachable(ConnectionError):
    """No response, or not one of a Fleet API: the request may be repeated."""


class Unavailable(Unreachable):
    """A response that the server, or a proxy before it, is unable to answer now."""


class UntrustedServer(Unreachable):
    """A server without the expected certificate, or without encryption."""


class ClockDiffers(Unreachable):
    """A server whose clock is not that of this machine."""


class RequestRefused(Exception):
    """The server's response that it does not serve a request.

    Attributes:
        status (int): HTTP's status code.
        code (int): Flower's error code, 0 where there is none.
        reason (str): The server's; empty where the response is not from a Fleet API.
        denial (str): Why it does not accept this node's key, a code of ``allowlist.py``.
    """

    def __init__(self, status: int, body: bytes):
        text = body.decode("utf-8", "replace")
        error = FlowerError.from_json(text)
        self.status = status
        self.code = error.code if error else 0
        self.reason = error.message if error else _member(text, "detail")
        self.denial = _member(text, "code")
        super().__init__(self.reason or f"HTTP status {status}")


def _member(text: str, name: str) -> str:
    """A member of a response's JSON object; empty if it has none."""
    try:
        return str(json.loads(text)[name])[:_MAX_DETAIL]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _error_of(status: int, body: bytes) -> RequestRefused | Unreachable:
    """The exception for a status other than OK; a proxy's own page is never a refusal."""
    refusal = RequestRefused(status, body)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or not refusal.reason:
        return Unavailable(str(refusal))
    if status == HTTPStatus.TOO_EARLY:
        return ClockDiffers(str(refusal))
    return Unreachable(str(refusal)) if status in _RETRYABLE else refusal


def utc_now() -> datetime:
    """The time that requests are signed with."""
    return datetime.now(UTC)


class Transport(FleetHttpClient):
    """Flower's client of the Fleet API over the standard library's HTTP.

    The methods, one a route, are Flower's.

    Args:
        host (str): The server's host.
        port (int): Its port.
        context (ssl.SSLContext or callable, optional): TLS, or what makes it for a connection;
            plaintext without.
        key (bytes, optional): The node's private key (PEM). Default: a new one.
        proxy (Proxy, optional): The proxy of connections.
        invitation (str, optional): What enrols the key, sent with the registration.

    Attributes:
        timeout (float): Seconds for a response.
        byte_range (str): The bytes of an object to pull, as ``START-END``.
        last_response (float): When the server last responded, by ``time.monotonic()``.
        outcome (str): The run's, once a response has had it.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Context,
        key: bytes | None,
        proxy: Proxy | None,
        invitation: str | None = None,
    ):
        self._address = (host, port, proxy)
        self._context = context
        self._private_key = keys.load_private(key) if key else keys.generate()
        self.public_key = keys.public_pem(self._private_key.public_key())
        self._headers = {
            "content-type": ours.PROTOBUF,
            "accept": ours.PROTOBUF,
            **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        }
        self._signed_at = 0.0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._invitation = invitation
        self.timeout = CONNECT_TIMEOUT
        self.byte_range = ""
        self.last_response = 0.0
        self.outcome = ""

    def _unary_unary(
        self,
        *,
        path: str,
        rpc_method: str,
        request: Any,
        response_type: Any,
        timeout: float | None = None,
    ) -> Any:
        """One request, which Flower's methods call."""
        headers = self._signed_headers()
        if path in LONG_POLLS:
            headers[ours.WAIT] = str(LONG_POLLS[path])
        if self._invitation is not None and path == REGISTER:
            headers[ours.TOKEN] = self._invitation
        if path == PULL_OBJECT:
            headers[ours.BYTES] = self.byte_range
        status, body = self._post(path, request.SerializeToString(), headers)
        if status != HTTPStatus.OK:
            raise _error_of(status, body)
        try:
            response = response_type.FromString(body)
        except DecodeError as error:
            raise Unreachable("what answers there does not speak Flower's Fleet API") from error
        self.last_response = time.monotonic()
        return response

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """A response's status and body."""
        idle: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        try:
            connection = idle or self._connect()
        except OSError as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        timeout = LONG_POLLS[path] + _POLL_MARGIN if path in LONG_POLLS else self.timeout
        try:
            if connection.sock is None:
                connection.timeout = timeout
                connection.connect()
                _detect_dead_peer(connection)
            connection.sock.settimeout(timeout)
            blocks = (body[start : start + BLOCK] for start in range(0, len(body), BLOCK))
            connection.request("POST", path, blocks, headers | {"content-length": str(len(body))})
            # Much of the body may be in the system's and the network's buffers still.
            connection.sock.settimeout(timeout + len(body) / _MIN_SPEED)
            response = connection.getresponse()
            content = _read(response)
        except ssl.SSLError as error:
            connection.close()
            self._local.connection = None
            if isinstance(error, ssl.SSLCertVerificationError):
                raise UntrustedServer(f"its certificate: {error.verify_message}") from error
            if error.reason == "WRONG_VERSION_NUMBER":
                raise UntrustedServer("what answers there does not encrypt") from error
            raise Unreachable(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self._local.connection = None
            # The server may have closed a connection that was idle: that is worth one retry.
            if idle and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                return self._post(path, body, headers)
            raise Unreachable(str(error) or type(error).__name__) from error
        self._local.connection = connection
        if (outcome := response.getheader(ours.RUN)) in ours.OUTCOMES:
            self.outcome = outcome
        return response.status, content

    def _connect(self) -> http.client.HTTPConnection:
        context = self._context() if callable(self._context) else self._context
        return connection_to(*self._address, context)

    def _signed_headers(self) -> dict[str, str]:
        # The signature covers only the time, so one serves for a few seconds: by the wall clock,
        # which goes on while a laptop sleeps and which the server compares.
        with self._lock:
            if abs(time.time() - self._signed_at) > _SIGNATURE_AGE:
                timestamp = utc_now().isoformat()
                signature = keys.sign(self._private_key, timestamp.encode("ascii"))
                self._headers |= {
                    FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public_key).decode(),
                    TIMESTAMP_HEADER: timestamp,
                    FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
                }
                self._signed_at = time.time()
            return dict(self._headers)

    def close(self) -> None:
        """Closes this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _read(response: http.client.HTTPResponse) -> bytes:
    if response.length is not None and response.length <= MAX_RESPONSE:
        return response.read()
    content = b"" if response.length else response.read(MAX_RESPONSE + 1)
    if response.length or len(content) > MAX_RESPONSE:
        raise http.client.HTTPException("the answer is too large")
    return content


def _detect_dead_peer(connection: http.client.HTTPConnection) -> None:
    """Keep-alive probes and a send timeout in the system's TCP.

    A router that has dropped its entry for a connection discards packets silently. A timeout for
    the response alone would be minutes where a request of megabytes is being sent.
    """
    options = {
        "TCP_KEEPIDLE": _DEAD_PEER // 3,
        "TCP_KEEPALIVE": _DEAD_PEER // 3,  # the same on macOS
        "TCP_KEEPINTVL": _DEAD_PEER // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * _DEAD_PEER,
    }
    numbers = {getattr(socket, name, None): value for name, value in options.items()}
    if sys.platform == "darwin":
        numbers[_RXT_CONNDROPTIME] = _DEAD_PEER
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for number, value in numbers.items():
        if number is not None:
            with suppress(OSError):  # a dead peer is then noticed later
                connection.sock.setsockopt(socket.IPPROTO_TCP, number, value)
