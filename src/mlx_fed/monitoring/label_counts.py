"""Which labels each client holds, as a table in the terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import FedError
from ..runs.labels import labels_of
from ..system.loading import loading
from ..task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

PICTURES = (".png", ".svg", ".html")
_MOST_ROWS = 40
_MOST_COLUMNS = 1000
_HEIGHTS = "▁▂▃▄▅▆▇█"


class Labels(NamedTuple):
    """Counts of labels, with a row for each client.

    ``classes`` has shape (classes,), ``train`` and ``test`` (clients, classes).
    """

    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return self.train + self.test


def count_labels(task: Task, num_partitions: int) -> Labels:
    """The labels of each client of a task: integers, in the last array of its data.

    Args:
        task (Task): Its data are arrays.
        num_partitions (int): Clients to ask it for.

    Raises:
        FedError: If a client has no data, or its data has no labels to show.
    """
    counted = []
    with loading("Counting labels", num_partitions, "clients") as progress:
        for client in range(num_partitions):
            counted.append(_count(task, client, num_partitions))
            progress.reached(client + 1)
    classes = np.unique(np.concatenate([found for row in counted for found, _ in row]))
    counts = np.zeros((2, num_partitions, len(classes)), np.int64)
    for client, row in enumerate(counted):
        for split, (found, number) in enumerate(row):
            counts[split, client, np.searchsorted(classes, found)] = number
    return Labels(classes, *counts)


def _count(task: Task, client: int, num_partitions: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The labels that a client has and how many of each, of its two splits."""
    try:
        data = task.data(client, num_partitions)
    except FedError:
        raise
    except Exception as error:
        raise FedError(
            f"The task's data cannot give partition {client} of {num_partitions}: "
            f"{type(error).__name__}: {error}"
        ) from error
    train = _labels(data.train, client, num_partitions)
    if not len(train):
        raise FedError(
            f"Partition {client} of {num_partitions} has no examples to train on: use fewer "
            "partitions, or spread the examples more evenly."
        )
    test = _labels(data.test, client, num_partitions) if data.test is not None else train[:0]
    return [np.unique(split, return_counts=True) for split in (train, test)]


def _labels(split: Any, client: int, num_partitions: int) -> np.ndarray:
    where = f"Partition {client} of {num_partitions}"
    if callable(split):
        raise FedError(f"{where} streams its batches, so its labels cannot be counted.")
    labels = labels_of(split)
    if labels is None:
        array = split[-1]
        dtype = str(array.dtype).removeprefix("mlx.core.")
        raise FedError(
            f"{where} has no labels: the last array of its data is {dtype} of shape "
            f"{tuple(array.shape)}, where one integer an example is needed."
        )
    return labels


def show(labels: Labels, width: int) -> RenderableType:
    """A table with a row for each client, or a summary of many.

    Args:
        labels (Labels): What :func:`count_labels` found.
        width (int): Characters that there is room for.
    """
    return _summary(labels) if len(labels.counts) > _MOST_ROWS else _rows(labels, width)


