"""Replies that carry an error, with Flower's code for it."""

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


def failed_reply(message: Message, reason: str, missing: bool = False) -> Message:
    """A reply that gives the reason why there is no result; ``missing`` where none came."""
    code = ErrorCode.NODE_UNAVAILABLE if missing else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, reason), reply_to=message)


def is_missing(reply: Message) -> bool:
    """Whether the reply only stands for one that never came: its node is gone, or was late."""
    return reply.has_error() and reply.error.code in _GONE


def gone(reply: Message) -> Message:
    """What Flower answers for a node that is gone, with a reason for people to read."""
    if is_missing(reply):
        reply.error = Error(
            reply.error.code, "it left, or its connection broke, before it had replied"
        )
    return reply
