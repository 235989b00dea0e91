"""The inside of a worker process: one worker, and the request that it is at."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cloudpickle

from ..errors import SimulationError
from ..system import (
    devices,
    loading,
)
from . import worker_progress
from .worker import SampledClient, Worker, WorkerConfig, WorkRequest, WorkResult, reason

_worker: Worker | None = None
_failure = "it was not started"


def start(job: bytes, device: str | None, parent: int, folder: Path) -> None:
    """Sets the process up, once. What goes wrong is told when it is given work."""
    global _worker, _failure
    threading.Thread(target=_end_after, args=(parent, folder), daemon=True).start()
    loading.set_listeners([worker_progress.sender(folder)])
    try:
        devices.use(device)
        made: WorkerConfig = cloudpickle.loads(job)
        _worker = Worker(made)
    except Exception as error:
        _failure = reason(error)


def _end_after(parent: int, folder: Path) -> None:
    """Ends this process soon after the run's own, which may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def work(request: Path, seats: Sequence[SampledClient]) -> WorkResult:
    """Lets the process's worker do what the file of a request asks.

    Raises:
        SimulationError: If the process could not be set up.
    """
    if _worker is None:
        raise SimulationError(f"A worker process could not start: {_failure}")
    return _worker.work(read_request(request), seats)


def write_request(request: WorkRequest, path: Path) -> None:
    """Writes a request for all workers: many spans of clients share one."""
    with path.open("wb") as file:
        pickle.dump(request, file, protocol=pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1)
def read_request(path: Path) -> WorkRequest:
    """The request in a file of this run's own."""
    with path.open("rb") as file:
        request: WorkRequest = pickle.load(file)
    return request
