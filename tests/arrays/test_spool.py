"""Large arrays wait on disk, one reply's worth of memory at a time, and nothing stays behind."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from mlx_fed.rounds import exchange, messages
from mlx_fed.rounds.closing import QuorumClosing
from mlx_fed.rounds.settings import RunSettings
from mlx_fed.arrays import spool
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import one_run_grid
from mlx_fed.flower.link_state import Link
from mlx_fed.arrays.flower_records import (
    SegmentedArray,
    SpooledBytes,
    array_values,
    copy_record,
    num_bytes,
)
from mlx_fed.arrays.spool import Spool

from ..helpers.federated import CLIENT, NORMALIZED, difference, federate
from ..helpers.fleet_routes import assert_carried, reply_to, Fleet


@pytest.fixture
def everything(monkeypatch):
    """Nothing is too small to wait on disk."""
    monkeypatch.setattr(spool, "_SMALL", 0)


def in_use(place: Spool) -> set[Path]:
    """The files that something refers to."""
    return {*place.folder.iterdir()}.difference(*place.spare.values())


def test_an_array_that_waits_is_the_same(everything, tmp_path: Path):
    values = np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    plain = Array(values)
    waiting = Spool(tmp_path).put_array(plain)
    assert isinstance(waiting, SegmentedArray)
    assert waiting.data == plain.data
    assert num_bytes(waiting) == len(plain.data)
    assert waiting.object_id == plain.object_id
    for array in (waiting.numpy(), array_values(waiting)):
        np.testing.assert_array_equal(array, values)
    for made in (copy.deepcopy(waiting), pickle.loads(pickle.dumps(waiting))):
        assert type(made) is Array
        assert made.data == plain.data


def test_a_file_is_used_again_when_nothing_refers_to_it(everything, tmp_path: Path):
    place = Spool(tmp_path / "waiting")
    with place.open():
        record = place.put_record([("w", Array(np.ones(3)))])
        other = copy_record(record)
        del record
        gc.collect()
        (path,) = in_use(place)
        assert other["w"].numpy().sum() == 3
        del other
        gc.collect()
        assert in_use(place) == set()
        smaller = place.put_record([("w", Array(np.zeros(2)))])
        assert path not in in_use(place)
        same = place.put_record([("w", Array(np.full(3, 2.0)))])
        assert path in in_use(place)
        assert (smaller["w"].numpy().sum(), same["w"].numpy().sum()) == (0, 6)
    assert not (tmp_path / "waiting").exists()


def test_what_is_small_stays_in_memory(tmp_path: Path):
    place = Spool(tmp_path / "waiting")
    assert place.put(b"few") == b"few"
    assert not (tmp_path / "waiting").exists()


def test_few_files_are_kept_to_be_used_again(everything, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(spool, "_MAX_SPARE", 5)
    place = Spool(tmp_path)
    for size in (3, 2, 1, 3, 2):
        held = [place.put(bytes(size)) for _ in range(2)]
        assert [bytes(each.view()) for each in held] == [bytes(size)] * 2
        del held
        gc.collect()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5


def test_what_a_disk_does_not_take_stays_in_memory(everything, tmp_path: Path, caplog):
    (tmp_path / "waiting").write_text("in the way")
    place = Spool(tmp_path / "waiting")
    assert place.put(b"some") == b"some"
    assert "stay in memory" in caplog.text
    assert place.put(b"more") == b"more"


def test_a_file_is_not_written_over_while_somebody_looks_at_it(everything, tmp_path: Path):
    place = Spool(tmp_path)
    view = place.put(b"before").view(1)
    other = place.put(b"behind")
    assert (bytes(view), bytes(other.view())) == (b"efore", b"behind")
    del view
    again = place.put(b"beyond")
    assert bytes(again.view(2, 4)) == b"yo"
    assert len([*tmp_path.iterdir()]) == 2


def test_a_file_that_is_not_what_was_written_is_said(everything, tmp_path: Path):
    held = Spool(tmp_path).put(b"whole")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"half")
    with pytest.raises(OSError, match="shorter than the bytes written"):
        held.view()


def test_where_a_disk_takes_no_more_the_room_of_what_is_not_needed_is_used(
    everything, little_room, tmp_path: Path, caplog
):
    """A limit on a file's size stands for a full disk: it is what some are too large for."""
    place = Spool(tmp_path)
    needed_no_more = [place.put(bytes(100)) for _ in range(2)]
    del needed_no_more
    gc.collect()
    assert len([*tmp_path.iterdir()]) == 2
    large = bytes(2**17)
    assert place.put(large) == large
    assert [*tmp_path.iterdir()] == []
    assert place.put(large) == large
    assert isinstance(place.put(bytes(100)), SpooledBytes)
    assert caplog.text.count("stay in memory") == 1


