"""The Fleet API of a federation's server, and nothing else: a small ASGI app.

The handlers, the authentication and the errors are Flower's own; what is left out is the web
framework around them, which costs several milliseconds a request. Two additions are opt-in by
header and unknown to a stock SuperNode: a node may wait for work (long poll), and is told when
the run is over.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from logging import getLogger
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto import fleet_pb2, message_pb2
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError

from . import headers as ours
from .link import Link

_SIGNED = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_PREFIX = "/v1/fleet/"
_MAX_BODY = 16 * 2**20
_INLINE_BODY = 64 * 2**10
_MAX_WAIT = 25.0
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = getLogger("mlx_fed")


class FleetRoutes:
    """The ASGI app: the Fleet API over a :class:`Link`."""

    def __init__(self, link: Link):
        self.link = link
        self._handlers = _handlers(link)
        self._app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=link.factory))
        self._verified: dict[tuple[str, ...], Any] = {}
        self._unsent: dict[str, tuple[str, set[str]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.link.loop = asyncio.get_running_loop()
        status, body, kind = await self._answer(scope, receive)
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        if self.link.finished:
            headers.append((ours.RUN.encode(), b"finished"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, str]:
        try:
            response = await self._call(scope, receive)
            return HTTPStatus.OK, response.SerializeToString(), PROTOBUF_MEDIA_TYPE
        except FlowerError as error:
            rule = API_ERROR_MAP[error.code]
            return rule.http_status_code, *_json(error.to_json(rule.public_message))
        except HTTPException as error:
            return error.status_code, *_json({"detail": error.detail})
        except Exception as error:
            # What a request made of itself is shown as a literal: it may hold control characters.
            log.warning("%s: %r", scope["path"], error)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            return status, *_json({"detail": "Internal server error."})

    async def _call(self, scope: Scope, receive: Receive) -> Any:
        path = scope["path"]
        handler = self._handlers.get(path) if scope["method"] == "POST" else None
        if handler is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "Not Found")
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != PROTOBUF_MEDIA_TYPE:
            raise FlowerError(ApiErrorCode.UNSUPPORTED_CONTENT_TYPE, f"{media_type!r}")
        body = await _read(receive, headers)
        request = PROTOBUF_REQUEST_TYPES["POST", path]()
        try:
            request.ParseFromString(body)
        except DecodeError as error:
            raise FlowerError(ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, str(error)) from error
        self._authenticate(headers, request)
        if getattr(request, "run_id", self.link.run_id) != self.link.run_id:
            raise HTTPException(HTTPStatus.FORBIDDEN, "Another run")
        if isinstance(request, fleet_pb2.PushMessagesRequest):
            _check_reply(request, self.link.run_id)
        if path.endswith("/pull-messages"):
            return await self._pull(request, handler, headers, receive)
        if path.endswith("/send-node-heartbeat"):
            response = handler(request)
            if wait := _seconds_to_wait(headers):
                await self._stays(request.node.node_id, receive, self.link.over, wait)
            return response
        if len(body) > _INLINE_BODY:
            loop = asyncio.get_running_loop()
            response = await loop.run_in_executor(None, handler, request)
        else:
            response = handler(request)
        self._take_note(request, response)
        return response

    def _authenticate(self, headers: dict[str, str], request: Any) -> None:
        """Flower's check of a signed timestamp; a signature seen before is not computed again.

        Its age and the node it may speak for are checked on every request.
        """
        signed = tuple(headers.get(name, "") for name in _SIGNED)
        node_id = getattr(getattr(request, "node", None), "node_id", None)
        if node_id is not None and self._verified.get(signed) == node_id:
            return
        authenticate_node(
            SimpleNamespace(  # type: ignore[arg-type]  # the parts of a Request that it reads
                headers=headers,
                app=self._app,
                state=SimpleNamespace(protobuf_request=request),
            )
        )
        if node_id is not None:
            self._remember(signed, node_id)

    def _remember(self, signed: tuple[str, ...], node_id: int) -> None:
        self._verified[signed] = node_id
        # Nodes reuse a signature for seconds; well before Flower would call it too old it goes.
        asyncio.get_running_loop().call_later(60.0, self._verified.pop, signed, None)

    async def _pull(
        self, request: Any, handler: Callable, headers: dict[str, str], receive: Receive
    ) -> Any:
        """Messages for a node, waited for where the node is ready to wait."""
        node_id = request.node.node_id
        now = asyncio.get_running_loop().time
        wait = _seconds_to_wait(headers)
        deadline = now() + wait
        work = self.link.work_for(node_id)
        if wait:
            self.link.deliver_again(node_id)
        while True:
            work.clear()
            response = handler(request)
            left = deadline - now()
            if response.messages_list or self.link.finished or left <= 0:
                return response
            if not await self._stays(node_id, receive, work, left):
                return response

    async def _stays(
        self, node_id: int, receive: Receive, news: asyncio.Event, seconds: float
    ) -> bool:
        """Waits for news, and returns whether the connection is still there."""
        self.link.hold(node_id)
        gone = asyncio.ensure_future(_disconnected(receive))
        waiting = asyncio.ensure_future(news.wait())
        await asyncio.wait({gone, waiting}, timeout=seconds, return_when="FIRST_COMPLETED")
        left = gone.done()
        gone.cancel()
        waiting.cancel()
        self.link.let_go(node_id, broken=left)
        return not left

    def _take_note(self, request: Any, response: Any) -> None:
        """Keeps track of which replies have all their objects, and tells the grid."""
        if isinstance(request, fleet_pb2.PushMessagesRequest):
            (reply,) = request.messages_list
            if not self.link.is_stored(reply):  # it came too late, or it is a second one
                return
            replied_to = reply.metadata.reply_to_message_id
            missing = set(response.objects_to_push)
            if missing:
                self._unsent[response.session_id] = (replied_to, missing)
            else:
                self._complete(replied_to)
        elif isinstance(request, message_pb2.PushObjectRequest) and response.stored:
            replied_to, missing = self._unsent.get(request.session_id, ("", set()))
            missing.discard(request.object_id)
            if replied_to and not missing:
                del self._unsent[request.session_id]
                self._complete(replied_to)
        elif isinstance(request, (fleet_pb2.ActivateNodeRequest, fleet_pb2.DeactivateNodeRequest)):
            self.link.tell_grid()

    def _complete(self, message_id: str) -> None:
        self.link.complete.add(message_id)
        self.link.tell_grid()


def _handlers(link: Link) -> dict[str, Callable[[Any], Any]]:
    """Flower's handlers by path, with the state that each one asks for."""
    state, store = link.state, link.state.object_store

    def register(request: Any) -> Any:
        return fleet_handlers.register_node(request, state, enable_supernode_auth=False)

    def unregister(request: Any) -> Any:
        return fleet_handlers.unregister_node(request, state, enable_supernode_auth=False)

    return {
        _PREFIX + "register-node": register,
        _PREFIX + "activate-node": lambda r: fleet_handlers.activate_node(r, state),
        _PREFIX + "deactivate-node": lambda r: fleet_handlers.deactivate_node(r, state),
        _PREFIX + "unregister-node": unregister,
        _PREFIX + "send-node-heartbeat": lambda r: fleet_handlers.send_node_heartbeat(r, state),
        _PREFIX + "pull-messages": lambda r: fleet_handlers.pull_messages(r, state, store),
        _PREFIX + "push-messages": lambda r: fleet_handlers.push_messages(r, state),
        _PREFIX + "get-run": lambda r: fleet_handlers.get_run(r, state),
        _PREFIX + "get-fab": lambda r: fleet_handlers.get_fab(r, state),
        _PREFIX + "push-object": lambda r: fleet_handlers.push_object(r, state),
        _PREFIX + "pull-object": lambda r: fleet_handlers.pull_object(r, state),
        _PREFIX + "confirm-message-received": lambda r: fleet_handlers.confirm_message_received(
            r, state, store
        ),
    }


