"""What a simulation says of input that is wrong, and of models that do not train together."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import cloudpickle
import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from mlx_fed.data.partitions import columns, load_partition

from ..helpers.simulated import CLIENTS, TASK, assert_same, load, loss, raising_for, simulate


def refused(result: fed.Result, phase: str = "train") -> dict[str, str]:
    """Who was left out of the first round, and why."""
    left_out = result.rounds[0]["refused"]
    return {each["node"]: each["reason"] for each in left_out if each["phase"] == phase}


# -- clients and strategies ----------------------------------------------------------------


def test_more_clients_than_examples(tmp_path: Path):
    def digits(partition_id: int, num_partitions: int | None) -> fed.Data:
        train, test = load_partition("digits", partition_id, num_partitions)
        return fed.Data(columns(train, "label"), columns(test, "label"))

    told: list[str] = []
    with pytest.raises(fed.FedError, match="Round 1: none of 3 nodes"):
        simulate(
            FedAvg(fraction_train=0.0005, min_train_nodes=3),
            tmp_path,
            replace(TASK, data=digits),
            num_clients=6000,
            listeners=(lambda event: told.append(getattr(event, "reason", "")),),
        )
    assert any("Cannot partition 'digits'" in reason and "6000" in reason for reason in told), told


def empty(partition_id: int, num_partitions: int | None) -> fed.Data:
    data = load(partition_id, num_partitions)
    if partition_id == 3:
        data = fed.Data(tuple(array[:0] for array in data.train), data.test)
    return data


@pytest.mark.parametrize("batched", [True, False])
def test_an_empty_partition_fails_and_the_round_goes_on(batched: bool, tmp_path: Path):
    one = simulate(FedAvg(), tmp_path, replace(TASK, data=empty), batched=batched)
    assert list(refused(one)) == ["node-3"]
    assert refused(one)["node-3"].startswith("Partition 3 has no training examples: have fewer")
    assert len(one.rounds[-1]["train"]["nodes"]) == CLIENTS - 1


def test_an_empty_stream_fails_and_the_round_goes_on(tmp_path: Path):
    def stream(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = load(partition_id, num_partitions)
        batches = [] if partition_id == 3 else [tuple(map(mx.array, data.train))]
        return fed.Data(lambda key: iter(batches), data.test)

    one = simulate(FedAvg(), tmp_path, replace(TASK, data=stream), num_clients=5)
    assert refused(one) == {"node-3": "ValueError: The client has no training examples."}


@pytest.mark.parametrize("test", [None, (np.zeros((0, 5), np.float32), np.zeros(0, np.int32))])
def test_clients_without_test_examples_are_left_out_of_evaluation(test: Any, tmp_path: Path):
    def untested(partition_id: int, num_partitions: int | None) -> fed.Data:
        data = load(partition_id, num_partitions)
        return data if partition_id else fed.Data(data.train, test)

    task = replace(TASK, data=untested)
    one = simulate(FedAvg(), tmp_path, task, num_clients=4)
    assert one.rounds[-1]["train"]["nodes"] == ["node-0", "node-1", "node-2", "node-3"]
    assert one.rounds[-1]["evaluate"]["nodes"] == ["node-1", "node-2", "node-3"]
    assert refused(one, "evaluate") == refused(one) == {}


def test_a_strategy_that_asks_for_more_clients_than_there_are(tmp_path: Path):
    with pytest.raises(fed.FedError, match=r"for 50 clients, and there are 40\. Simulate more"):
        simulate(FedAvg(min_available_nodes=50), tmp_path)
    with pytest.raises(fed.FedError, match=r"for 2 clients, and there are 1\."):
        simulate(FedAvg(), tmp_path, num_clients=1)


def test_one_client_is_a_federation(tmp_path: Path):
    one = simulate(None, tmp_path, num_clients=1)
    assert one.rounds[-1]["train"]["nodes"] == ["node-0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, "num_clients is a whole number, 1 or more, not 0"),
        ({"num_clients": "3"}, "num_clients is a whole number, 1 or more, not '3'"),
        ({"num_clients": 2.5}, "num_clients is a whole number, 1 or more, not 2.5"),
        ({"num_rounds": 0}, "num_rounds is a whole number, 1 or more, not 0"),
        ({"chunk_size": 0}, "chunk_size is a whole number, 1 or more, not 0"),
        ({"workers": -1}, "workers is a whole number, 0 or more, not -1"),
        ({"faults": 0.1}, "faults is an mlx_fed.Faults, not 0.1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(fed.FedError, match=message):
        simulate(FedAvg(), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


# -- tasks that raise ----------------------------------------------------------------------


def misshapen(partition_id: int, num_partitions: int | None) -> fed.Data:
    """One client's points have a coordinate too many, which shows when its step is traced."""
    data = load(partition_id, num_partitions)
    if partition_id == 7:
        x, y = data.train
        data = fed.Data((np.concatenate([x, x[:, :1]], axis=1), y), data.test)
    return data


