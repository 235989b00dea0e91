"""Label counts of simulated clients, in the run's folder for the dashboard.

A client is counted when it participates, so that no data is loaded for it. The nodes of a
federation are not counted: their label counts are private.
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
from ..events import Event, LabelsCounted, RoundFinished, RunAborted, RunFinished
from ..system.atomic_files import atomic_write, read_regular_file
from ..task import Data
from . import round_record

MOST_CLIENTS = 1000
"""Clients that are counted: the first participants."""
_MOST_CLASSES = 100
"""Labels with more values are no classes, but numbers of another kind."""
_FILE = "labels.json"
_PAUSE = 1.0
"""Seconds between writes of the file."""


def labels_of(split: Any) -> np.ndarray | None:
    """The labels of examples, shape (examples,): the last array, if it has an integer for each.

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
    """The number of a client's examples with each label, held-out ones included; empty without
    labels."""
    arrays = [
        labels for split in (data.train, data.test) if (labels := labels_of(split)) is not None
    ]
    if not arrays:
        return {}
    classes, counts = np.unique(np.concatenate(arrays), return_counts=True)
    if len(classes) > _MOST_CLASSES:
        return {}
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


class LabelsFile:
    """Listener that writes ``labels.json`` in a simulation's folder; errors do not stop the run.

    Args:
        folder (Path): The run's folder. The counts of a resumed run are continued.
        num_clients (int): The number of clients.
    """

    def __init__(self, folder: Path, num_clients: int):
        self.path, self.num_clients = folder / _FILE, num_clients
        self.counts: dict[int, dict[int, int]] = {}
        self.is_new, self.last_write = False, 0.0
        if before := read(folder):
            for client, counts in before["clients"]:
                self.counts[client] = dict(zip(before["classes"], counts, strict=True))

    def __call__(self, event: Event) -> None:
        if isinstance(event, LabelsCounted):
            self._add(event.clients)
        is_over = isinstance(event, (RunFinished, RunAborted))
        is_due = isinstance(event, RoundFinished) and time.monotonic() - self.last_write > _PAUSE
        if self.is_new and (is_over or is_due):
            self._write()

    def _add(self, clients: Mapping[int, Mapping[int, int]]) -> None:
        for client, counts in clients.items():
            if counts and client not in self.counts and len(self.counts) < MOST_CLIENTS:
                self.counts[client] = dict(counts)
                self.is_new = True

    def _write(self) -> None:
        self.is_new, self.last_write = False, time.monotonic()
        classes = sorted({label for counts in self.counts.values() for label in counts})
        if len(classes) > _MOST_CLASSES:
            return
        rows = [[k, [self.counts[k].get(c, 0) for c in classes]] for k in sorted(self.counts)]
        text = json.dumps({"of": self.num_clients, "classes": classes, "clients": rows})
        with suppress(OSError), atomic_write(self.path, durable=False) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """The label counts of a simulation, if there are any.

    Returns:
        dict: ``classes``; ``clients``, a number and counts by class for each participant; and
            ``of``, the number of clients.
    """
    try:
        content = round_record.from_json(read_regular_file(folder / _FILE))
        is_valid = all(len(counts) == len(content["classes"]) for _, counts in content["clients"])
    except (KeyError, OSError, TypeError, ValueError):
        return None
    return dict(content) if is_valid and content["clients"] else None


def version(folder: Path) -> str:
    """The version of the file: another after each write; empty if there is none."""
    try:
        stat = (folder / _FILE).lstat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}"  # each write creates a file
