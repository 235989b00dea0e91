"""``mlx-fed check``: faults are found before a run, each with what to do."""

import re
import socket
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.server import _serving, _socket
from mlx_fed.flower import transport

from ..conftest import command, free_port

TASK = "tests.helpers.tasks:moons"

OWN = """
import mlx_fed as fed
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim, numpy as np

x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
y = np.arange(20, dtype=np.int32) % 2
{change}
def load(partition_id, num_partitions):
    return fed.Data((x, y), (x, y))

task = fed.Task(
    model=lambda: nn.Linear(2, 2),
    loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y){loss},
    optimizer=lambda config: optim.SGD(0.1),
    data=load,
)
"""


def own_task(folder: Path, monkeypatch, change: str = "", loss: str = "") -> str:
    name = f"own_{abs(hash((change, loss)))}"
    (folder / f"{name}.py").write_text(OWN.format(change=change, loss=loss))
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:task"


def faults(text: str) -> list[str]:
    lines = text.splitlines()
    return [
        f"{line} | {advice.strip()}" for line, advice in pairwise(lines) if line.startswith("FAULT")
    ]


def test_a_node_that_is_ready(tmp_path):
    run = command("check", TASK)
    assert run.code == 0, run.text
    assert run.text.endswith("Ready.\n")
    assert "data: train: 160 examples of (2,) float32, () int32" in run.text
    assert "one step took" in run.text


TASKS = {
    "no such module": (None, "", "task: ", "mend the task"),
    "values that are not numbers": (
        "x[3] = np.nan",
        "",
        "have values that are not finite, the first at 3",
        "leave",
    ),
    "labels beyond the outputs": ("y[4] = 7", "", "training: .*7", "mend the task"),
    "a loss that is not finite": (
        "",
        " * mx.log(mx.array(0.0))",
        "the loss of the first step",
        "a smaller",
    ),
    "data that is not there": ("x = open('/no/such/file')", "", "No such file", "mend"),
    "arrays of unequal length": ("x = x[:5]", "", "data: ", "mend Task.data"),
    "no examples": ("x, y = x[:0], y[:0]", "", "data: .*no examples", "mend|choose"),
}


@pytest.mark.parametrize("case", TASKS)
def test_faults_of_a_task_are_found(case, tmp_path, monkeypatch):
    change, loss, words, advice = TASKS[case]
    name = "no_such_module:task"
    if change is not None:
        name = own_task(tmp_path, monkeypatch, change, loss)
    run = command("check", name)
    assert run.code == 1, run.text
    assert len(faults(run.text)) == 1, run.text
    assert re.search(words, faults(run.text)[0]), run.text
    assert re.search(advice, faults(run.text)[0]), run.text


def test_a_disk_that_cannot_be_written_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    (fault,) = faults(command("check", TASK).text)
    assert fault.endswith("| set TMPDIR")


def test_little_memory_is_found(monkeypatch):
    monkeypatch.setattr("mlx.core.get_peak_memory", lambda: 2**60)
    (fault,) = faults(command("check", TASK).text)
    assert "leaves too little" in fault


def test_a_server_that_does_not_answer_is_found():
    run = command("check", TASK, "--server", f"127.0.0.1:{free_port()}")
    (fault,) = faults(run.text)
    assert "no answer from 127.0.0.1" in fault
    assert "start the server" in fault


def test_a_policy_that_does_not_allow_the_server_is_found(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('[server]\nallowed = ["elsewhere:1"]\n')
    with _socket("127.0.0.1", 0) as listening, _serving(listening):
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        (fault,) = faults(command("check", TASK, "--server", server, "--policy", path).text)
        assert "allows the servers elsewhere:1" in fault
        path.write_text("[servers]\n")
        assert "Did you mean server?" in command("check", TASK, "--policy", path).text


class Secured:
    """A server with TLS, and a token for one node."""

    def __init__(self, folder: Path, listening: socket.socket):
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.federation = Federation(folder / "federation", self.address)
        self.token = self.federation.invite("hospital")

    def check(self, *arguments: object):
        return command("check", TASK, self.token, *arguments)


@pytest.fixture
def secured(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FED_HOME", str(tmp_path / "home"))
    with _socket("127.0.0.1", 0) as listening:
        secured = Secured(tmp_path, listening)
        with _serving(listening, secured.federation, "127.0.0.1"):
            yield secured


def test_a_token_is_not_used_up(secured):
    for _ in range(2):
        run = secured.check()
        assert run.code == 0, run.text
    assert secured.federation.nodes.all()[0].state == "invited"


def test_a_clock_that_is_wrong_is_found(secured, monkeypatch):
    ahead = transport.utc_now() + timedelta(hours=1)
    monkeypatch.setattr(transport, "utc_now", lambda: ahead)
    (fault,) = faults(secured.check().text)
    assert "this node's clock is" in fault
    assert "setting of the clock" in fault


def test_a_key_that_was_revoked_is_found(secured, tmp_path):
    secured.check()
    public = next((tmp_path / "home").rglob("node.pub"))
    where = ("--federation", secured.federation.folder)
    command("nodes", "revoke", "hospital", *where)
    assert command("nodes", "add", "hospital", "--key", public, *where).code == 0
    assert secured.check().code == 0
    command("nodes", "revoke", "hospital", *where)
    (fault,) = faults(secured.check().text)
    assert "was revoked" in fault
    assert "new token" in fault


def test_keys_that_others_can_read_are_found(secured, tmp_path):
    secured.check()
    next((tmp_path / "home").rglob("node.key")).chmod(0o644)
    assert "others can read it" in faults(secured.check().text)[0]


def test_another_server_is_found(secured, tmp_path):
    with _socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        other = Federation(tmp_path / "other", f"127.0.0.1:{port}")
        with _serving(listening, other, "127.0.0.1"):
            (fault,) = faults(secured.check("--server", f"127.0.0.1:{port}").text)
            assert "ask for a" in fault
    assert "identity" in faults(command("check", TASK, "mlxfed-no-token").text)[0]


def test_a_server_that_is_ready(tmp_path):
    Federation(tmp_path / "federation", "127.0.0.1:8080")
    run = command(
        *("check", TASK, "--as-server", "--port", free_port(), "--runs", tmp_path / "runs"),
        *("--federation", tmp_path / "federation", "--announce", "localhost:8080"),
    )
    assert run.code == 0, run.text
    assert "has an authority, and a certificate for" in run.text
    assert not (tmp_path / "runs").exists()


def test_faults_of_a_server_are_found(tmp_path):
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as other:
        run = command(
            *("check", "no_such_module:task", "--as-server", "--port", other.getsockname()[1]),
            *("--runs", tmp_path / "file" / "runs", "--announce", "no-such-host.invalid:1"),
        )
    found = faults(run.text)
    assert [each.split(":")[0].removeprefix("FAULT  ") for each in found] == [
        "port",
        "address",
        "runs",
        "task",
    ], run.text
