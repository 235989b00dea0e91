"""What a run looks like in a terminal: a live line where it is one, plain lines elsewhere."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..runs import folders, round_record
from ..system.loading import watched
from ..system.printable import printable
from ..tracebacks import is_exception
from .live_lines import LiveLines

if TYPE_CHECKING:
    from ..runs.history import Listener

_MOST_FAILURES = 10
"""Lines about nodes that are left out of a phase; an exception is shown once."""
_RUN = "run"
"""The live line that what happens in rounds is shown on."""
_STYLES = {
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


def server_line(event: str, fields: dict[str, Any]) -> str:
    """One event of a run as a line of text; empty for those not worth a line."""
    match event:
        case "serving":
            how = "  (encrypted; nodes are known by their keys)" if fields["secure"] else ""
            return f"Server ready on {fields['address']}{how}"
        case "dashboard":
            return f"Dashboard on {fields['address']}"
        case "invited":
            return f"{fields['node']} joins with:  {fields['command']} {fields['token']}"
        case "waiting":
            return f"Waiting for nodes: {fields['nodes']} of {fields['needed']}"
        case "joined":
            return f"{fields['node']} joined ({fields['nodes']} in all)"
        case "left":
            return f"{fields['node']} left"
        case "refused":
            return f"{fields['node']} refused: {fields['reason']}"
        case "resumed":
            done = fields["round"]
            return f"Going on after round {done}" if done else "Starting over: no round was done"
        case "note":
            return f"Note: {fields['text']}"
        case "failed":
            return f"{fields['node']} left out of {fields['phase']}: {fields['reason']}"
        case "round":
            return _round_line(fields)
        case "finished":
            why = f" ({fields['stopped']})" if fields.get("stopped") else ""
            return f"Finished in {fields['seconds']:.1f} s{why}. The model: {fields['model']}"
    return ""


def node_line(event: str, fields: dict[str, Any]) -> str:
    """One event of a node's life as a line of text; empty for those not worth a line."""
    match event:
        case "ready":
            return f"Data ready (node id {fields['partition']}), computing on {fields['device']}"
        case "waiting":
            return (
                f"No server at {fields['server']} yet: trying again "
                f"for {fields['wait']:.0f} seconds ({fields['reason']})"
            )
        case "note":
            return f"Note: {fields['text']}"
        case "joined":
            return f"Joined {fields['server']}"
        case "lost":
            return f"Lost {fields['server']} ({fields['reason']}): trying again"
        case "failed":
            return f"{_what(fields)} failed: {fields['reason']}"
        case "answered":
            metrics = _floats(fields["metrics"])
            if not metrics:
                return ""
            return "   ".join([_what(fields), *metrics, f"{fields['seconds']:.2f} s"])
        case "finished":
            return "The run is over."
    return ""


def tell_of_failure(message: str, error: Exception) -> None:
    """Says on the standard error of what a run goes on without, while anybody reads it there."""
    why = printable(f"{type(error).__name__}: {error}")
    try:
        print(f"{message}: {why}", file=sys.stderr, flush=True)
    except OSError:
        _write_nowhere(sys.stderr)


def _write_nowhere(stream: IO[str] | None) -> None:
    """Has the rest of a stream go nowhere, or what is left in it would fail when Python ends."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def _while_it_works(show: Callable[..., None]) -> Callable[..., None]:
    """A display's method, which is called for as long as that works: a run goes on without it."""

    @wraps(show)
    def show_or_give_up(self: Display, *args: Any, **fields: Any) -> None:
        if not self.works:
            return
        try:
            show(self, *args, **fields)
        except Exception as error:
            self.works = False
            self.close()
            if self.file is sys.stdout:
                _write_nowhere(sys.stdout)
            tell_of_failure("The output failed and nothing more is shown; all else goes on", error)

    return show_or_give_up


class Display:
    """What a run or a node shows, until its output fails: a pipe that nobody reads any more, a full
    disk. That is said once."""

    works = True

    def __init__(self, file: IO[str]):
        self.file = file

    def close(self) -> None:
        """Leaves the output as it was."""


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Lines(Display):
    """Lines of text, and on a terminal live ones at its foot."""

    def __init__(self, console: Console | None = None):
        self.console = console or _Terminal(highlight=False)
        super().__init__(self.console.file)
        self.live = LiveLines(self.console)
        self.loading = LoadingProgress(self.console, self.live)

    def close(self) -> None:
        """Takes the live lines off the terminal."""
        with suppress(OSError):  # it may be gone
            self.live.close()


