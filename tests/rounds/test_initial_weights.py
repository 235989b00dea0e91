"""Initial weights of a run, from a file or from arrays."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_fed.cli.main import app
from mlx_fed.cli.options import RunOptions, to_arguments
from mlx_fed.events import Notice
from tests.helpers.simulated import LOCAL, NORMALIZED, TASK, model, simulate, values


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> fed.Result:
    return simulate(None, tmp_path_factory.mktemp("first"), NORMALIZED, 4, num_rounds=1)


def start_at(initial: Any, folder: Path, task: fed.Task = NORMALIZED, **options: Any) -> fed.Result:
    """A run whose clients do not move: it ends with its initial weights."""
    task = replace(task, config={"learning-rate": 0.0})
    return simulate(None, folder, task, 4, num_rounds=1, initial=initial, **options)


@pytest.mark.parametrize("form", ["file", "arrays", "NumPy"])
def test_clients_train_from_the_initial_weights(form, first, tmp_path: Path):
    arrays = {**first.parameters, **first.statistics}
    initial: Any = {
        "file": first.model,
        "arrays": arrays,
        "NumPy": {name: np.asarray(array) for name, array in arrays.items()},
    }[form]
    result = start_at(initial, tmp_path, seed=9)
    for name, array in first.parameters.items():
        assert values(result.parameters[name]).tobytes() == values(array).tobytes()
    recorded = json.loads((result.folder / "settings.json").read_text())["initial"]
    assert recorded == (str(first.model) if form == "file" else f"{len(arrays)} arrays")


def test_a_run_from_the_seeds_own_weights_is_the_run_without(tmp_path: Path):
    expected = simulate(None, tmp_path, TASK, 4)
    at_start = start_at(None, tmp_path, TASK)
    result = simulate(None, tmp_path, TASK, 4, initial=at_start.model)
    for name, array in expected.parameters.items():
        assert values(result.parameters[name]).tobytes() == values(array).tobytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layers.0.weight": None}, "'layers.0.weight' is missing"),
        ({"layers.1.running_mean": None}, "'layers.1.running_mean' is missing"),
        ({"layers.0.weigth": mx.zeros(1)}, "'layers.0.weigth' is not one of the model's"),
        ({"layers.0.bias": mx.zeros(9)}, r"'layers.0.bias' has shape \(9,\), the model's .*\(8,\)"),
        ({"layers.0.bias": mx.zeros(8, mx.float16)}, "dtype float16, the model's has float32"),
        ({"layers.0.bias": np.zeros(8)}, r"dtype float64: .*astype\(numpy.float32\)"),
        ({"layers.0.bias": mx.full(8, mx.nan)}, "'layers.0.bias' has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, text, first, tmp_path: Path):
    arrays = {**first.parameters, **first.statistics, **change}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(fed.FedError, match=text):
        start_at(arrays, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_slip_in_a_name_is_corrected(first, tmp_path: Path):
    arrays = {**first.parameters, **first.statistics}
    arrays["layer.0.weight"] = arrays.pop("layers.0.weight")
    with pytest.raises(fed.FedError, match=r"did you mean 'layers\.0\.weight'"):
        start_at(arrays, tmp_path)


def frozen_model() -> nn.Module:
    module = model()
    module.layers[0].freeze()
    return module


def test_frozen_arrays_have_to_be_those_of_the_nodes(tmp_path: Path):
    task = replace(TASK, model=frozen_model)
    before = start_at(None, tmp_path, task)
    after = start_at(before.model, tmp_path, task)
    for name, array in before.parameters.items():
        assert values(after.parameters[name]).tobytes() == values(array).tobytes()
    with pytest.raises(fed.FedError, match=r"'layers.0.\w+', which is frozen and not sent"):
        start_at(before.model, tmp_path, task, seed=6)


def test_what_clients_keep_is_not_used_and_said(tmp_path: Path):
    task = replace(LOCAL, personal=lambda name: name.startswith("layers.4"))
    before = start_at(None, tmp_path, task)
    notices: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    after = start_at(before.model, tmp_path, task, seed=6, listeners=(listen,))
    assert set(after.parameters) == set(before.parameters)
    for name, array in before.parameters.items():
        assert values(after.parameters[name]).tobytes() == values(array).tobytes()
    assert any("each client has values of its own" in text for text in notices)


def test_a_resumed_run_has_its_own_weights(first, tmp_path: Path):
    result = start_at(first.model, tmp_path)
    with pytest.raises(fed.FedError, match=r"leave out initial= \(--weights\)"):
        start_at(first.model, tmp_path, resume=result.folder)
    resumed = start_at(None, tmp_path, resume=result.folder)
    assert values(resumed.parameters["layers.0.bias"]).tobytes() == (
        values(first.parameters["layers.0.bias"]).tobytes()
    )
    settings = json.loads((result.folder / "settings.json").read_text())
    assert settings["initial"] == str(first.model)


def test_a_run_without_a_complete_round_is_not_resumed_from_other_weights(first, tmp_path: Path):
    result = start_at(first.model, tmp_path)
    for path in (result.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(fed.FedError, match="has no complete round yet, and its initial weights"):
        start_at(None, tmp_path, resume=result.folder)


@pytest.mark.parametrize("initial", [3, "nowhere.safetensors"])
def test_what_is_no_weights_is_named(initial, tmp_path: Path):
    with pytest.raises(fed.FedError, match=r"not a int|no model file nowhere.safetensors"):
        start_at(initial, tmp_path)


def test_weights_on_the_command_line(tmp_path: Path):
    before = simulate(None, tmp_path, TASK, 4, num_rounds=1)
    line = ("simulate", "tests.helpers.simulated:TASK", "--clients", "2", "--rounds", "1", "-q")
    options = ("--workers", "0", "-c", "learning-rate=0", "--seed", "9", "--name", "second")
    options += ("--weights", str(before.model), "--runs", str(tmp_path))
    ended = CliRunner().invoke(app, [*line, *options])
    assert ended.exit_code == 0, ended.output
    arrays: Any = mx.load(str(tmp_path / "second" / "model.safetensors"))
    for name, array in before.parameters.items():
        assert values(arrays[name]).tobytes() == values(array).tobytes()
    assert to_arguments(RunOptions(initial=Path("m.safetensors"))) == ["--weights=m.safetensors"]
