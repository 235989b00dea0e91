"""The place of an error in a task's code: its traceback, its line, a function's definition."""

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
_EXCEPTION = re.compile(r"\w*(Error|Exception)(:| in) ")
_VARIABLE = "MLX_FED_TRACEBACK"


def is_exception(reason: str) -> bool:
    """Whether the reason of a failure is an exception of a task's own code."""
    return _EXCEPTION.match(reason) is not None


def user_traceback(error: BaseException) -> str:
    """The traceback of an exception without the frames of this library and of installed ones.

    All frames are shown where the environment has ``MLX_FED_TRACEBACK=1``, and where none would be
    left.
    """
    report = traceback.TracebackException.from_exception(error)
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
    """Where a function is defined: `` (task.py, line 12)``; empty of one that does not say."""
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""


def misfit(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str | None:
    """Why a function does not take some arguments, or None if it does or does not say."""
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
