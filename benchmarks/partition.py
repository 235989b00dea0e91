"""MNIST and a partition of it, written once to an ``.npz`` that every simulator reads."""

from pathlib import Path
from typing import Any

import numpy as np

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
"""Where the parquet files are looked for, unless a folder is named."""

NUM_CLIENTS = 100


def partitioner(name: str) -> Any:
    """Who gets which examples, by the partition's name.

    ``"iid"``; ``"dirichlet"``, with a concentration of 0.3; ``"two-digits"``, which is McMahan et
    al.'s: sorted by digit and cut in 200 shards of 300, of which each client gets two.
    """
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, ShardPartitioner

    if name == "iid":
        return IidPartitioner(NUM_CLIENTS)
    if name == "dirichlet":
        return DirichletPartitioner(
            NUM_CLIENTS, partition_by="label", alpha=0.3, min_partition_size=10, seed=42
        )
    return ShardPartitioner(
        NUM_CLIENTS, partition_by="label", num_shards_per_partition=2, shard_size=300, seed=42
    )


def write(dataset: str, name: str, path: Path) -> None:
    """Writes training images in the clients' order with their offsets, and the test set.

    Args:
        dataset (str): A folder of MNIST's parquet files.
        name (str): The partition's, as :func:`partitioner` knows it.
        path (Path): The file, an ``.npz``.
    """
    import datasets
    from flwr_datasets import FederatedDataset

    datasets.disable_progress_bars()
    federated = FederatedDataset(
        dataset=dataset, partitioners={"train": partitioner(name)}, seed=42
    )
    parts = [_arrays(federated.load_partition(number)) for number in range(NUM_CLIENTS)]
    test_images, test_labels = _arrays(federated.load_split("test"))
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.savez(
        path,
        train_images=images,
        train_labels=labels.astype(np.int32),
        offsets=np.cumsum([0, *(len(labels) for _, labels in parts)]),
        test_images=test_images,
        test_labels=test_labels.astype(np.int32),
    )


def _arrays(examples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 of shape (examples, 28, 28), and labels."""
    images = np.stack([np.asarray(image) for image in examples["image"]])
    return images, np.asarray(examples["label"])
