"""Replies while their objects arrive: what a node announced, and what it has sent of it.

A reply is announced by the tree of the objects that it is made of, and the tree does not change any
more. Each reply holds its objects by itself. Nothing is shared with the server's messages or with
another node's reply, so what a node announces or sends can change or delete neither, and all of a
reply is freed with it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_object_children_ids_from_object_content,
    get_object_id,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content

from ..arrays.flower_records import SpooledBytes
from ..arrays.spool import Spool
from .deserialize import inflate
from .request_limits import MOST_OBJECTS, OBJECT_ID

_DEEPEST = 8
"""Levels of an object tree. Flower's messages have 5: message, records, record, array, chunk."""

Children = Mapping[str, frozenset[str]]
"""The children of each object of a message, by id."""


def children_in(tree: ObjectTree) -> Children:
    """The objects that a tree names, each with its children.

    An object may stand at several places of a tree, with the same children at each.

    Raises:
        HTTPException: If the tree is too deep or too large, has something else than ids of
            objects, or gives an object two sets of children.
    """
    children: dict[str, frozenset[str]] = {}
    level, count = [tree], 1
    for _ in range(_DEEPEST):
        for node in level:
            ids = frozenset(child.object_id for child in node.children)
            if not OBJECT_ID.fullmatch(node.object_id):
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the id of an object")
            if len(ids) < len(node.children) or children.setdefault(node.object_id, ids) != ids:
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the tree of an object")
        level = [child for node in level for child in node.children]
        count += len(level)
        if count > MOST_OBJECTS:
            why = f"More than {MOST_OBJECTS} objects in a message"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        if not level:
            return children
    raise HTTPException(HTTPStatus.BAD_REQUEST, f"An object tree of more than {_DEEPEST} levels")


class IncomingReply:
    """A node's reply to one message.

    Args:
        node_id (int): The node's id.
        object_id (str): The id of the reply itself, which is one of its objects.
        children (dict): The children of each object.

    Attributes:
        missing (set): Ids of the objects that have not arrived yet.
    """

    def __init__(self, node_id: int, object_id: str, children: Children):
        self.node_id, self.object_id, self.children = node_id, object_id, children
        self.missing = set(children)
        self._contents: dict[str, SpooledBytes | bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        """Whether all objects have arrived."""
        return not self.missing

    def put(self, object_id: str, content: bytes, spool: Spool, limit: int) -> bool:
        """Takes an object's bytes if they are what the id says, and the announced tree.

        Args:
            object_id (str): Its id.
            content (bytes): Its bytes.
            spool (Spool): Where large ones wait.
            limit (int): Bytes that the objects of the reply may have in all.

        Returns:
            bool: Whether they were missing, and are right.

        Raises:
            HTTPException: If the reply becomes too large.
        """
        if object_id not in self.missing or not self._is_right(object_id, content):
            return False
        with self._lock:
            if self._bytes + len(content) > limit:
                why = f"The reply has more than {limit} bytes"
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
            if object_id not in self.missing:
                return False
            head = content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER)
            self._contents[object_id] = spool.put(content, head=head)
            self._bytes += len(content)
            self.missing.remove(object_id)
        return True

    def _is_right(self, object_id: str, content: bytes) -> bool:
        if get_object_id(content) != object_id:
            return False
        try:
            validate_object_content(content)
            children = get_object_children_ids_from_object_content(content)
        except (ValueError, UnexpectedObjectContentError):
            return False
        return len(children) == len(set(children)) and self.children[object_id] == set(children)

    def inflate(self, limit: int) -> Any:
        """The reply; the bytes of its arrays stay where they are.

        Args:
            limit (int): Bytes that its arrays may have in all.
        """
        return inflate(self.object_id, self._contents, limit)
