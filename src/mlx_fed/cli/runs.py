"""``mlx-fed runs`` and ``mlx-fed report``: records runs as tables, CSV, JSON and HTML."""

from __future__ import annotations

import operator
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FedError, os_errors
from ..system.printable import printable
from .application import App
from .option_kinds import option
from .options import RunsFolder

if TYPE_CHECKING:
    from ..runs.folders import RunRecord

runs_app = App("List, show, compare, export and remove runs.")

RunNames = Annotated[list[str], typer.Argument(metavar="RUN...", help="Names or folders of runs.")]
OutputFile = Annotated[
    Path | None, option("FILE", "The file to write.", "standard output", "--output", "-o")
]
Columns = Annotated[
    str | None,
    option(
        "NAMES",
        "Names of columns, with commas between them: seconds/train,bytes/*. '*' is all columns.",
        "losses and metrics",
    ),
]
_OPERATORS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

Row = dict[str, Any]


@runs_app.command("list")
def list_runs(
    runs: RunsFolder = Path("runs"),
    where: Annotated[
        list[str] | None,
        option(
            "CONDITION",
            "Only runs with state=finished, 'evaluate/loss<0.5', config.learning-rate=0.1 "
            "and so on; can be repeated.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        option("COLUMN", "Sort by a column, the smallest value first.", "the newest run first"),
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Reverse the order.")] = False,
    columns: Columns = None,
) -> None:
    """List the runs in a folder with the figures of their last rounds."""
    from ..runs import folders

    rows, errors = [], []
    paths = folders.list_runs(runs)
    for folder in paths:
        try:
            rows.append(_run_row(folders.read(folder)))
        except folders.RunsError as error:
            errors.append(printable(str(error)))
    if not paths:
        typer.echo(f"No runs in {runs}/ yet.")
        return
    for condition in where or []:
        rows = [row for row in rows if _matches(row, condition, rows)]
    if sort:
        _require_column(sort, rows)
        rows.sort(key=lambda row: _sort_key(row.get(sort)))
    if reverse:
        rows.reverse()
    _print_rows(rows, ("run", "state", "rounds"), columns, ("evaluate/", "central/", "train/"))
    for line in errors:
        typer.echo(line)


@runs_app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    runs: RunsFolder = Path("runs"),
    columns: Columns = None,
) -> None:
    """Show a run's settings and rounds."""
    from ..runs import folders
    from ..runs.matrices import matrices
    from ..runs.round_record import figures

    records = folders.read(folders.find(runs, run))
    typer.echo(printable(f"{records.name}  {records.state}  {records.folder}"))
    for line in folders.list_problems(records):
        typer.echo(printable(line))
    settings = folders.flatten_settings(records.settings).items()
    _print_table([(name, value) for name, value in settings if value not in (None, {}, [])])
    typer.echo("")
    rows = [{"round": record["round"], **figures(record)} for record in records.rounds]
    _print_rows(rows, ("round",), columns, ("train/", "evaluate/", "central/"))
    for phase, name, matrix in matrices(records.rounds[-1]) if records.rounds else ():
        _print_matrix(f"{phase}/{name}", records.rounds[-1]["round"], matrix)
    if records.damaged:
        typer.echo(f"{records.damaged} damaged lines of history.jsonl were skipped.")


@runs_app.command()
def compare(names: RunNames, runs: RunsFolder = Path("runs")) -> None:
    """Compare runs: settings that differ, and last figures."""
    from ..runs import folders

    records = folders.read_all([folders.find(runs, name) for name in names])
    rows = [_run_row(run) for run in records]
    figures = _metric_names(rows, ("train/", "evaluate/", "central/"))
    _print_table(
        [
            ("", *(run.name for run in records)),
            *((name, *values) for name, values in folders.differences(records).items()),
            *((name, *(row.get(name) for row in rows)) for name in ("rounds", *figures)),
        ]
    )


@runs_app.command()
def export(
    names: RunNames,
    runs: RunsFolder = Path("runs"),
    output: OutputFile = None,
    json: Annotated[bool, typer.Option("--json", help="All data as JSON, not CSV.")] = False,
) -> None:
    """Write the figures of runs as CSV, or all data as JSON."""
    from ..runs import folders

    records = folders.read_all([folders.find(runs, name) for name in names])
    _write(folders.to_json(records) + "\n" if json else folders.to_csv(records), output)


@runs_app.command()
def remove(
    names: RunNames,
    runs: RunsFolder = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs with their models and checkpoints."""
    from ..runs import folders

    paths = [folders.find(runs, name) for name in names]
    if not yes:
        typer.confirm(f"Remove {', '.join(map(str, paths))} for good?", abort=True)
    for folder in paths:
        folders.remove(folder)
        typer.echo(f"Removed {folder}")


def report(
    names: RunNames,
    runs: RunsFolder = Path("runs"),
    output: OutputFile = None,
    csv: Annotated[bool, typer.Option("--csv", help="The figures as CSV, not HTML.")] = False,
) -> None:
    """Write runs as one HTML file, in the same charts."""
    from ..monitoring.report import report
    from ..runs import folders

    records = folders.read_all([folders.find(runs, name) for name in names])
    if csv:
        _write(folders.to_csv(records), output)
    else:
        name = records[0].folder.name if len(records) == 1 else "runs"
        _write(report(records), output or Path(f"{name}.html"))


def _write(text: str, output: Path | None) -> None:
    """Writes text to a file or to the standard output.

    Raises:
        FedError: If the file cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    with os_errors(FedError, f"Cannot write {output}", "Choose another file with -o."):
        output.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {output}")


# -- rows and columns ----------------------------------------------------------------------


def _run_row(run: RunRecord) -> Row:
    """A run's name and state, its settings, and the figures of its last round."""
    from ..runs import folders
    from ..runs.round_record import figures

    settings = folders.flatten_settings(run.settings)
    rounds = f"{len(run.rounds)} of {settings.get('num_rounds', '?')}"
    last = figures(run.rounds[-1]) if run.rounds else {}
    return {"run": run.name, "state": run.state, "rounds": rounds, **settings, **last}


def _matches(row: Row, condition: str, rows: Iterable[Row]) -> bool:
    """Whether a row meets a condition such as ``evaluate/loss<0.5``; numbers compare as such."""
    match = re.fullmatch(r"([^<>=!]+)(<=|>=|!=|=|<|>)(.+)", condition)
    if match is None:
        raise FedError(f"--where {condition!r} is not a condition, such as evaluate/loss<0.5.")
    name, symbol, text = (group.strip() for group in match.groups())
    _require_column(name, rows)
    value, limit = _sort_key(row.get(name)), _sort_key(text)
    if symbol in ("=", "!="):
        return bool(_OPERATORS[symbol](value, limit))
    return value[0] == limit[0] and bool(_OPERATORS[symbol](value, limit))


def _sort_key(value: Any) -> tuple[int, float, str]:
    """Order of values of all kinds: numbers, then texts, then missing values."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return (2, 0.0, "") if value is None else (1, 0.0, str(value))
    return (0, number, "")


def _require_column(name: str, rows: Iterable[Row]) -> None:
    names = {key for row in rows for key in row}
    if names and name not in names:
        figures = ", ".join(sorted(name for name in names if "/" in name))
        raise FedError(f"No run has a column {name!r}: there are all settings, and {figures}.")


def _metric_names(rows: Sequence[Row], prefixes: Sequence[str]) -> list[str]:
    """The columns with losses and metrics, by prefix."""
    from ..runs.round_record import is_detail

    names = dict.fromkeys(name for row in rows for name in row)
    suffixes = ("/nodes", "examples")
    metrics = [n for n in names if not n.endswith(suffixes) and not is_detail(n)]
    return [name for prefix in prefixes for name in metrics if name.startswith(prefix)]


def _print_rows(
    rows: Sequence[Row], head: Sequence[str], columns: str | None, prefixes: Sequence[str]
) -> None:
    """Prints rows with the columns that patterns name, or with metrics as far as there is width."""
    if columns is not None:
        names = dict.fromkeys(name for row in rows for name in row)
        patterns = [pattern.strip() for pattern in columns.split(",")]
        metrics = [n for pattern in patterns for n in names if fnmatchcase(n, pattern)]
        if rows and not metrics:
            _require_column(patterns[0], rows)
        _print_table(_cells(rows, dict.fromkeys([*head, *metrics])))
        return
    metrics = _metric_names(rows, prefixes)
    count = len(metrics)
    width = shutil.get_terminal_size().columns
    while count and _width(_cells(rows, [*head, *metrics[:count]])) > width:
        count -= 1
    _print_table(_cells(rows, [*head, *metrics[:count]]))
    if metrics[count:]:
        typer.echo(printable(f"More with --columns: {', '.join(metrics[count:])}"))


def _cells(rows: Sequence[Row], names: Iterable[str]) -> list[Sequence[Any]]:
    names = [*names]
    return [names, *([row.get(name) for name in names] for row in rows)]


def _texts(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[_text(value) for value in row] for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else printable(str(value))


def _print_matrix(name: str, number: int, matrix: list[list[int]]) -> None:
    """Prints a confusion matrix with the accuracy of each class, or the accuracies alone where the
    terminal is too narrow."""
    from ..runs.matrices import accuracy, class_accuracies

    labels = range(len(matrix))
    accuracies = [value if value is None else f"{value:.4f}" for value in class_accuracies(matrix)]
    total = accuracy(matrix)
    suffix = "" if total is None else f", accuracy {total:.4f}"
    typer.echo("")
    line = f"{name} after round {number}{suffix}. Rows are labels, columns predictions."
    typer.echo(printable(line))
    table = [
        ["label", *labels, "accuracy"],
        *([label, *matrix[label], accuracies[label]] for label in labels),
    ]
    if _width(table) > shutil.get_terminal_size().columns:
        table = [[row[0], row[-1]] for row in table]
        typer.echo("The counts need a wider terminal, or are in mlx-fed runs export --json.")
    _print_table(table)


def _width(rows: Sequence[Sequence[Any]]) -> int:
    columns = zip(*_texts(rows), strict=True)
    return sum(2 + max(map(len, column)) for column in columns) - 2


def _print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in columns, two spaces apart, each row on one line."""
    texts = _texts(rows)
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
