"""The server's routes and clients of theirs, in this process."""

from __future__ import annotations

import http.client

import mlx.core as mx
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.link_grid import LinkGrid
from mlx_fed.flower.link_state import Link
from mlx_fed.rounds import messages

ARRAYS = {
    "small": mx.array([1.0, float("nan"), -0.0], dtype=mx.bfloat16),
    "large": mx.random.normal((1200, 1201), key=mx.random.key(0)),  # more than one 5 MiB chunk
}


class Fleet:
    """A server's routes on a port of the loopback, and the grid beside them."""

    def __init__(self, link: Link, port: int):
        self.link, self.port, self.grid = link, port, LinkGrid(link)
        self.clients: list[FleetClient] = []

    def node(self, **arguments) -> FleetClient:
        client = FleetClient("127.0.0.1", self.port, **arguments)
        client.register()
        self.clients.append(client)
        return client

    def message(
        self,
        node: FleetClient,
        content: RecordDict | None = None,
        kind: str = MessageType.TRAIN,
    ) -> str:
        content = content or RecordDict({"arrays": messages.pack(ARRAYS)})
        (message_id,) = self.grid.push_messages([Message(content, node.node_id, kind)])
        return message_id

    def post(self, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("POST", path, body, {"content-type": PROTOBUF_MEDIA_TYPE, **headers})
        response = connection.getresponse()
        return response.status, response.read()


def reply_to(message: Message, **metrics: float) -> Message:
    content = RecordDict(
        {"arrays": messages.pack(ARRAYS), "metrics": MetricRecord({"num-examples": 1, **metrics})}
    )
    return Message(content, reply_to=message)


def assert_carried(content: RecordDict) -> None:
    got = messages.unpack(messages.parameters_of(content)[1])
    for name, array in ARRAYS.items():
        assert got[name].dtype == array.dtype
        assert mx.array_equal(got[name].view(mx.uint16), array.view(mx.uint16)), name


def push_request(node: FleetClient, reply: Message, **changes) -> fleet_pb2.PushMessagesRequest:
    """What announces a reply, with parts of its metadata replaced."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    request = fleet_pb2.PushMessagesRequest(
        node=node._node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )
    for name, value in changes.items():
        setattr(request.messages_list[0].metadata, name, value)
    return request
