"""Everything that comes from a peer or a file, as functions of bytes.

Each entry does with its bytes what the program would do, and raises if the program would crash,
or if something passed that must not. The suite draws bytes with Hypothesis (``test_fuzz.py``);
``python -m tests.fuzz`` goes on for as long as one likes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER, NodeStatus
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from google.protobuf.message import DecodeError

from mlx_fed.rounds import checkpoint, checks, messages
from mlx_fed.runs import history, previous
from mlx_fed.arrays import named_arrays
from mlx_fed.cli.arguments import parse_settings
from mlx_fed.system import address
from mlx_fed.fleet import certificates, tokens
from mlx_fed.fleet.node_list import NodeList
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import keys, one_run_grid
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable
from mlx_fed.flower.allowlist import AccessDenied
from mlx_fed.flower.link_grid import LinkGrid
from mlx_fed.flower.link_state import Link
from mlx_fed.flower.fleet_routes import FleetRoutes
from mlx_fed.rounds.roster import Roster
from mlx_fed.rounds.strategy_state import State

ARRAYS = {"w": mx.array([[1.0, -2.0], [0.5, 3.0]]), "b": mx.array([0.5, 1.0], dtype=mx.bfloat16)}
SPEC = named_arrays.spec(ARRAYS)
ROUTES = sorted(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/"))
EXPECTED = {200, 400, 401, 403, 404, 408, 409, 412, 413, 415, 503}
_RENEW = 300
_SECONDS = 20.0


class World:
    """A server's routes with an honest node, which waits for work, and another one."""

    def __init__(self) -> None:
        self.link = Link()
        self.grid = LinkGrid(self.link)
        self.routes = FleetRoutes(self.link)
        self.inputs = 0
        self.honest, self.node = self._join(), self._join()
        self.waiting = self.ask(self.honest)
        self.theirs = set(self.link.state.object_store.store)  # type: ignore[attr-defined]
        self.ask(self.node)

    def _join(self) -> FleetClient:
        node = FleetClient("127.0.0.1", 1)
        register = fleet_pb2.RegisterNodeFleetRequest(public_key=node._transport.public_key)
        self.post(node, "/v1/fleet/register-node", register.SerializeToString())
        activate = fleet_pb2.ActivateNodeRequest(
            public_key=node._transport.public_key, heartbeat_interval=30
        )
        _, body = self.post(node, "/v1/fleet/activate-node", activate.SerializeToString())
        node.node_id = fleet_pb2.ActivateNodeResponse.FromString(body).node_id
        # A machine may stand still for longer than a heartbeat.
        self.link.state.nodes[node.node_id].online_until = float("inf")
        return node

    def ask(self, node: FleetClient) -> str:
        content = RecordDict({"arrays": messages.pack(ARRAYS), "config": ConfigRecord({"n": 1})})
        message = Message(content, node.node_id, MessageType.TRAIN)
        (message_id,) = self.grid.push_messages([message])
        return message_id

    def question(self) -> Message:
        """A message that the node has to reply to."""
        message = Message(RecordDict(), self.node.node_id, MessageType.TRAIN)
        self.grid.push_messages([message])
        return message

    def post(
        self, node: FleetClient, path: str, body: bytes, headers: dict[bytes, bytes] | None = None
    ) -> tuple[int, bytes]:
        signed = {k.encode(): v.encode() for k, v in node._transport._signed_headers().items()}
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": list((signed | (headers or {})).items()),
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            sent.append(event)

        loop().run_until_complete(asyncio.wait_for(self.routes(scope, receive, send), _SECONDS))
        status = sent[0]["status"]
        assert status in EXPECTED, f"{path}: {status}"
        return status, sent[1]["body"]

    def check(self) -> None:
        """The honest node is there, and its message is whole."""
        state = self.link.state
        assert state.nodes[self.honest.node_id].status == NodeStatus.ONLINE
        assert self.waiting in state.message_ins_store
        assert self.waiting not in self.link.replies
        assert self.theirs <= set(state.object_store.store)  # type: ignore[attr-defined]


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


_world: list[World] = []


def world() -> World:
    """The world, made anew now and then, and when the node has put itself out of it."""
    if _world:
        node = _world[0].link.state.nodes.get(_world[0].node.node_id)
        if not node or node.status != NodeStatus.ONLINE or _world[0].inputs > _RENEW:
            _world.clear()
    if not _world:
        _world.append(World())
    _world[0].inputs += 1
    one_run_grid.begin_run(_world[0].link.run_id, _world[0].link._task_id)  # others make runs, too
    return _world[0]