def bad_labels(partition_id: int, num_partitions: int | None) -> fed.Data:
    """One client's labels have a shape that the loss cannot take, as all others of its chunk."""
    data = load(partition_id, num_partitions)
    if partition_id == 7:
        x, y = data.train
        data = fed.Data((x, np.stack([y] * 4, axis=1)), data.test)
    return data


@pytest.mark.parametrize("data", [misshapen, bad_labels])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_client_on_which_a_task_raises_fails_alone(data, workers, tmp_path: Path):
    one = simulate(FedAvg(), tmp_path, replace(TASK, data=data), name="one", workers=workers)
    assert list(refused(one)) == ["node-7"]
    absent = replace(TASK, data=raising_for({7}, OSError("away")))
    other = simulate(FedAvg(), tmp_path, absent, name="other", batched=False)
    for name, array in other.parameters.items():
        assert mx.array_equal(one.parameters[name], array), name


NORMALIZED = replace(
    TASK, model=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm(8), nn.Linear(8, 3))
)


def test_batch_normalization_trains_on_any_number_of_examples_but_one(tmp_path: Path):
    """A last batch of one example, which MLX's refuses, joins the one before."""
    assert any(len(load(k, None).train[0]) % 8 == 1 for k in range(CLIENTS))
    batched = simulate(FedAvg(), tmp_path, NORMALIZED, name="batched")
    assert not refused(batched)
    assert_same(batched, simulate(FedAvg(), tmp_path, NORMALIZED, name="plain", batched=False))


