"""Trees of objects, and objects, that are no reply: functions that announce and push them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree

from mlx_fed.flower.transport import RequestRefused, Unreachable

from ..running import HostileNode, as_it_came, made, objects_of, replaced, tree_of

Objects = tuple[ObjectTree, dict[str, bytes]]
"""A tree that is announced, and objects by id."""
Send = Callable[[HostileNode, Message], None]


def empty_reply(question: Message) -> Message:
    """A reply without content."""
    return Message(RecordDict(), reply_to=question)


def deep(levels: int) -> Objects:
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


def doubling(levels: int) -> Objects:
    """Objects that each name the next one twice."""
    objects = [made([], body=os.urandom(8))]
    tree = ObjectTree(object_id=objects[0][0])
    for _ in range(levels):
        child = objects[-1][0]
        objects.append(made([child, child]))
        twice = [tree, ObjectTree(object_id=child)]
        tree = ObjectTree(object_id=objects[-1][0], children=twice)
    return tree, dict(objects)


def ladder(levels: int) -> Objects:
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


def hidden(levels: int) -> Objects:
    """A chain that is announced as objects beside each other, so that only their heads are deep."""
    _, objects = deep(levels)
    *below, root = objects
    return ObjectTree(object_id=root, children=[ObjectTree(object_id=x) for x in below]), objects


def wide(count: int) -> Objects:
    """So many objects below one."""
    ids = [os.urandom(32).hex() for _ in range(count)]
    root, content = made(ids, "Message")
    return ObjectTree(object_id=root, children=[ObjectTree(object_id=x) for x in ids]), {
        root: content
    }


def objects(make: Callable[[], Objects]) -> Send:
    """Announces these objects as a reply, and pushes them."""

    def send(node: HostileNode, question: Message) -> None:
        tree, contents = make()
        with suppress(RequestRefused, Unreachable):
            node.push_all(empty_reply(question), tree, contents)

    return send


def announced(change: Callable[[ObjectTree], ObjectTree | None]) -> Send:
    """Announces a good reply with another tree, and pushes its objects."""

    def send(node: HostileNode, question: Message) -> None:
        reply = as_it_came(question)
        tree, contents = objects_of(reply)
        with suppress(RequestRefused, Unreachable):
            node.push_all(reply, change(tree) or tree, contents)

    return send


def with_bytes(old: bytes, new: bytes) -> Send:
    """Pushes a good reply with other bytes in an object's body, and ids that fit."""

    def send(node: HostileNode, question: Message) -> None:
        reply = as_it_came(question)
        _, contents = objects_of(reply)
        contents = replaced(contents, old, new)
        root = [*contents][-1]
        with suppress(RequestRefused, Unreachable):
            node.push_all(reply, tree_of(contents, root), contents)

    return send


def pushed(change: Callable[[str, bytes], tuple[str, bytes]]) -> Send:
    """Announces a good reply, and pushes other objects than were announced."""

    def send(node: HostileNode, question: Message) -> None:
        reply = as_it_came(question)
        tree, contents = objects_of(reply)
        response = node.announce(reply, tree)
        for object_id, content in contents.items():
            with suppress(RequestRefused, Unreachable):
                node.push(response.session_id, *change(object_id, content))

    return send


def requested(change: Callable[[fleet_pb2.PushMessagesRequest, Message], None]) -> Send:
    """Announces a good reply by a request that is changed."""

    def send(node: HostileNode, question: Message) -> None:
        reply = as_it_came(question)
        tree, _ = objects_of(reply)
        reply.metadata.__dict__["_message_id"] = tree.object_id
        request = fleet_pb2.PushMessagesRequest(
            node=node._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
        )
        change(request, question)
        with suppress(RequestRefused, Unreachable):
            node._transport.PushMessages(request)

    return send


def _taking(children: Callable[[Message], ObjectTree]) -> Send:
    """Announces something of the server's as a part of the reply."""

    def send(node: HostileNode, question: Message) -> None:
        tree = children(question)
        root, content = made([tree.object_id], "Message")
        whole = ObjectTree(object_id=root, children=[tree])
        with suppress(RequestRefused, Unreachable):
            node.push_all(empty_reply(question), whole, {root: content})

    return send


def _arrays(question: Message) -> ArrayRecord:
    return next(value for value in question.content.values() if isinstance(value, ArrayRecord))


def _renamed(new: str) -> Callable[[ObjectTree], None]:
    def change(tree: ObjectTree) -> None:
        tree.children[0].object_id = new

    return change


