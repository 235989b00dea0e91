"""Replies that carry an error, with Flower's code for it."""

from __future__ import annotations

import traceback
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from ..errors import FedError
from ..tracebacks import location

_PACKAGE = Path(__file__).parents[1]

_GONE = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


def error_reply(message: Message, error: Exception, with_text: bool = True) -> Message:
    """A reply that says in a line why there is no result.

    Args:
        message (Message): What there is no result of.
        error (Exception): Why.
        with_text (bool): Whether to send what the exception says, which may hold data. Otherwise
            its type and the line of the user's code that raised it are sent, and in full what
            this package says itself.
    """
    if with_text or _is_ours(error):
        return failed_reply(message, f"{type(error).__name__}: {error}")
    where = f"{type(error).__name__} in {_place(error)}"
    return failed_reply(message, f"{where}; what it says stays on the node (--share-errors)")


def _is_ours(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or _PACKAGE in Path(frames[-1].filename).parents
    return isinstance(error, FedError) and ours and error.__cause__ is None


def _place(error: Exception) -> str:
    """The line that raised, of the user's code if that was at work, without the user's folders."""
    if place := location(error):
        return f"{place[0]}:{place[1]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


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
