"""The notebooks: each is executed from start to end, and has no outputs where it is kept."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ..conftest import ROOT

NOTEBOOKS = ROOT / "examples" / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def execute(notebook: Any, folder: Path) -> list[Any]:
    """The code cells of a notebook that was executed in a folder."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": folder}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_both_are_there():
    assert NAMES == ["serve_and_join.ipynb", "simulate.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs(name: str):
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_the_run_as_it_goes(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    cells = execute(read(name), tmp_path)
    (live,) = (c for c in cells if c.source.startswith(("result = fed.s", "from line_task")))
    (shown,) = live.outputs  # one output, whatever the number of rounds
    html = shown.data["text/html"]
    assert '<progress value="1.000"' in html
    assert "Finished in " in html
    assert "<svg" in html
    assert "evaluate/loss" in html
    (result,) = next(cell for cell in cells if cell.source == "result").outputs
    assert "<svg" in result.data["text/html"]
    if name == "simulate.ipynb":
        plots = [
            out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})
        ]
        assert len(plots) == 2
    else:
        (codes,) = next(cell for cell in cells if "node.wait" in cell.source).outputs
        assert codes.data["text/plain"] == "[0, 0, 0]"
        assert "joined (3 in all)" in html


RUN = """
import mlx_fed as fed
from tests.helpers.tasks import moons
fed.simulate(moons({config}), num_clients=2, num_rounds=3, runs="runs", workers=0{arguments})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ({"raise-in": 2}, "", "Stopped: Round 2: all 2 nodes failed"),
        ({}, ", target='accuracy=0.01'", "and the target was"),
    ],
    ids=["failed", "early"],
)
def test_an_end_before_the_last_round_is_shown(config, arguments, words, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    source = RUN.format(config=config, arguments=arguments)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(CellExecutionError) if config else nullcontext():
        execute(notebook, tmp_path)
    html = notebook.cells[0].outputs[0].data["text/html"]
    assert words in html
    assert "round" in html
