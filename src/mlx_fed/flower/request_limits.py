"""How much a node may send in one request, and for how long.

A body is bounded by what its route is for, before it is read; what it announces is bounded before
anything is kept of it.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from flwr.proto.message_pb2 import PullObjectResponse

from . import headers as ours

_LARGEST = {"push-object": 16 * 2**20, "push-messages": 8 * 2**20}
_OTHERS = 64 * 2**10
"""Bytes of a body, by route."""
_SLOWEST = 16 * 2**10
"""Bytes a second, below which a body has not come in time."""
_PATIENCE = 30.0
"""Seconds beyond that for any body."""
_AT_ONCE = 64 * 2**20
"""Bytes of bodies that one node may be sending at a time."""
MOST_OBJECTS = 50_000
"""Objects of a message."""
_LONGEST_HEARTBEAT = 60.0
OBJECT_ID = re.compile(r"[0-9a-f]{64}")
_BYTES = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


class Bodies:
    """Reads the bodies of requests, within bounds."""

    def __init__(self) -> None:
        self._arriving: Counter[bytes] = Counter()

    async def read(
        self,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        headers: dict[str, str],
        route: str,
        key: bytes,
    ) -> bytes:
        """A request's body.

        Args:
            receive (callable): Gives its parts.
            headers (dict): The request's headers.
            route (str): What it is for.
            key (bytes): Whose it is.

        Raises:
            HTTPException: If it is too large, before it is read where it says so, or too slow, or
                its node is sending too much at a time.
        """
        largest = _LARGEST.get(route, _OTHERS)
        if int(headers.get("content-length", 0)) > largest:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request body too large")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_PATIENCE + largest / _SLOWEST):
                async for part in _parts(receive):
                    parts.append(part)
                    size += len(part)
                    self._arriving[key] += len(part)
                    if size > largest:
                        why = "Request body too large"
                        raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
                    if self._arriving[key] > _AT_ONCE:
                        why = "Too many requests at a time"
                        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, why)
        except TimeoutError:
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "Request body too slow") from None
        finally:
            self._arriving[key] -= size
            if not self._arriving[key]:
                del self._arriving[key]
        return b"".join(parts) if len(parts) > 1 else parts[0]


async def _parts(receive: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytes]:
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Incomplete request")
        yield event.get("body", b"")
        if not event.get("more_body"):
            return


def cut(response: PullObjectResponse, headers: dict[str, str]) -> None:
    """Leaves of an object the bytes that were asked for."""
    if found := _BYTES.fullmatch(headers.get(ours.BYTES, "")):
        start, end = map(int, found.groups())
        if start > 0 or end < len(response.object_content):
            response.object_content = response.object_content[start:end]


def shorten_heartbeat(request: Any) -> None:
    """A node that promises to be silent for half an hour would count as there for an hour."""
    interval = getattr(request, "heartbeat_interval", 0.0)
    if interval > _LONGEST_HEARTBEAT:
        request.heartbeat_interval = _LONGEST_HEARTBEAT