@pytest.mark.parametrize("kind", [FedAvg, FedAdam, FedMedian])
def test_a_run_has_the_same_bits_and_leaves_nothing(kind, monkeypatch, tmp_path: Path):
    apps = [fed.client_app(NORMALIZED)] * 5
    expected = federate(kind(), tmp_path / "memory", apps, task=NORMALIZED)
    monkeypatch.setattr(spool, "_SMALL", 0)
    folder = tmp_path / "disk"
    (folder / "waiting").mkdir(parents=True)
    (folder / "waiting" / "of-a-run-that-was-killed").write_text("half")
    seen = 0

    def listener(event: events.Event) -> None:
        nonlocal seen
        seen = max(seen, len(list((folder / "waiting").glob("[0-9]*"))))

    result = federate(kind(), folder, apps, task=NORMALIZED, listener=listener)
    assert difference(result.parameters, expected.parameters) == 0
    assert difference(result.statistics, expected.statistics) == 0
    assert seen > 0
    assert not (folder / "waiting").exists()


def test_a_run_goes_on_from_masters_on_disk(everything, tmp_path: Path):
    expected = federate(FedAdam(), tmp_path / "one", (CLIENT,) * 3)
    federate(FedAdam(), tmp_path / "two", (CLIENT,) * 3, num_rounds=2)
    result = federate(FedAdam(), tmp_path / "two", (CLIENT,) * 3, resume=True)
    assert difference(result.parameters, expected.parameters) == 0


class Scattered(one_run_grid.OneRunGrid):
    """A grid whose replies come one at a time, in a given order."""

    def __init__(self, order: list[int]):
        one_run_grid.begin_run()
        self.order = order

    def push_messages(self, messages):
        self.messages = {str(n): message for n, message in enumerate(messages)}
        for number, message in self.messages.items():
            one_run_grid.set_message_id(message, number)
        return list(self.messages)

    def pull_messages(self, message_ids):
        for place in self.order:
            if str(place) in message_ids:
                arrays = ArrayRecord({"w": Array(np.full(4, place))})
                reply = Message(RecordDict({"arrays": arrays}), reply_to=self.messages[str(place)])
                reply.metadata.__dict__["_reply_to_message_id"] = str(place)
                return [reply]
        return []

    def get_node_ids(self):
        return []

    def send_and_receive(self, messages, *, timeout=None):
        return []


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_replies_are_given_in_order_and_early_ones_wait(everything, order, tmp_path: Path):
    place = Spool(tmp_path)
    one_run_grid.begin_run()
    outgoing = [Message(RecordDict(), node_id, "train") for node_id in (10, 11, 12)]
    names = {10: "a", 11: "b", 12: "c"}
    came: list[str] = []
    given = []
    for name, reply in exchange.exchange(
        Scattered(list(order)),
        outgoing,
        names,
        QuorumClosing(RunSettings(round_timeout=5.0)),
        "train",
        came.append,
        place,
    ):
        assert outgoing == []
        values = reply.content["arrays"]["w"].numpy()
        assert isinstance(reply.content["arrays"]["w"], SegmentedArray)
        given.append((name, int(values[0]), len(came)))
    assert [(name, value) for name, value, _ in given] == [("a", 0), ("b", 1), ("c", 2)]
    # Each is given as soon as those before it are there.
    assert [count for *_, count in given] == [
        max(order.index(place) for place in range(last + 1)) + 1 for last in range(3)
    ]
    del reply
    gc.collect()
    assert in_use(place) == set()


def test_objects_of_messages_wait_on_disk_and_go(everything, tmp_path: Path):
    place = Spool(tmp_path / "waiting")
    with _socket("127.0.0.1", 0) as listening, _serving(listening, spool=place) as link:
        fleet = Fleet(link, listening.getsockname()[1])
        node = fleet.node()
        message_id = fleet.message(node)
        held = [entry.content for entry in link.store.store.values()]
        assert any(isinstance(content, SpooledBytes) for content in held)
        del held
        received = node.receive()
        assert_carried(received.content)
        node.send(reply_to(received), 0.0)
        (reply,) = fleet.grid.pull_messages([message_id])
        record = messages.parameters_of(reply.content)[1]
        assert all(isinstance(array, SegmentedArray) for array in record.values())
        assert_carried(reply.content)
        assert len(link.store) == 0
        del reply, record
        gc.collect()
        assert in_use(place) == set()
        link.finish()
        node.leave()


def test_a_link_without_a_place_keeps_all_in_memory():
    link = Link()
    assert link.spool.folder is None
    link.close()


@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3, 4)])
def test_values_wait_in_the_bytes_that_flower_would_have(everything, shape, tmp_path: Path):
    values = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    waiting = Spool(tmp_path).put_values(values)
    assert isinstance(waiting, SegmentedArray)
    plain = Array(values)
    assert (waiting.data, waiting.dtype) == (plain.data, plain.dtype)
    assert (waiting.shape, waiting.stype) == (plain.shape, plain.stype)
