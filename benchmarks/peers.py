"""The simulators that are compared, and one run of one of them.

Each is a program of its own in ``simulation_peers/``, which gets a workload and prints when its
rounds ended.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from environments import NotInstalled, python_of
from federation import end_with_children
from mlx_fed.system.blas import load_fast_blas
from simulation_peers.workload import Workload


@dataclass(frozen=True)
class Peer:
    """A simulator, as it is run.

    Attributes:
        label (str): Its name in a table.
        program (str): Its file in ``simulation_peers/``.
        environment (str, optional): Where it is installed; in this Python without.
        fast_blas (bool): Whether it gets the OpenBLAS that mlx-fed brings, by ``LD_PRELOAD``.
    """

    label: str
    program: str
    environment: str | None = None
    fast_blas: bool = False


PEERS = {
    "bare": Peer("bare MLX loop, OpenBLAS, one core", "bare"),
    "laid-out": Peer("  its batches laid out, unshuffled", "bare_laid_out"),
    "gemm": Peer("GEMM limit, all cores", "gemm"),
    "pfl": Peer("pfl-research, as installed", "pfl_mlx", "pfl"),
    "pfl-openblas": Peer("pfl-research, OpenBLAS", "pfl_mlx", "pfl", fast_blas=True),
    "fedjax": Peer("FedJAX", "fedjax_jit", "fedjax"),
    "flower": Peer("Flower (Ray), as installed", "flower_ray", "flower"),
    "flower-openblas": Peer("Flower (Ray), OpenBLAS", "flower_ray", "flower", fast_blas=True),
    "mlx-fed": Peer("mlx-fed", "ours"),
}


class NotAvailable(Exception):
    """A peer that did not run, and why."""


@dataclass(frozen=True)
class Run:
    """What one run of a peer took.

    Attributes:
        start_up (float): Seconds from the process's start to the end of the first round.
        rounds (list): Seconds of each later round.
        accuracies (list): After each round, the first included, where a target was set.
    """

    start_up: float
    rounds: list[float]
    accuracies: list[float]


def run(peer: Peer, workload: Workload, limit: float = 3600) -> Run:
    """Runs a peer in a process of its own.

    Raises:
        NotAvailable: If it cannot be installed, fails, or takes more than ``limit`` seconds.
    """
    variables = dict(os.environ)
    try:
        python = python_of(peer.environment) if peer.environment else sys.executable
    except NotInstalled as error:
        raise NotAvailable(str(error)) from error
    if peer.environment:
        variables.pop("PYTHONPATH", None)
    if peer.fast_blas:
        variables |= {"LD_PRELOAD": _fast_blas(), "OPENBLAS_NUM_THREADS": "1"}
    program = Path(__file__).parent / "simulation_peers" / f"{peer.program}.py"
    started = time.time()
    process = subprocess.Popen(
        [python, str(program), workload.to_json()],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except BaseException as error:
        end_with_children(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise NotAvailable(f"no result within {limit:.0f} s") from error
        raise
    if process.returncode:
        reason = errors.strip().splitlines()
        # Ray's messages are long and coloured: the first words say what failed.
        raise NotAvailable(
            ascii(reason[-1][:150])[1:-1] if reason else f"exit {process.returncode}"
        )
    report = json.loads(output.splitlines()[-1])
    ended = report["ended"]
    seconds = [end - begin for begin, end in pairwise(ended)]
    return Run(ended[0] - started, seconds, report["accuracies"])


def _fast_blas() -> str:
    """The path of the library that ``mlx_fed.system.blas`` loads."""
    blas = load_fast_blas()
    path = blas.name.removeprefix("OpenBLAS (").removesuffix(")")
    if not Path(path).is_file():
        raise NotAvailable(f"no OpenBLAS to preload: {blas.hint or blas.name}")
    return path
