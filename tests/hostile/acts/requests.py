"""Requests that must not be served: functions of the federation and an enrolled node.

Each gives the status of the answer; ``None`` where the connection was closed without one.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2

from mlx_fed.flower import keys
from mlx_fed.flower.fleet_client import FleetClient

from ..running import HostileNode, Running

Request = Callable[[Running, HostileNode], "int | None"]
FLEET = "/v1/fleet/"
HEARTBEAT = FLEET + "send-node-heartbeat"


def exchange(running: Running, data: bytes, is_plain: bool = False) -> int | None:
    """Sends bytes on a connection, and the status of what comes back."""
    answer = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", running.port), 5) as connection:
        stream: socket.socket = connection
        if running.secure and not is_plain:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            stream = context.wrap_socket(connection)
        stream.settimeout(2)
        for start in range(0, len(data), 2**16):
            stream.sendall(data[start : start + 2**16])
        while len(answer) < 2**16 and (piece := stream.recv(4096)):
            answer += piece
    status = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(status[1]) if status else None


def raw(data: bytes, is_plain: bool = False) -> Request:
    """Bytes of a stranger."""
    return lambda running, node: exchange(running, data, is_plain)


def request(
    path: str = HEARTBEAT, method: str = "POST", body: bytes = b"", **headers: str | None
) -> Request:
    """A request of the node with some headers changed, or left out (None)."""

    def send(running: Running, node: HostileNode) -> int | None:
        signed: dict[str, str | None] = {**node._transport._signed_headers()}
        signed |= {name.replace("_", "-"): value for name, value in headers.items()}
        signed.setdefault("content-length", str(len(body)))
        lines = [f"{name}: {value}" for name, value in signed.items() if value is not None]
        text = "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", "connection: close", *lines])
        return exchange(running, text.encode("latin-1") + b"\r\n\r\n" + body)

    return send


def signed(timestamp: Callable[[], str], other_key: bool = False, text: str = "") -> Request:
    """A request with a signature of another time, by another key, or of another text."""

    def send(running: Running, node: HostileNode) -> int | None:
        key = keys.generate() if other_key else node._transport._private_key
        signature = keys.sign(key, (text or timestamp()).encode("latin-1"))
        public_key = b64encode(node._transport.public_key).decode()
        return request(
            flwr_public_key=public_key,
            flwr_timestamp=timestamp(),
            flwr_signature=b64encode(signature).decode(),
        )(running, node)

    return send


def posted(path: str, body: Callable[[HostileNode], bytes]) -> Request:
    """A request of the node with this body."""
    return lambda running, node: request(FLEET + path, body=body(node))(running, node)


def _ago(**time: float) -> Callable[[], str]:
    return lambda: (datetime.now(UTC) - timedelta(**time)).isoformat()


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _unknown_node(running: Running, node: HostileNode) -> int | None:
    stranger = FleetClient("127.0.0.1", running.port)
    body = heartbeat_pb2.SendNodeHeartbeatRequest(heartbeat_interval=30).SerializeToString()
    headers = {k.replace("-", "_"): v for k, v in stranger._transport._signed_headers().items()}
    return request(body=body, **headers)(running, node)


def _others(make: Callable[[int], object], path: str) -> Request:
    """A request in the name of each number that another node could have."""
    return posted(path, lambda node: make(12345).SerializeToString())  # type: ignore[attr-defined]


def _heartbeat(node_id: int) -> heartbeat_pb2.SendNodeHeartbeatRequest:
    request = heartbeat_pb2.SendNodeHeartbeatRequest(heartbeat_interval=30)
    request.node.node_id = node_id
    return request


def _pull(node_id: int) -> fleet_pb2.PullMessagesRequest:
    request = fleet_pb2.PullMessagesRequest()
    request.node.node_id = node_id
    return request


def _other_run(node: HostileNode) -> bytes:
    return run_pb2.GetRunRequest(node=node._node, run_id=12345).SerializeToString()


def _other_runs_object(node: HostileNode) -> bytes:
    return message_pb2.PullObjectRequest(
        node=node._node, run_id=12345, object_id="0" * 64
    ).SerializeToString()


_BYTES = {
    "no bytes": b"",
    "random bytes": bytes(range(256)) * 4,
    "zeros": bytes(5000),
    "the beginning of a handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a handshake of SSL 3": b"\x16\x03\x00\x00\x2f\x01\x00\x00\x2b\x03\x00" + bytes(41),
    "a record of 64 KiB": b"\x16\x03\x01\xff\xff" + bytes(2**16 - 1),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "HTTP/0.9": b"GET /\r\n",
    "HTTP/9": b"POST /v1/fleet/get-run HTTP/9.9\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.0\r\n",
    "a request of no method": b"/v1/fleet/get-run\r\n\r\n",
    "a method of 100 KB": b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "a path of 100 KB": b"POST /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a header of 100 KB": b"POST / HTTP/1.1\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
    "10,000 headers": b"POST / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    "a header without a name": b"POST / HTTP/1.1\r\n: b\r\n\r\n",
    "a header with NUL": b"POST / HTTP/1.1\r\na: \0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nabc",
    "a length below 0": b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    "a length and chunks": b"POST / HTTP/1.1\r\ncontent-length: 5\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nPOST /v1/fleet/get-run HTTP/1.1\r\n\r\n",
    "a chunk of 2**64 bytes": b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    b"ffffffffffffffff\r\nabc",
    "a chunk that is no number": b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "an upgrade": b"GET / HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "a proxy's request": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n\r\n",
}
_PATHS = {
    "a file": "/../../../../etc/passwd",
    "an encoded file": "/v1/fleet/%2e%2e/%2e%2e/etc/passwd",
    "the Control API": "/v1/control/start-run",
    "the Runtime API": "/v1/runtime/pull-app-inputs",
    "gRPC": "/flwr.proto.Control/StartRun",
    "another version": "/v2/fleet/get-run",
    "a route and more": HEARTBEAT + "/",
    "a route in capitals": HEARTBEAT.upper(),
    "a route with a query": HEARTBEAT + "?node=1",
    "metrics": "/metrics",
    "a page": "/",
}

ACTS: dict[str, Request] = {
    **{f"bytes: {name}": raw(data) for name, data in _BYTES.items()},
    "HTTP where TLS is": raw(b"GET / HTTP/1.1\r\n\r\n", is_plain=True),
    **{f"path: {name}": request(path) for name, path in _PATHS.items()},
    **{
        f"method: {method}": request(method=method)
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH")
    },
    "signature: none": request(flwr_signature=None),
    "signature: no key": request(flwr_public_key=None),
    "signature: no time": request(flwr_timestamp=None),
    "signature: no base 64": request(flwr_signature="!!!"),
    "signature: of zeros": request(flwr_signature=b64encode(bytes(70)).decode()),
    "signature: a key that is none": request(flwr_public_key=b64encode(b"key").decode()),
    "signature: a key of 50 KB": request(flwr_public_key="A" * 50_000),
    "signature: an hour old": signed(_ago(hours=1)),
    "signature: of tomorrow": signed(_ago(days=-1)),
    "signature: a time that is none": signed(lambda: "yesterday"),
    "signature: a time without a zone": signed(lambda: "2026-01-01T00:00:00"),
    "signature: of the year 1": signed(lambda: "0001-01-01T00:00:00+00:00"),
    "signature: by another key": signed(_now, other_key=True),
    "signature: of another text": signed(_now, text="2026-01-01T00:00:00+00:00"),
    "identity: a node that there is not": _unknown_node,
    "identity: another node's heartbeat": _others(_heartbeat, "send-node-heartbeat"),
    "identity: another node's messages": _others(_pull, "pull-messages"),
    "identity: another node leaves": _others(
        lambda number: fleet_pb2.DeactivateNodeRequest(node_id=number), "deactivate-node"
    ),
    "identity: another node is unregistered": _others(
        lambda number: fleet_pb2.UnregisterNodeFleetRequest(node_id=number), "unregister-node"
    ),
    "identity: another run": posted("get-run", _other_run),
    "identity: another run's object": posted("pull-object", _other_runs_object),
    "body: no protobuf": request(FLEET + "push-messages", body=b"\xff" * 100),
    "body: a deep one": request(FLEET + "push-messages", body=b"\x0a\x7e" * 5000),
    "body: of another type": request(content_type="application/json", body=b"{}"),
    "body: of no type": request(content_type=None),
    "body: 20 MB": request(FLEET + "push-messages", body=bytes(20 * 2**20)),
    "body: a length of 2**63": request(content_length=str(2**63)),
    "body: shorter than it says": request(content_length="100", body=os.urandom(10)),
    "body: compressed": request(content_encoding="gzip", body=b"\x1f\x8b" + bytes(100)),
}
