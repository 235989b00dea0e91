"""Handlers of the Fleet API's requests, one function a route, over a :class:`Link`.

Most call Flower's handler. Replies are stored in :mod:`~mlx_fed.flower.incoming_replies`.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import Status
from flwr.common.serde import message_from_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.superlink.servicer.fleet import fleet_handlers

from .incoming_replies import IncomingReply, children_in
from .link_state import Link


def register_node(link: Link, request: fleet_pb2.RegisterNodeFleetRequest) -> Any:
    """Registration of a new key; authorization has created the node of a listed one."""
    if link.allowlist is not None:
        node_id = link.state.get_node_id_by_public_key(request.public_key)
        return fleet_pb2.RegisterNodeFleetResponse(node_id=node_id or 0)
    return fleet_handlers.register_node(request, link.state, enable_supernode_auth=False)


def activate_node(link: Link, request: fleet_pb2.ActivateNodeRequest) -> Any:
    """Activation: the node is online from now on.

    Raises:
        HTTPException: If a node with this key is online.
    """
    state = link.state
    if link.allowlist is not None:
        link.renew_node_id(request.public_key)
    try:
        response = fleet_handlers.activate_node(request, state)
    except FlowerError as error:
        if error.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise
        if link.allowlist is not None:
            raise HTTPException(
                HTTPStatus.CONFLICT,
                "A node with this key is online: one key is one node. End the other one first.",
            ) from error
        # Without an allowlist a node makes its key for this time, and nobody else has it: the
        # node was activated, and the response was lost.
        node_id = state.get_node_id_by_public_key(request.public_key)
        if node_id is None or not state.deactivate_node(node_id):
            raise
        response = fleet_handlers.activate_node(request, state)
    link.notify_grid()
    return response


def deactivate_node(link: Link, request: fleet_pb2.DeactivateNodeRequest) -> Any:
    """Deactivation: the node is offline from now on."""
    response = fleet_handlers.deactivate_node(request, link.state)
    link.notify_grid()
    return response


def unregister_node(link: Link, request: fleet_pb2.UnregisterNodeFleetRequest) -> Any:
    """Unregistration; a listed key stays listed."""
    if link.allowlist is not None:
        return fleet_handlers.unregister_node(request, link.state, enable_supernode_auth=True)
    link.forget_node(request.node_id)
    link.notify_grid()
    return fleet_pb2.UnregisterNodeFleetResponse()


def push_messages(link: Link, request: fleet_pb2.PushMessagesRequest) -> Any:
    """Announcement of a reply by the tree of its objects; the response names those to push.

    Raises:
        FlowerError: If the run is over.
        HTTPException: If it is not one reply of the sender, or its tree is not valid.
    """
    _require_running(link)
    trees, replies = request.message_object_trees, request.messages_list
    if len(replies) != 1 or len(trees) != 1:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "One message and its object tree")
    tree, metadata = trees[0], replies[0].metadata
    message_id = metadata.reply_to_message_id
    if metadata.src_node_id != request.node.node_id or not message_id:
        raise HTTPException(HTTPStatus.FORBIDDEN, "Not a reply of this node")
    if metadata.run_id != link.run_id:
        raise HTTPException(HTTPStatus.FORBIDDEN, "Another run")
    if tree.object_id != metadata.message_id:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "Not the message's object tree")
    try:
        message_from_proto(replies[0])
    except Exception as error:  # such as an unknown message type
        raise HTTPException(HTTPStatus.BAD_REQUEST, "Not a message") from error
    reply = link.accept_reply(
        message_id, IncomingReply(request.node.node_id, tree.object_id, children_in(tree))
    )
    return fleet_pb2.PushMessagesResponse(
        reconnect=fleet_pb2.Reconnect(reconnect=5),
        results={tree.object_id: 0},
        objects_to_push=sorted(reply.missing) if reply else [],
        session_id=message_id,
    )


def push_object(link: Link, request: message_pb2.PushObjectRequest) -> Any:
    """One object of an announced reply.

    Raises:
        FlowerError: If the run is over.
        HTTPException: If the reply becomes too large.
    """
    _require_running(link)
    reply = link.replies.get(request.session_id)
    if reply is None or reply.node_id != request.node.node_id:
        return message_pb2.PushObjectResponse(stored=False)
    is_stored = reply.put(request.object_id, request.object_content, link.spool, link.reply_limit)
    if reply.is_complete:
        link.notify_grid()
    return message_pb2.PushObjectResponse(stored=is_stored)


def confirm_message_received(link: Link, request: message_pb2.ConfirmMessageReceivedRequest) -> Any:
    """Confirmation that a message arrived, which deletes its objects; only by its receiver."""
    if not link.is_addressed_to(request.message_object_id, request.node.node_id):
        return message_pb2.ConfirmMessageReceivedResponse()
    return fleet_handlers.confirm_message_received(request, link.state, link.state.object_store)


def _require_running(link: Link) -> None:
    status = link.state.get_run_status({link.run_id})[link.run_id].status
    if status != Status.RUNNING:
        raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, f"The run is {status}.")


PREFIX = "/v1/fleet/"

HANDLERS: dict[str, tuple[type[Any], Callable[[Link, Any], Any]]] = {
    PREFIX + "register-node": (fleet_pb2.RegisterNodeFleetRequest, register_node),
    PREFIX + "activate-node": (fleet_pb2.ActivateNodeRequest, activate_node),
    PREFIX + "deactivate-node": (fleet_pb2.DeactivateNodeRequest, deactivate_node),
    PREFIX + "unregister-node": (fleet_pb2.UnregisterNodeFleetRequest, unregister_node),
    PREFIX + "send-node-heartbeat": (
        heartbeat_pb2.SendNodeHeartbeatRequest,
        lambda link, request: fleet_handlers.send_node_heartbeat(request, link.state),
    ),
    PREFIX + "pull-messages": (
        fleet_pb2.PullMessagesRequest,
        lambda link, request: fleet_handlers.pull_messages(
            request, link.state, link.state.object_store
        ),
    ),
    PREFIX + "push-messages": (fleet_pb2.PushMessagesRequest, push_messages),
    PREFIX + "get-run": (
        run_pb2.GetRunRequest,
        lambda link, request: fleet_handlers.get_run(request, link.state),
    ),
    PREFIX + "get-fab": (
        fab_pb2.GetFabRequest,
        lambda link, request: fleet_handlers.get_fab(request, link.state),
    ),
    PREFIX + "push-object": (message_pb2.PushObjectRequest, push_object),
    PREFIX + "pull-object": (
        message_pb2.PullObjectRequest,
        lambda link, request: fleet_handlers.pull_object(request, link.state),
    ),
    PREFIX + "confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest,
        confirm_message_received,
    ),
}
"""The request type and the handler of each route."""
