"""Limits on requests by route: bytes and time of a body, objects of a message, heartbeats."""

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

_MAX_BODY = {"push-object": 16 * 2**20, "push-messages": 8 * 2**20}
_MAX_OTHER_BODY = 64 * 2**10
"""Bytes of a body, by route."""
_MIN_SPEED = 16 * 2**10
"""Bytes a second of a body."""
_BODY_TIMEOUT = 30.0
"""Seconds beyond that for any body."""
_MAX_OF_NODE = 64 * 2**20
"""Bytes of the unfinished bodies of one node."""
MAX_OBJECTS = 50_000
"""Objects of a message."""
_MAX_HEARTBEAT_INTERVAL = 60.0
OBJECT_ID = re.compile(r"[0-9a-f]{64}")
_BYTE_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


class BodyReader:
    """Reads the bodies of requests within the limits."""

    def __init__(self) -> None:
        self._pending: Counter[bytes] = Counter()

    async def read(
        self,
        receive: Callable[[], Awaitable[dict[str, Any]]],
        headers: dict[str, str],
        route: str,
        key: bytes,
    ) -> bytes:
        """A request's body.

        Args:
            receive (callable): ASGI's, for the parts of the body.
            headers (dict): The request's headers.
            route (str): The last part of its path.
            key (bytes): The node's public key.

        Raises:
            HTTPException: If it is too large (before it is read, where its length is known), too
                slow, or one of too many at a time.
        """
        max_size = _MAX_BODY.get(route, _MAX_OTHER_BODY)
        if int(headers.get("content-length", 0)) > max_size:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request body too large")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_TIMEOUT + max_size / _MIN_SPEED):
                async for chunk in _chunks(receive):
                    chunks.append(chunk)
                    size += len(chunk)
                    self._pending[key] += len(chunk)
                    if size > max_size:
                        why = "Request body too large"
                        raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
                    if self._pending[key] > _MAX_OF_NODE:
                        why = "Too many requests at a time"
                        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, why)
        except TimeoutError:
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "Request body too slow") from None
        finally:
            self._pending[key] -= size
            if not self._pending[key]:
                del self._pending[key]
        return b"".join(chunks) if len(chunks) > 1 else chunks[0]


async def _chunks(receive: Callable[[], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytes]:
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Incomplete request")
        yield event.get("body", b"")
        if not event.get("more_body"):
            return


def cut_object(response: PullObjectResponse, headers: dict[str, str]) -> None:
    """Cuts the object in a response to the byte range of the request, if it has one."""
    if match := _BYTE_RANGE.fullmatch(headers.get(ours.BYTES, "")):
        start, end = map(int, match.groups())
        if start > 0 or end < len(response.object_content):
            response.object_content = response.object_content[start:end]


def shorten_heartbeat(request: Any) -> None:
    """Limits the interval that a node announces: it counts as online for twice as long."""
    interval = getattr(request, "heartbeat_interval", 0.0)
    if interval > _MAX_HEARTBEAT_INTERVAL:
        request.heartbeat_interval = _MAX_HEARTBEAT_INTERVAL
