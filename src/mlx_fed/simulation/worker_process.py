"""Entry points of a worker process, which has one worker."""

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
from .worker import Worker, reason
from .worker_messages import SampledClient, WorkRequest, WorkResult

_worker: Worker | None = None
_failure = "it was not started"


def start(worker_config: bytes, device: str | None, parent: int, folder: Path) -> None:
    """Initialization of the process; :func:`work` reports an error here."""
    global _worker, _failure
    threading.Thread(target=_end_after, args=(parent, folder), daemon=True).start()
    loading.set_listeners([worker_progress.sender(folder)])
    try:
        devices.use(device)
        _worker = Worker(cloudpickle.loads(worker_config))
    except Exception as error:
        _failure = reason(error)


def _end_after(parent: int, folder: Path) -> None:
    """Ends this process soon after the main process, which may be killed."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def work(request_path: Path, clients: Sequence[SampledClient]) -> WorkResult:
    """Local training or evaluation of clients, by a request's file.

    Raises:
        SimulationError: If the process could not be set up.
    """
    if _worker is None:
        raise SimulationError(f"A worker process could not start: {_failure}")
    return _worker.work(read_request(request_path), clients)


def write_request(request: WorkRequest, path: Path) -> None:
    """Writes a request for all workers: many work units share one."""
    with path.open("wb") as file:
        pickle.dump(request, file, protocol=pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1)
def read_request(path: Path) -> WorkRequest:
    """Reads a request's file, which is of this run."""
    with path.open("rb") as file:
        request: WorkRequest = pickle.load(file)
    return request
