"""Progress bars in the last lines of a terminal, one for each activity, by rich."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn


class ProgressBars:
    """Progress bars on a terminal; nothing where the output is a file or a pipe.

    Args:
        console (Console): The console.
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
        self.tasks: dict[str, Task] = {}

    def update(
        self, name: str, text: str, completed: float | None = None, total: float | None = None
    ) -> None:
        """Adds a bar or changes it.

        Args:
            name (str): The bar's name for later calls.
            text (str): The text beside the bar.
            completed (float, optional): The completed amount.
            total (float, optional): The amount in all. Default: unknown.
        """
        has_total = name in self.tasks and self.tasks[name].total is not None
        if name not in self.tasks or (has_total and total is None):
            self._delete(name)
            number = self.progress.add_task(text, total=total)
            self.tasks[name] = next(task for task in self.progress.tasks if task.id == number)
        number = self.tasks[name].id
        self.progress.update(number, description=text, completed=completed, total=total)
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
