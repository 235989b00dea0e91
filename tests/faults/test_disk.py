"""A disk that fills up or can only be read, in the middle of a run: small ones of memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ..conftest import Started
from ..helpers.run_folders import assert_same_end
from ..helpers.fleet_commands import FED, join, serve
from ..helpers.run_folders import checkpoints
from ..helpers.run_folders import read_history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
SIZE = ("-c", "hidden=200000", "-c", "local-steps=1")
"""A model of 4 MB, two of whose arrays wait on disk."""
TASK = ("tests.helpers.tasks:moons", "--strategy", "FedAdam", *SIZE)


class Disk:
    """A file system of its own, at a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")

    def change(self, options: str) -> None:
        self.mount(f"remount,{options}")

    def fill(self) -> None:
        """Leaves no byte."""
        with (self.folder / "ballast").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**20))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """An empty disk of 256 MB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    disk.mount("size=256m")
    yield disk
    subprocess.run(["umount", "-l", str(disk.folder)], check=True)


def test_a_disk_that_is_too_small_ends_a_run_that_goes_on_with_more_room(
    start, disk: Disk, tmp_path: Path
):
    command = (*FED, "simulate", *TASK, "--workers", 0, "--clients", 3, "--rounds", 8)
    whole = start(*command, "--runs", tmp_path, "--name", "whole")
    assert whole.ends() == 0, whole.text

    disk.change("size=30m")  # a checkpoint has 12 MB
    run = start(*command, "--runs", disk.folder, "--name", "run")
    assert run.ends() == 1
    ended_well_informed(run, "No space left on device")
    reached = max(checkpoints(disk.folder / "run"))
    assert 1 <= reached < 8
    again = start(*command, "--runs", disk.folder, "--resume", "run")
    assert again.ends() == 1
    ended_well_informed(again, "No space left on device")

    disk.change("size=256m")
    last = start(*command, "--runs", disk.folder, "--resume", "run")
    assert last.ends() == 0, last.text
    assert_same_end(disk.folder / "run", tmp_path / "whole")


def test_a_server_whose_disk_is_full_ends_and_goes_on_with_the_nodes_that_wait(
    start, disk: Disk, tmp_path: Path
):
    kept = ("--strategy", "FedAdam", *SIZE, "--rounds", 200)
    server, address = serve(start, disk.folder, *kept)
    nodes = [join(start, address, number, *SIZE) for number in range(2)]
    server.line("round 2 ")
    while server.process.poll() is None:  # it makes room as it drops old checkpoints
        disk.fill()
        time.sleep(0.1)
    assert server.ends() == 1
    ended_well_informed(server, "No space left on device")
    (disk.folder / "ballast").unlink()
    reached = max(checkpoints(disk.folder / "run"))
    port = address.rpartition(":")[2]
    command = (*FED, "serve", *TASK, "--runs", disk.folder, "--resume", "run", "--port", port)
    again = start(*command, "--rounds", reached + 2)
    assert again.ends() == 0, again.text
    assert [node.ends() for node in nodes] == [0, 0]
    numbers = [record["round"] for record in read_history(disk.folder / "run")]
    assert numbers == list(range(1, reached + 3))


def test_a_disk_that_can_only_be_read(start, disk: Disk):
    command = (*FED, "simulate", *TASK, "--workers", 0, "--clients", 3, "--rounds", 8)
    first = start(*command, "--runs", disk.folder, "--name", "run", "--rounds", 2)
    assert first.ends() == 0, first.text
    files = {path: path.read_bytes() for path in disk.folder.rglob("*.*")}
    disk.change("ro")
    for place in (("--name", "new"), ("--resume", "run")):
        run = start(*command, "--runs", disk.folder, *place)
        assert run.ends() == 1
        ended_well_informed(run, "Read-only file system")
    assert {path: path.read_bytes() for path in disk.folder.rglob("*.*")} == files
    disk.change("rw")
    last = start(*command, "--runs", disk.folder, "--resume", "run")
    assert last.ends() == 0, last.text


def ended_well_informed(process: Started, why: str) -> None:
    assert "Error: Cannot " in process.text
    assert why in process.text
    assert "--runs" in process.text
    assert "Traceback" not in process.text
