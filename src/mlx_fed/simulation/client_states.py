"""Client states on disk between rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arrays.named_arrays import Arrays
from ..system.atomic_files import atomic_write


class ClientStateStore:
    """Store of client states, one file for each client and round in which it trained.

    Earlier states are kept too: when a worker dies, its clients train again from the state before,
    and so do all clients when the run resumes from a checkpoint.

    Args:
        folder (Path): Folder of the files.
        keep (int): Number of checkpoints from which the run can resume.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder, self.keep = folder, keep

    def load(self, client: int, before: int) -> Arrays | None:
        """State of a client before a round, or ``None`` if it has not trained yet."""
        rounds = [number for number in self._rounds(client) if number < before]
        if not rounds:
            return None
        arrays: Any = mx.load(str(self._path(client, max(rounds))), format="safetensors")
        return dict(arrays)

    def save(self, client: int, server_round: int, arrays: Mapping[str, mx.array]) -> None:
        """Writes the state of a client after a round."""
        self.folder.joinpath(str(client)).mkdir(parents=True, exist_ok=True)
        path = self._path(client, server_round)
        # A worker of a killed process may still write the same file.
        temporary_path = path.with_suffix(f".{os.getpid()}")
        with atomic_write(path, temporary_path, durable=False) as target, target.open("wb") as file:
            mx.save_safetensors(file, dict(arrays))
        # The oldest checkpoint to resume from is of this round or newer.
        start = server_round - self.keep - 2
        for old in sorted(n for n in self._rounds(client) if n <= start)[:-1]:
            self._path(client, old).unlink(missing_ok=True)

    def delete_after(self, server_round: int) -> None:
        """Deletes the states after later rounds, which are going to be repeated."""
        for path in self.folder.glob("*/*.safetensors"):
            if int(path.stem) > server_round:
                path.unlink()

    def _path(self, client: int, server_round: int) -> Path:
        return self.folder / str(client) / f"{server_round}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        return [int(p.stem) for p in self.folder.joinpath(str(client)).glob("*.safetensors")]
