"""Replies that carry an error, with Flower's code for it."""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode


def error_reply(message: Message, error: Exception) -> Message:
    """A reply that says in a line why there is no result."""
    return failed_reply(message, f"{type(error).__name__}: {error}")


def failed_reply(message: Message, reason: str, missing: bool = False) -> Message:
    """A reply that gives the reason why there is no result; ``missing`` where none came."""
    code = ErrorCode.NODE_UNAVAILABLE if missing else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, reason), reply_to=message)


def is_missing(reply: Message) -> bool:
    """Whether the reply only stands for one that never came: its node is gone, or was late."""
    gone = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
    return reply.has_error() and reply.error.code in gone
