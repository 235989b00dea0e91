"""A node's end of the Fleet API: Flower's requests over one kept-alive connection a thread."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

from flwr.app import Message, MessageType
from flwr.app.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, TIMESTAMP_HEADER
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, run_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.primitives.asymmetric import (
    generate_key_pairs,
    public_key_to_bytes,
    sign_message,
)
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError

from . import headers as ours
from . import keys
from .deserialize import inflate
from .proxies import Proxy, connection_to
from .serialize import cut_arrays

Context = ssl.SSLContext | Callable[[], ssl.SSLContext | None] | None
_REGISTER, _PULL = "/v1/fleet/register-node", "/v1/fleet/pull-object"
_HELD = {"/v1/fleet/pull-messages": 20.0, "/v1/fleet/send-node-heartbeat": 5.0}
"""Seconds that a server of ours may hold a request, by path."""

_RXT_CONNDROPTIME = 0x80
"""macOS's twin of TCP_USER_TIMEOUT, which Python has no name for."""
_OUTCOMES = (ours.FINISHED, ours.STOPPED, ours.FAILED)

_HEARTBEAT = 10.0
"""Seconds, as announced to the server: the least that Flower accepts. Twice that without a beat
and the node counts as gone."""

_SIGNATURE_AGE = 5.0
_LARGEST_RESPONSE = 64 * 2**20
_MOST_OBJECTS = 1_000_000
_LONGEST_DETAIL = 500
_TIMEOUT = 60.0
_FIRST_TIMEOUT = 10.0
"""Seconds that a server may take to answer, and to answer a node that it does not know yet."""
_BLOCK = 2**18
"""Bytes that have to be sent within that time: a connection may be slow, and still not be lost. And
the least in which an object comes whose connection broke."""
_SLOWEST = 16 * 2**10
"""Bytes a second for which a server of ours waits."""
_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
"""Answers after which the same request may do: that it came too slowly, that a clock is wrong."""
_SILENCE = 45
"""Seconds after which a connection is lost whose other end acknowledges nothing that is sent."""
_LATE = 15.0
"""Seconds beyond the time that a request is held, after which it counts as lost on the way."""


class Unreachable(ConnectionError):
    """The server did not answer, or not as a server of ours or a SuperLink does."""


class Unavailable(Unreachable):
    """The server, or a proxy in front of it, answered that it cannot do so now."""


class Refused(Exception):
    """The server answered and said no.

    Attributes:
        status (int): HTTP's status code.
        code (int): Flower's error code, 0 where there is none.
        reason (str): The server's, empty where the answer is not of a server of ours or a
            SuperLink.
    """

    def __init__(self, status: int, body: bytes):
        text = body.decode("utf-8", "replace")
        error = FlowerError.from_json(text)
        self.status = status
        self.code = error.code if error else 0
        self.reason = error.message if error else _detail(text)
        super().__init__(self.reason or f"HTTP status {status}")


class Untrusted(Unreachable):
    """Whoever answers is not the server that was meant, or the server expects encryption."""


def _detail(text: str) -> str:
    try:
        return str(json.loads(text)["detail"])[:_LONGEST_DETAIL]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _refusal(status: int, body: bytes) -> Refused | Unreachable:
    """What an answer other than OK means: a proxy refuses nothing in the server's name."""
    refusal = Refused(status, body)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or not refusal.reason:
        return Unavailable(str(refusal))
    return Unreachable(str(refusal)) if status in _AGAIN else refusal


def _read(response: http.client.HTTPResponse) -> bytes:
    if response.length is not None and response.length <= _LARGEST_RESPONSE:
        return response.read()
    content = b"" if response.length else response.read(_LARGEST_RESPONSE + 1)
    if response.length or len(content) > _LARGEST_RESPONSE:
        raise http.client.HTTPException("the answer is too large")
    return content


