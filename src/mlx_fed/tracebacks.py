"""The place of an error in a task's code: traceback, line, reason of a failure, definition."""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_STANDARD_LIBRARY = Path(os.__file__).resolve().parent
_EXCEPTION = re.compile(r"(\w*(?:Error|Exception))(?:: | \()")
_PLACE = re.compile(r"\(\S+, line \d+\)")
_VARIABLE = "MLX_FED_TRACEBACK"


def is_exception(reason: str) -> bool:
    """Whether the reason of a failure is an exception of a task's own code."""
    return _EXCEPTION.match(reason) is not None


def is_same_failure(one: str, other: str) -> bool:
    """Whether two reasons are one mistake: equal, or one type of exception at one line of code.

    The texts of an exception may differ, such as by the name of a client's file.
    """
    types = [match and match[1] for match in (_EXCEPTION.match(one), _EXCEPTION.match(other))]
    places = [_PLACE.findall(one)[-1:], _PLACE.findall(other)[-1:]]
    is_same_line = bool(places[0]) and places[0] == places[1]
    return one == other or (types[0] is not None and types[0] == types[1] and is_same_line)


def failure_reason(error: BaseException, with_text: bool = True) -> str:
    """An exception in a line: its type, its text, and the line of the task's code that raised it.

    Args:
        error (Exception): The exception.
        with_text (bool): Whether to include the exception's text.
    """
    place = location(error)
    if not with_text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file, line = place or (Path(frame.filename).name, frame.lineno)
        return f"{type(error).__name__} ({file}, line {line})"
    suffix = f" ({place[0]}, line {place[1]})" if place else ""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {text}{suffix}"


def user_traceback(error: BaseException) -> str:
    """The traceback of an exception without the frames of this library and of installed ones.

    All frames are shown where the environment has ``MLX_FED_TRACEBACK=1``, and where none would be
    left.
    """
    report = traceback.TracebackException.from_exception(error)
    if isinstance(error, SyntaxError) and location(error) is None:  # it has its own file and line
        return "".join(report.format_exception_only()).rstrip()
    if os.environ.get(_VARIABLE, "") in ("", "0"):
        frames = [frame for frame in report.stack if not _is_library(frame)]
        if frames:
            report.stack = traceback.StackSummary.from_list(frames)
        report.__cause__ = report.__context__ = None
    return "".join(report.format()).rstrip()


def location(error: BaseException) -> tuple[str, int] | None:
    """The name of the file and the line of a task's own code in which an exception arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(frame):
            return Path(frame.filename).name, frame.lineno or 0
    return None


def definition(function: Callable[..., Any]) -> str:
    """Place of a function's definition: `` (task.py, line 12)``; empty if it is unknown."""
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""


def misfit(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str | None:
    """Reason why a function does not take some arguments; None if it does, or is built in."""
    try:
        inspect.signature(function).bind(*arguments, **settings)
    except TypeError as error:
        return str(error)
    except ValueError:  # a built-in function
        pass
    return None


def _is_library(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of this package, of an installed one or of Python itself."""
    is_dataclass = frame.filename == "<string>" and frame.name == "__init__"
    if frame.filename.startswith("<frozen") or is_dataclass:
        return True
    path = Path(frame.filename).resolve()  # "<ipython-input-1>" and the like are the user's
    return (
        "site-packages" in path.parts
        or _STANDARD_LIBRARY in path.parents
        or _PACKAGE in path.parents
    )
