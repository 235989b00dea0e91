"""Floods of requests and connections, as processes: each goes on until it is ended.

    python -m tests.hostile.flooding strangers PORT
    python -m tests.hostile.flooding enrolled TOKEN FOLDER

The number of requests and connections so far is printed each second.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

from flwr.app import Message, RecordDict
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree

from mlx_fed.fleet.identity import from_token
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable

from .running import HostileNode, made, roll_call_answer

COUNTS: Counter[str] = Counter()
HOSTS = [f"127.0.0.{number}" for number in range(2, 12)]
"""Addresses of strangers, which no node has."""
_IDLE = 300


def connect(port: int) -> socket.socket:
    """A connection from one of the strangers' addresses."""
    connection = socket.socket()
    connection.settimeout(5)
    connection.bind((random.choice(HOSTS), 0))
    connection.connect(("127.0.0.1", port))
    return connection


def idle(port: int) -> None:
    """Connections on which nothing is said, the oldest ones given up for new ones."""
    kept: deque[socket.socket] = deque()
    while True:
        with suppress(OSError):
            kept.append(connect(port))
            COUNTS["idle connections"] += 1
        if len(kept) > _IDLE:
            kept.popleft().close()
        time.sleep(0.005)


def garbage(port: int) -> None:
    """Bytes that are neither TLS nor HTTP, and the beginnings of handshakes."""
    while True:
        with suppress(OSError), connect(port) as connection:
            connection.sendall(random.choice([b"\x16\x03\x01\x02\x00\x01", b"POST / "]))
            connection.sendall(os.urandom(1000))
            COUNTS["connections with garbage"] += 1
        time.sleep(0.005)


def handshakes(port: int) -> None:
    """TLS handshakes, and requests signed by keys that nobody knows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stranger = FleetClient("127.0.0.1", port)
    body = fleet_pb2.ActivateNodeRequest(
        public_key=stranger._transport.public_key, heartbeat_interval=30
    ).SerializeToString()
    while True:
        with suppress(OSError, HTTPException):
            connection = HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
            connection.source_address = (random.choice(HOSTS), 0)
            headers = stranger._transport._signed_headers()
            for path in ("activate-node", "push-messages", "../../etc/passwd"):
                connection.request("POST", f"/v1/fleet/{path}", body, headers)
                connection.getresponse().read()
                COUNTS["requests of strangers"] += 1
            connection.close()
        time.sleep(0.005)


def announce(node: HostileNode, question: Message) -> None:
    """Trees of a thousand objects, and objects for them."""
    while True:
        objects = [made([], body=os.urandom(1000))[0] for _ in range(1000)]
        root = made(objects, "Message", os.urandom(8))[0]
        tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=x) for x in objects])
        with suppress(RequestRefused, Unreachable):
            node.announce(Message(RecordDict(), reply_to=question), tree)
            COUNTS["trees"] += 1


def push(node: HostileNode, question: Message) -> None:
    """Objects of a megabyte that nothing names."""
    while True:
        object_id, content = made([], body=os.urandom(2**20))
        with suppress(RequestRefused, Unreachable):
            node.push(question.metadata.message_id, object_id, content)
            COUNTS["objects"] += 1


def pull(node: HostileNode, question: Message) -> None:
    """Objects that there are not, the run, and confirmations of others' messages."""
    while True:
        with suppress(RequestRefused, Unreachable):
            request = message_pb2.PullObjectRequest(
                node=node._node, run_id=node._run_id, object_id=os.urandom(32).hex()
            )
            node._transport.PullObject(request)
            COUNTS["pulls"] += 1


def main() -> None:
    kind, *arguments = sys.argv[1:]
    actions: list[Callable[[], None]]
    if kind == "strangers":
        port = int(arguments[0])
        actions = [lambda f=f: f(port) for f in (idle, garbage, handshakes, handshakes)]
    else:
        who = from_token(arguments[0], None, Path(arguments[1]))
        node = HostileNode(who.host, who.port, who.context, who.key, who.invitation)
        node.register()
        question = node.asked()
        # It does not take part: a silent participant is another subject.
        node.send(roll_call_answer(question, "-", 0), 0.0)
        question = node.asked()
        actions = [lambda f=f: f(node, question) for f in (announce, push, pull)]
    for action in actions:
        threading.Thread(target=action, daemon=True).start()
    while True:
        time.sleep(1)
        print(dict(COUNTS), flush=True)


if __name__ == "__main__":
    main()
