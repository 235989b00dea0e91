"""Confusion matrices in a round's record: rows are labels, columns are predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Matrix = list[list[int]]

_MOST_CLASSES = 1000
_PHASES = ("evaluate", "central")


def matrices(record: Mapping[str, Any]) -> Iterator[tuple[str, str, Matrix]]:
    """Phase, name and rows of each confusion matrix of a record."""
    for phase in _PHASES:
        for name, value in (record.get(phase) or {}).items():
            if is_matrix(value):
                yield phase, name, value


def is_matrix(value: Any) -> bool:
    """Whether a value of a record is a confusion matrix: a list of as many rows as columns."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(row, list) and len(row) == len(value) for row in value)
    )


def class_accuracies(matrix: Matrix) -> list[float | None]:
    """The share of each class's examples that are predicted as it; None where it has none."""
    return [row[k] / total if (total := sum(row)) else None for k, row in enumerate(matrix)]


def accuracy(matrix: Matrix) -> float | None:
    """The share of all examples that are predicted as what they are."""
    total = sum(map(sum, matrix))
    return sum(row[k] for k, row in enumerate(matrix)) / total if total else None


def pack(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with ``{"classes": 10, "cells": [place, count, ...]}`` in place of each matrix that
    is shorter so; the place of a cell counts row by row."""
    return {name: _pack(value) if is_matrix(value) else value for name, value in metrics.items()}


def _pack(matrix: Matrix) -> Matrix | dict[str, Any]:
    counts = [count for row in matrix for count in row]
    cells = [item for position, count in enumerate(counts) if count for item in (position, count)]
    # A place has two digits or more, and a 0 has one.
    return {"classes": len(matrix), "cells": cells} if len(cells) < len(counts) / 2 else matrix


def unpack(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that :func:`pack` has shortened.

    Raises:
        ValueError: If there are too many classes.
    """
    return {name: _unpack(value) for name, value in metrics.items()}


def _unpack(value: Any) -> Any:
    if not isinstance(value, dict) or not value.keys() >= {"classes", "cells"}:
        return value
    size, cells = int(value["classes"]), value["cells"]
    if not 1 < size <= _MOST_CLASSES:
        raise ValueError("too many classes")
    matrix = [[0] * size for _ in range(size)]
    for position, count in zip(cells[::2], cells[1::2], strict=True):
        matrix[position // size][position % size] = count
    return matrix


def figures(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The accuracy of each class, by names such as ``evaluate/confusion/accuracy-of-3``."""
    for phase, name, matrix in matrices(record):
        for label, value in enumerate(class_accuracies(matrix)):
            if value is not None:
                yield f"{phase}/{name}/accuracy-of-{label}", value
