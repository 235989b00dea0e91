"""A task as a ClientApp: what becomes of the messages that it answers."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import mlx_fed as fed

import mlx.core as mx
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from mlx_fed.clientapp import raising_app
from mlx_fed.fleet.policy import Policy
from mlx_fed.fleet.policy_gate import Gate
from mlx_fed.rounds import messages
from mlx_fed.training.trainer import Trainer
from mlx_fed.flower import serialize, one_run_grid

from .helpers.tasks import moons


def test_what_is_answered_goes_at_once():
    """Not when garbage is collected, which may be rounds later: it may be large."""
    one_run_grid.begin_run()
    task = moons({})
    app, context = fed.client_app(task), Context(1, 7, {"partition-id": 0}, RecordDict(), {})
    config = ConfigRecord({**task.config, "server-round": 1})
    for kind in (MessageType.EVALUATE, MessageType.TRAIN):
        record = messages.pack(Trainer(task).parameters())
        gone = [weakref.ref(array) for array in record.values()]
        message = Message(RecordDict({"arrays": record, "config": config}), 7, kind)
        del record
        gc.collect()
        gc.disable()
        try:
            reply = app(message, context)
            assert not reply.has_error(), reply.error
            assert [each() for each in gone] == [None]
            if kind == MessageType.TRAIN:
                gone = [weakref.ref(array) for array in reply.content["arrays"].values()]
                messages.count_bytes(reply.content)
                serialize.cut_arrays(reply)
                del reply
                assert [each() for each in gone] == [None]
        finally:
            gc.enable()


def test_parameters_do_not_stay_in_a_message_that_is_trained_from():
    one_run_grid.begin_run()
    task = moons({})
    arrays = Trainer(task).parameters()
    config = ConfigRecord({**task.config, "server-round": 1})
    shared = RecordDict({"arrays": messages.pack(arrays), "config": config})
    app = fed.client_app(task)
    context = Context(1, 7, {"partition-id": 0}, RecordDict(), {})
    replies = []
    for kind in (MessageType.EVALUATE, MessageType.TRAIN, MessageType.TRAIN):
        message = Message(shared, 7, kind)
        replies.append(app(message, context))
        assert not replies[-1].has_error(), replies[-1].error
        assert list(message.content) == ["config"]
    assert sorted(shared) == ["arrays", "config"]  # another message may have the same content
    first, second = (messages.unpack(reply.content["arrays"]) for reply in replies[1:])
    assert list(first) == list(arrays)
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert not any(mx.array_equal(first[name], arrays[name]) for name in first)


def test_nothing_holds_the_parameters_of_a_message_while_they_are_trained():
    """They may be large: once is enough, also with mods and a gate around training."""
    one_run_grid.begin_run()
    held = []

    def optimizer(settings):
        held.append(sent() is not None)
        return moons({}).optimizer(settings)

    task = replace(moons({}), optimizer=optimizer)
    gate = Gate(Policy(), "server:1")
    app = raising_app(task, around=[gate], around_training=[gate.clip])
    config = ConfigRecord({**task.config, "server-round": 1, "seed": 0, "run-id": "run-1"})
    record = messages.pack(Trainer(task).parameters())
    sent = weakref.ref(next(iter(record.values())))
    message = Message(RecordDict({"arrays": record, "config": config}), 7, MessageType.TRAIN)
    del record
    app(message, Context(1, 7, {"partition-id": 0}, RecordDict(), {}))
    assert held == [False]
