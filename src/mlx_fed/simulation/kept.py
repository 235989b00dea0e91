"""What each client keeps for itself, on disk between rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..weights import Arrays


class Kept:
    """Each client's own arrays as of the last rounds that it trained in.

    The round before is kept too: when a worker dies, its clients are trained again from what
    they had before.

    Args:
        folder (Path): Where they are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

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
        half = path.with_suffix(f".{os.getpid()}")
        with half.open("wb") as file:
            mx.save_safetensors(file, dict(arrays))
        half.replace(path)
        for old in sorted(self._rounds(client))[:-2]:
            self._path(client, old).unlink(missing_ok=True)

    def _path(self, client: int, number: int) -> Path:
        return self.folder / str(client) / f"{number}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        return [int(p.stem) for p in self.folder.joinpath(str(client)).glob("*.safetensors")]
