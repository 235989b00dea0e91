"""Progress of downloads, decoding and tokenizing, from :mod:`mlx_fed.system.loading`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import filesize
from rich.console import Console

from ..events import Event, LoadFinished, LoadProgress
from ..system.loading import loading_listeners
from ..system.printable import printable
from .output import print_line
from .progress_bars import ProgressBars
from .units import format_seconds


class LoadingBars:
    """Listener for loading events: a bar on a terminal; in a file a line at start and at end."""

    def __init__(self, console: Console, bars: ProgressBars):
        self.console, self.bars = console, bars
        self.started: set[str] = set()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, (LoadProgress, LoadFinished)):
            return
        name = printable(event.what)
        if self.bars.is_shown:
            if isinstance(event, LoadProgress):
                self.bars.update(name, f"{name}{_amount(event)}", event.done, event.of)
            else:
                self.bars.remove(name)
        elif isinstance(event, LoadFinished):
            self.started.discard(name)
            print_line(self.console, f"{name}: done in {format_seconds(event.seconds)}")
        elif name not in self.started:
            self.started.add(name)
            print_line(self.console, f"{name} ...")


@contextmanager
def show_loading(console: Console) -> Iterator[None]:
    """Shows loading events on a console until the context ends."""
    bars = ProgressBars(console)
    try:
        with loading_listeners(LoadingBars(console, bars)):
            yield
    finally:
        bars.close()


def _amount(event: LoadProgress) -> str:
    count, of, unit = event.done, event.of, event.unit
    if not count and not of:
        return ""
    if unit == "B":
        return f"  {filesize.decimal(count)}" + (f" of {filesize.decimal(of)}" if of else "")
    return f"  {count:,}" + (f" of {of:,}" if of else "") + (f" {unit}" if unit else "")
