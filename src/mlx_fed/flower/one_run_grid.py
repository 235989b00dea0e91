"""Grids of our own: what Flower would set for their messages, and what all of them answer."""

from __future__ import annotations

from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


def begin_run(run_id: int = 1, task_id: int = 1) -> None:
    """Lets this process make messages: Message reads who sends it from here."""
    TaskIdentity.task_id, TaskIdentity.run_id = task_id, run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def number(message: Message, message_id: str) -> None:
    """Gives a message the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id


class OneRunGrid(Grid):
    """What is the same in all grids that are there for one run."""

    def set_run(self, run: Any) -> None:
        raise RuntimeError("This grid has its run already.")

    @property
    def run(self) -> Any:
        raise RuntimeError("This grid's run is not kept by Flower.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """The same as Flower's ``Message(...)``, which is the way to make one."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
