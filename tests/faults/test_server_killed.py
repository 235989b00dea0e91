"""The server is killed, at any moment and at any byte, and its run ends as if it had not been.

``MLX_FED_KILLS=50 pytest -m slow tests/faults`` kills it as often as that.
"""

from __future__ import annotations

import os
import random
import signal
import time
from filecmp import cmp
from pathlib import Path

import pytest

from ..conftest import Started, free_port
from ..helpers.run_folders import checkpoints
from ..helpers.run_folders import read_history
from ..helpers.run_folders import assert_same_end

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MLX_FED_KILLS", "20"))
FED = ("-m", "mlx_fed")
SIZE = ("-c", "hidden=50000", "-c", "local-steps=1")
TASK = ("tests.helpers.tasks:moons", "--strategy", "FedAdam", *SIZE)
"""A model of which a checkpoint takes a while to write, so that kills come in the middle of it."""


def seconds_a_round(folder: Path) -> float:
    """How long a round of the run took, whatever the machine."""
    started = (folder / "settings.json").stat().st_mtime
    ended = (folder / "model.safetensors").stat().st_mtime
    return (ended - started) / len(read_history(folder))


def go_on_for(rounds: int, run: Started) -> None:
    """Waits until the run has gone so many rounds beyond its first."""
    first = int(run.line(r"(?m)^round (\d+) ")[1])
    run.line(rf"(?m)^round {first + rounds} ")


def has_half_a_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.part"))


def wait_for_half_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not has_half_a_checkpoint(folder):
        assert time.monotonic() < deadline, "no checkpoint is written"


@pytest.mark.timeout(60 + 12 * KILLS)
def test_a_simulation_that_is_killed_again_and_again(start, tmp_path: Path):
    rng = random.Random(4)
    rounds = 20 * KILLS
    options = ("--rounds", rounds, "--workers", 0, "--clients", 3, "--runs", tmp_path)
    command = (*FED, "simulate", *TASK, *options)
    whole = start(*command, "--name", "whole")
    assert whole.ends(600) == 0, whole.text

    folder, a_round = tmp_path / "killed", seconds_a_round(tmp_path / "whole")
    kills = halves = 0
    reached = set()
    while kills < KILLS:
        run = start(*command, *(("--resume",) if folder.exists() else ("--name",)), "killed")
        match rng.randrange(5):
            case 0:  # while it starts
                time.sleep(rng.uniform(0, 15) * a_round)
            case 1:  # as it writes
                go_on_for(rng.randrange(15), run)
                wait_for_half_a_checkpoint(folder)
            case _:
                go_on_for(rng.randrange(15), run)
                time.sleep(rng.uniform(0, 1.5) * a_round)
        assert run.process.poll() is None, "it was to be killed, and is done: more rounds!"
        run.process.send_signal(signal.SIGKILL)
        assert run.ends() == -signal.SIGKILL
        kills += 1
        halves += has_half_a_checkpoint(folder)
        reached.add(max(checkpoints(folder), default=0) if folder.exists() else 0)
    last = start(*command, "--resume", "killed")
    assert last.ends(600) == 0, last.text
    print(f"{kills} kills, {halves} while a checkpoint was written, after rounds {sorted(reached)}")
    assert halves > 0
    assert_same_end(folder, tmp_path / "whole")


@pytest.mark.timeout(60 + 12 * KILLS)
def test_a_simulation_that_is_killed_at_a_byte(start, tmp_path: Path):
    """The system ends the process as it writes that byte, of whichever file comes to it first."""
    whole = start("-m", "tests.helpers.limited", tmp_path / "whole", 0, 0)
    assert whole.ends() == 0, whole.text
    size = max(p.stat().st_size for p in checkpoints(tmp_path / "whole" / "run").values())

    rng = random.Random(5)
    places = [0, 1, 7, 8, 9, size // 2, size - 1]
    places += [rng.randrange(size) for _ in range(KILLS - len(places))]
    killed = 0
    for number, place in enumerate(places):
        runs = tmp_path / str(number)
        run = start("-m", "tests.helpers.limited", runs, rng.randint(1, 6), place)
        killed += run.ends() == -signal.SIGXFSZ
        assert run.process.returncode in (0, -signal.SIGXFSZ), run.text
        resumed = start("-m", "tests.helpers.limited", runs, 0, 0)
        assert resumed.ends() == 0, resumed.text
        assert_same_end(runs / "run", tmp_path / "whole" / "run")
    print(f"{killed} of {len(places)} runs killed at a byte")
    assert killed > len(places) // 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("own", "kills"),
    [((), 6), (("-c", "personal=true", "-c", "hidden=200000"), 2)],
    ids=["plain", "personal"],
)
def test_a_server_that_is_killed_while_its_nodes_go_on(start, tmp_path: Path, own, kills: int):
    """What nodes keep for themselves is what they had before the round that is repeated."""
    rng = random.Random(6)
    port = free_port()
    rounds = 20 * kills
    command = (*FED, "serve", *TASK, *own, "--rounds", rounds, "--runs", tmp_path, "--port", port)

    def with_nodes() -> list:
        address = f"127.0.0.1:{port}"
        join = (*FED, "join", TASK[0], "--server", address, *SIZE, *own)
        return [start(*join, "--node-id", number) for number in range(2)]

    nodes = with_nodes()
    whole = start(*command, "--name", "whole")
    assert whole.ends(120) == 0, whole.text
    assert [node.ends() for node in nodes] == [0, 0]

    a_round = seconds_a_round(tmp_path / "whole")
    nodes = with_nodes()
    for number in range(kills):
        server = start(*command, *(("--resume",) if number else ("--name",)), "killed")
        go_on_for(rng.randrange(15), server)
        time.sleep(rng.uniform(0, 1.5) * a_round)
        assert server.process.poll() is None, "it was to be killed, and is done: more rounds!"
        server.process.send_signal(signal.SIGKILL)
        server.ends()
    last = start(*command, "--resume", "killed")
    assert last.ends(120) == 0, last.text
    assert [node.ends() for node in nodes] == [0, 0], nodes[0].text
    ours, theirs = (read_history(tmp_path / name) for name in ("killed", "whole"))
    assert len(ours) == len(theirs) == rounds
    assert [r["train"] for r in ours] == [r["train"] for r in theirs]
    assert [r["evaluate"] for r in ours] == [r["evaluate"] for r in theirs]
    for name in ("model.safetensors", "best.safetensors"):
        assert cmp(tmp_path / "killed" / name, tmp_path / "whole" / name, shallow=False), name
