"""A task as a ClientApp: what becomes of the messages that it answers."""

from __future__ import annotations

import mlx_fed as fed

import mlx.core as mx
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from mlx_fed import messages
from mlx_fed.flower import local

from .tasks import moons


def test_parameters_do_not_stay_in_a_message_that_is_trained_from():
    local.begin_run()
    task = moons({})
    arrays = fed.training.Trainer(task).parameters()
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