def _check_reply(request: fleet_pb2.PushMessagesRequest, run_id: int) -> None:
    """Nodes send one reply at a time, of their own: Flower's handler would take any sender's."""
    trees, replies = request.message_object_trees, request.messages_list
    if len(replies) != 1 or len(trees) != 1:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "One message and its object tree")
    metadata = replies[0].metadata
    if metadata.src_node_id != request.node.node_id or not metadata.reply_to_message_id:
        raise HTTPException(HTTPStatus.FORBIDDEN, "Not a reply of this node")
    if metadata.run_id != run_id:
        raise HTTPException(HTTPStatus.FORBIDDEN, "Another run")
    if trees[0].object_id != metadata.message_id:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the message's object tree")


def _seconds_to_wait(headers: dict[str, str]) -> float:
    seconds = headers.get(ours.WAIT, "")
    return min(float(seconds), _MAX_WAIT) if seconds.replace(".", "", 1).isdigit() else 0.0


async def _read(receive: Receive, headers: dict[str, str]) -> bytes:
    """The request's body, refused before it is read if it is too large."""
    too_large = HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request body too large")
    if int(headers.get("content-length", 0)) > _MAX_BODY:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise HTTPException(HTTPStatus.BAD_REQUEST, "Incomplete request")
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY:
            raise too_large
        if not event.get("more_body"):
            return b"".join(parts) if len(parts) > 1 else parts[0]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(payload: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(payload).encode(), "application/json"