class ServerProgress(Lines):
    """Listens to a :class:`~mlx_fed.runs.history.History` and shows the run."""

    def __init__(self, console: Console | None = None):
        super().__init__(console)
        self.folder: Path | None = None
        self.of = 0
        self.failures: dict[str, list[str]] = defaultdict(list)

    @_while_it_works
    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        match event:
            case "loading" | "loaded":
                self.loading(event, fields)
            case "phase" | "replies":
                self._show_phase(**fields)
            case "waiting" if self.live.is_shown:
                self.live.show(_RUN, server_line(event, fields))
            case "failed":
                phase, reason = fields["phase"], fields["reason"]
                shown = self.failures[phase]
                if len(shown) < _MOST_FAILURES and not (reason in shown and is_exception(reason)):
                    shown.append(reason)
                    self._print(event, fields)
            case "traceback":
                for line in fields["text"].splitlines():
                    _print(self.console, line, _STYLES["failed"])
            case "started":
                self.folder, self.of = fields["folder"], fields["settings"].get("num_rounds", 0)
            case "round":
                self._count_left_out(fields)
                self._print(event, {**fields, "of": self.of})
            case "finished":
                self.close()
                if line := self._summary():
                    _print(self.console, line, "bold")
                self._print(event, fields)
            case _:
                self._print(event, fields)

    def _print(self, event: str, fields: dict[str, Any]) -> None:
        if line := server_line(event, fields):
            _print(self.console, line, _STYLES.get(event, ""))
        for name, text in fields.get("central", {}).items():
            if isinstance(text, str):  # such as a sample of what a model writes
                _print(self.console, f"{name}: {text}", "dim")

    def _show_phase(
        self,
        phase: str,
        round: int,
        of: int,
        nodes: int,
        answered: int,
        bytes: int = 0,
        seconds_left: float | None = None,
    ) -> None:
        parts = [f"round {round}/{of}", phase]
        if nodes:
            parts.append(f"{answered} of {nodes} nodes")
        if seconds_left is not None:
            parts += [size_text(bytes), f"about {seconds_text(seconds_left)} left"]
        # Half a round is training, the other half what comes after it.
        half = 0.0 if phase == "train" else 1.0
        share = min(1.0, answered / nodes) if nodes else 1.0
        self.live.show(_RUN, "  ".join(parts), round - 1 + (half + share) / 2, of)

    def _count_left_out(self, record: dict[str, Any]) -> None:
        """A line for the nodes left out of a round that had none of their own."""
        shown = {phase: len(reasons) for phase, reasons in self.failures.items()}
        self.failures.clear()
        for phase, count in Counter(each["phase"] for each in record.get("refused", ())).items():
            if more := count - shown.get(phase, 0):
                line = f"{more} more left out of {phase}: history.jsonl says why"
                _print(self.console, line, _STYLES["failed"])

    def _summary(self) -> str:
        """What the rounds changed, by the run's folder; empty where there is nothing to compare."""
        rounds = folders.read(self.folder).rounds if self.folder else []
        if len(rounds) < 2:
            return ""
        first, last = _figures(rounds[0]), _figures(rounds[-1])
        changes = [f"{n} {first[n]:.4f} -> {last[n]:.4f}" for n in last if n in first]
        return f"In {len(rounds)} rounds: {', '.join(changes)}" if changes else ""


class LoadingProgress:
    """Shows what :mod:`~mlx_fed.system.loading` tells of: a live line on a terminal, and
    elsewhere a plain
    line when it begins and one when it ends."""

    def __init__(self, console: Console, live: LiveLines):
        self.console, self.live = console, live
        self.begun: set[str] = set()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        what = printable(fields["what"])
        if self.live.is_shown:
            if event == "loading":
                self.live.show(what, f"{what}{_how_far(**fields)}", fields["done"], fields["of"])
            else:
                self.live.drop(what)
        elif event == "loaded":
            self.begun.discard(what)
            _print(self.console, f"{what}: done in {seconds_text(fields['seconds'])}", "")
        elif what not in self.begun:
            self.begun.add(what)
            _print(self.console, f"{what} ...", "")