def _rows(labels: Labels, width: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("client", "train", "test", "classes"):
        table.add_column(name, justify="right")
    counts = labels.counts
    heads = [str(label) for label in labels.classes]
    total = counts.sum(axis=0)
    cell = 1 + max(map(len, [*heads, str(total.max())]))
    as_numbers = len("client train test classes") + 4 + cell * len(heads) <= width
    if as_numbers:
        for head in heads:
            table.add_column(head, justify="right")
    else:
        table.add_column(f"labels {heads[0]} to {heads[-1]}", no_wrap=True, overflow="fold")
    for client, row in enumerate(counts):
        sizes = [labels.train[client].sum(), labels.test[client].sum(), np.count_nonzero(row)]
        cells = _numbers(row) if as_numbers else [_heights(row)]
        table.add_row(str(client), *map(str, sizes), *cells)
    sizes = [labels.train.sum(), labels.test.sum(), len(labels.classes)]
    cells = [*map(str, total)] if as_numbers else [_heights(total)]
    table.add_section()
    table.add_row("all", *map(str, sizes), *cells, style="bold")
    return table


def _numbers(row: np.ndarray) -> list[str]:
    """Counts, the largest share of the client's the brightest."""
    styles = np.select([row == 0, row * 10 >= row.sum() * 3], ["dim", "bold cyan"], "default")
    return [
        f"[{style}]{number or '·'}[/]" for style, number in zip(styles, row.tolist(), strict=True)
    ]


def _heights(row: np.ndarray) -> str:
    """A character for each class, as high as its count beside the client's largest."""
    heights = np.ceil(row / max(row.max(), 1) * len(_HEIGHTS)).astype(int)
    return "".join(_HEIGHTS[height - 1] if height else "·" for height in heights)


def _summary(labels: Labels) -> Table:
    from rich.table import Table

    counts = labels.counts
    sizes = counts.sum(axis=1)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in (f"of {len(sizes)} clients", "least", "median", "most"):
        table.add_column(name, justify="left" if name.startswith("of") else "right")
    rows = {
        "examples": sizes,
        "  to train on": labels.train.sum(axis=1),
        "  held out": labels.test.sum(axis=1),
        f"classes, of {len(labels.classes)}": np.count_nonzero(counts, axis=1),
        "share of the largest class": 100 * counts.max(axis=1) / sizes,
    }
    for name, values in rows.items():
        unit = " %" if name.startswith("share") else ""
        three = (values.min(), np.median(values), values.max())
        table.add_row(name, *(f"{value:,.0f}{unit}" for value in three))
    held = np.count_nonzero(counts, axis=0)
    table.add_row(
        "clients that have a class",
        *(f"{value:,.0f}" for value in (held.min(), np.median(held), held.max())),
    )
    table.add_section()
    table.add_row("examples in all", "", "", f"{sizes.sum():,}", style="bold")
    return table


def check_picture(path: Path) -> None:
    """Refuses a picture that could not be written, before any work is done.

    Raises:
        FedError: If the file's ending or folder will not do.
    """
    if path.suffix.lower() not in PICTURES:
        raise FedError(f"Cannot draw {str(path)!r}: its name must end in {', '.join(PICTURES)}.")
    if not path.parent.is_dir():
        raise FedError(f"Cannot draw {str(path)!r}: there is no folder {str(path.parent)!r}.")


def draw(labels: Labels, path: Path, title: str) -> None:
    """Writes a picture of the labels by client: PNG, SVG, or a page of HTML with an SVG.

    Raises:
        FedError: If it cannot be written.
    """
    check_picture(path)
    figure = _figure(labels, title)
    try:
        if path.suffix.lower() != ".html":
            figure.savefig(path, dpi=150)
            return
        svg = StringIO()
        figure.savefig(svg, format="svg")
        drawing = svg.getvalue()
        path.write_text(
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f"<title>{escape(title)}</title>\n"
            "<style>body { margin: 2em } svg { max-width: 100%; height: auto }</style>\n"
            f"{drawing[drawing.index('<svg') :]}</html>\n"
        )
    except OSError as error:
        raise FedError(f"Cannot write {str(path)!r}: {error.strerror}.") from error


def _figure(labels: Labels, title: str) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FedError('Pictures need matplotlib: pip install "mlx-fed[datasets]".') from error
    classes = len(labels.classes)
    palette = "tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"
    steps = np.arange(classes) if palette != "turbo" else np.linspace(0, 1, classes)
    colours = matplotlib.colormaps[palette](steps)
    if len(labels.counts) <= _MOST_ROWS:
        height = 1.7 + max(0.28 * len(labels.counts), 0.21 * min(classes, 20))
        figure = Figure(figsize=(10, height), layout="constrained")
        _bars(figure.add_subplot(), labels, colours)
    else:
        figure = Figure(figsize=(10, 3.2 + 0.28 * min(classes, 40)), layout="constrained")
        ratios = (1.5, 0.28 * min(classes, 40))
        _strips(figure.subplots(2, sharex=True, height_ratios=ratios), labels, colours)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _bars(axes: Axes, labels: Labels, colours: np.ndarray) -> None:
    """A bar for each client, with a piece for each class."""
    clients = range(len(labels.counts))
    ends = np.cumsum(labels.counts, axis=1)
    for index, label in enumerate(labels.classes):
        sizes = labels.counts[:, index]
        left, colour = ends[:, index] - sizes, colours[index]
        axes.barh(clients, sizes, left=left, height=0.8, color=colour, label=str(label))
    axes.set(xlabel="examples", ylabel="client", ylim=(len(clients) - 0.5, -0.5))
    axes.set_yticks(clients)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    shown = range(0, len(names), math.ceil(len(names) / 20))
    axes.legend(
        [handles[index] for index in shown],
        [names[index] for index in shown],
        title="label",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        handlelength=1,
        handleheight=1,
    )


def _strips(panels: Sequence[Axes], labels: Labels, colours: np.ndarray) -> None:
    """The sizes of many clients, and for each class a strip that is dark where it prevails."""
    above, below = panels
    sizes = labels.counts.sum(axis=1)
    edges = np.arange(len(sizes) + 1) - 0.5
    above.stairs(sizes, edges, fill=True, color="0.55", linewidth=0)
    above.set(ylabel="examples", ylim=(0, None))
    above.spines[["top", "right"]].set_visible(False)
    columns = min(len(sizes), _MOST_COLUMNS)
    starts = np.arange(columns) * len(sizes) // columns  # neighbours share one where there are more
    shares = np.add.reduceat(labels.counts / sizes[:, None], starts).T
    shares = shares / np.diff([*starts, len(sizes)])
    strips = np.repeat(colours[:, None], columns, axis=1)
    strips[..., 3] = np.sqrt(shares / shares.max())  # the eye tells little from nothing
    extent = (edges[0], edges[-1], len(labels.classes) - 0.5, -0.5)
    below.imshow(strips, aspect="auto", interpolation="nearest", extent=extent)
    below.set(xlabel="client", ylabel="label", xlim=(edges[0], edges[-1]))
    below.set_title(
        "the darker, the larger the label's share of the client's examples",
        loc="left",
        fontsize="small",
        color="0.35",
    )
    shown = range(0, len(labels.classes), math.ceil(len(labels.classes) / 40))
    below.set_yticks(shown, [str(labels.classes[index]) for index in shown])
    below.tick_params(length=0)
    for axis in (above, below):
        axis.locator_params(axis="x", integer=True)
