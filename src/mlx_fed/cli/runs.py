"""``mlx-fed runs`` and ``mlx-fed report``: what was run, in a terminal and in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..system.printable import printable
from .arguments import errors_as_messages
from .options import RunsFolder

if TYPE_CHECKING:
    from ..runs.folders import Recorded

runs_app = typer.Typer(
    help="List, show, compare, export and remove runs.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Names = Annotated[list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The file to write.", show_default="print it")
]


@runs_app.command("list")
def list_(runs: RunsFolder = Path("runs")) -> None:
    """List the runs in a folder, the newest first."""
    with errors_as_messages():
        from ..runs import folders as recorded

        found, unreadable = [], []
        for folder in recorded.folders(runs):
            try:
                found.append(recorded.read(folder))
            except recorded.RunsError as error:
                unreadable.append(printable(str(error)))
        if not found and not unreadable:
            typer.echo(f"No runs in {runs}/ yet.")
            return
        _table([*_overview(found)])
        for line in unreadable:
            typer.echo(line)


@runs_app.command()
def show(run: str, runs: RunsFolder = Path("runs")) -> None:
    """Show one run: its settings and its rounds."""
    with errors_as_messages():
        from ..runs import folders as recorded

        found = recorded.read(recorded.find(runs, run))
        typer.echo(printable(f"{found.name}  {found.state}  {found.folder}"))
        for line in recorded.troubles(found):
            typer.echo(printable(line))
        _table([("setting", "value"), *recorded.flat(found.settings).items()])
        typer.echo("")
        _table([*_rounds(found)])
        if found.damaged:
            typer.echo(f"{found.damaged} damaged lines of history.jsonl were passed over.")


@runs_app.command()
def compare(names: Names, runs: RunsFolder = Path("runs")) -> None:
    """Compare runs: the settings in which they differ, and what they reached."""
    with errors_as_messages():
        from ..runs import folders as recorded

        found = recorded.read_all([recorded.find(runs, name) for name in names])
        _table([("", *(run.name for run in found)), *_compared(found)])


@runs_app.command()
def export(
    names: Names,
    runs: RunsFolder = Path("runs"),
    output: Output = None,
    json: Annotated[bool, typer.Option("--json", help="All there is, in place of CSV.")] = False,
) -> None:
    """Write the figures of runs as CSV, a line a round, or all that is known as JSON."""
    with errors_as_messages():
        from ..runs import folders as recorded

        found = recorded.read_all([recorded.find(runs, name) for name in names])
        write(recorded.to_json(found) + "\n" if json else recorded.to_csv(found), output)


@runs_app.command()
def remove(
    names: Names,
    runs: RunsFolder = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs with their models and checkpoints."""
    with errors_as_messages():
        from ..runs import folders as recorded

        found = [recorded.find(runs, name) for name in names]
        if not yes:
            typer.confirm(f"Remove {', '.join(map(str, found))} for good?", abort=True)
        for folder in found:
            recorded.remove(folder)
            typer.echo(f"Removed {folder}")


def report(
    names: Names,
    runs: RunsFolder = Path("runs"),
    output: Output = None,
    csv: Annotated[bool, typer.Option("--csv", help="The figures as CSV, a line a round.")] = False,
) -> None:
    """Write runs, laid over each other, as one HTML file that can be mailed."""
    with errors_as_messages():
        from ..monitoring.report import report
        from ..runs import folders as recorded

        found = recorded.read_all([recorded.find(runs, name) for name in names])
        if csv:
            write(recorded.to_csv(found), output)
        else:
            name = found[0].folder.name if len(found) == 1 else "runs"
            write(report(found), output or Path(f"{name}.html"))


def write(text: str, output: Path | None) -> None:
    """Writes text to a file, or prints it.

    Raises:
        FedError: If the file cannot be written.
    """
    from ..errors import FedError

    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedError(
            f"Cannot write {output}: {error.strerror or error}. Choose another place with -o."
        ) from error
    typer.echo(f"Wrote {output}")


def _overview(found: list[Recorded]) -> Any:
    yield ("run", "state", "rounds", "strategy", "last round")
    for run in found:
        strategy = run.settings.get("strategy")
        name = strategy.get("name", "") if isinstance(strategy, dict) else ""
        of = run.settings.get("num_rounds", "?")
        yield (run.name, run.state, f"{len(run.rounds)} of {of}", name, _reached(run))


def _reached(run: Recorded) -> str:
    from ..runs.round_record import figures

    if not run.rounds:
        return ""
    wanted = ("train/loss", "evaluate/", "central/")
    last = {k: v for k, v in figures(run.rounds[-1]).items() if k.startswith(wanted)}
    shown = {k: v for k, v in last.items() if not k.endswith(("/median", "/nodes", "examples"))}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _rounds(run: Recorded) -> Any:
    from ..runs.round_record import figures

    rows = {record["round"]: figures(record) for record in run.rounds}
    names = dict.fromkeys(n for row in rows.values() for n in row if not n.endswith("/median"))
    yield ("round", *names)
    for number, row in rows.items():
        yield (number, *(f"{row[name]:.5g}" if name in row else "" for name in names))


def _compared(found: list[Recorded]) -> Any:
    from ..runs import folders as recorded

    yield from ((name, *row) for name, row in recorded.differences(found).items())
    yield ("rounds done", *(len(run.rounds) for run in found))
    yield ("last round", *(_reached(run).replace(", ", "\n") for run in found))


def _table(rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in rows[0]:
        table.add_column(Text(printable(str(head))), overflow="fold")
    for row in rows[1:]:
        cells = ("" if cell is None else str(cell) for cell in row)
        table.add_row(*(Text("\n".join(map(printable, c.split("\n")))) for c in cells))
    Console(highlight=False).print(table)
