"""``mlx-fed check``: faults are found before a run, each with what to do."""

import re
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_fed.fleet import preflight
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


ANSWERS = {
    "nothing": (b"", False, "no answer|no whole answer"),
    "a byte now and then": (b"HTTP/1.1 200 OK\r\nx: ", True, "no whole answer"),
    "garbage": (b"\0\1\2\r\n\r\n", False, "no answer"),
    "a page": (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>", False, "no answer"),
    "a huge body": (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", True, "no"),
    "escapes": (
        b'HTTP/1.1 502 x\r\ncontent-length: 23\r\n\r\n{"detail": "\\u001b[2Jx"}',
        False,
        "no answer",
    ),
    "a redirect": (
        b"HTTP/1.1 302 x\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n",
        False,
        "no answer",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_is_in_a_servers_place_neither_holds_up_nor_steers_the_check(case, monkeypatch):
    answer, drips, words = ANSWERS[case]
    monkeypatch.setattr(preflight, "_LONGEST_ANSWER", 2.0)
    listening = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connections.append(connection)
                connection.recv(2**16)
                connection.sendall(answer)
                for _ in range(60 if drips else 0):
                    threading.Event().wait(0.1)
                    connection.sendall(b"x")
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    run = command("check", TASK, "--server", f"127.0.0.1:{listening.getsockname()[1]}")
    listening.close()
    assert run.code == 1, run.text
    assert re.search(f"FAULT  server: .*{words}", run.text), run.text
    assert "\x1b" not in run.text


DATA = {
    "rows of nothing": "x = np.zeros((20, 0), np.float32)",
    "objects": "x = np.array([{}] * 20)",
    "text": "x = np.array(['a'] * 20)",
    "a scalar": "x = np.float32(1)",
    "negative labels": "y = y - 9",
    "infinite": "x[0, 0] = np.inf",
}


@pytest.mark.parametrize("case", DATA)
def test_odd_data_is_a_fault_and_no_traceback(case, tmp_path, monkeypatch):
    run = command("check", own_task(tmp_path, monkeypatch, DATA[case]))
    assert run.code == 1, run.text
    assert faults(run.text), run.text
    assert "Traceback" not in run.text
