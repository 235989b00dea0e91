"""The traceback of a task's own code: where in it an exception arose."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

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
    shown = traceback.TracebackException.from_exception(error)
    if os.environ.get(_VARIABLE, "") in ("", "0"):
        frames = [frame for frame in shown.stack if not _is_library(frame.filename)]
        if frames:
            shown.stack = traceback.StackSummary.from_list(frames)
        shown.__cause__ = shown.__context__ = None
    return "".join(shown.format()).rstrip()


def location(error: BaseException) -> tuple[str, int] | None:
    """The name of the file and the line of a task's own code in which an exception arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(frame.filename):
            return Path(frame.filename).name, frame.lineno or 0
    return None


def _is_library(filename: str) -> bool:
    """Whether a frame is of this package, of an installed one or of Python itself."""
    if filename.startswith("<frozen"):
        return True
    path = Path(filename).resolve()  # "<ipython-input-1>" and the like are the user's
    installed = "site-packages" in path.parts or _STANDARD_LIBRARY in path.parents
    return installed or _PACKAGE in path.parents
