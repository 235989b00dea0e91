"""What a node announces and pushes costs at most its own reply: the run goes on, whatever it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_object_tree,
)

from mlx_fed.flower.transport import RequestRefused

from .acts.object_trees import deep, doubling, empty_reply, hidden, ladder
from .running import (
    HostileNode,
    Running,
    as_it_came,
    made,
    objects_of,
    replaced,
    roll_call_answer,
    tree_of,
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
