"""The inside of a worker process: one worker, and the request that it is at."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cloudpickle

from .. import devices  # first of all: it brings the fast BLAS
from .worker import Job, Outcome, Request, Seat, Worker

_worker: Worker | None = None


def start(job: bytes, device: str | None) -> None:
    """Sets the process up, once."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run to act on
    devices.use(device)
    made: Job = cloudpickle.loads(job)
    _worker = Worker(made)


def work(request: Path, seats: Sequence[Seat]) -> Outcome:
    """Lets the process's worker do what the file of a request asks."""
    assert _worker is not None, "the process was started"
    return _worker.work(read_request(request), seats)


def write_request(request: Request, path: Path) -> None:
    """Writes a request for all workers: many spans of clients share one."""
    with path.open("wb") as file:
        pickle.dump(request, file, protocol=pickle.HIGHEST_PROTOCOL)


@lru_cache(maxsize=1)
def read_request(path: Path) -> Request:
    """The request in a file of this run's own."""
    with path.open("rb") as file:
        request: Request = pickle.load(file)
    return request
