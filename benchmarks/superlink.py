"""A stock Flower SuperLink with stock SuperNodes on the loopback, each a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from federation import end_with_children, free_port

Run = Callable[[Path, dict[str, int], float], Any]
"""Runs the app in a folder with settings, for so many seconds at most: what its server wrote."""


@contextmanager
def federation(
    folder: Path, nodes: int, started: Callable[[dict[str, int]], None] = lambda pids: None
) -> Iterator[Run]:
    """A SuperLink with SuperNodes, which are ended with the context.

    Apps get the folder as the setting ``timings``; their server writes JSON to ``server`` there.

    Args:
        folder (Path): For logs and results.
        nodes (int): How many SuperNodes there are.
        started (callable): Told the process ids by name, once all are up.
    """
    home = folder / "flwr"
    home.mkdir()
    port = free_port()
    home.joinpath("config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n'
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    processes: dict[str, subprocess.Popen] = {}

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(
                arguments,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(app: Path, settings: dict[str, int], seconds: float) -> Any:
        given = " ".join(f"{key}={value}" for key, value in settings.items())
        command = ["flwr", "run", str(app), "here", "--run-config", f'{given} timings="{folder}"']
        submitted = subprocess.run(command, env=environment, capture_output=True, text=True)
        if submitted.returncode:
            raise RuntimeError(submitted.stdout + submitted.stderr)
        return json.loads(_wait_for_file(folder / "server", seconds))

    try:
        start("superlink", "flower-superlink", "--insecure", "--host=127.0.0.1", f"--port={port}")
        _wait_for_port(port, processes["superlink"])
        for partition in range(nodes):
            start(
                f"supernode-{partition}",
                "flower-supernode",
                "--insecure",
                f"--superlink=127.0.0.1:{port}",
                "--host=127.0.0.1",
                f"--port={free_port()}",
                f"--node-config=partition-id={partition}",
            )
        started({name: process.pid for name, process in processes.items()})
        yield run
    except (TimeoutError, RuntimeError):
        for log in folder.glob("*.log"):
            print(f"--- {log.name}", log.read_text()[-3000:], sep="\n", file=sys.stderr)
        raise
    finally:
        for process in reversed(processes.values()):
            end_with_children(process)


def _wait_for_port(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("The SuperLink did not come up.")


def _wait_for_file(path: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"The run did not end within {seconds:.0f} seconds.")
        time.sleep(0.2)
    return path.read_text()
