"""A flood by strangers and by one enrolled node, with TLS: do rounds go on, does memory grow.

    python -m benchmarks.flood [--seconds 300] [--without 60] [--json]

A server and two nodes, each a process, train a small model on the loopback. Two processes of
strangers open idle connections, send garbage, and make handshakes and requests with keys that
nobody knows; one process with a node's own token announces trees of a thousand objects, pushes
objects of a megabyte and pulls what there is not, all as fast as they can. They share the machine's
cores with the server and the nodes, at the lowest priority. Rounds a second are compared with those
before and after the flood, and the server's memory with that at the flood's start.

The targets: at least half as many rounds a second, and memory that stays the same.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import tempfile
import time
from pathlib import Path

from tests.conftest import Started, starting
from tests.hostile.running import Running

MEGABYTE = 2**20


def rounds_a_second(running: Running, seconds: float, memory: list[int]) -> float:
    """Rounds in this time, with the server's memory at each twentieth of it."""
    start, first = time.monotonic(), running.rounds
    for _ in range(20):
        time.sleep(seconds / 20)
        memory.append(running.memory)
    return (running.rounds - first) / (time.monotonic() - start)


def counts(flood: Started) -> dict[str, int]:
    """What a process of the flood has sent."""
    return ast.literal_eval(flood.text.strip().splitlines()[-1])


def measure(seconds: float, without: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = next(processes := starting(folder))
        try:
            running = Running(start, folder, secure=True)
            running.goes_on(20, timeout=120)
            memory: list[int] = []
            before = rounds_a_second(running, without, [])
            python = ("-m", "tests.hostile.flooding")
            floods = [start(*python, "strangers", running.port) for _ in range(2)]
            floods.append(start(*python, "enrolled", running.token("flooder"), folder / "flooder"))
            for flood in floods:
                os.setpriority(os.PRIO_PROCESS, flood.process.pid, 19)
                flood.line(r"\{'")
            flooded = rounds_a_second(running, seconds, memory)
            sent: dict[str, int] = {}
            for flood in floods:
                assert flood.process.poll() is None, flood.text
                for what, count in counts(flood).items():
                    sent[what] = sent.get(what, 0) + count
                flood.end()
            after = rounds_a_second(running, without, [])
            assert "Traceback" not in running.server.text
        finally:
            next(processes, None)  # ends them
    quarter = len(memory) // 4
    return {
        "rounds a second before": round(before, 2),
        "rounds a second during": round(flooded, 2),
        "rounds a second after": round(after, 2),
        "load of the machine": round(os.getloadavg()[0], 1),
        "megabytes in the first quarter": max(memory[:quarter]) // MEGABYTE,
        "megabytes in the last quarter": max(memory[-quarter:]) // MEGABYTE,
        "sent": sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--without", type=float, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.seconds, options.without)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
