"""A mistake in a task is shown once, at the user's own line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mlx_fed as fed

import pytest

MISTAKEN = """
import mlx_fed as fed
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np


def data(partition_id, num_partitions):
    x = np.ones((8, 3), np.float32)
    return fed.Data(train=(x, x.sum(1)), test=(x, x.sum(1)))


def loss(model, x, y):
    return (model(x).foo - y) ** 2  # the mistake


task = fed.Task(
    model=lambda: nn.Linear(3, 1), loss=loss, optimizer=lambda config: optim.SGD(0.1), data=data
)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("everything", [False, True])
def test_the_traceback_ends_at_the_users_line(start, tmp_path: Path, workers, everything):
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    run = start(
        *("-m", "mlx_fed", "simulate", "mistaken:task", "--clients", 30, "--workers", workers),
        cwd=tmp_path,
        MLX_FED_TRACEBACK="1" if everything else "",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    assert run.ends() == 1
    text = run.text
    assert "# the mistake" in text
    assert ("worker.py" in text) == everything
    if not everything:
        assert text.count("Traceback (most recent call last)") == text.count("# the mistake") == 1
    # Named once, not for each client, and the round is not repeated.
    assert text.count("left out of train") == 1
    assert "all 30 nodes failed with the same error: AttributeError" in text
    assert "repeated" not in text


CELL = """
import my_task
import mlx_fed as fed

fed.simulate(my_task.task, num_clients=3, runs="{runs}", workers=0)  # the cell
"""


def test_a_notebook_shows_the_tasks_traceback_once_and_the_cells_line(
    tmp_path: Path, monkeypatch, capsys
):
    """IPython asks an exception for its traceback."""
    (tmp_path / "my_task.py").write_text(MISTAKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    cell = tmp_path / "cell.py"
    cell.write_text(CELL.format(runs=tmp_path))
    with pytest.raises(fed.FedError) as error:
        exec(compile(cell.read_text(), cell, "exec"), {})
    shown = "\n".join(error.value._render_traceback_())
    printed = capsys.readouterr().out
    assert printed.count("# the mistake") == 1
    assert "# the mistake" not in shown
    assert shown.count("# the cell") == 1
    assert "loop.py" not in shown
    assert "all 3 nodes failed with the same error: AttributeError" in shown.splitlines()[-1]
