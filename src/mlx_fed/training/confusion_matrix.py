"""Confusion matrix of a classifier: how often each class was taken for which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import TaskError
from ..task import DatasetMetric

MAX_CLASSES = 100
"""Classes up to which a round's record has a matrix: 10,000 counts."""


class ConfusionMatrix(DatasetMetric):
    """Confusion matrix and accuracy of each class, for labels that are integers from 0.

    Rows are labels, columns are predictions. Clients send counts and the server adds them up, so
    that the matrix of a round is that of all clients' examples together. The server sees each
    client's counts, and with them how many examples of each label the client holds.

    Args:
        num_classes (int): The number of classes, at most 100.
        predict (callable, optional): ``predict(model, *batch)`` returns predicted classes and
            labels, two arrays of integers of one shape (batch, ...). Default: for batches
            ``(x, y)``, the largest output of ``model(x)`` along the last axis, and ``y``.

    Raises:
        TaskError: If the number of classes is not from 2 to 100.

    Example:
        >>> metrics = {"confusion": fed.ConfusionMatrix(10)}
        >>> evaluation = result.rounds[-1].get("evaluate")
        >>> evaluation["confusion"]  # a list of rows
        >>> result.to_pandas()["evaluate/confusion/accuracy-of-3"]
    """

    def __init__(self, num_classes: int, predict: Callable[..., Any] | None = None):
        if not isinstance(num_classes, int) or not 2 <= num_classes <= MAX_CLASSES:
            raise TaskError(
                f"ConfusionMatrix({num_classes!r}): the number of classes is a whole number from 2 "
                f"to {MAX_CLASSES}."
            )

        def largest_output(model: nn.Module, x: Any, y: Any) -> tuple[mx.array, Any]:
            outputs = model(x)
            if outputs.shape[-1] != num_classes:
                raise TaskError(
                    f"the model has {outputs.shape[-1]} outputs, and the confusion matrix "
                    f"{num_classes} classes: give it predict="
                )
            return mx.argmax(outputs, axis=-1), y

        def compute(predictions: mx.array, labels: mx.array) -> Any:
            return count_pairs(np.asarray(labels), np.asarray(predictions), num_classes)

        object.__setattr__(self, "num_classes", num_classes)
        super().__init__(predict or largest_output, compute)

    num_classes: int


def count_pairs(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> list[int]:
    """Counts of each pair of label and prediction, row by row, num_classes**2 numbers.

    Raises:
        TaskError: If shapes differ, or a value is not one of the classes.
    """
    if labels.shape != predictions.shape:
        raise TaskError(
            f"labels have the shape {labels.shape} and predicted classes {predictions.shape}: "
            "both have one number for each example"
        )
    for name, values in (("label", labels), ("predicted class", predictions)):
        if values.dtype.kind not in "biu":
            raise TaskError(f"a {name} is a whole number, and these are {values.dtype}")
        outside = values[(values < 0) | (values >= num_classes)]
        if outside.size:
            raise TaskError(f"{name} {outside[0]} is not one of {num_classes} classes, from 0")
    pairs = labels.reshape(-1).astype(np.int64) * num_classes + predictions.reshape(-1)
    counts: list[int] = np.bincount(pairs, minlength=num_classes**2).tolist()
    return counts


def to_rows(counts: list[int]) -> list[list[int]]:
    """Rows of a square matrix."""
    size = round(len(counts) ** 0.5)
    return [counts[start : start + size] for start in range(0, len(counts), size)]
