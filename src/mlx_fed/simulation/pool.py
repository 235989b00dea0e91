"""The processes of a simulation: who gets which clients, and what becomes of a dead one's."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import cloudpickle
import mlx.core as mx
from loky import ProcessPoolExecutor

from ..errors import FedError
from . import process
from .worker import Job, Outcome, Seat, Worker

_AHEAD = 2
"""Spans that a process has at hand, so that it never waits for the next one."""
_MOST_DEATHS = 3


class SimulationError(FedError):
    """A simulation that cannot start or go on."""


class Span(NamedTuple):
    """Clients that one worker takes, and the file of what they are asked."""

    request: Path
    seats: Sequence[Seat]


def default_workers(device: str | None) -> int:
    """A process for each core that this one may use; on a GPU, this process alone."""
    on_gpu = device == "gpu" or (device is None and mx.default_device() == mx.Device(mx.gpu))
    return 0 if on_gpu else len(_cores())


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


class InProcess:
    """The one worker of this process itself, in place of a pool."""

    size = 1

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def run(self, spans: Sequence[Span]) -> Iterator[Outcome]:
        """What comes of each span, in order."""
        for request, seats in spans:
            yield self.worker.work(process.read_request(request), seats)

    def close(self, at_once: bool) -> None:
        """Nothing has to be ended."""


class Pool:
    """Worker processes, each started once and kept.

    A client goes to the same process in every round where it can, which has its data then.

    Args:
        job (Job): What the workers are set up with.
        size (int): How many there are.
        device (str, optional): ``"cpu"`` or ``"gpu"``.

    Raises:
        SimulationError: If the task cannot be sent to another process.
    """

    def __init__(self, job: Job, size: int, device: str | None):
        self.size = size
        try:
            self._start = (cloudpickle.dumps(job), device)
        except Exception as error:
            raise SimulationError(
                f"The task cannot be sent to worker processes: {error}. Make what it holds when "
                "it is called (inside Task.data or Task.model), or use workers=0."
            ) from error
        self._processes = [self._new_process() for _ in range(size)]

    def _new_process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            initializer=process.start,
            initargs=self._start,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )

    def run(self, spans: Sequence[Span]) -> Iterator[Outcome]:
        """What comes of each span, as it comes. A process that dies is replaced, and its spans
        are done again.

        Raises:
            SimulationError: If a span kills one process after another, or none can be started.
        """
        waiting: list[deque[Span]] = [deque() for _ in range(self.size)]
        for number, span in enumerate(spans):
            waiting[number % self.size].append(span)
        at_work: dict[Future, tuple[int, Span]] = {}
        deaths: dict[int, int] = {}
        try:
            while True:
                for worker in range(self.size):
                    held = sum(at == worker for at, _ in at_work.values())
                    for _ in range(_AHEAD - held):
                        if (following := _next(waiting, worker)) is None:
                            break
                        at_work[self._submit(worker, following)] = (worker, following)
                if not at_work:
                    return
                done, _ = wait(at_work, return_when=FIRST_COMPLETED)
                for future in done:
                    if future not in at_work:
                        continue
                    worker, span = at_work.pop(future)
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    elif isinstance(error, BrokenProcessPool):
                        self._replace(worker, span, error, deaths)
                        lost = [f for f, (at, _) in at_work.items() if at == worker]
                        waiting[worker].extendleft([at_work.pop(f)[1] for f in lost])
                        waiting[worker].appendleft(span)
                    else:
                        raise error
        finally:
            for future in at_work:
                future.cancel()

    def _submit(self, worker: int, span: Span) -> Future:
        try:
            return self._processes[worker].submit(process.work, span.request, span.seats)
        except BrokenProcessPool as error:  # it died while it had nothing to do
            future: Future = Future()
            future.set_exception(error)
            return future

    def _replace(self, worker: int, span: Span, error: Exception, deaths: dict[int, int]) -> None:
        first = span.seats[0].place
        deaths[first] = deaths.get(first, 0) + 1
        if deaths[first] == _MOST_DEATHS:
            clients = f"{span.seats[0].client} to {span.seats[-1].client}"
            cause = error.__cause__ or error
            raise SimulationError(
                f"{_MOST_DEATHS} processes died one after another over clients {clients}: "
                f"{str(cause).strip()} Is the memory enough? A smaller chunk_size or fewer "
                "workers need less; workers=0 shows what happens in this process."
            )
        self._processes[worker].shutdown(wait=False, kill_workers=True)
        self._processes[worker] = self._new_process()

    def close(self, at_once: bool) -> None:
        """Ends the processes: ``at_once`` whatever they are at, or when they have nothing to do."""
        for executor in self._processes:
            executor.shutdown(wait=True, kill_workers=at_once)


def _next(waiting: list[deque[Span]], worker: int) -> Span | None:
    """The worker's own next span, or the last of who has most left."""
    if waiting[worker]:
        return waiting[worker].popleft()
    longest = max(waiting, key=len)
    return longest.pop() if longest else None
