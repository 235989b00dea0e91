"""Calls of a task's functions, with a word on where one is that does not take its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import TaskError


def call(what: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What a task's function returns.

    Args:
        what (str): The function, for messages: ``"Task.data"``.
        function (callable): The function.
        arguments: Its arguments.
        settings: Its arguments by name.

    Raises:
        TaskError: If it does not take these arguments, with the line that defines it.
        Exception: What the function raises.
    """
    try:
        return function(*arguments, **settings)
    except TypeError as error:
        if _takes(function, arguments, settings):
            raise
        raise TaskError(f"{what}{_line_of(function)}: {error}") from error


def _takes(function: Callable[..., Any], arguments: Any, settings: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments, **settings)
    except TypeError:
        return False
    except ValueError:  # a built-in function, which does not say what it takes
        pass
    return True


def _line_of(function: Callable[..., Any]) -> str:
    """Where a function is defined: `` (task.py, line 12)``."""
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
