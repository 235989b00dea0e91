"""Files that are there as a whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fed.system.atomic_files import atomic_write

KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_fed.system.atomic_files import atomic_write

with atomic_write(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_file_takes_the_place_of_another(on_disk: bool, tmp_path: Path):
    path = tmp_path / "settings.json"
    path.write_text("before")
    with atomic_write(path, durable=on_disk) as part:
        part.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_there_stays_and_the_half_goes(on_disk: bool, tmp_path: Path):
    path = tmp_path / "settings.json"
    path.write_text("before")

    def write_half() -> None:
        with atomic_write(path, durable=on_disk) as part:
            part.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_the_half_of_a_process_that_was_killed_is_written_over(tmp_path: Path):
    path = tmp_path / "settings.json"
    path.write_text("before")
    subprocess.run([sys.executable, "-c", KILLED, path])
    assert path.read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 2
    with atomic_write(path) as part:
        part.write_text("after")
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]


def test_a_process_of_its_own_has_a_part_of_its_own(tmp_path: Path):
    path, own = tmp_path / "1.safetensors", tmp_path / "1.of-mine"
    with atomic_write(path, own) as part:
        assert part == own
        with atomic_write(path) as other:
            other.write_text("other")
        part.write_text("mine")
    assert path.read_text() == "mine"
