"""Counts of labels by client, and their table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import FedError
from ..runs.labels import labels_of
from ..system.loading import loading
from ..task import Task

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MAX_ROWS = 40
"""Clients with a row each; of more clients there is a summary."""
_HEIGHTS = "▁▂▃▄▅▆▇█"


class LabelCounts(NamedTuple):
    """Number of examples by client and label.

    Attributes:
        classes (array): The labels, of shape (classes,).
        train (array): Counts of training examples, of shape (clients, classes).
        test (array): Counts of held-out examples, of the same shape.
    """

    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return self.train + self.test


def count_labels(task: Task, num_partitions: int) -> LabelCounts:
    """Label counts of each client of a task: integers in the last array of its data.

    Args:
        task (Task): A task whose data are arrays.
        num_partitions (int): Number of clients.

    Raises:
        FedError: If a client has no data, or its data has no labels.
    """
    rows = []
    with loading("Counting labels", num_partitions, "clients") as progress:
        for client in range(num_partitions):
            rows.append(_count(task, client, num_partitions))
            progress.update(client + 1)
    classes = np.unique(np.concatenate([labels for row in rows for labels, _ in row]))
    counts = np.zeros((2, num_partitions, len(classes)), np.int64)
    for client, row in enumerate(rows):
        for split, (labels, numbers) in enumerate(row):
            counts[split, client, np.searchsorted(classes, labels)] = numbers
    return LabelCounts(classes, *counts)


def _count(task: Task, client: int, num_partitions: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The labels of a client and their counts, of the training split and the held-out one."""
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
            f"Partition {client} of {num_partitions} has no training examples: use fewer "
            "partitions or a more even partitioner."
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


def label_table(labels: LabelCounts, width: int) -> RenderableType:
    """Table with a row for each client, or a summary where there are many.

    Args:
        labels (LabelCounts): Counts from :func:`count_labels`.
        width (int): Characters of a line.
    """
    return _summary(labels) if len(labels.counts) > MAX_ROWS else _rows(labels, width)


def _rows(labels: LabelCounts, width: int) -> Table:
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
    """Counts as text; those of at least 30 % of the client's examples are bold."""
    styles = np.select([row == 0, row * 10 >= row.sum() * 3], ["dim", "bold cyan"], "default")
    return [
        f"[{style}]{number or '·'}[/]" for style, number in zip(styles, row.tolist(), strict=True)
    ]


def _heights(row: np.ndarray) -> str:
    """A bar character for each class, relative to the client's largest count."""
    heights = np.ceil(row / max(row.max(), 1) * len(_HEIGHTS)).astype(int)
    return "".join(_HEIGHTS[height - 1] if height else "·" for height in heights)


def _summary(labels: LabelCounts) -> Table:
    from rich.table import Table

    counts = labels.counts
    sizes = counts.sum(axis=1)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in (f"of {len(sizes)} clients", "minimum", "median", "maximum"):
        table.add_column(name, justify="left" if name.startswith("of") else "right")
    rows = {
        "examples": sizes,
        "  training": labels.train.sum(axis=1),
        "  held-out": labels.test.sum(axis=1),
        f"classes, of {len(labels.classes)}": np.count_nonzero(counts, axis=1),
        "share of the largest class": 100 * counts.max(axis=1) / sizes,
        "clients that have a class": np.count_nonzero(counts, axis=0),
    }
    for name, values in rows.items():
        unit = " %" if name.startswith("share") else ""
        quantiles = (values.min(), np.median(values), values.max())
        table.add_row(name, *(f"{value:,.0f}{unit}" for value in quantiles))
    table.add_section()
    table.add_row("all examples", "", "", f"{sizes.sum():,}", style="bold")
    return table
