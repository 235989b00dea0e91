"""A server that asks a node for more than its machine has: it takes no more than its model."""

from __future__ import annotations

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from mlx_fed.fleet.model_size import ModelSize
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import fleet_client, one_run_grid
from mlx_fed.flower.fleet_client import MessageTooLarge
from mlx_fed.flower.transport import Unreachable
from mlx_fed.rounds import messages
from mlx_fed.training import batches
from mlx_fed.training.trainer import Trainer

from ..helpers.fleet_routes import Fleet
from ..helpers.tasks import moons

MEGABYTE = 2**20
TASK = moons({})


@pytest.fixture
def fleet(tmp_path):
    with _socket("127.0.0.1", 0) as listening, _serving(listening) as link:
        fleet = Fleet(link, listening.getsockname()[1])
        yield fleet
        for client in fleet.clients:
            client.leave()


def arrays(count: int, different: bool = True) -> RecordDict:
    """A message of arrays of 1 MB."""
    values = {
        f"array-{number}": mx.full((MEGABYTE // 4,), float(number if different else 0))
        for number in range(count)
    }
    return RecordDict({"arrays": messages.pack(values)})


@pytest.mark.parametrize(
    ("kind", "model_bytes"),
    [(MessageType.TRAIN, 2 * MEGABYTE), (MessageType.EVALUATE, 0), (messages.ROLL_CALL, 2**40)],
)
def test_a_message_larger_than_the_model_is_refused_while_it_comes(
    fleet, monkeypatch, kind, model_bytes
):
    monkeypatch.setattr(fleet_client, "_SPARE", 4 * MEGABYTE)
    node = fleet.node(model_bytes=lambda: model_bytes)
    fleet.message(node, arrays(60), kind)
    pulled: list[int] = []
    pull = node._pull_object
    monkeypatch.setattr(
        node, "_pull_object", lambda *a: pulled.append(len(content := pull(*a))) or content
    )
    with pytest.raises(MessageTooLarge, match="times this node's model"):
        node.receive()
    assert sum(pulled) <= 4 * MEGABYTE + 4 * 2 * MEGABYTE + 6 * MEGABYTE


def test_a_message_of_the_models_size_comes_through(fleet, monkeypatch):
    monkeypatch.setattr(fleet_client, "_SPARE", MEGABYTE)
    node = fleet.node(model_bytes=lambda: 16 * MEGABYTE)
    fleet.message(node, arrays(16))
    assert len(messages.unpack(node.receive().content["arrays"])) == 16


def test_an_array_that_names_one_chunk_many_times_is_refused(fleet, monkeypatch):
    monkeypatch.setattr(fleet_client, "_SPARE", 14 * MEGABYTE)
    node = fleet.node(model_bytes=lambda: MEGABYTE)
    fleet.message(node, RecordDict({"arrays": messages.pack({"w": mx.zeros((40 * MEGABYTE,))})}))
    with pytest.raises(Unreachable, match="more bytes than"):
        node.receive()


def test_the_size_of_a_model_is_that_of_its_answer_to_the_roll_call():
    def raises() -> nn.Module:
        raise AssertionError("the model was built")

    size = ModelSize(TASK)
    assert size() == 4 * (16 * 2 + 16 + 2 * 16 + 2)
    answered = ModelSize(fed.Task(raises, TASK.loss, TASK.optimizer, TASK.data))
    answer = ConfigRecord({"parameters": '{"w": [[3, 5], "float32"]}', "statistics": "{}"})
    one_run_grid.begin_run()
    answered.take_answer(Message(RecordDict({"node": answer}), 1, "query.roll_call"))
    assert answered() == 60


@pytest.mark.parametrize("size", [10**9, 10**18, 161])
@pytest.mark.parametrize("local", [{}, {"local-steps": 3}, {"local-epochs": 2}])
def test_a_batch_is_no_larger_than_the_examples(size, local):
    trainer = Trainer(TASK)
    data = batches.load(TASK, 0, None)
    config = {**TASK.config, "server-round": 1, "batch-size": size, **local}
    mx.reset_peak_memory()
    update = trainer.train(trainer.parameters(), trainer.statistics(), data, config)
    assert update.metrics["num-examples"] == 160
    assert mx.get_peak_memory() < 2**26
    steps = list(batches.epoch(160, size, True, 0))
    assert [len(step.indices) for step in steps] == [161 if size == 161 else 160]


def test_padding_is_as_before_where_a_client_has_an_eighth_of_a_batch():
    for number in range(4, 33):
        (step,) = batches.epoch(number, 32, True, None)
        assert len(step.indices) == -(-number // 4) * 4
    (few,) = batches.epoch(3, 32, True, None)
    assert np.array_equal(few.indices, [0, 1, 2])