# -- what comes to the server ------------------------------------------------------------------


def request(path: str, data: bytes) -> None:
    """A body of a route; every other one speaks for its own node and run, and gets further."""
    here = world()
    body = data[1:]
    if data[:1] > b"\x7f":
        parsed = PROTOBUF_REQUEST_TYPES["POST", path]()
        with suppress(Exception):
            parsed.ParseFromString(body)
        if hasattr(parsed, "node"):
            parsed.node.node_id = here.node.node_id
        elif hasattr(parsed, "node_id"):
            parsed.node_id = here.node.node_id
        if hasattr(parsed, "run_id"):
            parsed.run_id = here.link.run_id
        if hasattr(parsed, "public_key"):
            parsed.public_key = here.node._transport.public_key
        for message in getattr(parsed, "messages_list", []):
            message.metadata.src_node_id = here.node.node_id
            message.metadata.run_id = here.link.run_id
            for tree in parsed.message_object_trees[:1]:
                message.metadata.message_id = tree.object_id
        body = parsed.SerializeToString()
    here.post(here.node, path, body)
    here.check()


def request_headers(data: bytes) -> None:
    """Headers over those that a node sends, a line each."""
    here = world()
    headers = {}
    for line in data.split(b"\n"):
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    if not headers.get(b"content-length", b"0").isdigit():
        return  # httptools lets none through
    # Nobody waits for what is not there; how long one would is looked at elsewhere.
    headers.pop(b"mlx-fed-wait", None)
    body = heartbeat_pb2.SendNodeHeartbeatRequest(node=here.node._node, heartbeat_interval=30)
    here.post(here.node, "/v1/fleet/send-node-heartbeat", body.SerializeToString(), headers)
    here.check()


@cache
def _server() -> tuple[int, FleetClient]:
    """A server on a port, for as long as this process lasts, and a node that has joined it."""
    listening = _socket("127.0.0.1", 0)
    running = _serving(listening)
    _kept.append(running)
    running.__enter__()
    port = listening.getsockname()[1]
    node = FleetClient("127.0.0.1", port)
    node.register()
    return port, node


_kept: list[Any] = []


def wire(data: bytes) -> None:
    """Bytes on a connection; then the server answers a node as before."""
    port, node = _server()
    where = ("127.0.0.1", port)
    with suppress(OSError), socket.create_connection(where, timeout=_SECONDS) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    pull = fleet_pb2.PullMessagesRequest(node=node._node).SerializeToString()
    path = "/v1/fleet/pull-messages"
    status, _ = node._transport._post(path, pull, node._transport._signed_headers())
    assert status == 200


def reply_object(data: bytes) -> bool:
    """A reply of which one object, at any depth, has these bytes: whether it counts."""
    here = world()
    question = here.question()
    reply = Message(_reply_content(), reply_to=question)
    contents = _with_object(reply, data[0] if data else 0, data[1:])
    root = next(reversed(contents))
    reply.metadata.__dict__["_message_id"] = root
    envelope = message_to_proto(remove_content_from_message(reply))
    tree = _tree_of(root, contents)
    announced = fleet_pb2.PushMessagesRequest(
        node=here.node._node, messages_list=[envelope], message_object_trees=[tree]
    )
    _, body = here.post(here.node, "/v1/fleet/push-messages", announced.SerializeToString())
    response = fleet_pb2.PushMessagesResponse()
    with suppress(Exception):
        response.ParseFromString(body)
    for object_id in contents:
        if object_id in response.objects_to_push:
            pushed = message_pb2.PushObjectRequest(
                node=here.node._node,
                run_id=here.link.run_id,
                object_id=object_id,
                object_content=contents[object_id],
                session_id=response.session_id,
            )
            here.post(here.node, "/v1/fleet/push-object", pushed.SerializeToString())
    replies = here.grid.pull_messages([question.metadata.message_id])
    counts = [judge(received) for received in replies]
    here.grid.withdraw([question.metadata.message_id])
    here.check()
    return any(counts)


