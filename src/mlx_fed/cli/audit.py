"""``mlx-fed audit``: the audit log of a node or a server."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from .arguments import errors_as_messages

audit = typer.Typer(
    help="Show and verify the audit log of a node or a server.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LogPath = Annotated[Path, typer.Argument(metavar="LOG", help="The file, such as audit.jsonl.")]


@audit.command()
def show(
    log: LogPath,
    event: Annotated[
        list[str] | None, typer.Option(help="Show these events only; as often as needed.")
    ] = None,
) -> None:
    """Show the log, a line for each event."""
    with errors_as_messages():
        from ..fleet.audit import entries
        from ..system.printable import printable

        for entry in entries(_existing(log)):
            if event and entry.event not in event:
                continue
            fields = " ".join(f"{key}={json.dumps(value)}" for key, value in entry.fields.items())
            local = entry.time.astimezone()
            typer.echo(
                printable(f"{entry.number:>5} {local:%Y-%m-%d %H:%M:%S} {entry.event} {fields}")
            )


@audit.command()
def verify(log: LogPath) -> None:
    """Verify that no line was changed, removed or inserted since it was written."""
    with errors_as_messages():
        from ..fleet.audit import entries

        last = next(iter(deque(entries(_existing(log)), maxlen=1)), None)
        if last is None:
            typer.echo(f"{log} has no lines.")
            return
        typer.echo(f"{log}: {last.number} lines are as they were written. The last has the hash")
        typer.echo(last.hash)
        typer.echo("Compare it with one that was noted elsewhere: a shorter log verifies too.")


def _existing(log: Path) -> Path:
    from ..errors import FedError

    if not log.is_file():
        raise FedError(f"There is no audit log {log}.")
    return log
