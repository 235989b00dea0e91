"""Progress bars in the last lines of a terminal, one for each activity, by rich."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.segment import ControlType, Segment

_WIDE = 72
"""Columns of a terminal with room for more than the text."""


def _control(text: str) -> Segment:
    return Segment(text, None, [(ControlType.CARRIAGE_RETURN,)])


class _Erasure:
    """Erases the cursor's line and all lines below it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # From the second column: tmux takes an erasure from the first cell on for a new screen.
        yield _control("\r \x1b[J\r")


@dataclass
class _Lines:
    """Lines of text; the cursor returns to the start of the first one."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.content, options, pad=False)[: options.size.height - 1]
        # Without automatic wrapping: the terminal may already be narrower than it has told.
        yield _control("\x1b[?7l")
        for number, line in enumerate(lines):
            if number:
                yield Segment.line()
            yield from line
        yield _control("\r" + "\x1b[A" * (len(lines) - 1) + "\x1b[?7h")


class _ResizableLive(Live):
    """Live display that a change of the terminal's width does not duplicate.

    rich leaves the cursor after the last line and moves it up by as many rows as it has drawn; in
    a narrower terminal the same lines have more rows. Here the cursor is at the start of the first
    line, where terminals keep it, and all below it is erased before the next drawing.
    """

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        if not self.console.is_interactive:
            return renderables
        display = [_Lines(self.get_renderable())] if self.is_started else []
        return [_Erasure(), *renderables, *display]


class ProgressBars:
    """Progress bars on a terminal; nothing where the output is a file or a pipe.

    Args:
        console (Console): The console.
    """

    def __init__(self, console: Console):
        self.is_shown = console.is_terminal
        text = TextColumn("{task.description}", style="cyan", markup=False)
        columns = [SpinnerColumn(), BarColumn(bar_width=24), text, TimeElapsedColumn()]
        self.progress = Progress(
            *(columns if console.width >= _WIDE else [text]),
            console=console,
            disable=not self.is_shown,
        )
        self.progress.live = _ResizableLive(
            console=console, transient=True, get_renderable=self.progress.get_renderable
        )
        self.tasks: dict[str, Task] = {}

    def update(
        self, name: str, text: str, amount: float | None = None, total: float | None = None
    ) -> None:
        """Adds a bar or changes it.

        Args:
            name (str): The bar's name for later calls.
            text (str): The text beside the bar.
            amount (float, optional): The completed amount.
            total (float, optional): The amount in all. Default: unknown.
        """
        has_total = name in self.tasks and self.tasks[name].total is not None
        if name not in self.tasks or (has_total and total is None):
            self._delete(name)
            number = self.progress.add_task(text, total=total)
            self.tasks[name] = next(task for task in self.progress.tasks if task.id == number)
        number = self.tasks[name].id
        self.progress.update(number, description=text, completed=amount, total=total)
        self.progress.start()

    def remove(self, name: str) -> None:
        """Removes a bar."""
        self._delete(name)
        if not self.tasks:
            self.close()

    def _delete(self, name: str) -> None:
        if name in self.tasks:
            self.progress.remove_task(self.tasks.pop(name).id)

    def close(self) -> None:
        """Removes all bars from the terminal, until the next update."""
        self.progress.stop()
