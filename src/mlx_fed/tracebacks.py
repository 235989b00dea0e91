"""The traceback of a task's own code: where in it an exception arose."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import mlx.core as mx

_LIBRARIES = tuple(
    str(Path(module).resolve().parent) + os.sep for module in (__file__, str(mx.__file__))
)
_EXCEPTION = re.compile(r"\w*(Error|Exception)(:| in) ")
_VARIABLE = "MLX_FED_TRACEBACK"


def is_exception(reason: str) -> bool:
    """Whether the reason of a failure is an exception of a task's own code."""
    return _EXCEPTION.match(reason) is not None


def user_traceback(error: BaseException) -> str:
    """The traceback of an exception without the frames of this library and of MLX.

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


def _is_library(path: str) -> bool:
    return str(Path(path).resolve()).startswith(_LIBRARIES) or path.startswith("<frozen")