@contextmanager
def loading_on(console: Console) -> Iterator[None]:
    """Shows what is loaded on a console, for as long as the context lasts."""
    live = LiveLines(console)
    try:
        with watched(LoadingProgress(console, live)):
            yield
    finally:
        live.close()


def _how_far(what: str, done: int, of: int | None, unit: str) -> str:
    if not done and not of:
        return ""
    if unit == "B":
        return f"  {size_text(done)}" + (f" of {size_text(of)}" if of else "")
    return f"  {done:,}" + (f" of {of:,}" if of else "") + (f" {unit}" if unit else "")


@contextmanager
def listeners_or_terminal(
    listeners: tuple[Listener, ...] | None,
) -> Iterator[tuple[Listener, ...]]:
    """The listeners that were given, or if none were the terminal for as long as the context
    lasts. They are told of what is loaded, too."""
    if listeners is not None:
        with watched(*listeners):
            yield tuple(listeners)
        return
    shown = ServerProgress()
    try:
        with watched(shown):
            yield (shown,)
    finally:
        shown.close()


@contextmanager
def told_or_terminal(notify: Callable[..., None] | None) -> Iterator[Callable[..., None]]:
    """Whom a node tells what happens: who was given, or else the terminal for as long as the
    context lasts. It is told of what is loaded, too."""
    shown = NodeProgress() if notify is None else None
    told = notify or shown
    assert told is not None
    try:
        with watched(lambda event, fields: told(event, **fields)):
            yield told
    finally:
        if shown:
            shown.close()


class JsonLines(Display):
    """Listens to a history and prints what happens as JSON, an object a line, for programs.

    Args:
        file (file, optional): Where to. Default: the standard output.
    """

    def __init__(self, file: IO[str] | None = None):
        super().__init__(file or sys.stdout)

    @_while_it_works
    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event not in ("replies", "labels", "loading", "loaded"):
            print(round_record.to_json({"event": event, **fields}), file=self.file, flush=True)


def size_text(size: float) -> str:
    """Bytes as people write them: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def seconds_text(seconds: float) -> str:
    """A time as people write it: ``"2 min 5 s"``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class NodeProgress(Lines):
    """Shows what happens on a node, and as a live line on a terminal what it is at."""

    @_while_it_works
    def __call__(self, event: str, **fields: Any) -> None:
        if event in ("loading", "loaded"):
            self.loading(event, fields)
        elif event == "working":
            self.live.show(_RUN, _what(fields))
        else:
            if event in ("joined", "answered"):
                self.live.show(_RUN, "waiting for the server")
            if line := node_line(event, fields):
                _print(self.console, line, _STYLES.get(event, ""))


def quiet_flower() -> None:
    """Keeps Flower's log lines out of ours."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def _print(console: Console, line: str, style: str) -> None:
    # What a node sends (names, reasons) is shown as text, never read as markup.
    console.print(Text(printable(line), style=style), soft_wrap=True)
    console.file.flush()


def _round_line(record: dict[str, Any]) -> str:
    # As wide as the last round's, so that the figures stand below each other.
    number = f"round {record['round']}".ljust(len(f"round {record.get('of', 0)}"))
    every = round_record.figures(record)
    figures = [
        f"{name} {value:.4f}{_median(every, name, value)}"
        for name, value in _figures(record).items()
    ]
    return "   ".join([number, *figures, f"{sum(record['seconds'].values()):.2f} s"])


def _median(figures: dict[str, float], name: str, mean: float) -> str:
    """The nodes' median of a metric, where their mean is far from it: one of them may be why."""
    key = "train/loss" if name == "train loss" else f"evaluate/{name}"
    median = figures.get(f"{key}/median", mean)
    return f" (median {median:.4f})" if abs(mean - median) > abs(median) / 2 else ""


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """A round's losses and metrics, by the names that they are shown with."""
    named = {"train loss": record["train"].get("loss")} | record["evaluate"]
    named |= {f"central {name}": value for name, value in record.get("central", {}).items()}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, float) and not name.startswith("num-")
    }


def _floats(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]


def _what(fields: dict[str, Any]) -> str:
    return f"round {fields['round']} {fields['kind']}" if fields["round"] else str(fields["kind"])