def object_tree(data: bytes) -> bool:
    """The tree of a reply, as protobuf: whether the reply is waited for."""
    here = world()
    question = here.question()
    message_id = question.metadata.message_id
    tree = ObjectTree()
    with suppress(DecodeError):
        tree.ParseFromString(data)
    reply = Message(RecordDict(), reply_to=question)
    reply.metadata.__dict__["_message_id"] = tree.object_id
    announced = fleet_pb2.PushMessagesRequest(
        node=here.node._node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[tree],
    )
    here.post(here.node, "/v1/fleet/push-messages", announced.SerializeToString())
    incoming = here.link.replies.get(message_id)
    if incoming is not None:
        assert not incoming.is_complete
        assert incoming.missing == set(incoming.children) == _within(incoming.children, tree, 8)
    here.grid.withdraw([message_id])
    assert message_id not in here.link.replies
    here.check()
    return incoming is not None


def _within(children: Any, tree: ObjectTree, levels: int) -> set[str]:
    """The ids in a tree of so many levels, each of which has these children."""
    assert levels > 0
    assert {child.object_id for child in tree.children} == children[tree.object_id]
    below = [_within(children, child, levels - 1) for child in tree.children]
    return {tree.object_id}.union(*below)


def object_graph(data: bytes) -> bool:
    """Objects of a reply as described by ``_graph``, announced and pushed: whether it counts."""
    here = world()
    question = here.question()
    message_id = question.metadata.message_id
    reply = Message(_reply_content(), reply_to=question)
    contents, announced = _graph(data[1:], reply)
    if not contents:
        return False
    root = [*contents][-1]
    reply.metadata.__dict__["_message_id"] = root
    push = fleet_pb2.PushMessagesRequest(
        node=here.node._node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[announced],
    )
    status, body = here.post(here.node, "/v1/fleet/push-messages", push.SerializeToString())
    if status == 200:
        response = fleet_pb2.PushMessagesResponse.FromString(body)
        order = [*contents] if data[0] % 2 else [*reversed(contents)]
        for object_id in [*order, *order[: data[0] // 2 % 4]]:
            pushed = message_pb2.PushObjectRequest(
                node=here.node._node,
                run_id=here.link.run_id,
                object_id=object_id,
                object_content=contents[object_id],
                session_id=response.session_id,
            )
            here.post(here.node, "/v1/fleet/push-object", pushed.SerializeToString())
        incoming = here.link.replies[message_id]
        for object_id in incoming.children.keys() - incoming.missing:
            head = get_object_children_ids_from_object_content(contents[object_id])
            assert set(head) == incoming.children[object_id], "a head that was not announced"
    counts = [judge(received) for received in here.grid.pull_messages([message_id])]
    here.grid.withdraw([message_id])
    assert message_id not in here.link.replies
    here.check()
    return any(counts)


_OBJECT_KINDS = (
    *("ArrayChunk", "Array", "ArrayRecord", "MetricRecord", "ConfigRecord", "RecordDict"),
    *("Message", "Error"),
)
_MOST_GRAPH_OBJECTS = 200


def _graph(data: bytes, reply: Message) -> tuple[dict[str, bytes], ObjectTree]:
    """Objects by id, children first, and the tree that is announced for the last one.

    Of each object the data has its kind, how it is announced, its children as places among the
    objects before it, and its body, where ``@`` and a place stand for an id. A message's body may
    be empty: it is the reply's.
    """
    source = BytesIO(data)
    contents: dict[str, bytes] = {}
    trees: list[ObjectTree] = []
    while (head := source.read(3)) and len(head) == 3 and len(trees) < _MOST_GRAPH_OBJECTS:
        kind = _OBJECT_KINDS[head[0] % len(_OBJECT_KINDS)]
        places = [place % len(trees) for place in source.read(head[2] % 32) if trees]
        body = source.read(int.from_bytes(source.read(2), "big") % 4096)
        for place in range(min(len(trees), 99), 0, -1):
            body = body.replace(b"@%02d" % (place - 1), trees[place - 1].object_id.encode())
        if kind == "Message" and not body:
            body = reply.deflate().partition(HEAD_BODY_DIVIDER)[2]
        ids = ",".join(trees[place].object_id for place in places)
        content = f"{kind} {ids} {len(body)}".encode() + HEAD_BODY_DIVIDER + body
        object_id = hashlib.sha256(content).hexdigest()
        contents.pop(object_id, None)
        contents[object_id] = content
        shown = [trees[place] for place in places]
        if head[1] % 8 == 1:  # without children
            shown = []
        elif head[1] % 8 == 2:  # another one, too
            shown += trees[-1:]
        elif head[1] % 8 == 3:  # the children without theirs
            shown = [ObjectTree(object_id=tree.object_id) for tree in shown]
        elif head[1] % 8 == 4:  # itself
            shown.append(ObjectTree(object_id=object_id))
        tree = ObjectTree(object_id=object_id, children=shown)
        if tree.ByteSize() > 2**20:
            break
        trees.append(tree)
    return contents, trees[-1] if trees else ObjectTree()


def _reply_content() -> RecordDict:
    return RecordDict(
        {
            "arrays": messages.pack(ARRAYS),
            "metrics": MetricRecord({"num-examples": 3, "loss": 0.5}),
            "config": ConfigRecord({"name": "a", "partition-id": 0}),
        }
    )


def _tree_of(object_id: str, contents: dict[str, bytes]) -> ObjectTree:
    """The tree that the objects' own heads give, where they are such."""
    children: list[str] = []
    with suppress(ValueError):
        children = get_object_children_ids_from_object_content(contents[object_id])
    below = [_tree_of(child, contents) for child in children if child in contents]
    return ObjectTree(object_id=object_id, children=below)


def _with_object(reply: Message, which: int, data: bytes) -> dict[str, bytes]:
    """A message's objects, children first, one of them replaced and its parents made to fit."""
    renamed: dict[bytes, bytes] = {}
    contents: dict[str, bytes] = {}
    objects = get_all_nested_objects(reply)
    for place, (object_id, item) in enumerate(objects.items()):
        content = data if place == which % len(objects) else item.deflate()
        for old, new in renamed.items():
            content = content.replace(old, new)
        new_id = hashlib.sha256(content).hexdigest()
        renamed[object_id.encode()] = new_id.encode()
        contents[new_id] = content
    return contents


def judge(received: Message) -> bool:
    """Whether the round loop counts a reply; if it does, it is fit to."""
    try:
        counted = checks.check_update(received, SPEC, {}, "num-examples")
    except checks.Refused:
        return False
    assert named_arrays.spec(counted.parameters) == SPEC
    assert all(mx.isfinite(array).all() for array in counted.parameters.values())
    assert 0 < counted.weight < float("inf")
    return True


def array_bytes(data: bytes) -> bool:
    """A shard of a reply's arrays."""
    stype = "safetensors" if data[:1] > b"\x7f" else "numpy.ndarray"
    array = Array("uint8", (len(data) - 1,), stype, data[1:])
    content = RecordDict({"a": ArrayRecord({"w": array}), "m": MetricRecord({"num-examples": 1})})
    return judge(Message(content, reply_to=world().question()))


def roll_call(data: bytes) -> bool:
    """A node's name, partition, fingerprint, parameters and statistics, which NUL divides: whether
    it takes part."""
    here = world()
    question = here.question()
    message_id, node_id = question.metadata.message_id, here.node.node_id
    told: list[str] = []
    roster = Roster(
        here.grid, SPEC, {}, {}, lambda event: told.append(event.name), {"base": "3f2a"}
    )
    roster.asked = {message_id: node_id}
    given = dict(zip(_ANSWERED, data.decode("utf-8", "replace").split("\0"), strict=False))
    content = RecordDict({"node": ConfigRecord({**given})})
    roster._take_in(Message(content, reply_to=question))
    here.grid.withdraw([message_id])
    here.check()
    takes_part = node_id in roster.nodes
    assert told == ["joined" if takes_part else "refused"]
    return takes_part


_ANSWERED = ("name", "partition-id", "fingerprint", "parameters", "statistics")


def invitation(data: bytes) -> None:
    members = _members()
    try:
        members.enrol(data.decode("latin-1"), b"key")
    except AccessDenied:
        return
    raise AssertionError("a made-up invitation was taken")


@cache
def _members() -> NodeList:
    members = NodeList(_folder() / "nodes.json")
    members.invite("node-0", b"0123456789abcdef")
    return members


# -- what comes to a node ----------------------------------------------------------------------


def answers(data: bytes) -> bool:
    """A server's answers to a node, 2 bytes of length before each: whether it gets work."""
    node = FleetClient("127.0.0.1", 1)
    parts = _parts(data)

    def post(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if not parts:
            raise Unreachable("gone")
        part = parts.pop(0)
        return (500 if part[:1] == b"\xff" else 200), part[1:]

    node._transport._post = post  # type: ignore[method-assign]  # what lies below is the library's
    got = []
    for ask in (node.register, node.receive, node.heartbeat, node.run_has_ended):
        with suppress(Unreachable, RequestRefused):
            got.append(ask())
    return any(isinstance(each, Message) for each in got)


def _parts(data: bytes) -> list[bytes]:
    parts = []
    while data:
        size = int.from_bytes(data[:2], "big")
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return parts


def token(data: bytes) -> None:
    with suppress(fed.FedError):
        made = tokens.decode(data.decode("utf-8", "replace"))
        tokens.check_name(made.name)
        address.parse(made.address)
        assert len(made.authority) == 32


# -- files -------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="mlx-fed-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)
    return path


def checkpoint_file(data: bytes) -> bool:
    """Whether a checkpoint can be read whose checksum fits: it was made on purpose."""
    path = _file(f"00001-{zlib.crc32(data):08x}.safetensors", data)
    try:
        return checkpoint.read(path).round >= 0
    except checkpoint.CheckpointError:
        return False
    finally:
        path.unlink()


def history_file(data: bytes) -> None:
    path = _file("run/history.jsonl", data)
    kept = history.History(path.parent)
    kept.go_on_after(3)
    assert all(record["round"] <= 3 for record in kept.rounds)
    history.History(path.parent).go_on_after(3)


def settings_file(data: bytes) -> None:
    folder = _file("run/settings.json", data).parent
    previous.previous_of(folder)


def nodes_file(data: bytes) -> None:
    members = NodeList(_file("members/nodes.json", data))
    with suppress(fed.FedError):
        members.all()
        members.name_of(b"key")
    with suppress(fed.FedError):
        members.enrol("a:" + "00" * 16, b"another")


def certificate_file(data: bytes) -> None:
    path = _file("ca.crt", data)
    with suppress(fed.FedError):
        certificates.fingerprint(data)
    with suppress(fed.FedError):
        certificates.client_context(path)


def key_file(data: bytes) -> None:
    with suppress(fed.FedError):
        keys.load_private(data)
    with suppress(fed.FedError):
        keys.load_public(data)


def settings(data: bytes) -> None:
    with suppress(fed.FedError):
        parse_settings(data.decode("utf-8", "replace").split("\n"))
    with suppress(fed.FedError):
        address.parse(data.decode("utf-8", "replace"))


def lora_file(data: bytes) -> None:
    from mlx_fed.lm.config import load_config

    with suppress(fed.FedError):
        load_config(_file("lora.yaml", data))


# -- all of them -------------------------------------------------------------------------------


def _route(path: str) -> Callable[[bytes], None]:
    return lambda data: request(path, data)


def _requests() -> dict[str, list[bytes]]:
    """A valid body of each route; the node is filled in as it is sent."""
    message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), 7, MessageType.TRAIN)
    reply = Message(RecordDict({"c": ConfigRecord({"a": 1})}), reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    push = fleet_pb2.PushMessagesRequest(
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
        clientapp_runtime_list=[0.5],
    )
    push.messages_list[0].metadata.reply_to_message_id = "0" * 64
    some_id = reply.object_id
    bodies: dict[str, Any] = {
        "heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(heartbeat_interval=30),
        "push-messages": push,
        "push-object": message_pb2.PushObjectRequest(object_id=some_id, object_content=b"abc"),
        "pull-object": message_pb2.PullObjectRequest(object_id=some_id),
        "confirm": message_pb2.ConfirmMessageReceivedRequest(message_object_id=some_id),
        "activate": fleet_pb2.ActivateNodeRequest(heartbeat_interval=30),
        "get-run": run_pb2.GetRunRequest(),
    }
    return {
        path: [b"\xff" + body.SerializeToString() for part, body in bodies.items() if part in path]
        or [b"\xff"]
        for path in ROUTES
    }


def _objects() -> list[bytes]:
    """Each object of a reply, at its own place."""
    reply = Message(_reply_content(), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    objects = get_all_nested_objects(reply).values()
    return [bytes([place]) + item.deflate() for place, item in enumerate(objects)]


def _described() -> bytes:
    """A reply's objects as ``_graph`` reads them."""
    reply = Message(_reply_content(), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    described, places = b"", {}
    for object_id, item in get_all_nested_objects(reply).items():
        head, _, body = item.deflate().partition(HEAD_BODY_DIVIDER)
        kind = _OBJECT_KINDS.index(head.split(b" ")[0].decode())
        children = get_object_children_ids_from_object_content(item.deflate())
        for child in children:
            body = body.replace(child.encode(), b"@%02d" % places[child])
        body = b"" if kind == _OBJECT_KINDS.index("Message") else body
        described += bytes([kind, 0, len(children), *(places[child] for child in children)])
        described += len(body).to_bytes(2, "big") + body
        places[object_id] = len(places)
    return described


def _trees() -> list[bytes]:
    """A reply's tree, and one in which an object has itself as a child."""
    reply = Message(_reply_content(), reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
    tree = get_object_tree(reply)
    within = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="0" * 64)])
    return [tree.SerializeToString(), within.SerializeToString()]


def _in_order(message: Message) -> list[Any]:
    """A message's objects as a node pulls them."""
    objects = get_all_nested_objects(message)
    return [objects[tree.object_id] for tree in iterate_object_tree(get_object_tree(message))]


def _answers() -> bytes:
    register = fleet_pb2.RegisterNodeFleetResponse(node_id=7).SerializeToString()
    activate = fleet_pb2.ActivateNodeResponse(node_id=7).SerializeToString()
    message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), 7, MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = message.object_id
    pull = fleet_pb2.PullMessagesResponse(
        messages_list=[message_to_proto(remove_content_from_message(message))],
        message_object_trees=[get_object_tree(message)],
    )
    found = {"object_found": True, "object_available": True}
    objects = [
        message_pb2.PullObjectResponse(object_content=item.deflate(), **found).SerializeToString()
        for item in _in_order(message)
    ]
    confirmed = b""
    bodies = [register, activate, pull.SerializeToString(), *objects, confirmed]
    parts = [b"\x00" + body for body in bodies]
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def _checkpoint() -> bytes:
    record = ArrayRecord({"w": Array(np.ones((2, 2), np.float32))})
    made = checkpoint.Checkpoint(1, record, {}, State({}, {}), checkpoint.Best(1, 0.5), {"a": "b"})
    buffer = BytesIO()
    checkpoint._write(checkpoint._Checked(buffer), made)
    return buffer.getvalue()


ENTRIES: dict[str, Callable[[bytes], object]] = {
    **{path.rpartition("/")[2]: _route(path) for path in ROUTES},
    "headers": request_headers,
    "wire": wire,
    "reply": reply_object,
    "object tree": object_tree,
    "object graph": object_graph,
    "arrays": array_bytes,
    "roll call": roll_call,
    "invitation": invitation,
    "answers": answers,
    "token": token,
    "checkpoint": checkpoint_file,
    "history": history_file,
    "settings.json": settings_file,
    "nodes.json": nodes_file,
    "certificate": certificate_file,
    "key": key_file,
    "settings": settings,
    "lora.yaml": lora_file,
}
"""Each way in, by its name."""


@cache
def seeds() -> dict[str, list[bytes]]:
    """For each entry bytes that go all the way."""
    one_run_grid.begin_run()
    shard, plain = BytesIO(), BytesIO()
    mx.save_safetensors(shard, ARRAYS)
    np.save(plain, np.ones((2, 2), np.float32))
    private, public = keys.generate_files()
    node = {"name": "a", "number": 0, "key": "key", "secret": "", "expires": 1.5}
    some_token = tokens.Token("127.0.0.1:8080", b"f" * 32, "node-0", 0, b"s" * 16)
    return {
        **{path.rpartition("/")[2]: bodies for path, bodies in _requests().items()},
        "headers": [
            b"content-type: " + PROTOBUF_MEDIA_TYPE.encode(),
            b"flwr-timestamp: 2026-01-01",
        ],
        "wire": [
            b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc",
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\na: b\r\n\r\n",
        ],
        "reply": _objects(),
        "object tree": _trees(),
        "object graph": [b"\x01" + _described()],
        "arrays": [b"\xff" + shard.getvalue(), b"\x00" + plain.getvalue()],
        "roll call": [
            "\0".join(["node-0", "0", '{"base": "3f2a"}', json.dumps(SPEC), "{}"]).encode(),
            b'node-0\x000\x00{"base": "\\ud800"}',
            b"node-0\x000\x00" + b"[" * 100_000,
        ],
        "invitation": [b"node-0:" + b"00" * 16],
        "answers": [_answers()],
        "token": [tokens.encode(some_token).encode()],
        "checkpoint": [_checkpoint()],
        "history": [b'{"round": 1}\n{"round": 2, "train": {}}\n'],
        "settings.json": [b'{"num_rounds": 3, "config": {"run-id": "a"}}', b"[]"],
        "nodes.json": [json.dumps({"nodes": [node]}).encode()],
        "certificate": [certificates.make_authority(certificates.new_key())],
        "key": [private, public],
        "settings": [b"a=1\nb=true\nc=x", b"[::1]:8080"],
        "lora.yaml": [b"model: m\niters: 8\nfederation: {rounds: 2, nodes: 1}\n"],
    }
