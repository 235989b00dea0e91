"""The main job on one machine: a server and its clients, each a process of its own."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent


def main(
    clients: Annotated[int, typer.Option(min=1, help="Clients to start.")] = 2,
    rounds: Annotated[int | None, typer.Option(min=1, show_default="the dataset's")] = None,
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    num_partitions: Annotated[
        int | None, typer.Option(min=1, help="Parts of the data.", show_default="3, or --clients")
    ] = None,
    partitioner: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    strategy: Annotated[str, typer.Option(help="One of Flower's strategies.")] = "FedAvg",
    gpu: Annotated[bool, typer.Option("--gpu", help="Clients train on the GPU.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    seed: int = 0,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
) -> None:
    """Start a server and clients on this machine and train the MNIST example."""
    server = ["server.py", f"--port={port}", f"--dataset={dataset}", f"--min-clients={clients}"]
    server += [f"--strategy={strategy}", f"--seed={seed}", f"--runs={runs.resolve()}"]
    server += [f"--rounds={rounds}"] if rounds else []
    client = ["client.py", f"--server=127.0.0.1:{port}", f"--dataset={dataset}"]
    client += [f"--partitioner={partitioner}"] + (["--gpu"] if gpu else [])
    client += [f"--num-partitions={num_partitions or max(3, clients)}"]
    with tempfile.TemporaryDirectory() as logs:
        processes = [_start(server)]
        paths = [Path(logs, f"client-{number}.log") for number in range(clients)]
        for number, path in enumerate(paths):
            processes.append(_start([*client, f"--node-id={number}"], path))
        sys.exit(_wait(processes, paths))


def _start(command: list[str], log: Path | None = None) -> subprocess.Popen:
    output = log.open("w") if log else None
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE,
        stdout=output,
        stderr=subprocess.STDOUT if log else None,
    )


def _wait(processes: list[subprocess.Popen], logs: list[Path]) -> int:
    """Waits for all to end; if one fails, ends the others and shows what a client said."""
    server, *clients = processes
    try:
        while server.poll() is None:
            for client, log in zip(clients, logs, strict=True):
                if client.poll():
                    print(log.read_text(), end="", file=sys.stderr)
                    return client.returncode
            try:
                server.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        if server.returncode:
            return server.returncode
        return max(client.wait() for client in clients)
    except KeyboardInterrupt:
        # The terminal sends Ctrl-C to every one of them: each ends by itself.
        for process in processes:
            process.wait()
        return 130
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


if __name__ == "__main__":
    typer.run(main)
