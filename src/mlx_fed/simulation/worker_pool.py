"""The processes of a simulation: who gets which clients, and what becomes of a dead one's."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import groupby, product
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from loky import ProcessPoolExecutor

from ..errors import SimulationError
from ..training.trainer import Trainer
from . import pickling, worker_process
from .worker import SampledClient, Worker, WorkerConfig, WorkResult

_AHEAD = 2
"""Spans that a process has at hand, so that it never waits for the next one."""
_MOST_DEATHS = 3
_MEMORY = "Is the memory enough? A smaller chunk_size or fewer workers need less;"
_FAULT = (
    "MLX does not check indices, and one out of range is such a fault: are all labels of the data "
    "from 0 to one less than the model's outputs, and all tokens below the size of its vocabulary?"
)
_CONTAINERS_MEMORY = Path("/sys/fs/cgroup/memory.max")
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",  # Accelerate's, on macOS
    # loky would take the data that a worker keeps for a leak, and end it.
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
}


class WorkUnit(NamedTuple):
    """Clients that one worker takes, and the file of what they are asked."""

    request: Path
    seats: Sequence[SampledClient]


def default_workers(device: str | None) -> int:
    """A process for each core that this one may use; on a GPU, this process alone."""
    on_gpu = device == "gpu" or (device is None and mx.default_device() == mx.Device(mx.gpu))
    return 0 if on_gpu else len(_cores())


def data_bytes(workers: int) -> int:
    """How much of the clients' data each worker keeps: together an eighth of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is none, or it says "max"
        memory = min(memory, int(_CONTAINERS_MEMORY.read_text()))
    return memory // 8 // workers


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


class InProcessPool:
    """The one worker of this process itself, in place of a pool: it has the server's model."""

    size = 1

    def __init__(self, job: WorkerConfig, trainer: Trainer):
        self.worker = Worker(job, trainer)

    def run(self, spans: Sequence[WorkUnit]) -> Iterator[WorkResult]:
        """What comes of each span, in order."""
        for request, seats in spans:
            yield self.worker.work(worker_process.read_request(request), seats)

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

    def __init__(self, job: WorkerConfig, size: int, device: str | None):
        self.size = size
        try:
            self._start = (pickling.dumps(job), device, os.getpid(), job.folder)
        except Exception as error:
            raise SimulationError(
                f"The task cannot be sent to worker processes: {error}. Make what it holds when "
                "it is called (inside Task.data or Task.model), or use workers=0."
            ) from error
        # Now, as it lets through the signals that _submit blocks.
        resource_tracker.ensure_running()
        self._processes = [self._new_process() for _ in range(size)]

    def _new_process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            initializer=worker_process.start,
            initargs=self._start,
            env=_ENVIRONMENT,
        )

    def run(self, spans: Sequence[WorkUnit]) -> Iterator[WorkResult]:
        """What comes of each span, as it comes. A process that dies is replaced, and its spans
        are done again.

        Raises:
            SimulationError: If a span kills one process after another, or none can be started.
        """
        waiting: list[deque[WorkUnit]] = [deque() for _ in range(self.size)]
        for number, span in enumerate(spans):
            waiting[number % self.size].append(span)
        at_work: dict[Future, tuple[int, WorkUnit]] = {}
        deaths: Counter[int] = Counter()
        try:
            while True:
                held = Counter(worker for worker, _ in at_work.values())
                # All workers get their next span before one is given another ahead.
                for depth, worker in product(range(_AHEAD), range(self.size)):
                    if held[worker] <= depth and (following := _next(waiting, worker)):
                        at_work[self._submit(worker, following)] = (worker, following)
                        held[worker] += 1
                if not at_work:
                    return
                done, _ = wait(at_work, return_when=FIRST_COMPLETED)
                for future in done & at_work.keys():
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        if future in at_work:
                            worker = at_work[future][0]
                            lost = _take_back(at_work, worker)
                            waiting[worker].extendleft(reversed(_blamed(lost, error, deaths)))
                            self._replace(worker)
                    else:
                        del at_work[future]
                        yield future.result()
        finally:
            for future in at_work:
                future.cancel()

    def _submit(self, worker: int, span: WorkUnit) -> Future:
        # A process that is started inherits what is blocked: Ctrl-C, and a terminal that is
        # closed, are for the run to act on.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            return self._processes[worker].submit(worker_process.work, span.request, span.seats)
        except BrokenProcessPool as error:  # it died while it had nothing to do
            future: Future = Future()
            future.set_exception(error)
            return future
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _replace(self, worker: int) -> None:
        self._processes[worker].shutdown(wait=False, kill_workers=True)
        self._processes[worker] = self._new_process()

    def close(self, at_once: bool) -> None:
        """Ends the processes: ``at_once`` whatever they are at, or when they have nothing to do."""
        for executor in self._processes:
            executor.shutdown(wait=True, kill_workers=at_once)


def _next(waiting: list[deque[WorkUnit]], worker: int) -> WorkUnit | None:
    """The worker's own next span, or the last of who has most left."""
    if waiting[worker]:
        return waiting[worker].popleft()
    longest = max(waiting, key=len)
    return longest.pop() if longest else None


def by_block(seats: Sequence[SampledClient]) -> list[Sequence[SampledClient]]:
    """Seats, those of one block of places together: a block is summed by one worker."""
    return [list(block) for _, block in groupby(seats, lambda seat: seat.block)]


def _take_back(at_work: dict[Future, tuple[int, WorkUnit]], worker: int) -> list[WorkUnit]:
    """What a dead process leaves undone, in the order in which it was given it."""
    lost = [
        future
        for future, (at, _) in at_work.items()
        if at == worker and not (future.done() and future.exception() is None)
    ]
    return [at_work.pop(future)[1] for future in lost]


def _blamed(lost: list[WorkUnit], error: Exception, deaths: Counter[int]) -> list[WorkUnit]:
    """What is to be done again, the first of it, over which the process died, block by block.

    Raises:
        SimulationError: If processes have died over it too often.
    """
    request, seats = lost[0]
    first = seats[0].place
    deaths[first] += 1
    if deaths[first] == _MOST_DEATHS:
        codes = _exit_codes(error)
        is_fault = any(name in codes for name in ("SIGSEGV", "SIGABRT", "SIGBUS"))
        advice = _FAULT if is_fault else _MEMORY
        clients = ", ".join(str(seat.client) for seat in seats)
        raise SimulationError(
            f"{_MOST_DEATHS} worker processes died one after another over clients {clients}: "
            f"{codes}. {advice} workers=0 shows what happens in this process."
        )
    return [*(WorkUnit(request, block) for block in by_block(seats)), *lost[1:]]


def _exit_codes(error: Exception) -> str:
    """The last of what loky says of dead processes, such as "exit codes {SIGKILL(-9)}"."""
    found = re.search(r"exit codes .*?(\{.*\})", str(error))
    return f"exit codes {found[1]}" if found else str(error.__cause__ or error).strip()
