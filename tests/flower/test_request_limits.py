"""What a peer may make the server hold, wait for and delete: little, and nothing of others."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest
from fastapi import HTTPException
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from mlx_fed.flower import connections
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import transport, incoming_replies, link_state, request_limits
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable

from ..helpers.fleet_routes import Fleet, push_request


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as state:
        yield Fleet(state, listening.getsockname()[1])
        state.finish()


def connect(fleet: Fleet) -> socket.socket:
    return socket.create_connection(("127.0.0.1", fleet.port), timeout=10)


def is_closed(connection: socket.socket, seconds: float = 10) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def head(route: str, node: FleetClient | None = None, **headers: str) -> bytes:
    signed = node._transport._signed_headers() if node else {"content-type": PROTOBUF_MEDIA_TYPE}
    lines = [f"POST /v1/fleet/{route} HTTP/1.1", "host: x"]
    lines += [f"{name}: {value}" for name, value in (signed | headers).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def answer(connection: socket.socket) -> int:
    return int(connection.recv(65536).split()[1])


# -- connections -------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: "])
def test_a_connection_that_asks_nothing_is_closed(fleet, monkeypatch, sent):
    monkeypatch.setattr(connections, "_HEADER_TIMEOUT", 0.3)
    with connect(fleet) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_a_node_that_is_idle_between_requests_is_not_closed(fleet, monkeypatch):
    monkeypatch.setattr(connections, "_HEADER_TIMEOUT", 0.3)
    node = fleet.node()
    request = heartbeat_pb2.SendNodeHeartbeatRequest(node=node._node, heartbeat_interval=10)
    monkeypatch.setattr("mlx_fed.flower.transport.LONG_POLLS", {})
    node._transport.SendNodeHeartbeat(request)
    kept = node._transport._local.connection
    for _ in range(2):
        time.sleep(0.6)
        node._transport.SendNodeHeartbeat(request)
        assert node._transport._local.connection is kept


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"POST /", b"a" * 4096),
        (b"POST / HTTP/1.1\r\na: ", b"b" * 4096),
        (b"POST / HTTP/1.1\r\n", b"a: b\r\n" * 500),
        (head("get-run", **{"transfer-encoding": "chunked"}) + b"1", b";a" * 2048),
    ],
)
def test_headers_without_an_end_are_cut_off(fleet, start, more):
    with connect(fleet) as connection:
        connection.sendall(start)
        sent = 0
        with pytest.raises(OSError, match=r"(?i)reset|broken"):  # noqa: PT012
            while sent < 2**20:
                connection.sendall(more)
                sent += len(more)
                time.sleep(0.001)
        assert sent < 2**20


@pytest.fixture
def few(monkeypatch) -> Iterator[Fleet]:
    """A server of at most 8 connections."""
    monkeypatch.setattr("mlx_fed.fleet.server.raise_file_limit", lambda: 8)
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as state:
        yield Fleet(state, listening.getsockname()[1])
        state.finish()


def connect_from(fleet: Fleet, host: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", fleet.port), 10, source_address=(host, 0))


def test_strangers_make_room_for_others(few):
    """The oldest, from where most of them are; a node's connection is not closed for them."""
    node = few.node()
    node.heartbeat()
    kept = node._transport._local.connection
    lone = connect_from(few, "127.0.0.3")
    flood = [connect_from(few, "127.0.0.2") for _ in range(20)]
    assert is_closed(flood[0])
    assert not is_closed(lone, 0.2)
    assert not is_closed(flood[-1], 0.2)
    node.heartbeat()
    assert node._transport._local.connection is kept
    assert few.node().node_id
    for connection in (lone, *flood):
        connection.close()


def test_a_node_has_so_many_connections(few, monkeypatch):
    monkeypatch.setattr(connections, "_MAX_OF_NODE", 3)
    node = few.node()
    body = fleet_pb2.PullMessagesRequest(node=node._node).SerializeToString()
    request = head("pull-messages", node, **{"content-length": str(len(body))}) + body
    held = [connect(few) for _ in range(5)]
    for connection in held:
        connection.sendall(request)
        assert answer(connection) == 200
    assert [is_closed(connection, 0.3) for connection in held] == [True, True, False, False, False]
    for connection in held:
        connection.close()


# -- bodies ------------------------------------------------------------------------------------


def test_a_body_that_does_not_come_is_not_waited_for(fleet, monkeypatch):
    monkeypatch.setattr(request_limits, "_BODY_TIMEOUT", 0.3)
    monkeypatch.setattr(request_limits, "_MIN_SPEED", 2**40)
    node = fleet.node()
    with connect(fleet) as connection:
        connection.sendall(head("pull-messages", node, **{"content-length": "100"}) + b"a")
        assert answer(connection) == 408
        assert is_closed(connection)


