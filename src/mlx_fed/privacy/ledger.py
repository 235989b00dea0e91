"""Ledger of a run's releases, and what they spend of a privacy budget."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from . import accountant
from .accountant import Release

FILE = "privacy.jsonl"
"""File of a run's folder with a line for each release."""


class Ledger:
    """Releases of the model, counted on disk before anybody sees it.

    A release whose round was not recorded, as the server died, stays counted.

    Args:
        delta (float): The probability that epsilon does not hold.
    """

    def __init__(self, delta: float):
        self.delta = delta
        self._releases: Counter[Release] = Counter()
        self._path: Path | None = None
        self._epsilons: dict[frozenset[tuple[Release, int]], float] = {}

    def open(self, folder: Path) -> None:
        """Counts the releases that a run's folder has, and records further ones there."""
        self._path = folder / FILE
        self._releases.clear()
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                self._releases[Release(entry["noise"], entry["fraction"])] += 1

    def add(self, release: Release, **fields: Any) -> None:
        """Records a release, with further fields of its line."""
        self._releases[release] += 1
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({**fields, **release._asdict()}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def epsilon(self, *further_releases: Release) -> float:
        """Epsilon of all releases so far, with further ones."""
        releases = self._releases + Counter(further_releases)
        key = frozenset(releases.items())
        if key not in self._epsilons:
            self._epsilons[key] = accountant.epsilon(releases, self.delta)
        return self._epsilons[key]

    def state(self) -> dict[str, Any]:
        """Nothing: the file has what a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Leaves the ledger as the file has it."""