def test_a_client_that_fails_in_a_chunk_leaves_the_others_as_they_are(tmp_path: Path):
    """BatchNorm cannot train on one example, which is all that two of the clients have."""
    singles = {3, 17}

    def data(partition: int, num_partitions: int | None) -> fed.Data:
        whole = load(partition, num_partitions)
        if partition not in singles:
            return whole
        return fed.Data(tuple(array[:1] for array in whole.train), whole.test)

    task = replace(NORMALIZED, data=data)
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    one = simulate(FedAvg(), tmp_path, task, name="one", listeners=(listen,))
    assert set(refused(one)) == {f"node-{k}" for k in singles}
    assert notes == []  # the model itself trains together
    assert_same(one, simulate(FedAvg(), tmp_path, task, name="other", batched=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_that_raises_on_all_ends_the_run(workers: int, tmp_path: Path):
    data = raising_for(set(range(CLIENTS)), OSError("the disk is not mounted"))
    told: list[events.Event] = []
    with pytest.raises(fed.FedError, match="all 40 nodes failed with the same error: OSError"):
        simulate(
            FedAvg(),
            tmp_path,
            replace(TASK, data=data),
            workers=workers,
            name="run",
            max_repeats=1,
            listeners=(told.append,),
        )
    refused = [event for event in told if isinstance(event, events.ReplyRefused)]
    assert len(refused) == CLIENTS  # nor repeated
    assert all("OSError: the disk is not mounted (" in event.reason for event in refused)
    assert (tmp_path / "run" / "model.safetensors").exists()


# In another process, as each of these is a memory fault where it is not refused.
LABELS = """
from dataclasses import replace
from pathlib import Path

import mlx_fed as fed
import mlx.nn as nn
import numpy as np
from tests.helpers.simulated import TASK, load, simulate


def one_too_many(partition_id, num_partitions):
    data = load(partition_id, num_partitions)
    x, y = data.train
    return data if partition_id < 3 else fed.Data((x, np.where(y == 2, {label}, y)), data.test)


def shifted(model, x, y):
    return nn.losses.cross_entropy(model(x), y - 1)


task = replace(TASK, data=one_too_many, {fields})
for batched in (True, False):
    result = simulate(None, Path("runs"), task, 5, batched=batched)
    for refused in result.rounds[0]["refused"]:
        if refused["phase"] == "train":
            print(batched, refused["node"], refused["reason"])
"""


@pytest.mark.parametrize(
    ("label", "fields", "wrong"),
    [
        (3, "", True),
        (10**6, "", True),
        (-4, "", True),
        (-1, "", False),
        (4, "loss=shifted", True),
        (3, "loss=shifted", False),
    ],
)
def test_labels_without_an_output_are_refused(label, fields, wrong, tmp_path: Path):
    program = LABELS.format(label=label, fields=fields)
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MLX_DISABLE_COMPILE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    nodes = [line.rsplit(": ")[0].split()[:2] for line in run.stdout.splitlines()]
    expected = [[str(batched), f"node-{k}"] for batched in (True, False) for k in (3, 4)]
    assert sorted(nodes) == (sorted(expected) if wrong else [])
    assert ("has a label that the model has no output for" in run.stdout) == wrong


def takes_one(argument: Any) -> None:
    raise AssertionError("it is called with another number of arguments")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"loss": takes_one}, r"TaskError: .* \(test_simulation_input.py, line \d+\): takes_one"),
        ({"optimizer": lambda config: None}, "TaskError: Task.optimizer must return an mlx.optim"),
        ({"augment": lambda key, x, y: None}, "TaskError: Task.augment returned None: it returns"),
        ({"loss": lambda model, x, y: None}, "LossError: Task.loss .* returned a NoneType"),
        ({"data": lambda partition, of: None}, "TaskError: Task.data must return mlx_fed.Data"),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_what_a_task_does_not_take_or_return_ends_the_run_at_once(
    fields: dict[str, Any], reason: str, batched: bool, tmp_path: Path
):
    with pytest.raises(fed.FedError, match=f"^Round 1: all 4 nodes failed .* error: {reason}"):
        simulate(None, tmp_path, replace(TASK, **fields), 4, batched=batched)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"data": takes_one}, r"^Task.data is called as .* \(test_simulation_input.py, line \d+\)"),
        ({"optimizer": lambda: None}, r"^Task.optimizer is called as optimizer\(config\)"),
    ],
)
def test_what_a_task_cannot_be_called_with_ends_the_run_before_it(
    fields: dict[str, Any], reason: str, tmp_path: Path
):
    with pytest.raises(fed.FedError, match=reason):
        simulate(None, tmp_path, replace(TASK, **fields), 4)


