"""Messages that stay in this process: what a Flower run would set, and their ids."""

from __future__ import annotations

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity


def begin_run() -> None:
    """Lets this process make messages: Message reads who sends it from here."""
    TaskIdentity.task_id = TaskIdentity.run_id = 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def number(message: Message, message_id: str) -> None:
    """Gives a message the id that its reply will refer to."""
    message.metadata.__dict__["_message_id"] = message_id
