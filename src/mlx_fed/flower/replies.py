"""A reply that carries an error, with Flower's code for it."""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

_GONE = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


def error_reply(message: Message, error: Exception) -> Message:
    """A reply that says in a line why there is no result."""
    return failed_reply(message, f"{type(error).__name__}: {error}")


def failed_reply(message: Message, reason: str) -> Message:
    """A reply that gives the reason why there is no result."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def is_of_gone_node(reply: Message) -> bool:
    """Whether Flower answers here for a node that is gone, or was when its reply was due."""
    return reply.has_error() and reply.error.code in _GONE
