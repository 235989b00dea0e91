"""How much a node may send in one request, and for how long.

A body is bounded by what its route is for, before it is read; what it announces is bounded before
anything is kept of it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from . import headers as ours

_LARGEST = {"push-object": 16 * 2**20, "push-messages": 8 * 2**20}
_OTHERS = 64 * 2**10
"""Bytes of a body, by route."""
_SLOWEST = 16 * 2**10
"""Bytes a second, below which a body has not come in time."""
_PATIENCE = 30.0
"""Seconds beyond that for any body."""
_MOST_OBJECTS = 50_000
_LONGEST_HEARTBEAT = 60.0
_OBJECT_ID = re.compile(r"[0-9a-f]{64}")
_BYTES = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


async def read(
    receive: Callable[[], Awaitable[dict[str, Any]]], headers: dict[str, str], route: str
) -> bytes:
    """A request's body.

    Raises:
        HTTPException: If it is too large, before it is read where it says so, or too slow.
    """
    largest = _LARGEST.get(route, _OTHERS)
    if int(headers.get("content-length", 0)) > largest:
        raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request body too large")
    try:
        async with asyncio.timeout(_PATIENCE + largest / _SLOWEST):
            return await _read(receive, largest)
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "Request body too slow") from None


async def _read(receive: Callable[[], Awaitable[dict[str, Any]]], largest: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Incomplete request")
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > largest:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request body too large")
        if not event.get("more_body"):
            return b"".join(parts) if len(parts) > 1 else parts[0]


def cut(response: PullObjectResponse, headers: dict[str, str]) -> None:
    """Leaves of an object the bytes that were asked for."""
    if found := _BYTES.fullmatch(headers.get(ours.BYTES, "")):
        start, end = map(int, found.groups())
        if start > 0 or end < len(response.object_content):
            response.object_content = response.object_content[start:end]


def check_tree(tree: ObjectTree) -> None:
    """Refuses more objects than any message of ours has, and names that no object has.

    Raises:
        HTTPException: Saying which.
    """
    for count, each in enumerate(iterate_object_tree(tree), 1):
        if count > _MOST_OBJECTS:
            why = f"More than {_MOST_OBJECTS} objects in a message"
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        if not _OBJECT_ID.fullmatch(each.object_id):
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the id of an object")


def shorten_heartbeat(request: Any) -> None:
    """A node that promises to be silent for half an hour would count as there for an hour."""
    interval = getattr(request, "heartbeat_interval", 0.0)
    if interval > _LONGEST_HEARTBEAT:
        request.heartbeat_interval = _LONGEST_HEARTBEAT
