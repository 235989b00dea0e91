"""Text output of a run or a node, which may fail without ending it: a closed pipe, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from ..system.printable import printable
from .progress_bars import ProgressBars

STYLES = {
    "serving": "bold",
    "dashboard": "bold",
    "finished": "bold",
    "resumed": "bold",
    "note": "yellow",
    "joined": "dim",
    "left": "yellow",
    "waiting": "yellow",
    "lost": "yellow",
    "refused": "red",
    "failed": "red",
}
"""The style of an event's line."""
RUN_BAR = "run"
"""Name of the progress bar that shows the current round, phase or task."""


class Output:
    """A listener's output. It stops at the first failure, which standard error reports once."""

    works = True

    def __init__(self, file: IO[str]):
        self.file = file

    def close(self) -> None:
        """Restores the output, such as the cursor of a terminal."""


def stops_at_failure(write: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a method of :class:`Output`: after its first exception, calls do nothing."""

    @wraps(write)
    def guarded(self: Output, *args: Any, **fields: Any) -> None:
        if not self.works:
            return
        try:
            write(self, *args, **fields)
        except Exception as error:
            self.works = False
            self.close()
            if self.file is sys.stdout:
                _discard(sys.stdout)
            print_failure("The output failed and nothing more is shown; the run continues", error)

    return guarded


class _TerminalConsole(Console):
    def on_broken_pipe(self) -> None:
        """Raises, where rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class TerminalOutput(Output):
    """Lines of text, and below them progress bars if the output is a terminal.

    Args:
        console (Console, optional): The console. Default: the standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or _TerminalConsole(highlight=False)
        super().__init__(self.console.file)
        self.bars = ProgressBars(self.console)

    def close(self) -> None:
        """Removes the progress bars from the terminal."""
        with suppress(OSError):  # the output may have failed
            self.bars.close()


def print_line(console: Console, line: str, style: str = "") -> None:
    """Prints a line as plain text: what a node sends (names, reasons) is never read as markup."""
    console.print(Text(printable(line), style=style), soft_wrap=True)
    console.file.flush()


def print_failure(message: str, error: Exception) -> None:
    """Prints on the standard error what a run continues without, as long as that can be read."""
    reason = printable(f"{type(error).__name__}: {error}")
    try:
        print(f"{message}: {reason}", file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _discard(stream: IO[str] | None) -> None:
    """Redirects a stream to the null device: Python's flush at exit would fail otherwise."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        os.close(null)
