"""What is read is never run, and what is written stays in its folder."""

from __future__ import annotations

import ast
import os
import re
import pickle
import zlib
from io import BytesIO
from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from mlx_fed.rounds import checkpoint, checks
from mlx_fed.runs import history, run_folder
from mlx_fed.flower import one_run_grid
from mlx_fed.rounds.strategy_state import State

from .conftest import ROOT

SOURCES = sorted((ROOT / "src" / "mlx_fed").rglob("*.py"))
BETWEEN_PROCESSES = ROOT / "src" / "mlx_fed" / "simulation"
"""The only place that pickles: between a simulation's own processes."""
RUNS_WHAT_IT_READS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_room_reads_what_could_run(path):
    if BETWEEN_PROCESSES in path.parents:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used = {each.name.split(".")[0] for each in node.names} & RUNS_WHAT_IT_READS
            writes_only = not re.search(r"pickle\.load|Unpickler", path.read_text())
            assert used <= ({"pickle"} if writes_only else set())
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in RUNS_WHAT_IT_READS
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load")
            assert called != "yaml.load" or "class Loader(yaml.SafeLoader)" in path.read_text()


class Harm:
    """What runs as it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def objects(harm: Harm) -> bytes:
    """An array of objects, as NumPy's format has it."""
    file = BytesIO()
    np.save(file, np.array([harm], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("stype", ["numpy.ndarray", "safetensors", "pickle", "torch.tensor", ""])
def test_a_reply_that_would_run_is_refused(tmp_path, stype):
    one_run_grid.begin_run()
    harm = Harm(tmp_path / "harm")
    for data in (objects(harm), pickle.dumps(harm)):
        record = ArrayRecord({"w": Array("float32", (1,), stype, data)})
        content = RecordDict({"a": record, "m": MetricRecord({"num-examples": 1})})
        reply = Message(content, reply_to=Message(RecordDict(), 7, MessageType.TRAIN))
        with pytest.raises(checks.Refused):
            checks.check_update(reply, {"w": ((1,), "float32")}, {}, "num-examples")
    assert not harm.path.exists()


def test_a_checkpoint_that_would_run_is_refused(tmp_path):
    harm = Harm(tmp_path / "harm")
    for data in (objects(harm), pickle.dumps(harm)):
        path = tmp_path / f"00001-{zlib.crc32(data):08x}.safetensors"
        path.write_bytes(data)
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.read(path)
    masters = ArrayRecord({"../../w": Array(np.ones(2, np.float32))})
    made = checkpoint.Checkpoint(1, masters, {}, State({}, {}), None, {})
    checkpoints = checkpoint.Checkpoints(tmp_path, 1)
    checkpoints.save(made, lambda: None)
    checkpoints.wait()
    assert not harm.path.exists()
    assert {path.parent.name for path in tmp_path.rglob("*.safetensors")} == {
        "checkpoints",
        tmp_path.name,
    }


@pytest.mark.parametrize("name", ["..", "../a", "a/b", "/etc/a", "", "a\n", ".hidden", "a\0"])
def test_a_runs_name_is_a_plain_one(tmp_path, name):
    with pytest.raises(history.HistoryError, match="A run's name has letters"):
        run_folder.new_run_folder(tmp_path / "runs", name)
    assert not list(tmp_path.iterdir())


def test_a_nodes_name_is_nowhere_a_path(start, tmp_path):
    runs = tmp_path / "a" / "b" / "runs"
    where = ("--port", 0, "--runs", runs, "--name", "run", "--rounds", 1, "--min-nodes", 1)
    server = start("-m", "mlx_fed", "serve", "tests.helpers.tasks:moons", *where)
    address = server.line(r"Server ready on (\S+)").group(1)
    named = ("--server", address, "--name", "../../../escaped")
    node = start("-m", "mlx_fed", "join", "tests.helpers.tasks:moons", *named)
    assert server.ends() == 0, server.text
    assert node.ends() == 0, node.text
    assert "../../../escaped joined" in server.text
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    outside = {path.name for path in written if runs / "run" not in path.parents}
    assert outside == {"output-0.txt", "output-1.txt"}
