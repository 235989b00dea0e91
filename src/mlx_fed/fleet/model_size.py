"""Size of a node's model, by which the messages that it takes are limited."""

from __future__ import annotations

import json

from flwr.app import ConfigRecord, Message

from ..arrays import named_arrays
from ..arrays.flower_records import records_in
from ..task import Task
from ..training.trainer import Trainer

_KINDS = ("parameters", "statistics")


class ModelSize:
    """Bytes of the arrays of a task's model that travel.

    They are known from the node's answer to the roll call. For a server that sends none the model
    is built.

    Args:
        task (Task): The task.
    """

    def __init__(self, task: Task):
        self.task = task
        self._bytes: int | None = None

    def __call__(self) -> int:
        if self._bytes is None:
            trainer = Trainer(self.task)
            specs = trainer.spec, trainer.all_statistics_spec
            self._bytes = sum(named_arrays.size(spec)["bytes"] for spec in specs)
        return self._bytes

    def take_answer(self, answer: Message) -> None:
        """Takes the size from this node's answer to a roll call, if the model is in it."""
        for record in records_in(answer.content, ConfigRecord).values():
            if all(kind in record for kind in _KINDS):
                specs = [json.loads(str(record[kind])) for kind in _KINDS]
                self._bytes = sum(named_arrays.size(spec)["bytes"] for spec in specs)
