"""What a user does with a result: predict, tabulate, plot, show."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.helpers.simulated import LOCAL, NORMALIZED, TASK, load, simulate, values

POINTS, LABELS = load(3, None).test  # type: ignore[misc]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> fed.Result:
    return simulate(None, tmp_path_factory.mktemp("runs"), NORMALIZED, 4, test=(POINTS, LABELS))


def test_the_model_predicts_as_the_server_evaluated_it(result):
    model = result.load()
    assert not model.training
    accuracy = np.mean(np.asarray(model(mx.array(POINTS)).argmax(axis=1)) == LABELS)
    assert accuracy == pytest.approx(result.rounds[-1]["central"]["accuracy"])


def test_the_best_model_is_that_of_the_round_with_the_lowest_loss(tmp_path: Path):
    rates = {1: 0.2, 2: 0.2, 3: 30.0}
    task = replace(
        TASK, optimizer=lambda config: fed_sgd(rates[int(config.get("server-round", 1))])
    )
    result = simulate(None, tmp_path, task, 4, test=(POINTS, LABELS))
    losses = [record["central"]["loss"] for record in result.rounds]
    assert np.argmin(losses) == 1
    model = result.load(best=True)
    loss = task.loss(model, mx.array(POINTS), mx.array(LABELS)).mean().item()
    assert loss == pytest.approx(losses[1], rel=1e-5)


def fed_sgd(rate: float):
    import mlx.optimizers as optim

    return optim.SGD(rate)


@pytest.mark.parametrize("name", ["model.safetensors", ""])
def test_a_model_file_of_an_earlier_run_is_loaded(result, name):
    model = fed.load_model(NORMALIZED, result.folder / name)
    for key, array in tree_flatten(result.load().parameters()):
        assert (
            values(array).tobytes() == values(dict(tree_flatten(model.parameters()))[key]).tobytes()
        )
    assert not model.training


def test_a_task_of_settings_is_made_with_those_of_the_run(tmp_path: Path):
    def make(config):
        assert config["learning-rate"] == 0.125
        return TASK

    result = simulate(None, tmp_path, make, 4, num_rounds=1, config={"learning-rate": 0.125})
    fed.load_model(make, result.folder)


def test_what_stays_with_clients_has_its_initial_values(tmp_path: Path):
    task = replace(LOCAL, personal=lambda name: name.startswith("layers.4"))
    result = simulate(None, tmp_path, task, 4)
    model = dict(tree_flatten(result.load().parameters()))
    mx.random.seed(0)
    assert values(model["layers.1.running_mean"]).tolist() == [0.0] * 8
    assert (
        values(model["layers.0.weight"]).tobytes()
        == values(result.parameters["layers.0.weight"]).tobytes()
    )
    # The file says the same.
    for key, array in tree_flatten(fed.load_model(task, result.model).parameters()):
        assert values(array).tobytes() == values(model[key]).tobytes()


def test_another_models_file_is_refused_by_its_differences(result, tmp_path: Path):
    arrays = dict(mx.load(str(result.model)))
    arrays["layer.0.weight"] = arrays.pop("layers.0.weight")
    arrays["layers.0.bias"] = arrays["layers.0.bias"].astype(mx.float16)
    arrays["layers.4.bias"] = mx.zeros(4)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), arrays)
    with pytest.raises(fed.FedError) as error:
        fed.load_model(NORMALIZED, tmp_path / "other.safetensors")
    for text in (
        "'layer.0.weight' is not one of the model's (did you mean 'layers.0.weight'?)",
        "'layers.0.bias' has dtype float16, the model's has float32",
        "'layers.4.bias' has shape (4,), the model's has (3,)",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_a_file_that_is_no_model_is_named(content, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(fed.FedError, match=str(path)):
        fed.load_model(TASK, path)


def test_a_private_buffer_is_in_the_result_and_not_in_a_file(tmp_path: Path):
    import mlx.nn as nn
    import mlx.optimizers as optim

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self._seen = mx.zeros(1)

        def __call__(self, x):
            if self.training:
                self._seen = self._seen + 1
            return self.linear(x)

    task = replace(
        TASK,
        model=Counting,
        buffers=lambda name: "average" if name == "_seen" else None,
        optimizer=lambda config: optim.SGD(0.1),
    )
    result = simulate(None, tmp_path, task, 4)
    assert result.load()._seen.item() > 0
    with pytest.raises(fed.FedError, match=r"'_seen' is private"):
        result.load(best=True)


def test_the_best_model_may_be_absent(tmp_path: Path):
    with pytest.raises(fed.FedError, match="keep=1"):
        simulate(None, tmp_path, TASK, 4, num_rounds=1, keep=0).load(best=True)


def test_a_table_has_a_row_for_each_round(result):
    pytest.importorskip("pandas")
    table = result.to_pandas()
    assert list(table["round"]) == [1, 2, 3]
    for column, phase, metric in (
        ("train/loss", "train", "loss"),
        ("evaluate/accuracy", "evaluate", "accuracy"),
        ("central/loss", "central", "loss"),
    ):
        assert list(table[column]) == [record[phase][metric] for record in result.rounds]


def test_a_chart_has_a_line_for_each_phase(result):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    loss, accuracy = result.plot()
    assert loss.get_title() == "loss"
    assert [line.get_label() for line in loss.lines] == ["train", "evaluate", "central"]
    assert list(accuracy.lines[-1].get_ydata()) == [
        record["central"]["accuracy"] for record in result.rounds
    ]
    with pytest.raises(fed.FedError, match="'acuracy': there are loss, accuracy"):
        result.plot("acuracy")


@pytest.mark.parametrize(
    ("library", "call"), [("pandas", "to_pandas"), ("matplotlib.pyplot", "plot")]
)
def test_a_library_that_is_not_installed_is_named(result, library, call, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(fed.FedError, match=f"pip install {library.partition('.')[0]}"):
        getattr(result, call)()


def test_a_result_is_short_in_a_console_and_a_table_in_a_notebook(result):
    text = repr(result)
    assert re.match(r"Result\(3 rounds, train/loss [\d.]+ -> [\d.]+, evaluate/loss ", text)
    assert str(result.folder) in text
    assert len(text) < 400
    page = result._repr_html_()
    assert page.count("<svg") == 5
    assert "<td>central/accuracy</td>" in page
    assert "http" not in page
