"""A reply that carries an error, with Flower's code for it."""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode


def error_reply(message: Message, error: Exception) -> Message:
    """A reply that says in a line why there is no result."""
    return failed_reply(message, f"{type(error).__name__}: {error}")


def failed_reply(message: Message, reason: str) -> Message:
    """A reply that gives the reason why there is no result."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
