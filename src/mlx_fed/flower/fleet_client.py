"""A node's requests to the Fleet API of one of our servers or of a stock SuperLink."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from flwr.app import Message, MessageType
from flwr.app.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, run_pb2
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)

from ..errors import FedError
from .deserialize import inflate
from .one_run_grid import set_message_id
from .proxies import Proxy
from .request_limits import MAX_OBJECTS
from .serialize import cut_arrays
from .transport import (
    BLOCK,
    CONNECT_TIMEOUT,
    MAX_RESPONSE,
    TIMEOUT,
    Context,
    RequestRefused,
    Transport,
    Unreachable,
)

_HEARTBEAT_INTERVAL = 10.0
"""Seconds, as announced to the server: the least that Flower accepts. After twice that without a
heartbeat the node counts as offline."""
_SPARE = 64 * 2**20
_MODELS = 4
"""A message has no more bytes than that many models and the spare ones."""


class MessageTooLarge(FedError):
    """A message with more bytes than one for this node's model has."""


class FleetClient:
    """A node's connection to one of our servers or to a stock SuperLink.

    The objects of an evaluated message are cached: the parameters that a node evaluates at the
    end of a round it trains from in the next, and they travel once.

    Args:
        host (str): The server's host.
        port (int): Its port.
        context (ssl.SSLContext or callable, optional): TLS, or what makes it for a connection;
            plaintext without.
        key (bytes, optional): The node's private key (PEM), which the server knows; without one
            the node registers a new key, which is unregistered when it leaves.
        invitation (str, optional): What enrols the key.
        proxy (Proxy, optional): The proxy of connections.
        model_bytes (callable, optional): Gives the bytes of the model's arrays, by which messages
            are limited. Default: no limit.

    Attributes:
        node_id (int): The id that the server gave.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Context = None,
        key: bytes | None = None,
        invitation: str | None = None,
        proxy: Proxy | None = None,
        model_bytes: Callable[[], float] = lambda: math.inf,
    ):
        self._transport = Transport(host, port, context, key, proxy, invitation)
        self._model_bytes = model_bytes
        self._registers = key is None or invitation is not None
        self._piece_size = MAX_RESPONSE
        self._reset()
        self.node_id = 0

    def _reset(self) -> None:
        """Clears what belongs to a run: a server that was restarted has another one."""
        self._objects: dict[str, bytes] = {}
        self._partial_object = ("", bytearray())
        self._run_id: int | None = None

    @property
    def outcome(self) -> str:
        """The run's outcome, after a response that has it."""
        return self._transport.outcome

    @property
    def last_response(self) -> float:
        """When the server last responded, by ``time.monotonic()``."""
        return self._transport.last_response

    @property
    def _node(self) -> node_pb2.Node:
        return node_pb2.Node(node_id=self.node_id)

    def register(self) -> None:
        """Registration of this node, where its key is new, and its activation.

        Raises:
            Unreachable: If there is no response.
            RequestRefused: If the server does not accept the node.
            UntrustedServer: If it is another server than was meant.
        """
        key = self._transport.public_key
        self._transport.timeout = CONNECT_TIMEOUT
        if self._registers:
            try:
                self._transport.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=key))
            except RequestRefused as refusal:
                # The node registered before, and the response was lost.
                if refusal.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise
        response = self._transport.ActivateNode(
            fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=_HEARTBEAT_INTERVAL)
        )
        self.node_id = response.node_id
        self._transport.close()
        self._transport.timeout = TIMEOUT
        self._reset()

    def heartbeat(self) -> None:
        """One heartbeat; one of our servers delays the response for seconds.

        It sees the connection break when this process ends, before a heartbeat is missing.
        """
        self._transport.SendNodeHeartbeat(
            heartbeat_pb2.SendNodeHeartbeatRequest(
                node=self._node, heartbeat_interval=_HEARTBEAT_INTERVAL
            )
        )

    def leave(self) -> None:
        """Deactivation of this node, as far as the server can be reached."""
        with suppress(Unreachable, RequestRefused):
            self._transport.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node_id))
            if self._registers:
                self._transport.UnregisterNode(
                    fleet_pb2.UnregisterNodeFleetRequest(node_id=self.node_id)
                )
        self._transport.close()

    def receive(self) -> Message | None:
        """The next message for this node, with its content; ``None`` if there is none yet.

        One of our servers delays the response until there is one, for up to 20 seconds.

        Raises:
            MessageTooLarge: If it has more bytes than one for this node's model.
        """
        response = self._transport.PullMessages(fleet_pb2.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        with _parsing():
            metadata = message_from_proto(response.messages_list[0]).metadata
            message_id, run_id = metadata.message_id, metadata.run_id
            is_query = metadata.message_type.startswith(MessageType.QUERY)
            object_ids: list[str] = []
            for tree in iterate_object_tree(response.message_object_trees[0]):
                object_ids.append(tree.object_id)
                if len(object_ids) > MAX_OBJECTS:
                    raise ValueError(f"more than {MAX_OBJECTS} objects")
        # Objects of other messages would take memory beside it. What has been pulled of this one
        # stays in the cache in case the connection breaks.
        objects = {key: self._objects[key] for key in object_ids if key in self._objects}
        self._objects = objects
        limit = _SPARE + (0 if is_query else _MODELS * self._model_bytes())
        size = sum(map(len, objects.values()))
        for object_id in object_ids:
            if object_id not in objects:
                objects[object_id] = self._pull_object(run_id, object_id)
                size += len(objects[object_id])
                if size > limit:
                    self._objects = {}
                    raise MessageTooLarge(
                        f"The server sends a message of more than {limit:,.0f} bytes, which are "
                        f"{_MODELS} times this node's model and {_SPARE:,} more."
                    )
        with suppress(Unreachable):  # a confirmation only frees the server's memory early
            self._transport.ConfirmMessageReceived(
                message_pb2.ConfirmMessageReceivedRequest(
                    node=self._node, run_id=run_id, message_object_id=message_id
                )
            )
        self._objects = {}
        with _parsing():
            message = inflate(message_id, objects, limit)
            if not isinstance(message, Message):
                raise TypeError(f"a {type(message).__name__}")
        set_message_id(message, message_id)
        self._run_id = run_id
        if not message.metadata.message_type.startswith(MessageType.TRAIN):
            self._objects = objects
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """A reply to the server, with the seconds that the app took for it."""
        cut_arrays(reply, BLOCK if self._piece_size < MAX_RESPONSE else math.inf)
        with no_object_id_recompute():
            set_message_id(reply, reply.object_id)
            response = self._transport.PushMessages(
                fleet_pb2.PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[seconds],
                )
            )
            missing = set(response.objects_to_push)
            # The message itself is last in this order: a server may take it as complete.
            for object_id, item in get_all_nested_objects(reply).items():
                if object_id not in missing:
                    continue
                request = message_pb2.PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=object_id,
                    object_content=item.deflate(),
                    session_id=response.session_id,
                )
                with self._adapting_piece_size():
                    self._transport.PushObject(request)

    def run_has_ended(self) -> bool:
        """Whether the run of the last message is over, where a stock SuperLink does not say so."""
        if self._run_id is None:
            return False
        try:
            self._transport.GetRun(run_pb2.GetRunRequest(node=self._node, run_id=self._run_id))
        except RequestRefused as refusal:
            return refusal.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
        return False

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        """An object's bytes, resumed at the byte where an earlier pull of it broke off."""
        request = message_pb2.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        if self._partial_object[0] != object_id:
            self._partial_object = (object_id, bytearray())
        content = self._partial_object[1]
        pause = 0.01
        while True:
            size = self._piece_size
            self._transport.byte_range = f"{len(content)}-{len(content) + size}"
            with self._adapting_piece_size():
                response = self._transport.PullObject(request)
            piece = response.object_content
            if not response.object_found:
                raise Unreachable("a part of the message is gone from the server")
            if not response.object_available:
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
                continue
            if len(piece) > size or (len(piece) < size and not content):
                return piece  # a stock SuperLink sends all of it
            content += piece
            if len(piece) < size:
                self._partial_object = ("", bytearray())
                if hashlib.sha256(content).hexdigest() != object_id:
                    raise Unreachable("the pieces of an object do not fit each other")
                return bytes(content)

    @contextmanager
    def _adapting_piece_size(self) -> Iterator[None]:
        """Small pieces after a connection broke, growing with each that comes through."""
        try:
            yield
        except Unreachable:
            self._piece_size = BLOCK
            raise
        self._piece_size += BLOCK
        if self._piece_size > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE:
            self._piece_size = MAX_RESPONSE


@contextmanager
def _parsing() -> Iterator[None]:
    """Turns any exception over a peer's bytes into :class:`Unreachable`."""
    try:
        yield
    except Exception as error:  # a peer's bytes may raise any
        raise Unreachable(f"what came is not a message: {error!r:.200}") from error
