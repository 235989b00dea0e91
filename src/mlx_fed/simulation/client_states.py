"""What each client keeps for itself, on disk between rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arrays.named_arrays import Arrays
from ..system.atomic_files import atomic_write


class ClientStateStore:
    """Each client's own arrays as of the rounds that it trained in.

    Those from before are kept too: when a worker dies, its clients are trained again from what
    they had, and so are all when the run goes on from a checkpoint.

    Args:
        folder (Path): Where they are kept.
        keep (int): Checkpoints that the run can go on from.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder, self.keep = folder, keep

    def load(self, client: int, before: int) -> Arrays | None:
        """What the client had before the round, or None if it has not trained yet."""
        rounds = [number for number in self._rounds(client) if number < before]
        if not rounds:
            return None
        loaded: Any = mx.load(str(self._path(client, max(rounds))), format="safetensors")
        return dict(loaded)

    def save(self, client: int, number: int, arrays: Mapping[str, mx.array]) -> None:
        """Keeps what the client has after the round."""
        self.folder.joinpath(str(client)).mkdir(parents=True, exist_ok=True)
        path = self._path(client, number)
        # A worker of a process that was killed may still be at the same one.
        temporary = path.with_suffix(f".{os.getpid()}")
        with atomic_write(path, temporary, durable=False) as part, part.open("wb") as file:
            mx.save_safetensors(file, dict(arrays))
        # The last checkpoint is of two rounds before, or newer, and one of those to keep.
        start = number - self.keep - 2
        for old in sorted(n for n in self._rounds(client) if n <= start)[:-1]:
            self._path(client, old).unlink(missing_ok=True)

    def forget_after(self, number: int) -> None:
        """Drops what clients had after later rounds, which are going to be repeated."""
        for path in self.folder.glob("*/*.safetensors"):
            if int(path.stem) > number:
                path.unlink()

    def _path(self, client: int, number: int) -> Path:
        return self.folder / str(client) / f"{number}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        return [int(p.stem) for p in self.folder.joinpath(str(client)).glob("*.safetensors")]
