"""What we lean on in Flower's private modules, one test an assumption.

When a new Flower release breaks something, the test that fails here says what.
"""

from __future__ import annotations

import datetime
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.message import array as flower_array
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import in_memory_linkstate
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
)
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from mlx_fed.rounds import messages
from mlx_fed.arrays import spool
from mlx_fed.rounds.exchange import exchange
from mlx_fed.rounds.closing import QuorumClosing
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import fleet_client, serialize, transport, one_run_grid
from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import RequestRefused, Unreachable
from mlx_fed.flower.link_state import Link
from mlx_fed.flower.error_replies import error_reply
from mlx_fed.flower.fleet_handlers import HANDLERS, PREFIX

from ..helpers.proxy import Proxy
from ..helpers.fleet_routes import ARRAYS, Fleet, assert_carried, push_request, reply_to


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        fleet = Fleet(link, listening.getsockname()[1])
        yield fleet
        link.finish()
        for client in fleet.clients:
            client.leave()


def test_a_run_made_in_memory_is_running_and_can_be_kept_alive():
    link = Link()
    status = link.state.get_run_status({link.run_id})[link.run_id].status
    assert status == "running"
    assert link.state.acknowledge_task_heartbeat(link._task_id)
    link.close()
    assert link.state.get_run_status({link.run_id})[link.run_id].status == "finished"


def test_messages_can_be_made_where_the_link_is():
    link = Link()
    message = Message(RecordDict(), 7, MessageType.TRAIN)
    assert message.metadata.run_id == link.run_id
    link.close()


def test_a_message_and_its_reply_come_through_unchanged(fleet):
    node = fleet.node()
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    message_id = fleet.message(node)
    message = node.receive()
    assert message.metadata.message_id == message_id
    assert_carried(message.content)
    node.send(reply_to(message, loss=0.5), 0.1)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert reply.metadata.reply_to_message_id == message_id
    assert reply.metadata.src_node_id == node.node_id
    assert_carried(reply.content)
    assert reply.content["metrics"]["loss"] == 0.5
    assert len(fleet.link.state.object_store) == 0, "objects stay behind"
    assert fleet.link.state.num_message_ins() == 0


