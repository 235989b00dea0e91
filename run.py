"""The main job on one machine: a server and its clients, each a process of its own."""

import errno
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from mlx_fed.cli.options import Leading, Watching, as_flags, with_options
from mlx_fed.system.devices import load_fast_blas

HERE = Path(__file__).parent
FAREWELL = 10.0
"""Seconds that clients have to end after the server's run."""


@with_options
def main(
    *,
    clients: Annotated[int, typer.Option(min=1, help="Clients to start.")] = 2,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train.", show_default="the dataset's")
    ] = None,
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    num_partitions: Annotated[
        int | None, typer.Option(min=1, help="Parts of the data.", show_default="3, or --clients")
    ] = None,
    partitioner: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    strategy: Annotated[str, typer.Option(help="One of Flower's strategies.")] = "FedAvg",
    gpu: Annotated[bool, typer.Option("--gpu", help="Clients train on the GPU.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The server's.")] = 8080,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    leading: Leading,
    shown: Watching,
) -> None:
    """Start a server and clients on this machine and train the MNIST example."""
    num_partitions = num_partitions or max(3, clients)
    if num_partitions < clients:
        sys.exit(
            f"Error: {clients} clients need a part of the data each: "
            f"--num-partitions {num_partitions} is too few."
        )
    _require_free(port)
    if not gpu and load_fast_blas().hint:
        print(f"MLX computes slowly here: {load_fast_blas().hint}", file=sys.stderr)
    # Ends the processes below, too; a server that is ended tells its clients.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    server = ["server.py", f"--port={port}", f"--dataset={dataset}", f"--min-clients={clients}"]
    server += [f"--strategy={strategy}", f"--seed={seed}", *as_flags(leading), *as_flags(shown)]
    server += [f"--rounds={rounds}"] if rounds else []
    client = ["client.py", f"--server=127.0.0.1:{port}", f"--dataset={dataset}"]
    client += [f"--partitioner={partitioner}", f"--num-partitions={num_partitions}"]
    client += ["--gpu"] if gpu else []
    with tempfile.TemporaryDirectory() as logs:
        paths = [Path(logs, f"client-{number}.log") for number in range(clients)]
        processes: list[subprocess.Popen] = []
        failed, interrupted = None, False
        try:
            processes.append(_start(server))
            for number, path in enumerate(paths):
                processes.append(_start([*client, f"--node-id={number}"], path))
            failed = _wait(*processes)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # The server first: it says goodbye to the clients and takes its live line away.
            for process in processes:
                process.terminate()
                process.wait()
        if interrupted:
            print("Interrupted.", file=sys.stderr)
            sys.exit(130)
        if failed is not None:
            if failed > 0:
                print(paths[failed - 1].read_text(), end="", file=sys.stderr)
            sys.exit(processes[failed].returncode)


def _require_free(port: int) -> None:
    """Ends here if the port is taken: the clients would join whoever serves there."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                where = f"Port {port} is in use on 127.0.0.1"
                sys.exit(f"Error: {where}: end the other server or choose a --port.")


def _start(command: list[str], log: Path | None = None) -> subprocess.Popen:
    output = log.open("w") if log else None
    # A terminal sends Ctrl-C to all of its processes. These leave it to this one, whatever they
    # are at; they inherit that it is ignored.
    restored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen(
            [sys.executable, HERE / command[0], *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
        )
    finally:
        signal.signal(signal.SIGINT, restored)


def _wait(server: subprocess.Popen, *clients: subprocess.Popen) -> int | None:
    """Waits for all to end, or for the first that fails: which one, with 0 for the server."""
    while server.poll() is None:
        for number, client in enumerate(clients, 1):
            if client.poll():
                return number
        time.sleep(0.05)
    if server.returncode:
        return 0
    deadline = time.monotonic() + FAREWELL
    while time.monotonic() < deadline and any(client.poll() is None for client in clients):
        time.sleep(0.05)
    return next((number for number, client in enumerate(clients, 1) if client.poll()), None)


if __name__ == "__main__":
    typer.run(main)