class _Transport(FleetHttpClient):
    """Flower's client of the Fleet API, over the standard library's HTTP.

    It has Flower's methods, one a route; only how a request is sent is ours.
    """

    def __init__(
        self, host: str, port: int, context: Context, key: bytes | None, proxy: Proxy | None
    ):
        self._place = (host, port, proxy)
        self._context = context
        self._private_key = keys.load(key) if key else generate_key_pairs()[0]
        self.public_key = public_key_to_bytes(self._private_key.public_key())
        self._headers = {
            "content-type": PROTOBUF_MEDIA_TYPE,
            "accept": PROTOBUF_MEDIA_TYPE,
            **dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata()),
        }
        self._signed_at = 0.0
        self._lock = threading.Lock()
        self._local = threading.local()
        self.timeout = _FIRST_TIMEOUT
        self.heard = 0.0
        self.outcome = ""
        self.invitation: str | None = None
        self.bytes = ""

    def _unary_unary(
        self,
        *,
        path: str,
        rpc_method: str,
        request: Any,
        response_type: Any,
        timeout: float | None = None,
    ) -> Any:
        headers = self._signed_headers()
        if path in _HELD:
            headers[ours.WAIT] = str(_HELD[path])
        if self.invitation is not None and path == _REGISTER:
            headers[ours.TOKEN] = self.invitation
        if path == _PULL:
            headers[ours.BYTES] = self.bytes
        status, body = self._post(path, request.SerializeToString(), headers)
        if status != HTTPStatus.OK:
            raise _refusal(status, body)
        try:
            response = response_type.FromString(body)
        except DecodeError as error:
            raise Unreachable("what answers there does not speak Flower's Fleet API") from error
        self.heard = time.monotonic()
        return response

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        held: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        try:
            connection = held or self._connect()
        except OSError as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        timeout = _HELD[path] + _LATE if path in _HELD else self.timeout
        try:
            if connection.sock is None:
                connection.timeout = timeout
                connection.connect()
                _notice_silence(connection)
            connection.sock.settimeout(timeout)
            blocks = (body[start : start + _BLOCK] for start in range(0, len(body), _BLOCK))
            length = {"content-length": str(len(body))}
            connection.request("POST", path, blocks, headers | length)
            # Much of it may be on its way still.
            connection.sock.settimeout(timeout + len(body) / _SLOWEST)
            response = connection.getresponse()
            content = _read(response)
        except ssl.SSLError as error:
            connection.close()
            self._local.connection = None
            if isinstance(error, ssl.SSLCertVerificationError):
                raise Untrusted(f"its certificate: {error.verify_message}") from error
            if error.reason == "WRONG_VERSION_NUMBER":
                raise Untrusted("what answers there does not encrypt") from error
            raise Unreachable(str(error)) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self._local.connection = None
            # A server may have closed a connection that was idle: that is worth one more try.
            if held and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                return self._post(path, body, headers)
            raise Unreachable(str(error) or type(error).__name__) from error
        self._local.connection = connection
        if (outcome := response.getheader(ours.RUN)) in _OUTCOMES:
            self.outcome = outcome
        return response.status, content

    def _connect(self) -> http.client.HTTPConnection:
        context = self._context() if callable(self._context) else self._context
        return connection_to(*self._place, context)

    def _signed_headers(self) -> dict[str, str]:
        # The signature covers only the time, so one serves for a few seconds: by the clock on the
        # wall, which goes on while a laptop sleeps and which the server looks at.
        with self._lock:
            if abs(time.time() - self._signed_at) > _SIGNATURE_AGE:
                timestamp = now().isoformat()
                signature = sign_message(self._private_key, timestamp.encode("ascii"))
                self._headers |= {
                    FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self.public_key).decode(),
                    TIMESTAMP_HEADER: timestamp,
                    FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
                }
                self._signed_at = time.time()
            return dict(self._headers)

    def close(self) -> None:
        """Closes this thread's connection."""
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _notice_silence(connection: http.client.HTTPConnection) -> None:
    """Has the system give a connection up that is silent.

    A router that has forgotten it lets nothing through and says nothing. While a request of
    megabytes is on its way, an answer is not missed for minutes.
    """
    options = {
        "TCP_KEEPIDLE": _SILENCE // 3,
        "TCP_KEEPALIVE": _SILENCE // 3,  # the same on macOS
        "TCP_KEEPINTVL": _SILENCE // 6,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 1000 * _SILENCE,
    }
    numbers = {getattr(socket, name, None): value for name, value in options.items()}
    if sys.platform == "darwin":
        numbers[_RXT_CONNDROPTIME] = _SILENCE
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for number, value in numbers.items():
        if number is not None:
            with suppress(OSError):  # it is only noticed later
                connection.sock.setsockopt(socket.IPPROTO_TCP, number, value)


