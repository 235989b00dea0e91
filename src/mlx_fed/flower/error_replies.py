"""Error replies: Flower's ``Message`` with an ``Error`` in place of content."""

from __future__ import annotations

import traceback
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from ..errors import FedError
from ..tracebacks import failure_reason

_PACKAGE = Path(__file__).parents[1]

_MISSING = (
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
)


def error_reply(message: Message, error: Exception, with_text: bool = True) -> Message:
    """The error reply to a message whose handling raised an exception.

    Args:
        message (Message): The message.
        error (Exception): What was raised.
        with_text (bool): Whether to send the exception's text, which may hold data. Otherwise
            its type and the line of the user's code that raised it are sent, and in full what
            this package says itself.
    """
    if with_text or _is_ours(error):
        return failed_reply(message, failure_reason(error))
    summary = failure_reason(error, with_text=False)
    return failed_reply(message, f"{summary}: what it says stays on the node (--share-errors)")


def _is_ours(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or _PACKAGE in Path(frames[-1].filename).parents
    return isinstance(error, FedError) and ours and error.__cause__ is None


def failed_reply(message: Message, reason: str, missing: bool = False) -> Message:
    """The error reply with a reason; ``missing`` stands for a reply that never came."""
    code = ErrorCode.NODE_UNAVAILABLE if missing else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code, reason), reply_to=message)


def is_missing(reply: Message) -> bool:
    """Whether the reply stands for one that never came: its node is offline, or was late."""
    return reply.has_error() and reply.error.code in _MISSING


def explain_missing(reply: Message) -> Message:
    """Flower's error for the reply of a node that is offline, with a reason in words."""
    if is_missing(reply):
        reply.error = Error(
            reply.error.code, "it left, or its connection broke, before it had replied"
        )
    return reply
