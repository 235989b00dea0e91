"""The Fleet API of a federation's server, and nothing else: a small ASGI app.

The errors and most handlers are Flower's own; what is left out is the web framework around them,
which costs several milliseconds a request. Replies are taken in by ``incoming``.

Additions are opt-in by header and unknown to a stock SuperNode: a node may wait for work (long
poll), is told when the run is over, and may show an invitation as it registers.

Who is answered at all is settled in ``admission``, from a request's headers.
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
from flwr.common.constant import Status
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.server.superlink.utils import check_abort
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError

from . import headers as ours
from . import request_limits
from .access import SIGNED, Denied
from .admission import Admission
from .incoming_replies import IncomingReply, children_in
from .link_state import Link

_PREFIX = "/v1/fleet/"
_INLINE_BODY = 64 * 2**10
_MAX_WAIT = 25.0
_BLOCK = 2**18
_BODY_LEFT_UNREAD = (400, 401, 404, 408, 413, 415, 503)
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

log = getLogger("mlx_fed")


class FleetRoutes:
    """The ASGI app: the Fleet API over a :class:`Link`.

    Args:
        link (Link): The state. Where it has a door, only nodes which that one knows are answered;
            otherwise any node may register.
    """

    def __init__(self, link: Link):
        self.link = link
        self._handlers = _handlers(link)
        self._admission = Admission(link)
        self._bodies = request_limits.Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.link.loop = asyncio.get_running_loop()
        status, body, kind = await self._answer(scope, receive)
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        if status in _BODY_LEFT_UNREAD:
            headers.append((b"connection", b"close"))
        if self.link.outcome:
            headers.append((ours.RUN.encode(), self.link.outcome.encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        # Each block waits until the connection has taken those before it: a connection is idle,
        # and may be closed, some time after the last was handed over.
        ends = [*range(_BLOCK, len(body), _BLOCK), len(body)]
        for start, end in pairwise([0, *ends]):
            block, more = memoryview(body)[start:end], end < len(body)
            await send({"type": "http.response.body", "body": block, "more_body": more})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, str]:
        try:
            response = await self._call(scope, receive)
            return HTTPStatus.OK, response.SerializeToString(), PROTOBUF_MEDIA_TYPE
        except FlowerError as error:
            rule = API_ERROR_MAP[error.code]
            return rule.http_status_code, *_json(error.to_json(rule.public_message))
        except HTTPException as error:
            return error.status_code, *_json({"detail": error.detail})
        except Denied as error:
            return HTTPStatus.UNAUTHORIZED, *_json({"detail": str(error)})
        except asyncio.CancelledError:  # the server ends; uvicorn would show a traceback
            return HTTPStatus.SERVICE_UNAVAILABLE, *_json({"detail": "The server ends."})
        except Exception as error:
            # What a request made of itself is shown as a literal: it may hold control characters.
            log.warning("%s: %.500r", scope["path"], error)
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
        key = self._admission.signer(headers)
        self._admission.let_in(key, path, headers)
        body = await self._bodies.read(receive, headers, path.removeprefix(_PREFIX), key)
        request = PROTOBUF_REQUEST_TYPES["POST", path]()
        try:
            request.ParseFromString(body)
        except DecodeError as error:
            raise FlowerError(ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, str(error)) from error
        self._admission.check_identity(key, request)
        if signed := scope.get("extensions", {}).get(SIGNED):
            signed["by"](key)  # the connection is a node's, and no stranger's
        if getattr(request, "run_id", self.link.run_id) != self.link.run_id:
            raise HTTPException(HTTPStatus.FORBIDDEN, "Another run")
        request_limits.shorten_heartbeat(request)
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
        if isinstance(request, message_pb2.PullObjectRequest):
            request_limits.cut(response, headers)
            self.link.bytes_sent += len(response.object_content)
        return response

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
            if response.messages_list or self.link.over.is_set() or left <= 0:
                return response
            if not await self._stays(node_id, receive, work, left):
                return response
            self.link.require_known(node_id)

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


def _handlers(link: Link) -> dict[str, Callable[[Any], Any]]:
    """Flower's handlers by path, with the state that each one asks for."""
    state, store = link.state, link.state.object_store

    def register(request: Any) -> Any:
        if link.door is not None:  # it has come through the door
            node_id = state.get_node_id_by_public_key(request.public_key)
            return fleet_pb2.RegisterNodeFleetResponse(node_id=node_id or 0)
        return fleet_handlers.register_node(request, state, enable_supernode_auth=False)

    def activate(request: Any) -> Any:
        if link.door is not None:
            link.make_another_of(request.public_key)
        try:
            response = fleet_handlers.activate_node(request, state)
        except FlowerError as error:
            if error.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise
            if link.door is None:
                # Where any node may come it makes its key for this time, and nobody else has it:
                # it has been activated, and the answer was lost on the way.
                node_id = state.get_node_id_by_public_key(request.public_key)
                if node_id is None or not state.deactivate_node(node_id):
                    raise
                response = fleet_handlers.activate_node(request, state)
            else:
                raise HTTPException(
                    HTTPStatus.CONFLICT,
                    "A node with this key is online: one key is one node. End the other one first.",
                ) from error
        link.tell_grid()
        return response

    def deactivate(request: Any) -> Any:
        response = fleet_handlers.deactivate_node(request, state)
        link.tell_grid()
        return response

    def confirm(request: Any) -> Any:
        if not link.is_for(request.message_object_id, request.node.node_id):
            return message_pb2.ConfirmMessageReceivedResponse()  # it deletes nothing of others
        return fleet_handlers.confirm_message_received(request, state, store)

    def push_messages(request: Any) -> Any:
        _require_running(link)
        _check_reply(request, link.run_id)
        tree, replied_to = request.message_object_trees[0], _replied_to(request)
        announced = IncomingReply(request.node.node_id, tree.object_id, children_in(tree))
        reply = link.announce(replied_to, announced)  # not one that comes too late, or a second one
        return fleet_pb2.PushMessagesResponse(
            reconnect=fleet_pb2.Reconnect(reconnect=5),
            results={tree.object_id: 0},
            objects_to_push=sorted(reply.missing) if reply else [],
            session_id=replied_to,
        )

    def push_object(request: Any) -> Any:
        _require_running(link)
        reply = link.replies.get(request.session_id)
        if reply is None or reply.node_id != request.node.node_id:
            return message_pb2.PushObjectResponse(stored=False)
        stored = reply.put(request.object_id, request.object_content, link.spool, link.reply_limit)
        if reply.is_complete:
            link.tell_grid()
        return message_pb2.PushObjectResponse(stored=stored)

    def unregister(request: Any) -> Any:
        if link.door is not None:  # its key stays known
            return fleet_handlers.unregister_node(request, state, enable_supernode_auth=True)
        link.forget_node(request.node_id)
        link.tell_grid()
        return fleet_pb2.UnregisterNodeFleetResponse()

    return {
        _PREFIX + "register-node": register,
        _PREFIX + "activate-node": activate,
        _PREFIX + "deactivate-node": deactivate,
        _PREFIX + "unregister-node": unregister,
        _PREFIX + "send-node-heartbeat": lambda r: fleet_handlers.send_node_heartbeat(r, state),
        _PREFIX + "pull-messages": lambda r: fleet_handlers.pull_messages(r, state, store),
        _PREFIX + "push-messages": push_messages,
        _PREFIX + "get-run": lambda r: fleet_handlers.get_run(r, state),
        _PREFIX + "get-fab": lambda r: fleet_handlers.get_fab(r, state),
        _PREFIX + "push-object": push_object,
        _PREFIX + "pull-object": lambda r: fleet_handlers.pull_object(r, state),
        _PREFIX + "confirm-message-received": confirm,
    }


def _require_running(link: Link) -> None:
    ended = [Status.PENDING, Status.STARTING, Status.FINISHED]
    if why := check_abort(link.run_id, ended, link.state):
        raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, why)


def _replied_to(request: fleet_pb2.PushMessagesRequest) -> str:
    return str(request.messages_list[0].metadata.reply_to_message_id)


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
    try:
        message_from_proto(replies[0])
    except Exception as error:  # such as a type that no message has
        raise HTTPException(HTTPStatus.BAD_REQUEST, "Not a message") from error


def _seconds_to_wait(headers: dict[str, str]) -> float:
    try:
        seconds = float(headers.get(ours.WAIT, 0))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _MAX_WAIT) if math.isfinite(seconds) else 0.0


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(payload: dict[str, Any]) -> tuple[bytes, str]:
    return json.dumps(payload).encode(), "application/json"