@pytest.mark.parametrize("route", ["pull-messages", "push-messages", "push-object"])
@pytest.mark.parametrize("said", [True, False])
def test_a_body_is_as_large_as_its_route_needs(fleet, monkeypatch, route, said):
    monkeypatch.setattr(
        request_limits, "_MAX_BODY", {"push-object": 200_000, "push-messages": 100_000}
    )
    largest = {"pull-messages": request_limits._MAX_OTHER_BODY}.get(
        route
    ) or request_limits._MAX_BODY[route]
    node = fleet.node()
    with connect(fleet) as connection:
        if said:
            length = {"content-length": str(largest + 1)}
            connection.sendall(head(route, node, **length))
        else:
            body = b"%x\r\n" % (largest + 1) + b"\0" * (largest + 1) + b"\r\n0\r\n\r\n"
            connection.sendall(head(route, node, **{"transfer-encoding": "chunked"}) + body)
        assert answer(connection) == 413
        assert is_closed(connection)


def test_nothing_of_a_strangers_body_is_read(fleet):
    with connect(fleet) as connection:
        connection.sendall(head("push-object", **{"content-length": str(10 * 2**20)}))
        assert answer(connection) == 401
        assert is_closed(connection)


# -- messages ----------------------------------------------------------------------------------


def asked(fleet: Fleet, node: FleetClient) -> Message:
    content = RecordDict({"config": ConfigRecord({"n": 1})})
    fleet.grid.push_messages([Message(content, node.node_id, MessageType.TRAIN)])
    return node.receive()


def test_a_message_has_so_many_objects(fleet, monkeypatch):
    monkeypatch.setattr(incoming_replies, "MAX_OBJECTS", 10)
    node = fleet.node()
    request = push_request(node, Message(RecordDict(), reply_to=asked(fleet, node)))
    many = [ObjectTree(object_id=f"{number:064x}") for number in range(11)]
    request.message_object_trees[0].children.extend(many)
    with pytest.raises(RequestRefused, match="More than 10 objects") as refusal:
        node._transport.PushMessages(request)
    assert refusal.value.status == 413
    assert len(fleet.link.state.object_store) == 0


TREES = {
    "deep": ["a", ["b", ["c", ["d", ["e", ["f", ["g", ["h", ["i"]]]]]]]]],
    "a child twice": ["a", ["b"], ["b"]],
    "other children": ["a", ["b", ["c"]], ["d", ["b"]]],
    "itself": ["a", ["a"]],
}


@pytest.mark.parametrize("shape", TREES)
def test_a_tree_that_no_message_has_is_refused(shape):
    with pytest.raises(HTTPException) as refusal:
        incoming_replies.children_in(tree_of(TREES[shape]))
    assert refusal.value.status_code == 400


def test_an_object_stands_at_several_places_of_a_tree():
    """As in two records that hold the same zeros."""
    tree = tree_of(["a", ["b", ["d"]], ["c", ["d"]]])
    children = {
        id[0]: {child[0] for child in ids} for id, ids in incoming_replies.children_in(tree).items()
    }
    assert children == {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}


def tree_of(shape: list) -> ObjectTree:
    name, *children = shape
    letter = name if name <= "f" else chr(ord(name) - ord("g") + ord("0"))
    return ObjectTree(object_id=letter * 64, children=map(tree_of, children))


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"]
)
def test_objects_have_ids_of_objects(fleet, name):
    node = fleet.node()
    request = push_request(node, Message(RecordDict(), reply_to=asked(fleet, node)))
    request.message_object_trees[0].children.append(ObjectTree(object_id=name))
    with pytest.raises(RequestRefused, match="Not the id of an object"):
        node._transport.PushMessages(request)


def test_a_reply_has_so_many_bytes(fleet):
    fleet.link.reply_limit = 2000
    node = fleet.node()
    reply = Message(
        RecordDict({"c": ConfigRecord({"b": b"x" * 3000})}), reply_to=asked(fleet, node)
    )
    with pytest.raises(RequestRefused, match="The reply has more than 2000 bytes"):
        node.send(reply, 0.0)


