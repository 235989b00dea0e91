"""Calls of a task's functions, whose errors name one that does not take its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import TaskError
from ..tracebacks import definition, misfit


def call(what: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """The result of one of a task's functions.

    Args:
        what (str): The function, for messages: ``"Task.data"``.
        function (callable): The function.
        arguments: Its arguments.
        settings: Its arguments by name.

    Raises:
        TaskError: If it does not take these arguments, with the line that defines it.
        Exception: Any that the function raises.
    """
    try:
        return function(*arguments, **settings)
    except TypeError as error:
        if misfit(function, *arguments, **settings) is None:
            raise
        raise TaskError(f"{what}{definition(function)}: {error}") from None
