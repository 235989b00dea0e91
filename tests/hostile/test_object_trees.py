"""What a node announces and pushes costs at most its own reply: the run goes on, whatever it is."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_tree,
)

from mlx_fed.flower.transport import RequestRefused

from .running import (
    HostileNode,
    Running,
    as_it_came,
    made,
    objects_of,
    roll_call_answer,
)


@pytest.fixture(scope="module", params=["TLS", pytest.param("plaintext", marks=pytest.mark.slow)])
def running(request, start_once, tmp_path_factory) -> Iterator[Running]:
    running = Running(start_once, tmp_path_factory.mktemp("run"), request.param == "TLS")
    running.goes_on()
    return running


@pytest.fixture
def node(running: Running, request) -> HostileNode:
    name = f"hostile-{abs(hash(request.node.name))}"
    node = running.hostile(name)
    yield node
    node.leave()


def empty_reply(question: Message) -> Message:
    return Message(RecordDict(), reply_to=question)


def deep(levels: int) -> tuple[ObjectTree, dict[str, bytes]]:
    """A chain of objects, announced in pieces that the wire's format takes."""
    objects = [made([], body=os.urandom(8))]
    tree = ObjectTree(object_id=objects[0][0])
    pieces = []
    for level in range(levels):
        child = objects[-1][0]
        objects.append(made([child]))
        below = tree if level % 60 else ObjectTree(object_id=child)
        tree = ObjectTree(object_id=objects[-1][0], children=[below])
        if level % 60 == 59 or level == levels - 1:
            pieces.append(tree)
    pieces.insert(0, ObjectTree(object_id=objects[0][0]))
    objects.append(made([objects[-1][0]], body=b"x"))
    return ObjectTree(object_id=objects[-1][0], children=pieces), dict(objects)


def doubling(levels: int) -> tuple[ObjectTree, dict[str, bytes]]:
    """Objects that each name the next one twice."""
    objects = [made([], body=os.urandom(8))]
    tree = ObjectTree(object_id=objects[0][0])
    for _ in range(levels):
        child = objects[-1][0]
        objects.append(made([child, child]))
        twice = [tree, ObjectTree(object_id=child)]
        tree = ObjectTree(object_id=objects[-1][0], children=twice)
    return tree, dict(objects)


def ladder(levels: int) -> tuple[ObjectTree, dict[str, bytes]]:
    """The same without a child that is named twice: two objects a level, which share children."""
    objects = [made([], body=os.urandom(8)) for _ in range(2)]
    below = [each for each, _ in objects]
    trees = [ObjectTree(object_id=each) for each in below]
    for _ in range(levels):
        pair = [made(below, body=os.urandom(8)) for _ in range(2)]
        stubs = [ObjectTree(object_id=each) for each in below]
        trees = [
            ObjectTree(object_id=pair[0][0], children=trees),
            ObjectTree(object_id=pair[1][0], children=stubs),
        ]
        objects += pair
        below = [each for each, _ in pair]
    objects.append(made(below, body=b"x"))
    return ObjectTree(object_id=objects[-1][0], children=trees), dict(objects)


def hidden(levels: int) -> tuple[ObjectTree, dict[str, bytes]]:
    """A chain that is announced as objects beside each other, so that only their heads are deep."""
    _, objects = deep(levels)
    *below, root = objects
    return ObjectTree(object_id=root, children=[ObjectTree(object_id=x) for x in below]), objects


@pytest.mark.parametrize(
    "tree",
    [deep(1500), doubling(40), ladder(35), hidden(1500)],
    ids=["deep", "doubling", "ladder", "hidden"],
)
def test_a_tree_of_objects_is_one_that_a_message_has(running, node, tree):
    announced, contents = tree
    question = node.asked()
    try:
        taken = node.push_all(empty_reply(question), announced, contents)
    except RequestRefused as refusal:
        assert refusal.status == 400  # noqa: PT017
    else:
        assert not all(taken)
    running.goes_on()


# -- silence -----------------------------------------------------------------------------------


def without_children(question: Message, node: HostileNode) -> list[ObjectTree]:
    """The model's own record, as an object without children."""
    (arrays,) = (value for value in question.content.values() if isinstance(value, ArrayRecord))
    return [ObjectTree(object_id=arrays.object_id)]


def the_whole_model(question: Message, node: HostileNode) -> list[ObjectTree]:
    """The model's own record, as a part of the reply."""
    (arrays,) = (value for value in question.content.values() if isinstance(value, ArrayRecord))
    return [get_object_tree(arrays)]


def the_question(question: Message, node: HostileNode) -> list[ObjectTree]:
    """The server's own message, as a part of the reply."""
    return [ObjectTree(object_id=question.metadata.message_id)]


