"""The Fleet API of a federation's server as an ASGI app, without a web framework.

A framework costs several milliseconds a request. Additions to Flower's protocol are opt-in by
header, and a stock SuperNode does not know them: long polls, the run's outcome, an invitation.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from itertools import pairwise
from logging import getLogger
from typing import Any

from fastapi import HTTPException
from flwr.proto import message_pb2
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from google.protobuf.message import DecodeError

from . import headers as ours
from . import request_limits
from .allowlist import AccessDenied
from .authentication import NodeAuthentication
from .connections import AUTHENTICATED
from .fleet_handlers import HANDLERS, PREFIX
from .link_state import Link

_INLINE_BODY = 64 * 2**10
"""Bytes of a body up to which a handler runs on the event loop."""
_MAX_WAIT = 25.0
_BLOCK = 2**18
_BODY_UNREAD = (400, 401, 404, 408, 413, 415, 503)
"""Statuses with which the body may be unread, so that the connection cannot be used again."""
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = getLogger("mlx_fed")


class FleetRoutes:
    """The ASGI app of the Fleet API.

    Args:
        link (Link): The state. With an allowlist only the nodes on it are served; without one any
            node may register.
    """

    def __init__(self, link: Link):
        self.link = link
        self._authentication = NodeAuthentication(link)
        self._bodies = request_limits.BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.link.loop = asyncio.get_running_loop()
        status, body, media_type = await self._respond(scope, receive)
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        if status in _BODY_UNREAD:
            headers.append((b"connection", b"close"))
        if self.link.outcome:
            headers.append((ours.RUN.encode(), self.link.outcome.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        # Each block waits until the connection has taken those before it: the time after which an
        # idle connection is closed starts with the last.
        ends = [*range(_BLOCK, len(body), _BLOCK), len(body)]
        for start, end in pairwise([0, *ends]):
            block, more_body = memoryview(body)[start:end], end < len(body)
            await send({"type": "http.response.body", "body": block, "more_body": more_body})

    async def _respond(self, scope: Scope, receive: Receive) -> tuple[int, bytes, str]:
        """Status, body and media type of the response, of errors as well."""
        try:
            response = await self._handle(scope, receive)
            return HTTPStatus.OK, response.SerializeToString(), ours.PROTOBUF
        except FlowerError as error:
            rule = API_ERROR_MAP[error.code]
            return rule.http_status_code, *_json(error.to_json(rule.public_message))
        except HTTPException as error:
            return error.status_code, *_json({"detail": error.detail})
        except AccessDenied as error:
            return HTTPStatus.UNAUTHORIZED, *_json({"detail": str(error), "code": error.code})
        except asyncio.CancelledError:  # the server ends; uvicorn would show a traceback
            return HTTPStatus.SERVICE_UNAVAILABLE, *_json({"detail": "The server ends."})
        except Exception as error:
            # As a literal, since text from a request may have control characters.
            log.warning("%s: %.500r", scope["path"], error)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            return status, *_json({"detail": "Internal server error."})

    async def _handle(self, scope: Scope, receive: Receive) -> Any:
        """The response to one request: authentication, body, sender, handler, in this order."""
        path = scope["path"]
        if scope["method"] != "POST" or path not in HANDLERS:
            raise HTTPException(HTTPStatus.NOT_FOUND, "Not Found")
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != ours.PROTOBUF:
            raise FlowerError(ApiErrorCode.UNSUPPORTED_CONTENT_TYPE, f"{media_type!r}")
        key = self._authentication.authenticate(headers)
        self._authentication.authorize(key, path, headers)

        body = await self._bodies.read(receive, headers, path.removeprefix(PREFIX), key)
        request_type, handler = HANDLERS[path]
        request = request_type()
        try:
            request.ParseFromString(body)
        except DecodeError as error:
            raise FlowerError(ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, str(error)) from error

        self._authentication.check_sender(key, request)
        if connection := scope.get("extensions", {}).get(AUTHENTICATED):
            connection["by"](key)
        if getattr(request, "run_id", self.link.run_id) != self.link.run_id:
            raise HTTPException(HTTPStatus.FORBIDDEN, "Another run")
        request_limits.shorten_heartbeat(request)

        if path.endswith("/pull-messages"):
            return await self._pull_messages(request, handler, headers, receive)
        if path.endswith("/send-node-heartbeat"):
            response = handler(self.link, request)
            if wait := _wait_seconds(headers):
                await self._long_poll(request.node.node_id, receive, self.link.run_end, wait)
            return response
        if len(body) > _INLINE_BODY:
            loop = asyncio.get_running_loop()
            response = await loop.run_in_executor(None, handler, self.link, request)
        else:
            response = handler(self.link, request)
        if isinstance(request, message_pb2.PullObjectRequest):
            request_limits.cut_object(response, headers)
            self.link.bytes_sent += len(response.object_content)
        return response

    async def _pull_messages(
        self, request: Any, handler: Callable, headers: dict[str, str], receive: Receive
    ) -> Any:
        """A message for the node, at once or by a long poll."""
        node_id = request.node.node_id
        clock = asyncio.get_running_loop().time
        wait = _wait_seconds(headers)
        deadline = clock() + wait
        event = self.link.message_event(node_id)
        if wait:
            self.link.redeliver(node_id)
        while True:
            event.clear()
            response = handler(self.link, request)
            timeout = deadline - clock()
            if response.messages_list or self.link.run_end.is_set() or timeout <= 0:
                return response
            if not await self._long_poll(node_id, receive, event, timeout):
                return response
            self.link.require_listed(node_id)

    async def _long_poll(
        self, node_id: int, receive: Receive, event: asyncio.Event, timeout: float
    ) -> bool:
        """Waits for an event; returns whether the connection is still open."""
        self.link.begin_poll(node_id)
        disconnect = asyncio.ensure_future(_disconnect(receive))
        signal = asyncio.ensure_future(event.wait())
        await asyncio.wait({disconnect, signal}, timeout=timeout, return_when="FIRST_COMPLETED")
        is_open = not disconnect.done()
        disconnect.cancel()
        signal.cancel()
        self.link.end_poll(node_id, is_open)
        return is_open


def _wait_seconds(headers: dict[str, str]) -> float:
    try:
        seconds = float(headers.get(ours.WAIT, 0))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _MAX_WAIT) if math.isfinite(seconds) else 0.0


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(payload: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(payload).encode(), "application/json"