@contextmanager
def _understood() -> Iterator[None]:
    """Says of what cannot be read that no server of ours, and no SuperLink, sent it."""
    try:
        yield
    except Exception as error:  # a stranger's bytes can bring about any
        raise Unreachable(f"what came is not a message: {error!r:.200}") from error


def _trees(response: fleet_pb2.PullMessagesResponse) -> Iterator[ObjectTree]:
    for count, tree in enumerate(iterate_object_tree(response.message_object_trees[0])):
        if count > _MOST_OBJECTS:
            raise ValueError(f"more than {_MOST_OBJECTS} objects")
        yield tree


class FleetClient:
    """A node's connection to a server of ours or to a stock SuperLink.

    It holds the objects of a message that it does not train from: what the node evaluates at the
    end of a round it trains from in the next, and it comes over the wire once.

    Args:
        host (str): The server's host.
        port (int): Its port.
        context (ssl.SSLContext or callable, optional): TLS, or what makes it when there is a
            connection to make; plaintext without.
        key (bytes, optional): The node's private key (PEM), which the server knows; without one
            the node makes one for this time and registers it itself.
        invitation (str, optional): What lets the server know the key from now on.
        proxy (Proxy, optional): What connections go through.

    Attributes:
        node_id (int): The id that the server gave.
        outcome (str): The run's, once the server has said that it is over.
        heard (float): When the server last answered, by ``time.monotonic()``.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Context = None,
        key: bytes | None = None,
        invitation: str | None = None,
        proxy: Proxy | None = None,
    ):
        self._transport = _Transport(host, port, context, key, proxy)
        self._transport.invitation = invitation
        self._registers = key is None or invitation is not None
        self._held: dict[str, bytes] = {}
        self._begun = ("", bytearray())
        self._piece = _LARGEST_RESPONSE
        self._run_id: int | None = None
        self.node_id = 0

    @property
    def outcome(self) -> str:
        return self._transport.outcome

    @property
    def heard(self) -> float:
        return self._transport.heard

    @property
    def _node(self) -> node_pb2.Node:
        return node_pb2.Node(node_id=self.node_id)

    def register(self) -> None:
        """Makes this node known to the server.

        Raises:
            Unreachable: If there is no answer.
            Refused: If the server does not take it.
            Untrusted: If it is another server than was meant.
        """
        key = self._transport.public_key
        self._transport.timeout = _FIRST_TIMEOUT
        if self._registers:
            try:
                self._transport.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=key))
            except Refused as refusal:
                # It has registered before, and the answer was lost on the way.
                if refusal.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise
        request = fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=_HEARTBEAT)
        self.node_id = self._transport.ActivateNode(request).node_id
        self._transport.close()
        self._transport.timeout = _TIMEOUT
        # A server that was started again has another run.
        self._held, self._run_id, self._begun = {}, None, ("", bytearray())

    def beat(self) -> None:
        """Tells the server that this node is there; one of ours holds the request for seconds.

        It sees the connection break when this process ends, and need not miss a beat first.
        """
        request = heartbeat_pb2.SendNodeHeartbeatRequest(
            node=self._node, heartbeat_interval=_HEARTBEAT
        )
        self._transport.SendNodeHeartbeat(request)

    def leave(self) -> None:
        """Takes this node off the server's list."""
        try:
            request = fleet_pb2.DeactivateNodeRequest(node_id=self.node_id)
            self._transport.DeactivateNode(request)
            if self._registers:
                self._transport.UnregisterNode(
                    fleet_pb2.UnregisterNodeFleetRequest(node_id=self.node_id)
                )
        except (Unreachable, Refused):
            pass
        self._transport.close()

    def receive(self) -> Message | None:
        """The next message for this node, with its content; ``None`` if there is none yet.

        A server of ours holds the request until there is one, for up to 20 seconds.
        """
        response = self._transport.PullMessages(fleet_pb2.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        with _understood():
            envelope = message_from_proto(response.messages_list[0])
            message_id, run_id = envelope.metadata.message_id, envelope.metadata.run_id
            objects = [tree.object_id for tree in _trees(response)]
        # What is not of this message must not be in memory beside it. What comes of it is held for
        # the case that the connection breaks: it need not come again.
        contents = {each: self._held[each] for each in objects if each in self._held}
        self._held = contents
        for object_id in objects:
            if object_id not in contents:
                contents[object_id] = self._pull_object(run_id, object_id)
        with suppress(Unreachable):  # it only frees the server's memory early
            self._transport.ConfirmMessageReceived(
                message_pb2.ConfirmMessageReceivedRequest(
                    node=self._node, run_id=run_id, message_object_id=message_id
                )
            )
        self._held = {}
        with _understood():
            message = inflate(message_id, contents)
            if not isinstance(message, Message):
                raise TypeError(f"a {type(message).__name__}")
        message.metadata.__dict__["_message_id"] = message_id
        self._run_id = run_id
        if not message.metadata.message_type.startswith(MessageType.TRAIN):
            self._held = contents
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """Sends a reply, with the seconds that it took to make."""
        cut_arrays(reply, _BLOCK if self._piece < _LARGEST_RESPONSE else math.inf)
        with no_object_id_recompute():
            message_id = reply.object_id
            reply.metadata.__dict__["_message_id"] = message_id
            request = fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            response = self._transport.PushMessages(request)
            wanted = set(response.objects_to_push)
            # The message itself comes last in this order: a server may take it as complete.
            for object_id, item in get_all_nested_objects(reply).items():
                if object_id not in wanted:
                    continue
                push = message_pb2.PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=object_id,
                    object_content=item.deflate(),
                    session_id=response.session_id,
                )
                with self._in_pieces():
                    self._transport.PushObject(push)

    def run_has_ended(self) -> bool:
        """Whether the run of the last message is over, as a stock SuperLink lets one find out."""
        if self._run_id is None:
            return False
        try:
            self._transport.GetRun(run_pb2.GetRunRequest(node=self._node, run_id=self._run_id))
        except Refused as refusal:
            return refusal.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
        return False

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        """An object, which goes on where it broke off, in pieces for as long as that may happen."""
        request = message_pb2.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        if self._begun[0] != object_id:
            self._begun = (object_id, bytearray())
        content = self._begun[1]
        pause = 0.01
        while True:
            size = self._piece
            self._transport.bytes = f"{len(content)}-{len(content) + size}"
            with self._in_pieces():
                response = self._transport.PullObject(request)
            piece = response.object_content
            if not response.object_found:
                raise Unreachable("a part of the message is gone from the server")
            if not response.object_available:
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            elif len(piece) > size or (len(piece) < size and not content):
                return piece
            else:
                content += piece
                if len(piece) < size:
                    return self._whole(object_id, content)

    def _whole(self, object_id: str, content: bytearray) -> bytes:
        self._begun = ("", bytearray())
        if hashlib.sha256(content).hexdigest() != object_id:
            raise Unreachable("the pieces of an object do not fit each other")
        return bytes(content)

    @contextmanager
    def _in_pieces(self) -> Iterator[None]:
        """Makes pieces small where a connection breaks, and larger while it does not."""
        try:
            yield
        except Unreachable:
            self._piece = _BLOCK
            raise
        self._piece += _BLOCK
        if self._piece > FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE:
            self._piece = _LARGEST_RESPONSE