@pytest.mark.parametrize(
    "children",
    [
        without_children,
        pytest.param(the_whole_model, marks=pytest.mark.slow),
        pytest.param(the_question, marks=pytest.mark.slow),
    ],
)
def test_a_node_cannot_change_what_others_are_sent(running, children):
    """What it evaluates is what all train from in the next round."""
    name = f"taker-{children.__name__}".replace("_", "-")
    node = running.hostile(name)
    node.send(roll_call_answer(node.asked(), name, node.number), 0.0)
    while not (question := node.asked()).metadata.message_type.startswith("evaluate"):
        node.send(as_it_came(question), 0.0)
    root, content = made([tree.object_id for tree in children(question, node)], "Message")
    tree = ObjectTree(object_id=root, children=children(question, node))
    response = node.announce(empty_reply(question), tree)
    assert node.push(response.session_id, root, content)
    node.leave()
    running.goes_on(4)


# -- memory ------------------------------------------------------------------------------------

MEGABYTE = 2**20
ROOM = 150 * MEGABYTE
"""More than one reply may take, and less than what each of these sends."""


def push_a_heap(node: HostileNode, question: Message, root: str, count: int) -> None:
    """Pushes a reply's objects, each too small for the disk, but for the reply itself."""
    objects = dict(made([], body=os.urandom(250_000)) for _ in range(count))
    tree = ObjectTree(object_id=root, children=[ObjectTree(object_id=each) for each in objects])
    with suppress(RequestRefused):
        node.push_all(empty_reply(question), tree, objects)


def test_a_reply_that_is_announced_again_and_again_is_one(running, node):
    before, question = running.memory, node.asked()
    for _ in range(25):
        push_a_heap(node, question, made([], body=b"never sent")[0], 40)
    assert running.memory - before < ROOM
    running.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the roll call", "the farewell"])
def test_what_a_node_left_behind_goes_with_it(running, to):
    """It sends nearly all of a reply, leaves, and comes again as another node."""
    running.goes_on()
    before = running.memory
    for number in range(7):
        node = running.hostile(f"leaver-{to[4:8]}-{number}")
        question = node.asked()
        if to == "the farewell":
            node.send(roll_call_answer(question, "-", 0), 0.0)
            question = node.asked()
        push_a_heap(node, question, made([], body=b"never sent %d" % number)[0], 160)
        node.leave()
        running.goes_on(1)
    assert running.memory - before < ROOM
    running.goes_on()


def test_what_a_node_sends_at_a_time_is_bounded(running, node):
    """Requests whose bodies never end, on many connections."""
    before = running.memory
    body = bytes(15 * MEGABYTE)
    connections = []
    for _ in range(24):
        connection = node._transport._connect()
        connection.timeout = 10
        connection.putrequest("POST", "/v1/fleet/push-object")
        for name, value in node._transport._signed_headers().items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(len(body) + 1))
        connection.endheaders()
        with suppress(OSError):
            connection.send(body)
        connections.append(connection)
    time.sleep(0.5)
    assert running.memory - before < ROOM
    for connection in connections:
        connection.close()
    running.goes_on()


def test_an_array_has_the_bytes_that_came(running):
    """Its chunk comes once, and its body names it 2,000 times."""
    node = running.hostile("repeater")
    node.send(roll_call_answer(node.asked(), "repeater", node.number), 0.0)
    question = node.asked()
    reply = as_it_came(question)
    data = os.urandom(200_000)
    (record,) = (value for value in reply.content.values() if isinstance(value, ArrayRecord))
    for name in record:
        record[name] = Array("uint8", (len(data),), "safetensors", data)
    tree, contents = objects_of(reply)
    contents = replaced(contents, b'"arraychunk_ids": [0]', b"%b" % repeated(2000))
    root = next(reversed(contents))
    tree = tree_of(contents, root)
    assert all(node.push_all(reply, tree, contents))
    running.server.line("repeater.*more bytes than a reply may have")
    node.leave()
    running.goes_on()


def repeated(times: int) -> bytes:
    """An array's body that names its first chunk so many times."""
    return b'"arraychunk_ids": [' + b", ".join([b"0"] * times) + b"]"


def replaced(contents: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    """Objects, children first, with one body changed and all parents made to fit."""
    ids: dict[bytes, bytes] = {}
    changed: dict[str, bytes] = {}
    for object_id, content in contents.items():
        for before, after in ids.items():
            content = content.replace(before, after)
        if old in content:
            head, _, body = content.partition(HEAD_BODY_DIVIDER)
            body = body.replace(old, new)
            kind, children, _ = head.split(b" ")
            head = b" ".join([kind, children, b"%d" % len(body)])
            content = head + HEAD_BODY_DIVIDER + body
        changed_id = hashlib.sha256(content).hexdigest()
        ids[object_id.encode()] = changed_id.encode()
        changed[changed_id] = content
    return changed


def tree_of(contents: dict[str, bytes], root: str) -> ObjectTree:
    """The tree that the objects' own heads give."""
    children = get_object_children_ids_from_object_content(contents[root])
    return ObjectTree(object_id=root, children=[tree_of(contents, child) for child in children])
