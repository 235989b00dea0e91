"""MLXClient under Flower's own start_server and start_client."""

import logging
import socket
import subprocess
import sys
from dataclasses import replace

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_fed.numpy_client import MLXClient
from mlx_fed.arrays.named_arrays import WeightsError

pytestmark = pytest.mark.usefixtures("uncompiled")

CLIENT = """
import sys
from tests.test_numpy_client import moons_task
from mlx_fed.numpy_client import MLXClient
from flwr.client import start_client
task = moons_task()
number = int(sys.argv[2])
start_client(
    server_address=sys.argv[1],
    client=MLXClient(task, task.data(number, 2), client=number).to_client(),
)
"""


class Net(nn.Module):
    def __init__(self, dtype=mx.float32):
        super().__init__()
        self.first = nn.Linear(2, 16)
        self.norm = nn.BatchNorm(16)
        self.last = nn.Linear(16, 2)
        self.last.set_dtype(dtype)

    def __call__(self, x):
        return self.last(nn.relu(self.norm(self.first(x))))


def moons_task(dtype=mx.float32) -> fed.Task:
    def load(partition_id, num_partitions):
        rng = np.random.default_rng(partition_id)
        labels = rng.integers(0, 2, 200)
        points = rng.normal(0, 0.4, (200, 2)) + np.stack([labels, 1 - labels], axis=1)
        points, labels = points.astype(np.float32), labels.astype(np.int32)
        return fed.Data((points[:160], labels[:160]), (points[160:], labels[160:]))

    return fed.Task(
        model=lambda: Net(dtype),
        loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
        metrics={"accuracy": lambda model, x, y: mx.argmax(model(x), axis=1) == y},
        optimizer=lambda config: optim.SGD(config["learning-rate"]),
        data=load,
        config={"learning-rate": 0.1},
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_parameters_go_out_and_come_back(dtype):
    task = moons_task(dtype)
    one = MLXClient(task, task.data(0, 2))
    other = MLXClient(task, task.data(1, 2), seed=7)
    other.set_parameters(one.get_parameters({}))
    for name, array in one.trainer.parameters().items():
        assert array.dtype == other.trainer.parameters()[name].dtype
        assert mx.array_equal(array, other.trainer.parameters()[name]), name
    assert set(one.trainer.statistics()) == {"norm.running_mean", "norm.running_var"}
    assert len(one.get_parameters({})) == len(one.trainer.spec) + 2


def test_fit_takes_the_old_apis_settings_and_trains():
    task = moons_task()
    client = MLXClient(task, task.data(0, 2))
    before = client.get_parameters({})
    after, examples, metrics = client.fit(before, {"local_epochs": 3, "learning_rate": 0.2})
    assert examples == 160
    assert metrics["loss"] < client.evaluate(before, {})[0] + 1
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    loss, examples, metrics = client.evaluate(after, {})
    assert examples == 40
    assert loss < client.evaluate(before, {})[0]
    assert metrics["accuracy"] > 0.8


def test_a_wrong_shape_names_the_parameter_and_both_shapes():
    task = moons_task()
    client = MLXClient(task, task.data(0, 2))
    arrays = client.get_parameters({})
    with pytest.raises(WeightsError, match="got 3 arrays"):
        client.set_parameters(arrays[:3])
    arrays[0] = arrays[0].T
    with pytest.raises(WeightsError, match=r"'first\.weight' has shape \(2, 16\).*\(16, 2\)"):
        client.set_parameters(arrays)


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({"personal": lambda name: name.startswith("last")}, {"last.weight", "last.bias"}),
        ({"statistics": "local"}, {"norm.running_mean", "norm.running_var"}),
    ],
)
def test_what_a_client_keeps_does_not_travel(kept, left):
    task = replace(moons_task(), **kept)
    client = MLXClient(task, task.data(0, 2))
    trainer = client.trainer
    before = client.get_parameters({})
    assert len(before) == len({*trainer.slots.parameters, *trainer.statistics_spec} - left)
    after, _, _ = client.fit(before, {})
    assert len(after) == len(before)
    loss = client.evaluate(after, {})[0]
    client.client_state = {}
    assert client.evaluate(after, {})[0] != loss


def test_runs_under_flowers_start_server(pytestconfig):
    """The old program: start_server here, two start_client processes."""
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, address, str(number)],
            cwd=pytestconfig.rootpath,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(2)
    ]

    def accuracy(results):
        total = sum(examples for examples, _ in results)
        return {"accuracy": sum(n * float(m["accuracy"]) for n, m in results) / total}

    try:
        history = start_server(
            server_address=address,
            config=ServerConfig(num_rounds=3),
            strategy=FedAvg(evaluate_metrics_aggregation_fn=accuracy),
        )
        assert [c.wait(30) for c in clients] == [0, 0]
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
            client.wait()
    losses = [loss for _, loss in history.losses_distributed]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert history.metrics_distributed["accuracy"][-1][1] > 0.8
