"""A simulation's processes: whatever ends them, the result or the run's folder is whole."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import pytest
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

from ..conftest import ROOT
from ..helpers.simulated import CLIENTS, TASK, assert_same, load, simulate
from ..helpers.run_folders import read_history

pytestmark = pytest.mark.slow

# -- workers that die ----------------------------------------------------------------------


def dying_once(folder: Path, client: int, how: Callable[[], None]) -> fed.Task:
    """A task that ends the process which is the first to load a client's data."""

    def load_or_die(partition_id: int, num_partitions: int | None) -> fed.Data:
        flag = folder / "died"
        if partition_id == client and not flag.exists():
            flag.touch()
            how()
        return load(partition_id, num_partitions)

    return replace(TASK, data=load_or_die)


DEATHS = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "exit": lambda: os._exit(3)}


@pytest.mark.parametrize("how", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_a_worker_that_dies_is_replaced_and_its_clients_are_redone(
    strategy: Callable[[], Strategy], how, tmp_path: Path
):
    task = dying_once(tmp_path, 20, how)
    one = simulate(strategy(), tmp_path, task, name="one", workers=2)
    assert (tmp_path / "died").exists()
    assert_same(one, simulate(strategy(), tmp_path, name="other"))
    assert one.rounds[0]["refused"] == []


def test_clients_are_redone_from_the_statistics_that_they_had(tmp_path: Path):
    """A worker is killed in round 2, when some of its clients have saved new ones already."""
    from ..helpers.simulated import LOCAL

    flag = tmp_path / "died"

    def optimizer(config: dict):
        if config.get("server-round") == 2 and not flag.exists() and os.getpid() != main:
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return LOCAL.optimizer(config)

    main = os.getpid()
    task = replace(LOCAL, optimizer=optimizer)
    one = simulate(FedAvg(), tmp_path, task, name="one", workers=2, chunk_size=3)
    assert flag.exists()
    assert_same(one, simulate(FedAvg(), tmp_path, LOCAL, name="other"))


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_workers_that_are_killed_while_they_wait_are_replaced(phase: str, tmp_path: Path):
    """All of them, each time before a phase of round 2 and 3."""
    (tmp_path / "workers").mkdir()

    def load_and_tell(partition_id: int, num_partitions: int | None) -> fed.Data:
        (tmp_path / "workers" / str(os.getpid())).touch()
        return load(partition_id, num_partitions)

    def kill(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.phase == phase and event.round > 1:
            for path in (tmp_path / "workers").iterdir():
                os.kill(int(path.name), signal.SIGKILL)
                path.unlink()
                killed.append(path.name)

    killed: list[str] = []
    task = replace(TASK, data=load_and_tell)
    one = simulate(FedAvg(), tmp_path, task, name="one", workers=2, listeners=(kill,))
    assert len(killed) >= 3
    assert_same(one, simulate(FedAvg(), tmp_path, name="other"))


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_clients_that_kill_every_worker_are_named(strategy, tmp_path: Path):
    def load_or_die(partition_id: int, num_partitions: int | None) -> fed.Data:
        if partition_id == 20:
            os._exit(3)
        return load(partition_id, num_partitions)

    with pytest.raises(fed.FedError) as raised:
        simulate(strategy(), tmp_path, replace(TASK, data=load_or_die), name="run", workers=2)
    message = str(raised.value)
    named = re.match(r"3 worker processes died one after another over clients ([\d, ]+):", message)
    assert named
    clients = named[1].split(", ")  # the block that client 20 is in
    assert "20" in clients
    assert len(clients) <= 16
    assert "EXIT(3)" in message
    assert "workers=0" in message
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_memory_fault_is_not_taken_for_want_of_memory(tmp_path: Path):
    def load_or_die(partition_id: int, num_partitions: int | None) -> fed.Data:
        if partition_id == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return load(partition_id, num_partitions)

    with pytest.raises(fed.FedError) as raised:
        simulate(None, tmp_path, replace(TASK, data=load_or_die), 2, workers=1)
    message = str(raised.value)
    assert "SIGSEGV" in message
    assert "are all labels of the data from 0 to one less than the model's outputs" in message
    assert "memory enough" not in message


# -- wherever a simulation is started from -------------------------------------------------

UNGUARDED = """
from functools import cache

import mlx_fed as fed
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
import numpy as np

centre = mx.array([0.5, 0.0])

@cache
def corners():
    return np.eye(2)

def load(partition_id, num_partitions):
    rng = np.random.default_rng(partition_id)
    labels = rng.integers(0, 2, 40).astype(np.int32)
    points = (rng.normal(0, 0.4, (40, 2)) + corners()[labels]).astype(np.float32)
    return fed.Data((points, labels), (points, labels))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def __call__(self, x):
        return self.head(x - centre)

task = fed.Task(
    model=Net,
    loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
    optimizer=lambda config: optim.SGD(0.1),
    data=load,
)
result = fed.simulate(task, num_clients=20, num_rounds=1, workers=2, runs=RUNS, listeners=())
print("ended with", result.rounds[0]["train"]["loss"])
"""


def test_scripts_without_a_guard(start, tmp_path: Path):
    code = UNGUARDED.replace("RUNS", repr(str(tmp_path / "runs")))
    script = tmp_path / "script.py"
    script.write_text(code)
    as_script = start(script)
    as_text = start("-c", code)
    assert as_script.ends() == as_text.ends() == 0, as_script.text + as_text.text
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    as_stdin = subprocess.run(
        [sys.executable, "-"],
        input=code,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert as_stdin.returncode == 0, as_stdin.stderr
    assert as_stdin.stderr == ""
    assert as_script.text == as_text.text == as_stdin.stdout
    assert re.fullmatch(r"ended with [01]\.\d+\n", as_script.text)


def test_a_task_of_a_module_in_the_current_folder(start, tmp_path: Path):
    code = UNGUARDED.partition("result =")[0]
    (tmp_path / "my_module.py").write_text(code)
    arguments = ("my_module:task", "--clients", 20, "--rounds", 2, "--workers", 2)
    run = start("-m", "mlx_fed", "simulate", *arguments, "--name", "run", cwd=tmp_path)
    assert run.ends() == 0, run.text
    assert [record["round"] for record in read_history(tmp_path / "runs" / "run")] == [1, 2]
    assert "Finished in" in run.text


# -- a run that is ended from outside ------------------------------------------------------


class Terminal:
    """A command in a terminal of its own, whose keys it gets."""

    def __init__(self, arguments: list[str], folder: Path):
        self.shown = ""
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        # MLX keeps its compiled programs there.
        (self.temporary / "mlx").symlink_to(Path(tempfile.gettempdir(), "mlx"))
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(self.temporary)}
            os.execve(sys.executable, [sys.executable, *arguments], environment)

    def read(self) -> bool:
        """Takes in what comes; False at the end."""
        try:
            part = os.read(self.file, 65536)
        except OSError:
            return False
        self.shown += part.decode(errors="replace")
        return bool(part)

    def until(self, pattern: str) -> None:
        while not re.search(pattern, self.shown):
            assert self.read(), f"{pattern!r} is not in:\n{self.shown}"

    def ends(self) -> int:
        while self.read():
            pass
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def left_behind(self) -> list[Path]:
        """What is left of the command's temporary folders."""
        return [path for path in self.temporary.iterdir() if path.name != "mlx"]


def descendants(pid: int) -> set[int]:
    """Processes that a process has started, and those that these have."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = dict(map(int, line.split()) for line in table.splitlines())
    found: set[int] = set()
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below}
        found |= below
    return found


def all_end(pids: set[int]) -> bool:
    """Whether processes end by themselves."""
    for _ in range(300):
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.1)
    return False


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


SLOW = ["-m", "mlx_fed", "simulate", "tests.helpers.simulated:slow", "--clients", str(CLIENTS)]
SLOW += ["--rounds", "50", "--workers", "2", "--name", "run"]


@pytest.mark.parametrize("moment", ["at the start", "in a round"])
def test_ctrl_c_ends_it_all_and_leaves_what_was_reached(moment: str, tmp_path: Path):
    run = Terminal(SLOW, tmp_path)
    if moment == "in a round":
        run.until(r"round 2 .*train loss")
    else:
        run.until("round 1")
        time.sleep(0.1)  # the workers are importing
    workers = descendants(run.pid)
    assert workers
    os.write(run.file, b"\x03")
    assert run.ends() == 130, run.shown
    assert "Interrupted. To resume: " in run.shown
    assert "Traceback" not in run.shown
    assert "resource_tracker" not in run.shown
    assert all_end(workers)
    assert run.left_behind() == []
    folder = tmp_path / "runs" / "run"
    assert mx.load(str(folder / "model.safetensors"))
    if moment == "in a round":
        assert len(read_history(folder)) >= 2


def test_who_ends_the_run_ends_it_all_and_leaves_what_was_reached(tmp_path: Path):
    run = Terminal(SLOW, tmp_path)
    run.until(r"round 1 .*train loss")
    workers = descendants(run.pid)
    os.kill(run.pid, signal.SIGTERM)
    assert run.ends() == 128 + signal.SIGTERM, run.shown
    assert "Traceback" not in run.shown
    assert all_end(workers)
    assert run.left_behind() == []
    assert mx.load(str(tmp_path / "runs" / "run" / "model.safetensors"))


def test_when_a_run_is_killed_its_workers_end_and_nothing_stays(tmp_path: Path):
    run = Terminal(SLOW, tmp_path)
    run.until(r"round 1 .*train loss")
    workers = descendants(run.pid)
    assert len(workers) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.ends()
    assert all_end(workers)
    assert run.left_behind() == []


def test_all_workers_have_a_share_of_a_small_round(tmp_path: Path):
    (tmp_path / "seen").mkdir()

    def load_and_tell(partition_id: int, num_partitions: int | None) -> fed.Data:
        (tmp_path / "seen" / str(os.getpid())).touch()
        return load(partition_id, num_partitions)

    task = replace(TASK, data=load_and_tell)
    simulate(FedMedian(), tmp_path, task, num_clients=2 * 16, num_rounds=1, workers=2)
    assert len(list((tmp_path / "seen").iterdir())) == 2
