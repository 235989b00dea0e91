"""A run's folder: its name, its settings, its rounds and its model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_fed import events
from mlx_fed.runs.history import History, HistoryError
from mlx_fed.runs.run_folder import new_run_folder


def test_a_run_is_named_by_the_time(tmp_path):
    names = [new_run_folder(tmp_path / "deep" / "runs").name for _ in range(3)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", names[0])
    assert len(set(names)) == 3  # within a second
    assert all((tmp_path / "deep" / "runs" / name).is_dir() for name in names)


@pytest.mark.parametrize("name", ["first", "a.b-c_1", "1", "läuft"])
def test_a_run_may_have_a_name(tmp_path, name):
    assert new_run_folder(tmp_path, name) == tmp_path / name
    with pytest.raises(HistoryError, match=f"There is a run named '{name}'.*choose another name"):
        new_run_folder(tmp_path, name)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "/etc", "a/b", "a b", "-x", "a\n", ".x"])
def test_a_name_is_a_plain_one(tmp_path, name):
    with pytest.raises(HistoryError, match="name has letters, digits"):
        new_run_folder(tmp_path / "runs", name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match=r"Cannot make the run's folder.*file.* --runs"):
        new_run_folder(tmp_path / "file")
    with pytest.raises(HistoryError, match="Cannot make the run's folder"):
        new_run_folder(tmp_path, "x" * 300)


def test_rounds_are_written_as_they_end_and_told(tmp_path):
    told = []
    history = History(tmp_path, (told.append,))
    history.notify(events.NodeJoined("a", 1))
    first = {"round": 1, "train": {"loss": 0.5, "nodes": ["a"]}}
    history.add_round(first)
    assert first["time"] > 0
    assert (tmp_path / "history.jsonl").read_text() == json.dumps(first) + "\n"
    history.add_round({"round": 2, "central": {"a": np.float32(0.25), "b": mx.array(0.5)}})
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    written = json.loads(lines[1])
    assert written.pop("time") > 0
    assert written == {"round": 2, "central": {"a": 0.25, "b": 0.5}}
    assert [event.name for event in told] == ["joined", "round", "round"]
    assert told[0] == events.NodeJoined("a", 1)
    assert history.rounds[0] is first


def test_settings_are_readable(tmp_path):
    History(tmp_path).write_settings({"num-rounds": 3, "folder": Path("x")})
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "num-rounds": 3,
        "folder": "x",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "status.json"}


def test_the_model_loads_into_mlx(tmp_path):
    history = History(tmp_path)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3))
    model.set_dtype(mx.bfloat16)
    for _ in range(2):  # the second time in place of the first
        path = history.save_model(dict(tree_flatten(model.parameters())))
    assert [path.name for path in tmp_path.iterdir()] == [path.name] == ["model.safetensors"]
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm(3))
    other.load_weights(str(path))
    for name, array in tree_flatten(other.parameters()):
        assert mx.array_equal(array, dict(tree_flatten(model.parameters()))[name])
        assert array.dtype == mx.bfloat16


# -- a place that cannot be written --------------------------------------------------------

WRITE = {
    "settings.json": lambda history: history.write_settings({"a": 1}),
    "history.jsonl": lambda history: history.add_round({"round": 1}),
    "model.safetensors": lambda history: history.save_model({"w": mx.zeros(100_000)}),
}
PART = {"settings.json": "settings.json.part", "model.safetensors": "model.safetensors.part"}


@pytest.mark.parametrize("name", WRITE)
def test_a_folder_that_is_gone_is_an_error(tmp_path, name):
    history = History(tmp_path / "run")
    with pytest.raises(HistoryError, match=rf"Cannot write .*{name}: No such file .* --runs"):
        WRITE[name](history)
    assert history.rounds == []


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(tmp_path, name):
    (tmp_path / PART.get(name, name)).symlink_to("/dev/full")
    with pytest.raises(HistoryError, match=rf"Cannot write .*{name}: No space left on device"):
        WRITE[name](History(tmp_path))


def test_what_was_written_before_is_kept(tmp_path, little_room):
    history = History(tmp_path)
    history.add_round({"round": 1})
    history.save_model({"w": mx.ones(3)})
    with pytest.raises(HistoryError, match=r"history\.jsonl: File too large"):
        history.add_round({"round": 2, "nodes": ["node"] * 2**16})
    with pytest.raises(HistoryError, match=r"model\.safetensors: File too large"):
        history.save_model({"w": mx.zeros(2**16)})
    (kept,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert history.rounds == [json.loads(kept)]
    assert history.rounds[0]["round"] == 1
    assert mx.load(str(tmp_path / "model.safetensors"))["w"].tolist() == [1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("history.jsonl", "model.safetensors"),
    }
