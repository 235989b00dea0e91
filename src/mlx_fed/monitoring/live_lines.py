"""The live lines at the foot of a terminal: a bar for each thing that goes on just now."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn


class LiveLines:
    """Shows lines while there are any; where the output is no terminal it shows nothing.

    Args:
        console (Console): Where.
    """

    def __init__(self, console: Console):
        self.is_shown = console.is_terminal
        self.progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", style="cyan", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self.is_shown,
        )
        self.lines: dict[str, Task] = {}

    def show(
        self, name: str, text: str, done: float | None = None, of: float | None = None
    ) -> None:
        """Shows a line, or what has become of it.

        Args:
            name (str): By which it is known here.
            text (str): What it says beside the bar.
            done (float, optional): How far it has come.
            of (float, optional): Of how much. Default: that is not known.
        """
        known = name in self.lines and (of is not None or self.lines[name].total is None)
        if not known:
            self._remove(name)
            line = self.progress.add_task(text, total=of)
            self.lines[name] = next(task for task in self.progress.tasks if task.id == line)
        line = self.lines[name].id
        self.progress.update(line, description=text, completed=done, total=of)
        self.progress.start()

    def drop(self, name: str) -> None:
        """Takes a line away."""
        self._remove(name)
        if not self.lines:
            self.close()

    def _remove(self, name: str) -> None:
        if name in self.lines:
            self.progress.remove_task(self.lines.pop(name).id)

    def close(self) -> None:
        """Takes all away, until there is something to show again."""
        self.progress.stop()
