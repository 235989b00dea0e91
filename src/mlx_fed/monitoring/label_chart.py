"""Chart of label counts by client, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import FedError, install_command
from .label_counts import MAX_ROWS, LabelCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".html")
_MAX_COLUMNS = 1000


def check_chart_path(path: Path) -> None:
    """Checks that a chart can be written to a path, before labels are counted.

    Raises:
        FedError: If the file's format is unknown or its folder does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise FedError(f"Cannot draw {str(path)!r}: its name must end in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FedError(f"Cannot draw {str(path)!r}: there is no folder {str(path.parent)!r}.")


def draw_chart(labels: LabelCounts, path: Path, title: str) -> None:
    """Chart of label counts by client as a file: PNG, SVG, or HTML with the SVG inside.

    Raises:
        FedError: If it cannot be written.
    """
    check_chart_path(path)
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


def _figure(labels: LabelCounts, title: str) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FedError(f"Pictures need matplotlib: {install_command('datasets')}.") from error
    classes = len(labels.classes)
    palette = "tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"
    steps = np.arange(classes) if palette != "turbo" else np.linspace(0, 1, classes)
    colours = matplotlib.colormaps[palette](steps)
    if len(labels.counts) <= MAX_ROWS:
        height = 1.7 + max(0.28 * len(labels.counts), 0.21 * min(classes, 20))
        figure = Figure(figsize=(10, height), layout="constrained")
        _bars(figure.add_subplot(), labels, colours)
    else:
        figure = Figure(figsize=(10, 3.2 + 0.28 * min(classes, 40)), layout="constrained")
        ratios = (1.5, 0.28 * min(classes, 40))
        _strips(figure.subplots(2, sharex=True, height_ratios=ratios), labels, colours)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _bars(axes: Axes, labels: LabelCounts, colours: np.ndarray) -> None:
    """Stacked bars: one for each client, with a segment for each class."""
    clients = range(len(labels.counts))
    ends = np.cumsum(labels.counts, axis=1)
    for index, label in enumerate(labels.classes):
        sizes = labels.counts[:, index]
        starts, colour = ends[:, index] - sizes, colours[index]
        axes.barh(clients, sizes, left=starts, height=0.8, color=colour, label=str(label))
    axes.set(xlabel="examples", ylabel="client", ylim=(len(clients) - 0.5, -0.5))
    axes.set_yticks(clients)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    indices = range(0, len(names), math.ceil(len(names) / 20))
    axes.legend(
        [handles[index] for index in indices],
        [names[index] for index in indices],
        title="label",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
        handlelength=1,
        handleheight=1,
    )


def _strips(panels: Sequence[Axes], labels: LabelCounts, colours: np.ndarray) -> None:
    """The clients' sizes, and below them a heat map of each class's share."""
    top, bottom = panels
    sizes = labels.counts.sum(axis=1)
    edges = np.arange(len(sizes) + 1) - 0.5
    top.stairs(sizes, edges, fill=True, color="0.55", linewidth=0)
    top.set(ylabel="examples", ylim=(0, None))
    top.spines[["top", "right"]].set_visible(False)
    columns = min(len(sizes), _MAX_COLUMNS)
    starts = (
        np.arange(columns) * len(sizes) // columns
    )  # of many clients, neighbours share a column
    shares = np.add.reduceat(labels.counts / sizes[:, None], starts).T
    shares = shares / np.diff([*starts, len(sizes)])
    strips = np.repeat(colours[:, None], columns, axis=1)
    strips[..., 3] = np.sqrt(shares / shares.max())  # small shares stay visible
    extent = (edges[0], edges[-1], len(labels.classes) - 0.5, -0.5)
    bottom.imshow(strips, aspect="auto", interpolation="nearest", extent=extent)
    bottom.set(xlabel="client", ylabel="label", xlim=(edges[0], edges[-1]))
    bottom.set_title(
        "colour: the label's share of the client's examples",
        loc="left",
        fontsize="small",
        color="0.35",
    )
    ticks = range(0, len(labels.classes), math.ceil(len(labels.classes) / 40))
    bottom.set_yticks(ticks, [str(labels.classes[index]) for index in ticks])
    bottom.tick_params(length=0)
    for axis in (top, bottom):
        axis.locator_params(axis="x", integer=True)
