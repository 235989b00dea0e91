"""A server and its nodes on this machine, each in a process of its own, and their return values."""

import multiprocessing
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

_PATIENCE = 300.0
"""Seconds that a process may take."""


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(*parts: Callable[[], Any]) -> list[Any]:
    """Runs the functions at once, each in a new process; what they return, in order.

    Raises:
        RuntimeError: If one of them fails, or takes more than five minutes.
    """
    context = multiprocessing.get_context("spawn")
    running = []
    try:
        for part in parts:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_send_result, args=(part, theirs))
            process.start()
            theirs.close()
            running.append((process, ours))
        return [_result(process, pipe) for process, pipe in running]
    finally:
        for process, _ in running:
            process.terminate()
            process.join()


def _send_result(part: Callable[[], Any], pipe: Any) -> None:
    pipe.send(part())


def _result(process: Any, pipe: Any) -> Any:
    try:
        if pipe.poll(_PATIENCE):
            return pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"A process ended with exit code {process.exitcode}.") from None
    raise RuntimeError(f"A process gave no result in {_PATIENCE:.0f} seconds.")


def end_with_children(process: subprocess.Popen) -> None:
    """Ends a process that was started in a session of its own, and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
