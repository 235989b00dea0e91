"""What a node takes for a server that it does not reach, and waits for."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import pytest
import uvicorn
from flwr.app import Message, RecordDict
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from mlx_fed.rounds import messages
from mlx_fed.fleet import resident_node, server
from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.identity import from_files, from_token
from mlx_fed.fleet.model_size import ModelSize
from mlx_fed.fleet.resident_node import JoinError, ResidentNode
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import transport
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable
from mlx_fed.flower.link_grid import LinkGrid

from ..conftest import free_port
from ..helpers.proxy import Proxy
from ..helpers.fleet_commands import join, serve
from ..helpers.tasks import moons

_PAGE = b"<html><h1>It is not there</h1></html>"


@pytest.fixture
def proxy() -> Iterator[Callable[[int], Proxy]]:
    """Makes proxies to ports, and ends them."""
    proxies: list[Proxy] = []

    def make(port: int) -> Proxy:
        proxies.append(Proxy(port))
        return proxies[-1]

    yield make
    for each in proxies:
        each.close()


def answer(status: str, body: bytes = _PAGE, kind: str = "text/html") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    "said",
    [
        answer("502 Bad Gateway"),
        answer("503 Service Unavailable", b""),
        answer("504 Gateway Timeout", b'{"detail": "upstream"}', "application/json"),
        answer("408 Request Timeout", b'{"detail": "slow"}', "application/json"),
        answer("429 Too Many Requests", b'{"detail": "later"}', "application/json"),
        answer("404 Not Found"),
        answer("302 Found"),
        b"",
    ],
    ids=lambda said: said[9:12].decode() or "closes",
)
def test_what_a_proxy_answers_is_no_refusal(proxy, said: bytes):
    way = proxy(free_port())
    way.say(said)
    connection = FleetClient("127.0.0.1", way.port)
    for request in (connection.register, connection.heartbeat, connection.receive):
        with pytest.raises(Unreachable):
            request()


def test_what_a_server_answers_is_a_refusal(proxy):
    way = proxy(free_port())
    way.say(answer("401 Unauthorized", b'{"detail": "who are you?"}', "application/json"))
    with pytest.raises(RequestRefused, match="who are you"):
        FleetClient("127.0.0.1", way.port).register()


def test_a_node_outlives_a_proxy_whose_server_is_gone(start, proxy, tmp_path):
    leading, address = serve(start, tmp_path, "--rounds", 30, "--min-nodes", 1)
    way = proxy(int(address.rpartition(":")[2]))
    way.say(answer("502 Bad Gateway"))
    joining = join(start, f"127.0.0.1:{way.port}", 0, "-c", "slow=0.1")
    joining.line("No server at .* yet: trying again .*HTTP status 502")
    way.mend()
    leading.line("round 2 ")
    way.say(answer("503 Service Unavailable"))
    joining.line("Lost ")
    time.sleep(1.5)  # it tries again once a second or more often
    way.mend()
    assert leading.ends() == 0, leading.text
    assert joining.ends() == 0, joining.text


def test_a_server_that_only_ever_answers_that_it_cannot_is_given_up(monkeypatch):
    """Although it answers heartbeats."""
    monkeypatch.setattr(transport, "LONG_POLLS", {})
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        connection = FleetClient(*listening.getsockname())
        connection.register()
        who = from_files("127.0.0.1:1", None, None)
        persisting = ResidentNode(
            connection, None, {}, who, 1.0, lambda *_, **__: None, ModelSize(moons({}))
        )

        def send() -> None:
            connection.heartbeat()
            raise transport.Unavailable("Internal server error.")

        with pytest.raises(JoinError, match=r"gone for 1 seconds .Internal server error"):
            persisting._retry(send)
        link.finish()


def test_a_forwarder_without_its_server_is_no_stranger(start, proxy, tmp_path):
    """It takes the connection and closes it: the certificate does not come, and none is wrong."""
    secure = ("--secure", "--federation", tmp_path / "federation", "--min-nodes", 1)
    leading, address = serve(start, tmp_path, *secure)
    token = leading.line(r"(mlxfed-\S+)\n")[1]
    way = proxy(int(address.rpartition(":")[2]))
    way.say(b"")
    to = f"127.0.0.1:{way.port}"
    joining = join(start, to, 0, token, MLX_FED_HOME=str(tmp_path / "home"))
    joining.line("No server at .* yet: trying again")
    time.sleep(0.5)
    way.mend()
    assert leading.ends() == 0, leading.text
    assert joining.ends() == 0, joining.text


def test_a_node_whose_activation_is_not_answered_is_not_another_one(tmp_path, monkeypatch):
    """It hears that a node with its key is online until that one counts as gone: it is itself."""
    monkeypatch.setattr(resident_node, "_CONFLICT_TIME", 2.0)
    port = free_port()
    federation = Federation(tmp_path / "federation", f"127.0.0.1:{port}")
    who = from_token(federation.invite("node-0"), None, tmp_path / "home")
    connection = FleetClient(who.host, who.port, who.context, who.key, who.invitation)
    activate = connection._transport.ActivateNode

    def lose_the_answer(request: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(resident_node, "_CONFLICT_TIME", 2.0)
        activate(request)
        raise Unreachable("it is lost on the way")

    monkeypatch.setattr(connection._transport, "ActivateNode", lose_the_answer)
    told: list[str] = []
    joining = ResidentNode(
        connection, None, {}, who, 60.0, lambda event: told.append(event.name), ModelSize(moons({}))
    )
    thread = threading.Thread(target=joining._register, daemon=True)
    thread.start()
    time.sleep(resident_node._CONFLICT_TIME + 0.5)  # its server is started later
    with _socket("127.0.0.1", port) as listening, _serving(listening, federation, "h") as link:
        _wait_until(link.online)
        time.sleep(1.5)
        (node_id,) = link.online()
        assert thread.is_alive()
        link.state.deactivate_node(node_id)  # as after two heartbeats that did not come
        thread.join(20)
        assert told == ["waiting", "joined"]
        connection.leave()
        link.finish()


def test_an_answer_over_a_slow_connection_has_the_time_that_it_takes(tmp_path, monkeypatch):
    """TLS that is closed breaks off what it has still to send."""
    monkeypatch.setattr(server, "_KEEP_ALIVE", 2)
    monkeypatch.setattr(asyncio.constants, "SSL_SHUTDOWN_TIMEOUT", 0.5)
    loops = uvicorn.config.LOOP_FACTORIES
    monkeypatch.setitem(loops, "auto", loops["asyncio"])
    port = free_port()
    way = Proxy(port, speed=800_000)
    federation = Federation(tmp_path / "federation", f"127.0.0.1:{way.port}")
    who = from_token(federation.invite("node-0"), None, tmp_path / "home")
    connection = FleetClient(who.host, who.port, who.context, who.key, who.invitation)
    arrays = {"large": mx.random.normal((1200, 1201))}
    content = RecordDict({"arrays": messages.pack(arrays)})
    with _socket("127.0.0.1", port) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        with _serving(listening, federation, "127.0.0.1") as link:
            connection.register()
            LinkGrid(link).push_messages([Message(content, connection.node_id, "train")])
            received = connection.receive()
            assert received is not None
            carried = messages.unpack(messages.parameters_of(received.content)[1])
            assert mx.array_equal(carried["large"], arrays["large"])
            connection.leave()
            link.finish()
    assert not way.done
    way.close()


def test_an_answer_that_nobody_takes_is_given_up(monkeypatch):
    monkeypatch.setattr(server.LimitedHttpProtocol, "send_timeout", 1.0)
    with _socket("127.0.0.1", 0) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        with _serving(listening) as link:
            connection = FleetClient(*listening.getsockname())
            connection.register()
            content = RecordDict({"arrays": messages.pack({"large": mx.zeros((1200, 1201))})})
            LinkGrid(link).push_messages([Message(content, connection.node_id, "train")])
            (tree,) = connection._transport.PullMessages(
                fleet_pb2.PullMessagesRequest(node=connection._node)
            ).message_object_trees
            for each in iterate_object_tree(tree):
                request = message_pb2.PullObjectRequest(
                    node=connection._node, run_id=link.run_id, object_id=each.object_id
                )
                taking = http.client.HTTPConnection(*listening.getsockname(), timeout=20)
                taking.sock = socket.socket()
                taking.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                taking.sock.connect(listening.getsockname())
                headers = connection._transport._signed_headers()
                taking.request("POST", transport.PULL_OBJECT, request.SerializeToString(), headers)
                response = taking.getresponse()
                if int(response.headers["content-length"]) > 2**22:
                    break
            time.sleep(3)
            with pytest.raises((ConnectionError, http.client.IncompleteRead)):
                response.read()
            connection.leave()
            link.finish()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has another option")
@pytest.mark.timeout(30)
def test_an_upload_of_which_nothing_arrives_is_broken_off(monkeypatch):
    """Long before the time that it may take over a slow connection."""
    monkeypatch.setattr(transport, "_DEAD_PEER", 6)
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        connection = FleetClient(*silent.getsockname())
        with pytest.raises(Unreachable, match="timed out"):
            connection._transport._post("/", bytes(2**20), {})


def _wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
