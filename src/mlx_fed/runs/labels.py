"""Which labels simulated clients hold, in the run's folder for whoever watches.

They are counted as clients take part, so that nobody is loaded for it. The nodes of a federation
are not asked: how many examples they have of a kind is theirs to know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.examples import leaves
from ..system.atomic_files import read_plain, replacing
from ..task import Data
from . import round_record

MOST_CLIENTS = 1000
"""Clients that are counted: those that take part first."""
_MOST_CLASSES = 100
"""More are no classes, but numbers of another kind."""
_FILE = "labels.json"
_PAUSE = 1.0
"""Seconds until the file is written again."""


def labels_of(split: Any) -> np.ndarray | None:
    """The labels of examples: the last of their arrays, if it has an integer for each.

    Args:
        split (tuple or callable): ``Data.train`` or ``Data.test``.
    """
    if split is None or callable(split):
        return None
    array = leaves(split)[-1]
    dtype = str(array.dtype).removeprefix("mlx.core.")
    if array.ndim != 1 or not dtype.startswith(("int", "uint")):
        return None
    return np.asarray(array)


def count(data: Data) -> dict[int, int]:
    """How many of a client's examples, held-out ones included, have each label; empty where they
    have none."""
    found = [
        labels for split in (data.train, data.test) if (labels := labels_of(split)) is not None
    ]
    if not found:
        return {}
    classes, counts = np.unique(np.concatenate(found), return_counts=True)
    if len(classes) > _MOST_CLASSES:
        return {}
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


class LabelsFile:
    """Listens to a simulation and keeps ``labels.json`` in its folder; the run goes on without it.

    Args:
        folder (Path): The run's; what it has of the run before it was resumed is kept.
        num_clients (int): How many clients there are.
    """

    def __init__(self, folder: Path, num_clients: int):
        self.path, self.num_clients = folder / _FILE, num_clients
        self.counts: dict[int, dict[int, int]] = {}
        self.is_new, self.written = False, 0.0
        if before := read(folder):
            for client, counts in before["clients"]:
                self.counts[client] = dict(zip(before["classes"], counts, strict=True))

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "labels":
            self._add(fields["clients"])
        over = event in ("finished", "stopped")
        rested = event == "round" and time.monotonic() - self.written > _PAUSE
        if self.is_new and (over or rested):
            self._write()

    def _add(self, clients: Mapping[int, Mapping[int, int]]) -> None:
        for client, counts in clients.items():
            if counts and client not in self.counts and len(self.counts) < MOST_CLIENTS:
                self.counts[client] = dict(counts)
                self.is_new = True

    def _write(self) -> None:
        self.is_new, self.written = False, time.monotonic()
        classes = sorted({label for counts in self.counts.values() for label in counts})
        if len(classes) > _MOST_CLASSES:
            return
        rows = [[k, [self.counts[k].get(c, 0) for c in classes]] for k in sorted(self.counts)]
        text = json.dumps({"of": self.num_clients, "classes": classes, "clients": rows})
        with suppress(OSError), replacing(self.path, on_disk=False) as part:
            part.write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """What a simulation has counted, if it has: ``classes``, for each client that took part its
    number and counts, and how many clients there are (``of``)."""
    try:
        found = round_record.from_json(read_plain(folder / _FILE))
        whole = all(len(counts) == len(found["classes"]) for _, counts in found["clients"])
    except (KeyError, OSError, TypeError, ValueError):
        return None
    return dict(found) if whole and found["clients"] else None


def changed(folder: Path) -> str:
    """What tells one state of the file from another; empty where there is none."""
    try:
        stat = (folder / _FILE).lstat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}"  # each is a file of its own