def test_a_reply_is_announced_as_often_as_its_node_likes_and_is_one(fleet):
    node = fleet.node()
    question = asked(fleet, node)
    reply = Message(RecordDict({"c": ConfigRecord({"b": b"x"})}), reply_to=question)
    objects = get_all_nested_objects(reply)
    for object_id, item in objects.items():
        response = node._transport.PushMessages(push_request(node, reply))
        assert object_id in response.objects_to_push
        request = message_pb2.PushObjectRequest(
            node=node._node,
            run_id=fleet.link.run_id,
            object_id=object_id,
            object_content=item.deflate(),
            session_id=response.session_id,
        )
        assert node._transport.PushObject(request).stored
        assert not node._transport.PushObject(request).stored
    assert list(fleet.link.replies) == [question.metadata.message_id]
    assert len(fleet.grid.pull_messages(list(fleet.link.replies))) == 1
    assert not fleet.link.replies


def test_a_node_sends_nothing_for_another_nodes_reply(fleet):
    node, other = fleet.node(), fleet.node()
    reply = Message(RecordDict(), reply_to=asked(fleet, node))
    response = node._transport.PushMessages(push_request(node, reply))
    (object_id, item), *_ = get_all_nested_objects(reply).items()
    request = message_pb2.PushObjectRequest(
        node=other._node,
        run_id=fleet.link.run_id,
        object_id=object_id,
        object_content=item.deflate(),
        session_id=response.session_id,
    )
    assert not other._transport.PushObject(request).stored


def test_replies_that_are_not_taken_leave_nothing_behind(fleet):
    node = fleet.node()
    reply = Message(RecordDict(), reply_to=asked(fleet, node))
    for number in range(5):
        request = push_request(node, reply, reply_to_message_id=f"{number:064x}")
        assert not node._transport.PushMessages(request).objects_to_push
        request = push_request(node, reply)
        node._transport.PushMessages(request)
    assert len(fleet.link.replies) == 1
    assert not fleet.link.state._object_push_sessions
    assert len(fleet.link.state.object_store) < 10


def test_a_node_confirms_nothing_of_others(fleet):
    node, other = fleet.node(), fleet.node()
    content = RecordDict({"config": ConfigRecord({"n": 1})})
    message = Message(content, other.node_id, MessageType.TRAIN)
    (message_id,) = fleet.grid.push_messages([message])
    stored = len(fleet.link.state.object_store)
    node._transport.ConfirmMessageReceived(
        message_pb2.ConfirmMessageReceivedRequest(
            node=node._node, run_id=fleet.link.run_id, message_object_id=message_id
        )
    )
    assert len(fleet.link.state.object_store) == stored
    assert other.receive().metadata.message_id == message_id


def test_so_many_nodes_may_register_where_any_may(fleet, monkeypatch):
    monkeypatch.setattr(link_state, "_MAX_NODES", 2)
    fleet.node(), fleet.node()
    with pytest.raises(Unreachable, match="Too many nodes"):  # one of them may leave
        fleet.node()


@pytest.mark.parametrize("interval", [1800.0, float("nan"), 1e300, -1.0])
def test_a_node_cannot_be_silent_for_long(fleet, interval):
    node = fleet.node()
    request = heartbeat_pb2.SendNodeHeartbeatRequest(node=node._node, heartbeat_interval=interval)
    try:
        node._transport._post(  # not held
            "/v1/fleet/send-node-heartbeat",
            request.SerializeToString(),
            node._transport._signed_headers(),
        )
    finally:
        state = fleet.link.state.nodes[node.node_id]
        assert state.online_until < time.time() + 150


@pytest.mark.parametrize("wait", ["", "nan", "inf", "-1", "1e400", "\xb2", "1,5", "9" * 400])
def test_a_wait_is_a_few_seconds_whatever_is_asked_for(wait):
    from mlx_fed.flower import headers, fleet_routes

    assert 0 <= fleet_routes._wait_seconds({headers.WAIT: wait}) <= fleet_routes._MAX_WAIT


def test_what_is_bounded_is_enough_for_a_large_model():
    """10,000 arrays of 400 MB in all: their announcement, and each object."""
    tree = ObjectTree(object_id="0" * 64)
    for number in range(25_000):
        tree.children.append(ObjectTree(object_id=f"{number + 1:064x}"))
    request = fleet_pb2.PushMessagesRequest(message_object_trees=[tree])
    assert request.ByteSize() < request_limits._MAX_BODY["push-messages"]
    assert len(incoming_replies.children_in(tree)) == 25_001
    assert request_limits._MAX_BODY["push-object"] > 5 * 2**20 + 1024


def test_nodes_send_as_slowly_as_the_server_lets_them():
    assert transport._MIN_SPEED == request_limits._MIN_SPEED