@pytest.mark.parametrize("largest", [7, 100, 5 * 2**20])
def test_arrays_are_cut_into_flowers_own_chunks(largest, monkeypatch, tmp_path):
    for module in (serialize, flower_array):
        monkeypatch.setattr(module, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", largest)
    monkeypatch.setattr(spool, "_SMALL", 0)
    few = {"w": mx.arange(9.0), "v": mx.array(1.0, mx.bfloat16)}
    values = [np.asfortranarray(np.ones((3, 2))), np.array(1.0), np.zeros((0, 3), np.float16)]
    plain = {str(number): Array(array) for number, array in enumerate(values)}
    place = spool.Spool(tmp_path)
    records = {
        "packed": messages.pack(ARRAYS if largest > 100 else few),
        "plain": ArrayRecord(plain),
        "on disk": place.put_record(plain.items()),
        "none": ArrayRecord(),
    }
    ours = RecordDict(records)
    flowers = RecordDict(
        {
            kind: ArrayRecord(
                {n: Array(a.dtype, a.shape, a.stype, a.data) for n, a in record.items()}
            )
            for kind, record in records.items()
        }
    )
    expected = {key: item.deflate() for key, item in get_all_nested_objects(flowers).items()}
    one_run_grid.begin_run()
    serialize.cut_arrays(Message(ours, 7, MessageType.TRAIN))
    got = {
        key: b"".join(serialize.views_of(item))
        for key, item in get_all_nested_objects(ours).items()
    }
    assert got == expected


def test_an_error_comes_through_with_its_reason(fleet):
    node = fleet.node()
    message_id = fleet.message(node)
    node.send(error_reply(node.receive(), OSError("no data")), 0.1)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.error.reason == "OSError: no data"


def test_nodes_that_share_arrays_do_not_take_them_from_each_other(fleet):
    nodes = [fleet.node() for _ in range(3)]
    record = messages.pack(ARRAYS)
    ids = fleet.grid.push_messages(
        [Message(RecordDict({"arrays": record}), n.node_id, MessageType.TRAIN) for n in nodes]
    )
    for node in nodes:
        message = node.receive()  # and confirms it, which deletes what nobody else needs
        assert_carried(message.content)
        node.send(reply_to(message), 0.0)  # equal replies share their objects too
    assert len(list(fleet.grid.pull_messages(ids))) == 3


def test_a_node_pulls_what_it_evaluated_and_trains_from_only_once(fleet, monkeypatch):
    node = fleet.node()
    pulled = []
    pull = node._pull_object
    monkeypatch.setattr(node, "_pull_object", lambda *a: pulled.append(a) or pull(*a))
    record = messages.pack(ARRAYS)
    sizes = []
    for number, kind in enumerate((MessageType.EVALUATE, MessageType.TRAIN, MessageType.TRAIN)):
        content = RecordDict({"arrays": record, "config": ConfigRecord({"n": number})})
        fleet.message(node, content, kind)
        assert_carried(node.receive().content)
        sizes.append(len(pulled))
        pulled.clear()
    # message, record dict and config are new; array record, arrays and chunks are not
    assert sizes[1] == 3
    # What was trained from does not come again, and is not held.
    assert sizes[0] == sizes[2] > 6


def test_a_reply_counts_only_when_all_its_objects_are_there(fleet, monkeypatch):
    node = fleet.node()
    message_id = fleet.message(node)
    message = node.receive()
    seen = []
    push = node._transport.PushObject

    def push_and_look(request):
        seen.append(list(fleet.grid.pull_messages([message_id])))
        return push(request)

    monkeypatch.setattr(node._transport, "PushObject", push_and_look)
    node.send(reply_to(message), 0.0)
    assert len(seen) > 5
    assert not any(seen)
    assert len(list(fleet.grid.pull_messages([message_id]))) == 1


def test_work_reaches_a_node_that_waits_in_the_request_that_waited(fleet):
    node = fleet.node()
    received = []
    waiting = threading.Thread(target=lambda: received.append(node.receive()))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "the server answered at once, with nothing"
    message_id = fleet.message(node)
    waiting.join(10)
    assert received[0].metadata.message_id == message_id


def test_the_end_of_the_run_reaches_a_node_that_waits(fleet):
    node = fleet.node()
    received = []
    waiting = threading.Thread(target=lambda: received.append(node.receive()))
    waiting.start()
    waiting.join(0.3)
    fleet.link.finish()
    waiting.join(10)
    assert received == [None]
    assert node.outcome == "finished"


def test_a_message_for_a_node_that_left_is_answered_with_an_error(fleet):
    node, other = fleet.node(), fleet.node()
    message_id = fleet.message(node)
    assert list(fleet.grid.pull_messages([message_id])) == []
    node.leave()
    (reply,) = fleet.grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == message_id
    assert list(fleet.grid.get_node_ids()) == [other.node_id]
    late = fleet.message(node)
    (reply,) = fleet.grid.pull_messages([late])
    assert reply.has_error()


def test_a_key_can_be_given_another_id_once_its_node_has_left():
    link = Link()
    before = link.state.create_node("", "", b"key", 0, name="node-0")
    link.renew_node_id(b"key")
    assert link.state.get_node_id_by_public_key(b"key") == before, "it was never here"
    link.state.activate_node(before, 10)
    link.renew_node_id(b"key")
    assert link.online() == {before}
    link.state.deactivate_node(before)
    link.renew_node_id(b"key")
    after = link.state.get_node_id_by_public_key(b"key")
    assert after != before
    assert not link.state.acknowledge_node_heartbeat(before, 10)
    link.state.activate_node(after, 10)
    assert link.online() == {after}
    assert link.state.nodes[after].name == "node-0"
    link.close()


# -- connections that break, machines that sleep -----------------------------------------------


def test_a_message_whose_delivery_broke_off_is_delivered_again(fleet, monkeypatch):
    node = fleet.node()
    message_id = fleet.message(node)
    # The answer to the pull is lost: the server takes the message as delivered.
    node._transport.PullMessages(fleet_pb2.PullMessagesRequest(node=node._node))
    pull, broken = node._pull_object, []

    def pull_and_break_once(*arguments):
        if len(broken) < 1:
            broken.append(arguments)
            raise Unreachable("the network is down")
        return pull(*arguments)

    monkeypatch.setattr(node, "_pull_object", pull_and_break_once)
    with pytest.raises(Unreachable):
        node.receive()
    message = node.receive()
    assert message.metadata.message_id == message_id
    assert_carried(message.content)
    node.send(reply_to(message), 0.0)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert_carried(reply.content)
    assert len(fleet.link.state.object_store) == 0


def test_what_came_of_a_message_before_it_broke_off_does_not_come_again(fleet, monkeypatch):
    node = fleet.node()
    message_id = fleet.message(node)
    pull, pulled = node._pull_object, []

    def pull_and_break(run_id, object_id):
        if len(pulled) in (2, 5):
            pulled.append("")
            raise Unreachable("the network is down")
        pulled.append(object_id)
        return pull(run_id, object_id)

    monkeypatch.setattr(node, "_pull_object", pull_and_break)
    for _ in range(2):
        with pytest.raises(Unreachable):
            node.receive()
    message = node.receive()
    assert message.metadata.message_id == message_id
    assert_carried(message.content)
    came = [object_id for object_id in pulled if object_id]
    assert len(came) == len(set(came)) > 6
    assert not node._objects, "what is trained from is in memory twice"


def test_what_came_of_a_message_that_cannot_be_read_comes_again(fleet, monkeypatch):
    node = fleet.node()
    fleet.message(node)
    with monkeypatch.context() as broken:
        broken.setattr(node, "_pull_object", lambda *_: b"")
        broken.setattr(node._transport, "ConfirmMessageReceived", lambda _: None)
        with pytest.raises(Unreachable, match="is not a message"):
            node.receive()
    assert_carried(node.receive().content)


def test_a_large_piece_over_a_slow_connection_has_the_time_that_it_takes(monkeypatch):
    """It has longer than a small request, and a server that does not answer that one is gone."""
    monkeypatch.setattr(fleet_client, "TIMEOUT", 0.5)
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        way = Proxy(listening.getsockname()[1], speed=4e6)
        fleet = Fleet(link, way.port)
        node = fleet.node()
        message_id = fleet.message(node)
        node.send(reply_to(node.receive()), 0.0)
        (reply,) = fleet.grid.pull_messages([message_id])
        assert_carried(reply.content)
        node._transport.close()
        way.swallow()
        started = time.monotonic()
        with pytest.raises(Unreachable):
            node._pull_object(link.run_id, "0" * 64)
        assert time.monotonic() - started < 2
        link.finish()
        way.close()


def test_what_came_of_a_piece_before_it_broke_off_does_not_come_again(fleet):
    """No connection lasts as long as a whole piece takes."""
    way = Proxy(fleet.port, most=1_500_000)
    node = FleetClient("127.0.0.1", way.port)
    node.register()
    message_id = fleet.message(node)
    message = None
    while message is None and way.done["drop"] < 40:
        with suppress(Unreachable):
            message = node.receive()
    assert message is not None
    assert_carried(message.content)
    assert 3 < way.done["drop"] < 15
    reply = reply_to(message)
    while way.done["drop"] < 80:
        with suppress(Unreachable):
            node.send(reply, 0.0)
            break
    (reply,) = fleet.grid.pull_messages([message_id])
    assert_carried(reply.content)
    node.leave()
    way.close()


def test_pieces_that_do_not_fit_each_other_are_no_object(fleet, monkeypatch):
    node = fleet.node()
    fleet.message(node)
    pull = node._transport.PullObject

    def pull_another(request):
        response = pull(request)
        if len(response.object_content) > 1000:
            response.object_content = b"?" + response.object_content[1:]
        return response

    node._piece_size = 2**18
    with monkeypatch.context() as broken:
        broken.setattr(node._transport, "PullObject", pull_another)
        with pytest.raises(Unreachable, match="do not fit each other"):
            node.receive()
    assert_carried(node.receive().content)


@pytest.mark.parametrize("asked", ["0-0", "7-3", "-1-5", "a-b", "1", "0-99999999999999999999"])
def test_bytes_that_nobody_has(fleet, asked: str):
    node = fleet.node()
    fleet.message(node)
    pulled = node._transport.PullMessages(fleet_pb2.PullMessagesRequest(node=node._node))
    request = message_pb2.PullObjectRequest(
        node=node._node,
        run_id=fleet.link.run_id,
        object_id=pulled.message_object_trees[0].object_id,
    )
    node._transport.byte_range = asked
    response = node._transport.PullObject(request)
    assert response.object_available
    assert bool(response.object_content) == (asked not in ("0-0", "7-3"))


def test_a_reply_may_take_longer_than_flower_lets_it(fleet, monkeypatch):
    monkeypatch.setattr(in_memory_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 0)
    node = fleet.node()
    message_id = fleet.message(node)
    node.send(reply_to(node.receive()), 0.0)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert_carried(reply.content)


def test_a_reply_counts_days_later(fleet, monkeypatch):
    """Only a round's timeout ends its waiting."""
    node = fleet.node()
    message_id = fleet.message(node)
    message = node.receive()
    later = in_memory_linkstate.now() + datetime.timedelta(days=30)
    monkeypatch.setattr(in_memory_linkstate, "now", lambda: later)
    node.send(reply_to(message), 0.0)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert_carried(reply.content)


def test_a_message_that_could_not_be_confirmed_is_answered_all_the_same(fleet, monkeypatch):
    def down(request):
        raise Unreachable("the network is down")

    node = fleet.node()
    message_id = fleet.message(node)
    monkeypatch.setattr(node._transport, "ConfirmMessageReceived", down)
    node.send(reply_to(node.receive()), 0.0)
    assert len(fleet.grid.pull_messages([message_id])) == 1
    assert len(fleet.link.state.object_store) == 0, "objects stay behind"


def test_a_reply_that_broke_off_can_be_sent_again(fleet, monkeypatch):
    node = fleet.node()
    message_id = fleet.message(node)
    reply = reply_to(node.receive())
    push, pushed = node._transport.PushObject, []

    def push_and_break(request):
        pushed.append(push(request))
        if len(pushed) == 3:
            raise Unreachable("the network is down")
        return pushed[-1]

    monkeypatch.setattr(node._transport, "PushObject", push_and_break)
    with pytest.raises(Unreachable):
        node.send(reply, 0.0)
    assert list(fleet.grid.pull_messages([message_id])) == []
    node.send(reply, 0.0)
    (received,) = fleet.grid.pull_messages([message_id])
    assert_carried(received.content)


def test_a_node_whose_connection_breaks_and_comes_back_stays_online(fleet):
    node = fleet.node()
    received, connections = [], []
    connect = node._transport._connect
    node._transport._connect = lambda: connections.append(connect()) or connections[-1]

    def receive():
        with suppress(Unreachable):
            node.receive()
        received.append(node.receive())

    waiting = threading.Thread(target=receive)
    waiting.start()
    while not fleet.link._open_polls[node.node_id]:
        time.sleep(0.01)
    connections[0].sock.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert list(fleet.grid.get_node_ids()) == [node.node_id]
        time.sleep(0.05)
    message_id = fleet.message(node)
    waiting.join(10)
    assert received[0].metadata.message_id == message_id


def test_a_node_whose_next_connection_breaks_too_is_given_time_for_another(fleet):
    node, link = fleet.node(), fleet.link
    poll_count = link._poll_counts[node.node_id]
    link.begin_poll(node.node_id)
    link.end_poll(node.node_id, is_connected=False)
    link._deactivate_silent(node.node_id, poll_count)
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    link._deactivate_silent(node.node_id, poll_count + 1)
    assert list(fleet.grid.get_node_ids()) == []


def test_a_node_that_did_not_hear_the_answer_registers_again(fleet):
    node = fleet.node()
    known = node.node_id
    message_id = fleet.message(node)
    node.register()
    assert node.node_id == known
    assert list(fleet.grid.get_node_ids()) == [known]
    assert node.receive().metadata.message_id == message_id


def test_a_machine_that_slept_signs_anew(monkeypatch):
    """Its clock on the wall went on, and the monotonic one stood still."""
    import datetime

    with _socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    node = FleetClient("127.0.0.1", port)
    an_hour_ago = transport.utc_now() - datetime.timedelta(hours=1)
    with monkeypatch.context() as then:
        then.setattr(transport, "utc_now", lambda: an_hour_ago)
        then.setattr(transport.time, "time", an_hour_ago.timestamp)
        with pytest.raises(Unreachable):
            node.register()
    with _socket("127.0.0.1", port) as listening, _serving(listening):
        node.register()


def test_nodes_that_could_not_be_heard_are_not_given_up(fleet, monkeypatch):
    from mlx_fed.flower import link_state

    node = fleet.node()
    message_id = fleet.message(node)
    later = time.time() + 3600  # the server's machine slept for an hour
    fleet.link.state.nodes[node.node_id].online_until -= 3600
    monkeypatch.setattr(link_state.time, "time", lambda: later - 3600 + 10)
    fleet.link._last_check -= 3600
    assert list(fleet.grid.pull_messages([message_id])) == []
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    node.send(reply_to(node.receive()), 0.0)
    assert len(fleet.grid.pull_messages([message_id])) == 1


def test_a_clock_that_is_set_back_keeps_no_silent_node(fleet, monkeypatch):
    from mlx_fed.flower import link_state

    node = fleet.node()
    ahead = [3600.0]
    wall, stamp = time.time, in_memory_linkstate.now
    monkeypatch.setattr(link_state.time, "time", lambda: wall() + ahead[0])
    monkeypatch.setattr(
        in_memory_linkstate, "now", lambda: stamp() + datetime.timedelta(seconds=ahead[0])
    )
    fleet.link.state.acknowledge_node_heartbeat(node.node_id, 10)
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    ahead[0] = 0.0
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    ahead[0] = 4.0  # so long without a look, it is not taken for a suspended process
    assert list(fleet.grid.get_node_ids()) == [node.node_id]
    for _ in range(5):
        ahead[0] += 4.0
        fleet.grid.get_node_ids()
    assert list(fleet.grid.get_node_ids()) == []


# -- nodes that mean harm ----------------------------------------------------------------------


def test_a_second_reply_changes_nothing(fleet):
    node = fleet.node()
    message_id = fleet.message(node)
    message = node.receive()
    first, second = reply_to(message, loss=1.0), reply_to(message, loss=2.0)
    node._transport.PushMessages(push_request(node, first))  # announced, and not sent yet
    node.send(second, 0.0)
    assert list(fleet.grid.pull_messages([message_id])) == []
    node.send(first, 0.0)
    (reply,) = fleet.grid.pull_messages([message_id])
    assert reply.content["metrics"]["loss"] == 1.0
    node.send(second, 0.0)  # after all is over


@pytest.mark.parametrize("at", ["not asked", "at work", "sending"])
def test_a_message_whose_time_is_up_is_withdrawn(fleet, monkeypatch, at):
    node = fleet.node()
    dead = Message(RecordDict({"arrays": messages.pack(ARRAYS)}), node.node_id, MessageType.TRAIN)
    received = []

    def work(timeout):
        """What the node does until the deadline."""
        if at != "not asked":
            received.append(node.receive())
        if at == "sending":
            node._transport.PushMessages(push_request(node, reply_to(received[0])))
        time.sleep(timeout)

    monkeypatch.setattr(fleet.grid, "wait", work)
    closing = QuorumClosing(RunSettings(round_timeout=0.4))
    names = {node.node_id: "node-0"}
    answers = exchange(fleet.grid, [dead], names, closing, "train", lambda _: None)
    missing = dict(answers)
    assert missing == {"node-0": "no reply within 0 seconds: one that comes later is dropped"}
    assert len(fleet.link.state.object_store) == 0, "objects stay behind"

    for message in received:
        node.send(reply_to(message), 0.0)  # too late
    message_id = fleet.message(node)
    message = node.receive()
    assert message.metadata.message_id == message_id
    node.send(reply_to(message), 0.0)
    assert len(fleet.grid.pull_messages([message_id])) == 1
    assert len(fleet.link.state.object_store) == 0, "objects stay behind"


def test_a_reply_to_nothing_changes_nothing(fleet):
    node = fleet.node()
    reply = reply_to(Message(RecordDict(), node.node_id, MessageType.TRAIN))
    reply.metadata.__dict__["_src_node_id"] = node.node_id
    request = push_request(node, reply, reply_to_message_id="0" * 64)
    assert not node._transport.PushMessages(request).objects_to_push
    assert not fleet.link.replies


@pytest.mark.parametrize("pose", ["another node", "the server", "nobody"])
def test_a_node_cannot_send_in_anothers_name(fleet, pose):
    node, other = fleet.node(), fleet.node()
    message_id = fleet.message(other)
    reply = reply_to(other.receive())
    changes = {
        "another node": {"src_node_id": other.node_id},
        "the server": {
            "src_node_id": SUPERLINK_NODE_ID,
            "dst_node_id": other.node_id,
            "reply_to_message_id": "",
        },
        "nobody": {"src_node_id": node.node_id, "reply_to_message_id": ""},
    }[pose]
    with pytest.raises(RequestRefused) as refusal:
        node._transport.PushMessages(push_request(node, reply, **changes))
    assert refusal.value.status == 403
    assert list(fleet.grid.pull_messages([message_id])) == []
    other.send(reply, 0.0)
    assert len(fleet.grid.pull_messages([message_id])) == 1


@pytest.mark.parametrize("sent", ["an array", "another message", "a broken record"])
def test_a_reply_that_cannot_be_read_counts_as_an_error(fleet, sent):
    node, other = fleet.node(), fleet.node()
    message_id, others = fleet.message(node), fleet.message(other)
    reply, root = reply_to(node.receive()), None
    if sent == "an array":
        root = reply.content["arrays"]
    elif sent == "another message":
        root = reply_to(other.receive())
    else:
        content = MetricRecord({"n": 1}).deflate().replace(b"MetricRecord", b"MetricTecord")
        tree = ObjectTree(object_id=get_object_id(content))
    objects = {} if root is None else get_all_nested_objects(root)
    contents = {i: item.deflate() for i, item in objects.items()}
    if root is None:
        contents = {tree.object_id: content}
    else:
        tree = get_object_tree(root)
    request = push_request(node, reply, message_id=tree.object_id)
    request.message_object_trees[0].CopyFrom(tree)
    response = node._transport.PushMessages(request)
    for object_id in response.objects_to_push:
        with suppress(RequestRefused):
            node._transport.PushObject(
                message_pb2.PushObjectRequest(
                    node=node._node,
                    run_id=fleet.link.run_id,
                    object_id=object_id,
                    object_content=contents[object_id],
                    session_id=response.session_id,
                )
            )
    replies = fleet.grid.pull_messages([message_id, others])
    if sent == "a broken record":  # Flower's store has refused it
        assert replies == []
    else:
        (answer,) = replies
        assert answer.metadata.reply_to_message_id == message_id
        assert "the reply cannot be read" in answer.error.reason


def test_another_run_is_forbidden(fleet):
    node = fleet.node()
    for send in (node._transport.PullObject, node._transport.PushObject):
        request = {
            "PullObject": message_pb2.PullObjectRequest,
            "PushObject": message_pb2.PushObjectRequest,
        }[send.__name__]
        with pytest.raises(RequestRefused) as refusal:
            send(request(node=node._node, run_id=1, object_id="0" * 64))
        assert refusal.value.status == 403
    node._run_id = 1
    assert not node.run_has_ended(), "a run of another server says nothing about this one's"


def test_flowers_own_client_speaks_with_our_routes(fleet):
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supernode.fleet_http_connection import http_request_response

    address = f"127.0.0.1:{fleet.port}"
    with http_request_response(address, insecure=True) as connection:
        _, receive, send, get_run, _, pull, push, confirm = connection
        (node_id,) = fleet.grid.get_node_ids()
        assert receive() is None
        content = RecordDict({"arrays": messages.pack(ARRAYS)})
        (message_id,) = fleet.grid.push_messages([Message(content, node_id, MessageType.TRAIN)])
        envelope, tree = receive()
        run_id = envelope.metadata.run_id
        assert get_run(run_id).run_id == fleet.link.run_id
        contents = {t.object_id: pull(run_id, t.object_id) for t in iterate_object_tree(tree)}
        confirm(run_id, message_id)
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id
        assert_carried(message.content)
        reply = reply_to(message)
        objects = get_all_nested_objects(reply)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = send(reply, get_object_tree(reply), 0.1)
        for object_id, item in objects.items():
            if object_id in wanted:
                push(run_id, session, object_id, item.deflate())
    (received,) = fleet.grid.pull_messages([message_id])
    assert_carried(received.content)


def test_only_fleet_routes_answer(fleet):
    """All of Flower's, with its own request types."""
    fleet_routes = {
        path: kind for (_, path), kind in PROTOBUF_REQUEST_TYPES.items() if path.startswith(PREFIX)
    }
    assert {path: kind for path, (kind, _) in HANDLERS.items()} == fleet_routes
    others = [path for _, path in PROTOBUF_REQUEST_TYPES if path not in fleet_routes]
    assert len(others) > 50
    for path in (*others, "/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/"):
        assert fleet.post(path)[0] == 404, path


def test_nothing_is_answered_without_a_signature(fleet):
    for method, path in PROTOBUF_REQUEST_TYPES:
        if path.startswith("/v1/fleet/"):
            assert method == "POST"
            assert fleet.post(path)[0] == 401, path


def test_a_node_speaks_for_itself_only(fleet):
    node, other = fleet.node(), fleet.node()
    request = heartbeat_pb2.SendNodeHeartbeatRequest(
        node=node_pb2.Node(node_id=other.node_id), heartbeat_interval=10
    )
    for _ in range(2):  # the second time from the cache of signatures
        with pytest.raises(RequestRefused) as refusal:
            node._transport.SendNodeHeartbeat(request)
        assert refusal.value.status == 401
        node._transport.GetRun  # noqa: B018
    again = fleet_pb2.RegisterNodeFleetRequest(public_key=other._transport.public_key)
    with pytest.raises(RequestRefused):
        node._transport.RegisterNode(again)


def test_an_old_signature_is_refused(fleet, monkeypatch):
    import datetime

    node = fleet.node()
    an_hour_ago = transport.utc_now() - datetime.timedelta(hours=1)
    monkeypatch.setattr(transport, "utc_now", lambda: an_hour_ago)
    node._transport._signed_at = 0.0
    with pytest.raises(Unreachable, match="this node's clock is 3600 s behind the server's"):
        node.receive()
    monkeypatch.undo()
    node._transport._signed_at = 0.0
    message_id = fleet.message(node)
    assert node.receive().metadata.message_id == message_id


def test_requests_that_are_not_ones(fleet):
    headers = fleet.node()._transport._signed_headers()
    del headers["content-type"]
    assert fleet.post("/v1/fleet/register-node", b"\xff\xff\xff", **headers)[0] == 400
    html = {"content-type": "text/html"}
    assert fleet.post("/v1/fleet/register-node", b"", **html)[0] == 415
    for header in ({}, headers):  # a stranger's body is not looked at
        connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=20)
        connection.putrequest("POST", "/v1/fleet/push-object")
        for name, value in ({"content-type": PROTOBUF_MEDIA_TYPE} | header).items():
            connection.putheader(name, value)
        connection.putheader("content-length", str(2**40))
        connection.endheaders()
        assert connection.getresponse().status == (413 if header else 401)


def test_an_object_that_nobody_announced_is_not_stored(fleet):
    node = fleet.node()
    response = node._transport.PushObject(
        message_pb2.PushObjectRequest(
            node=node._node, run_id=fleet.link.run_id, object_id="0" * 64, object_content=b"x"
        )
    )
    assert not response.stored
    assert len(fleet.link.state.object_store) == 0


def test_after_its_end_a_run_is_forbidden_as_on_a_superlink(fleet):
    node = fleet.node()
    fleet.message(node)
    node.receive()
    assert not node.run_has_ended()
    fleet.link.close()
    assert node.run_has_ended()


def test_a_server_that_is_not_there():
    with _socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unreachable):
        FleetClient("127.0.0.1", port).register()