def _twice(tree: ObjectTree) -> None:
    tree.children.append(tree.children[0])


def _itself(tree: ObjectTree) -> None:
    tree.children.append(ObjectTree(object_id=tree.object_id))


def _childless(tree: ObjectTree) -> ObjectTree:
    return ObjectTree(object_id=tree.object_id)


def _more(tree: ObjectTree) -> None:
    tree.children.append(ObjectTree(object_id=os.urandom(32).hex()))


def _other_root(tree: ObjectTree) -> ObjectTree:
    return tree.children[0]


def _again(node: HostileNode, question: Message) -> None:
    for body in (b"a", b"b"):
        root, _ = made([], "Message", body + os.urandom(8))
        with suppress(RequestRefused, Unreachable):
            node.announce(empty_reply(question), ObjectTree(object_id=root))


def _nobodys(node: HostileNode, question: Message) -> None:
    object_id, content = made([], body=os.urandom(2**20))
    for session in (question.metadata.message_id, "", "0" * 64, "x" * 10_000):
        assert not node.push(session, object_id, content)


ACTS: dict[str, Send] = {
    "deep": objects(lambda: deep(1500)),
    "doubling": objects(lambda: doubling(40)),
    "a ladder": objects(lambda: ladder(35)),
    "hidden depth": objects(lambda: hidden(1500)),
    "nine levels": objects(lambda: deep(9)),
    "50,001 objects": objects(lambda: wide(50_001)),
    "10,000 objects that never come": objects(lambda: wide(10_000)),
    "a single chunk": objects(lambda: (ObjectTree(object_id=made([])[0]), dict([made([])]))),
    "an unknown kind": objects(
        lambda: (ObjectTree(object_id=made([], "Code")[0]), dict([made([], "Code", b"x")]))
    ),
    "an id of no hash": announced(_renamed("x" * 64)),
    "an empty id": announced(_renamed("")),
    "an id in capitals": announced(_renamed("A" * 64)),
    "an id that is a path": announced(_renamed("../../../../etc/passwd")),
    "an id of a megabyte": announced(_renamed("a" * 2**20)),
    "a child named twice": announced(_twice),
    "itself as a child": announced(_itself),
    "no children": announced(_childless),
    "a child that never comes": announced(_more),
    "another root": announced(_other_root),
    "an empty tree": announced(lambda tree: ObjectTree()),
    "another tree afterwards": _again,
    "objects of no reply": _nobodys,
    "bytes of another hash": pushed(lambda key, content: (key, content + b"x")),
    "bytes without a head": pushed(lambda key, content: (key, content[10:])),
    "no bytes": pushed(lambda key, content: (key, b"")),
    "another id": pushed(lambda key, content: (os.urandom(32).hex(), content)),
    "17 MB": pushed(lambda key, content: (key, bytes(17 * 2**20))),
    "a chunk that there is not": with_bytes(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [7]'),
    "a chunk below 0": with_bytes(b'"arraychunk_ids": [0]', b'"arraychunk_ids": [-9]'),
    "chunks that are texts": with_bytes(b'"arraychunk_ids": [0]', b'"arraychunk_ids": ["0"]'),
    "no chunks": with_bytes(b'"arraychunk_ids": [0]', b'"arraychunk_ids": []'),
    "a chunk 2,000 times": with_bytes(
        b'"arraychunk_ids": [0]', b'"arraychunk_ids": [' + b"0, " * 1999 + b"0]"
    ),
    "an array that is no JSON": with_bytes(b'{"dtype"', b'{"dtype'),
    "an array without a shape": with_bytes(b'"shape"', b'"shapf"'),
    "a record without its array": with_bytes(b'"shard-00001-of-00001"', b'"shard'),
    "the model's record": _taking(lambda question: get_object_tree(_arrays(question))),
    "the model's record without children": _taking(
        lambda question: ObjectTree(object_id=_arrays(question).object_id)
    ),
    "the question": _taking(lambda q: ObjectTree(object_id=q.metadata.message_id)),
    "two messages": requested(
        lambda request, question: request.messages_list.append(request.messages_list[0])
    ),
    "no message": requested(lambda request, question: request.ClearField("messages_list")),
    "no tree": requested(lambda request, question: request.ClearField("message_object_trees")),
    "another sender": requested(
        lambda request, question: setattr(request.messages_list[0].metadata, "src_node_id", 1)
    ),
    "another node": requested(lambda request, question: setattr(request.node, "node_id", 1)),
}