def test_a_task_that_returns_no_data(tmp_path: Path):
    data = lambda partition, of: None if partition == 2 else load(partition, of)  # noqa: E731
    one = simulate(FedAvg(), tmp_path, replace(TASK, data=data), num_clients=5)
    assert refused(one).keys() == {"node-2"}
    assert "must return mlx_fed.Data, not a NoneType" in refused(one)["node-2"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_function_that_is_not_deterministic_ends_the_run(workers: int, tmp_path: Path):
    def draw(partition_id: int, num_partitions: int | None) -> fed.Data:
        points = np.random.default_rng().normal(size=(20, 5)).astype(np.float32)
        return fed.Data((points, np.zeros(20, np.int32)))

    with pytest.raises(fed.FedError, match=r"Task\.data gave other examples for partition 0 than"):
        simulate(FedAvg(), tmp_path, replace(TASK, data=draw), workers=workers)


def test_a_task_that_cannot_be_sent_to_workers(tmp_path: Path):
    lock = threading.Lock()

    def guarded(partition_id: int, num_partitions: int | None) -> fed.Data:
        with lock:
            return load(partition_id, num_partitions)

    task = replace(TASK, data=guarded)
    with pytest.raises(fed.FedError, match=r"sent to worker processes: .*lock.*workers=0"):
        simulate(FedAvg(), tmp_path, task, workers=2)
    assert simulate(FedAvg(), tmp_path, task, num_clients=4).rounds


def test_a_task_that_cannot_be_made_in_a_worker(tmp_path: Path):
    here = threading.get_native_id()

    def make(config: dict) -> fed.Task:
        if threading.get_native_id() != here:
            raise OSError("there is no license for a second process")
        return TASK

    with pytest.raises(fed.FedError, match=r"process could not start: OSError: there is no"):
        simulate(FedAvg(), tmp_path, make, workers=2)


def test_tasks_hold_arrays_and_dtypes(tmp_path: Path):
    centre, factor = mx.array([0.5, 0, 0, 0, 0]), mx.array([2.0], mx.bfloat16)
    shift, dtype = np.ones(5, np.float32), mx.float32

    def shifted(module: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return loss(module, (x + shift - centre).astype(dtype), y) * factor.astype(dtype)

    task = replace(TASK, loss=shifted)
    one = simulate(FedAvg(), tmp_path, task, name="one", workers=2)
    assert_same(one, simulate(FedAvg(), tmp_path, task, name="other"))


def test_tasks_hold_functions_of_mlx(tmp_path: Path):
    activation, project, least = nn.gelu, mx.fast.rms_norm, mx.finfo(mx.float16)
    scale = mx.compile(lambda x: x * 0.5)

    def model() -> nn.Module:
        return MLP(activation)

    def scaled(module: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return loss(module, scale(project(x, None, least.eps)), y)

    task = replace(TASK, model=model, loss=scaled)
    one = simulate(FedAvg(), tmp_path, task, name="one", num_clients=4, workers=2)
    assert_same(one, simulate(FedAvg(), tmp_path, task, name="other", num_clients=4))


def test_an_app_for_rays_workers_holds_functions_and_dtypes_of_mlx():
    activation, dtype = mx.tanh, mx.array(0.0, mx.bfloat16).dtype

    def model() -> nn.Module:
        module = MLP(activation)
        module.set_dtype(dtype)
        return module

    app = pickle.loads(cloudpickle.dumps(fed.client_app(replace(TASK, model=model))))
    assert isinstance(app, ClientApp)


class MLP(nn.Module):
    def __init__(self, activation: Callable[[mx.array], mx.array]):
        super().__init__()
        self.layers = [nn.Linear(5, 8), nn.Linear(8, 3)]
        self._activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.layers[1](self._activation(self.layers[0](x)))


# -- models that do not train together -----------------------------------------------------


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(6, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.head(nn.relu(self.convolution(x[..., None])).reshape(-1, 6))


class Adapted(nn.Module):
    """A quantized layer that is frozen, and an adapter of low rank that is trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.QuantizedLinear.from_linear(nn.Linear(32, 3), 32, 4)
        self.down, self.up = mx.random.normal((32, 2)), mx.zeros((2, 3))

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.concatenate([x] * 7, axis=1)[:, :32]
        return self.base(x) + x @ self.down @ self.up


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("model", [Convolution, Adapted])
def test_a_model_that_does_not_train_together_is_told_of_once(model, workers, tmp_path: Path):
    notes: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    task = replace(TASK, model=model)
    one = simulate(
        FedMedian(), tmp_path, task, name="one", workers=workers, chunk_size=4, listeners=(listen,)
    )
    assert len(notes) == 1
    assert notes[0].startswith("clients train one after another, not together: ")
    assert "vmap" in notes[0]
    assert refused(one) == {}
    assert_same(one, simulate(FedMedian(), tmp_path, task, name="other", batched=False))


def test_a_loss_that_cannot_be_masked_trains_together(tmp_path: Path):
    task = replace(TASK, loss=lambda module, x, y: loss(module, x, y).mean())
    told: list[str] = []
    listeners = (lambda event: told.append(event.name),)
    one = simulate(FedAvg(), tmp_path, task, name="one", listeners=listeners)
    assert "note" not in told
    assert_same(one, simulate(FedAvg(), tmp_path, task, name="other", batched=False))


def stream_or_arrays(partition_id: int, num_partitions: int | None) -> fed.Data:
    data = load(partition_id, num_partitions)
    if partition_id % 3 or len(data.train[0]) < 16:
        return data
    x, y = map(mx.array, data.train)
    return fed.Data(lambda key: ((x[k : k + 8], y[k : k + 8]) for k in (0, 8)), data.test)


def test_streams_and_arrays_in_one_federation(tmp_path: Path):
    task = replace(TASK, data=stream_or_arrays)
    one = simulate(FedAvg(), tmp_path, task, name="one")
    assert_same(one, simulate(FedAvg(), tmp_path, task, name="other", workers=2, batched=False))


def test_more_replies_than_clients_are_refused(tmp_path: Path):
    with pytest.raises(fed.FedError, match="min_replies is 4, and there are 3 clients"):
        fed.simulate(None, num_clients=3, num_rounds=1, min_replies=4, runs=tmp_path)  # type: ignore
