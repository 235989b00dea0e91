"""Pool of worker processes: schedules clients, and repeats the work of a process that dies."""

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
from .worker import Worker
from .worker_messages import SampledClient, WorkerConfig, WorkResult

_MAX_QUEUED = 2
"""Units that are submitted to a process, so that it never waits for the next one."""
_MAX_DEATHS = 3
_MEMORY = "Is the memory enough? A smaller chunk_size or fewer workers need less;"
_FAULT = (
    "MLX does not check indices, and one out of range is such a fault: are all labels of the data "
    "from 0 to one less than the model's outputs, and all tokens below the size of its vocabulary?"
)
_CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",  # Accelerate's, on macOS
    # loky would end a worker for the size of its cache.
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
}


class WorkUnit(NamedTuple):
    """Work of one call of a worker: the file of a request, and the clients."""

    request_path: Path
    clients: Sequence[SampledClient]


def default_workers(device: str | None) -> int:
    """Number of worker processes: one for each core that this process may use; 0 on a GPU."""
    on_gpu = device == "gpu" or (device is None and mx.default_device() == mx.Device(mx.gpu))
    return 0 if on_gpu else len(_cores())


def data_bytes(workers: int) -> int:
    """Size of each worker's cache of partitions: together an eighth of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is no file, or it is "max"
        memory = min(memory, int(_CONTAINER_MEMORY.read_text()))
    return memory // 8 // workers


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


class InProcessPool:
    """Pool of one worker in this process, with the server's model."""

    size = 1

    def __init__(self, worker_config: WorkerConfig, trainer: Trainer):
        self.worker = Worker(worker_config, trainer)

    def run(self, units: Sequence[WorkUnit]) -> Iterator[WorkResult]:
        """Results of work units, in order."""
        for path, clients in units:
            yield self.worker.work(worker_process.read_request(path), clients)

    def close(self, at_once: bool) -> None:
        """Does nothing."""


class Pool:
    """Worker processes, each started once for the run.

    A client goes to the same process in every round where it can, whose cache then has its data.

    Args:
        worker_config (WorkerConfig): Configuration of the workers.
        size (int): Number of processes.
        device (str, optional): ``"cpu"`` or ``"gpu"``.

    Raises:
        SimulationError: If the task cannot be sent to another process.
    """

    def __init__(self, worker_config: WorkerConfig, size: int, device: str | None):
        self.size = size
        try:
            arguments = pickling.dumps(worker_config), device, os.getpid(), worker_config.folder
        except Exception as error:
            raise SimulationError(
                f"The task cannot be sent to worker processes: {error}. Make what it holds when "
                "it is called (inside Task.data or Task.model), or use workers=0."
            ) from error
        self._start_arguments = arguments
        # Now, as it unblocks the signals that _submit blocks.
        resource_tracker.ensure_running()
        self._processes = [self._new_process() for _ in range(size)]

    def _new_process(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            initializer=worker_process.start,
            initargs=self._start_arguments,
            env=_ENVIRONMENT,
        )

    def run(self, units: Sequence[WorkUnit]) -> Iterator[WorkResult]:
        """Results of work units, in the order of completion.

        A process that dies is replaced, and its units run again.

        Raises:
            SimulationError: If a unit kills one process after another, or none can be started.
        """
        queues: list[deque[WorkUnit]] = [deque() for _ in range(self.size)]
        for number, unit in enumerate(units):
            queues[number % self.size].append(unit)
        running: dict[Future, tuple[int, WorkUnit]] = {}
        deaths: Counter[int] = Counter()
        try:
            while True:
                num_running = Counter(worker for worker, _ in running.values())
                # Each worker gets a unit before any worker gets a second one.
                for depth, worker in product(range(_MAX_QUEUED), range(self.size)):
                    if num_running[worker] <= depth and (next_unit := _next_unit(queues, worker)):
                        running[self._submit(worker, next_unit)] = (worker, next_unit)
                        num_running[worker] += 1
                if not running:
                    return
                futures, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in futures & running.keys():
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        del running[future]
                        yield future.result()
                    elif future in running:
                        worker = running[future][0]
                        units_to_repeat = _split_first(_pop_units(running, worker), error, deaths)
                        queues[worker].extendleft(reversed(units_to_repeat))
                        self._replace(worker)
        finally:
            for future in running:
                future.cancel()

    def _submit(self, worker: int, unit: WorkUnit) -> Future:
        # A new process inherits blocked signals: the run acts on Ctrl-C and on a closed terminal.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            executor = self._processes[worker]
            return executor.submit(worker_process.work, unit.request_path, unit.clients)
        except BrokenProcessPool as error:  # it died while it was idle
            future: Future = Future()
            future.set_exception(error)
            return future
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _replace(self, worker: int) -> None:
        self._processes[worker].shutdown(wait=False, kill_workers=True)
        self._processes[worker] = self._new_process()

    def close(self, at_once: bool) -> None:
        """Ends the processes: ``at_once`` by a signal, or when they are idle."""
        for executor in self._processes:
            executor.shutdown(wait=True, kill_workers=at_once)


def _next_unit(queues: list[deque[WorkUnit]], worker: int) -> WorkUnit | None:
    """Next unit of the worker's queue, or the last one of the longest queue."""
    if queues[worker]:
        return queues[worker].popleft()
    longest = max(queues, key=len)
    return longest.pop() if longest else None


def by_block(clients: Sequence[SampledClient]) -> list[Sequence[SampledClient]]:
    """Clients grouped by block: a block is summed by one worker."""
    return [list(block) for _, block in groupby(clients, lambda client: client.block)]


def _pop_units(running: dict[Future, tuple[int, WorkUnit]], worker: int) -> list[WorkUnit]:
    """Unfinished units of a dead process, in the order of submission."""
    futures = [
        future
        for future, (owner, _) in running.items()
        if owner == worker and not (future.done() and future.exception() is None)
    ]
    return [running.pop(future)[1] for future in futures]


def _split_first(units: list[WorkUnit], error: Exception, deaths: Counter[int]) -> list[WorkUnit]:
    """Units to run again, the first one, on which the process died, block by block.

    Raises:
        SimulationError: If processes have died on it too often.
    """
    path, clients = units[0]
    position = clients[0].position
    deaths[position] += 1
    if deaths[position] == _MAX_DEATHS:
        codes = _exit_codes(error)
        is_fault = any(name in codes for name in ("SIGSEGV", "SIGABRT", "SIGBUS"))
        advice = _FAULT if is_fault else _MEMORY
        partitions = ", ".join(str(client.partition) for client in clients)
        raise SimulationError(
            f"{_MAX_DEATHS} worker processes died one after another over clients {partitions}: "
            f"{codes}. {advice} workers=0 shows what happens in this process."
        )
    return [*(WorkUnit(path, block) for block in by_block(clients)), *units[1:]]


def _exit_codes(error: Exception) -> str:
    """Exit codes in loky's message on dead processes, such as "exit codes {SIGKILL(-9)}"."""
    match = re.search(r"exit codes .*?(\{.*\})", str(error))
    return f"exit codes {match[1]}" if match else str(error.__cause__ or error).strip()
