"""Replies of nodes while their objects arrive.

A node announces a reply by the tree of its objects, which is final. Each reply stores its own
objects: nothing is shared with the server's messages or other replies, so that a node can change or
delete neither, and all objects are freed with their reply.
"""

from __future__ import annotations

import threading
import time
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
from .request_limits import MAX_OBJECTS, OBJECT_ID

_MAX_DEPTH = 8
"""Levels of an object tree. Flower's messages have 5: message, records, record, array, chunk."""

Children = Mapping[str, frozenset[str]]
"""The children of each object of a message, by id."""


def children_in(tree: ObjectTree) -> Children:
    """The children of each object in a tree; an object that occurs twice has the same ones.

    Raises:
        HTTPException: If the tree is too deep or too large, has an id that is not a SHA-256, or two
            sets of children of one object.
    """
    children: dict[str, frozenset[str]] = {}
    level, count = [tree], 1
    for _ in range(_MAX_DEPTH):
        for node in level:
            ids = frozenset(child.object_id for child in node.children)
            if not OBJECT_ID.fullmatch(node.object_id):
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the id of an object")
            if len(ids) < len(node.children) or children.setdefault(node.object_id, ids) != ids:
                raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the tree of an object")
        level = [child for node in level for child in node.children]
        count += len(level)
        if count > MAX_OBJECTS:
            why = f"More than {MAX_OBJECTS} objects in a message"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        if not level:
            return children
    raise HTTPException(HTTPStatus.BAD_REQUEST, f"An object tree of more than {_MAX_DEPTH} levels")


class IncomingReply:
    """A node's reply to one message.

    Args:
        node_id (int): The node's id.
        object_id (str): The id of the reply itself, which is one of its objects.
        children (dict): The children of each object.

    Attributes:
        missing (set): Ids of the objects that have not arrived yet.
        last_piece (float): Monotonic time at which it was announced, or its last object arrived.
    """

    def __init__(self, node_id: int, object_id: str, children: Children):
        self.node_id, self.object_id, self.children = node_id, object_id, children
        self.missing = set(children)
        self.last_piece = time.monotonic()
        self._contents: dict[str, SpooledBytes | bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def is_complete(self) -> bool:
        """Whether all objects have arrived."""
        return not self.missing

    def put(self, object_id: str, content: bytes, spool: Spool, limit: int) -> bool:
        """Stores an object's bytes if their hash is its id and their children are in the tree.

        Args:
            object_id (str): Its id.
            content (bytes): Its bytes.
            spool (Spool): Storage of large objects.
            limit (int): Bytes that the objects of the reply may have in all.

        Returns:
            bool: Whether they were stored: not if they are wrong, or there already.

        Raises:
            HTTPException: If the reply becomes too large.
        """
        if object_id not in self.missing or not self._is_valid(object_id, content):
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
            self.last_piece = time.monotonic()
        return True

    def _is_valid(self, object_id: str, content: bytes) -> bool:
        if get_object_id(content) != object_id:
            return False
        try:
            validate_object_content(content)
            children = get_object_children_ids_from_object_content(content)
        except (ValueError, UnexpectedObjectContentError):
            return False
        return len(children) == len(set(children)) and self.children[object_id] == set(children)

    def inflate(self, limit: int) -> Any:
        """The reply as a message, without a copy of its arrays.

        Args:
            limit (int): Bytes that its arrays may have in all.
        """
        return inflate(self.object_id, self._contents, limit)
