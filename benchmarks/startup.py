"""How long one waits before anything happens: importing, the command line, a server that is ready.

    python benchmarks/startup.py [--repeats 5] [--json]

Seconds of new processes of this Python, medians, after one that fills the disk's cache:
``import mlx_fed``, the interpreter's own start included; ``mlx-fed --help``; and
``mlx-fed serve``, from its start to its line ``Server ready``.

The targets: 0.5 s, 0.5 s and 5 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("mlx-fed"))
TARGETS = {"import mlx_fed": 0.5, "mlx-fed --help": 0.5, "server ready": 5.0}


def seconds_of(command: list[str]) -> float:
    """From a command's start to its end."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_to_import() -> float:
    return seconds_of([sys.executable, "-c", "import mlx_fed"])


def seconds_to_help() -> float:
    return seconds_of([COMMAND, "--help"])


def seconds_to_ready() -> float:
    """From a server's start to its first line."""
    with tempfile.TemporaryDirectory() as runs:
        command = [COMMAND, "serve", "examples.mnist:task", "--port=0", f"--runs={runs}"]
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
            try:
                for line in server.stdout or ():
                    if line.startswith("Server ready"):
                        return time.perf_counter() - started
            finally:
                server.kill()
    raise RuntimeError(f"The server ended with exit code {server.returncode} before it was ready.")


def median(measure: Callable[[], float], repeats: int) -> float:
    measure()
    return statistics.median(measure() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each, default 5")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measures = dict(
        zip(TARGETS, (seconds_to_import, seconds_to_help, seconds_to_ready), strict=True)
    )
    seconds = {name: median(measure, arguments.repeats) for name, measure in measures.items()}
    if arguments.json:
        print(json.dumps({"seconds": seconds, "targets": TARGETS}, indent=2))
        return
    print(f"{'':16}{'seconds':>9}{'target':>8}")
    for name, taken in seconds.items():
        print(f"{name:16}{taken:9.3f}{TARGETS[name]:8.1f}")


if __name__ == "__main__":
    main()
