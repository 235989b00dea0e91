"""``mlx-fed audit``: the audit log of a node or a server."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from .application import App
from .option_kinds import option

audit_app = App("Show and verify the audit log of a node or a server.")

LogPath = Annotated[Path, typer.Argument(metavar="LOG", help="The file, such as audit.jsonl.")]


@audit_app.command()
def show(
    log: LogPath,
    event: Annotated[
        list[str] | None, option("NAME", "Show these events only; can be repeated.")
    ] = None,
) -> None:
    """Show the log, a line for each event."""
    from ..fleet.audit import entries
    from ..system.printable import printable

    for entry in entries(_require(log)):
        if event and entry.event not in event:
            continue
        fields = " ".join(f"{key}={json.dumps(value)}" for key, value in entry.fields.items())
        local = entry.time.astimezone()
        typer.echo(printable(f"{entry.number:>5} {local:%Y-%m-%d %H:%M:%S} {entry.event} {fields}"))


@audit_app.command()
def verify(log: LogPath) -> None:
    """Verify that no line was changed, removed or inserted."""
    from ..fleet.audit import entries

    last = next(iter(deque(entries(_require(log)), maxlen=1)), None)
    if last is None:
        typer.echo(f"{log} has no lines.")
        return
    typer.echo(f"{log}: {last.number} lines are as they were written. The last has the hash")
    typer.echo(last.hash)
    typer.echo("Compare it with one that was noted elsewhere: a shorter log verifies too.")


def _require(log: Path) -> Path:
    from ..errors import FedError

    if not log.is_file():
        raise FedError(f"There is no audit log {log}.")
    return log
