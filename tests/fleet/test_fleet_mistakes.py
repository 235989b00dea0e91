"""The mistakes of a newcomer's first hour, as in tests/test_mistakes.py, on a fleet of processes.

A node shows the traceback of its task's code once, ending at the line of the mistake; the server
names the node, the exception's type and that line.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.fleet_commands import join, serve

MODULE = """
import mlx_fed as fed
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
Y = (np.arange(40) % 4).astype(np.int32)


def loss(model, x, y):
    return nn.losses.cross_entropy(model(x), y)


def data_of(x, y):
    return lambda partition_id, num_partitions: fed.Data(train=(x, y), test=(x, y))


def task_of(**fields):
    right = {"model": lambda: nn.Linear(8, 4), "loss": loss, "data": data_of(X, Y)}
    right["optimizer"] = lambda config: optim.SGD(0.1)
    return fed.Task(**{**right, **fields})


def read_file(partition_id, num_partitions):
    return fed.Data(train=(np.load(f"patients-{partition_id}.npy"), Y))  # file


def return_nothing(model, x, y):  # nothing
    loss(model, x, y)


right = task_of()
setting = task_of(optimizer=lambda config: optim.SGD(config["lr"]))  # setting
attribute = task_of(loss=lambda model, x, y: model(x).foo)  # attribute
inputs = task_of(loss=lambda model, x, y: loss(model, x[:, :7], y))
arguments = task_of(loss=lambda model, batch: model(batch))  # arguments
nothing = task_of(loss=return_nothing)
matrix = task_of(loss=lambda model, x, y: model(x) ** 2)  # matrix
labels = task_of(data=data_of(X, Y + 1))
floats = task_of(data=data_of(X, Y.astype(float)))
outputs = task_of(model=lambda: nn.Linear(8, 2))
wide = task_of(model=lambda: nn.Linear(8, 5))
file = task_of(data=read_file)
texts = task_of(data=data_of(X, np.array(["cat", "dog"] * 20)))
pair = task_of(data=lambda partition_id, num_partitions: (X, Y))
lengths = task_of(data=data_of(X, Y[:30]))
empty = task_of(data=data_of(X[:0], Y[:0]))
rate = task_of(loss=lambda model, x, y: model(x).sum(-1) ** 2,
               optimizer=lambda config: optim.SGD(1e9), local_epochs=5)
"""
LINES = {
    match[1]: number
    for number, line in enumerate(MODULE.splitlines(), 1)
    if (match := re.search(r"  # (\w+)$", line))
}
LOSS = MODULE.splitlines().index("    return nn.losses.cross_entropy(model(x), y)") + 1

REFUSED: dict[str, tuple[str, int, bool]] = {
    "setting": ("KeyError", LINES["setting"], True),
    "attribute": ("AttributeError", LINES["attribute"], True),
    "inputs": ("ValueError", LOSS, True),
    "arguments": ("TaskError", LINES["arguments"], False),
    "nothing": ("LossError", LINES["nothing"], False),
    "matrix": ("LossError", LINES["matrix"], False),
    "labels": ("ExamplesError", LOSS, False),
    "floats": ("ExamplesError", LOSS, False),
}
"""Mistakes in the roll call's first step: the exception, its line, and whether it is the task's
own, so that its traceback is shown."""
NOT_JOINED = {
    "file": ("FileNotFoundError", "patients-8.npy"),
    "texts": ("Data.test[1]", "labels into integers"),
    "pair": ("Task.data must return mlx_fed.Data",),
    "lengths": ("[40, 30]",),
    "empty": ("has no training examples",),
}
"""Mistakes that a node finds before it asks for the server."""
TASKS = [*REFUSED, *NOT_JOINED]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mistakes.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)  # fifteen processes
def test_each_mistake_is_told_on_its_node_and_by_name_at_the_server(start, folder: Path):
    server, address = serve(start, folder, "--min-nodes", 20, "--wait", 500, task="mistakes:right")
    nodes = {
        task: join(start, address, n, "--wait", 500, task=f"mistakes:{task}")
        for n, task in enumerate(TASKS)
    }
    for number, (task, (kind, line, is_own)) in enumerate(REFUSED.items()):
        place, node = f"(mistakes.py, line {line})", nodes[task]
        assert node.ends(300) == 1
        assert node.text.count("Traceback (most recent call last)") == int(is_own), node.text
        assert f"roll call failed: {kind}: " in node.text
        assert place in node.text
        if is_own:
            last_frame = re.findall(r'File "(.*)", line (\d+)', node.text)[-1]
            assert last_frame == (str(folder / "mistakes.py"), str(line))
        refusal = server.line(rf"node-{number} refused: {kind}.*").group()
        assert place in refusal
        assert ("stays on the node" in refusal) == is_own
    for task, texts in NOT_JOINED.items():
        node = nodes[task]
        assert node.ends(300) == 1
        assert all(text in node.text for text in texts), node.text
        assert node.text.count("Traceback (most recent call last)") == int(
            task in ("file", "lengths")
        )
    node = join(start, address, 20, "--name", "clinic", task="mistakes:wide")
    assert node.ends(300) == 1
    server.line(
        r"clinic refused: its model is not the server's: parameter 'weight' has shape \(5, 8\)"
    )
    # The node's own text is shown where its owner shares it.
    join(start, address, 21, "--share-errors", task="mistakes:setting")
    server.line(r"node-21 refused: KeyError: no setting lr.*\(mistakes.py, line \d+\)")
    joined = {int(number) for number in re.findall(r"node-(\d+)", server.text)}
    assert joined == {*range(len(REFUSED)), 21}
    assert not re.search(r"node \d", server.text)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("setting", rf"KeyError \(mistakes.py, line {LINES['setting']}\)"),
        pytest.param("outputs", r"ExamplesError: .*entry 3 of 2", marks=pytest.mark.slow),
        pytest.param("nothing", r"LossError: Task.loss .*NoneType", marks=pytest.mark.slow),
    ],
)
def test_the_run_ends_at_once_if_all_nodes_fail_with_one_exception(
    start, folder: Path, task: str, reason: str
):
    server, address = serve(start, folder, task=f"mistakes:{task}")
    nodes = [join(start, address, number, task=f"mistakes:{task}") for number in range(2)]
    assert server.ends() == 1
    assert re.search(rf"Error: All 2 nodes failed with the same error: {reason}", server.text)
    assert [node.ends() for node in nodes] == [1, 1]


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_ends_the_run_and_the_node_says_at_which_step(
    start, folder: Path
):
    server, address = serve(start, folder, task="mistakes:rate")
    nodes = [join(start, address, number, task="mistakes:rate") for number in range(2)]
    assert server.ends() == 1
    assert re.search(r"Error: Round 1: .* A smaller learning rate", server.text)
    for node in nodes:
        node.ends()
        assert len(re.findall(r"Note: the loss is \w+ at step \d+ of 10", node.text)) == 1
