"""The MNIST example on one machine: a server and its clients, each in its own process."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports: no traceback

import errno
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from mlx_fed.cli.application import run_command
from mlx_fed.cli.arguments import parse_settings
from mlx_fed.cli.options import (
    MonitorOptions,
    RunOptions,
    SeedOption,
    Settings,
    StrategyOptions,
    to_arguments,
    with_options,
)
from mlx_fed.errors import FedError
from mlx_fed.system.devices import load_fast_blas

ROOT = Path(__file__).parent
GRACE_PERIOD = 10.0
"""Seconds that clients have to end after the server."""


@with_options
def main(
    *,
    clients: Annotated[int, typer.Option(min=1, metavar="N", help="Number of clients.")] = 2,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds to train.", show_default="the dataset's"),
    ] = None,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="digits, mnist, or a folder of parquet files.")
    ] = "digits",
    num_partitions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Number of partitions of the data.",
            show_default="3, or --clients",
        ),
    ] = None,
    partitioner: Annotated[str, typer.Option(metavar="NAME", help="iid or dirichlet.")] = "iid",
    strategy: Annotated[str, typer.Option(metavar="NAME", help="A Flower strategy.")] = "FedAvg",
    strategy_option: StrategyOptions = None,
    config: Settings = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Clients train on the GPU.")] = False,
    port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="PORT", help="The server's port.")
    ] = 8080,
    seed: SeedOption = 0,
    run: RunOptions,
    monitor: MonitorOptions,
) -> None:
    """Start a server and clients on this machine and train the MNIST example."""
    num_partitions = num_partitions or max(3, clients)
    if num_partitions < clients:
        raise FedError(
            f"{clients} clients need a partition of the data each: "
            f"--num-partitions {num_partitions} is too few."
        )
    if config:
        _require_settings({"dataset": dataset, "partitioner": partitioner}, config)
    _require_free(port)
    if not gpu and load_fast_blas().hint:
        print(f"MLX computes slowly here: {load_fast_blas().hint}", file=sys.stderr)
    server = ["server.py", f"--port={port}", f"--dataset={dataset}", f"--min-clients={clients}"]
    server += [f"--strategy={strategy}", f"--seed={seed}"]
    server += [f"--strategy-option={option}" for option in strategy_option or ()]
    server += [f"--config={setting}" for setting in config or ()]
    server += [*to_arguments(run), *to_arguments(monitor)]
    server += [f"--rounds={rounds}"] if rounds else []
    client = ["client.py", f"--server=127.0.0.1:{port}", f"--dataset={dataset}"]
    client += [f"--partitioner={partitioner}", f"--num-partitions={num_partitions}"]
    client += [f"--config={setting}" for setting in config or ()]
    client += ["--gpu"] if gpu else []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"client-{number}.log") for number in range(clients)]
        processes: list[subprocess.Popen] = []
        try:
            processes.append(_start(server))
            for number, log in enumerate(logs):
                processes.append(_start([*client, f"--node-id={number}"], log))
            failure = _wait(*processes)
        except KeyboardInterrupt:
            # The server's process prints the line about the interruption.
            sys.exit(128 + signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # The server first: it tells the clients, and removes its progress bars.
            for process in processes:
                process.terminate()
                process.wait()
        if failure:
            print(logs[failure - 1].read_text(), end="", file=sys.stderr)
        if failure is not None:
            sys.exit(processes[failure].returncode)


def _require_settings(defaults: dict[str, str], config: list[str]) -> None:
    """Raises if a setting does not exist, or has a value that it does not take."""
    from examples.mnist import task
    from mlx_fed.settings_check import check_config
    from mlx_fed.task import make_task

    settings = parse_settings([*(f"{key}={value}" for key, value in defaults.items()), *config])
    check_config(settings, make_task(task, settings), [task])


def _require_free(port: int) -> None:
    """Raises if the port is in use: the clients would join the other server."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise FedError(
                    f"Port {port} is in use on 127.0.0.1: end the other server or choose a --port."
                ) from error


def _start(command: list[str], log: Path | None = None) -> subprocess.Popen:
    output = log.open("w") if log else None
    # A terminal sends Ctrl-C to all its processes. These inherit that it is ignored, and this
    # process ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(
            [sys.executable, ROOT / command[0], *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            env={**os.environ, "MLX_FED_COMMAND": shlex.join(["./run.sh", *sys.argv[1:]])},
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def _wait(server: subprocess.Popen, *clients: subprocess.Popen) -> int | None:
    """Waits until all have ended or one has failed: returns its number, 0 for the server."""
    while server.poll() is None:
        for number, client in enumerate(clients, 1):
            if client.poll():
                return number
        time.sleep(0.05)
    if server.returncode:
        return 0
    deadline = time.monotonic() + GRACE_PERIOD
    while time.monotonic() < deadline and any(client.poll() is None for client in clients):
        time.sleep(0.05)
    return next((number for number, client in enumerate(clients, 1) if client.poll()), None)


if __name__ == "__main__":
    run_command(main, "./run.sh")
