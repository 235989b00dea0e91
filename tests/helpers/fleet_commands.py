"""A server and its nodes as commands, each in a process."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

TASK = "tests.helpers.tasks:moons"
FED = ("-m", "mlx_fed")


def serve(start, tmp_path: Path, *arguments, name="run", task=TASK):
    """A server on a free port, and where it is."""
    server = start(
        *FED,
        "serve",
        task,
        "--port",
        0,
        "--runs",
        tmp_path,
        "--name",
        name,
        "--wait",
        60,
        *arguments,
    )
    return server, server.line(r"Server ready on (\S+)").group(1)


def join(start, address: str, node_id: int, *arguments, task=TASK, **env):
    return start(
        *FED,
        "join",
        task,
        "--server",
        address,
        "--node-id",
        node_id,
        "--wait",
        60,
        *arguments,
        **env,
    )


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = (mx.load(str(folder / "model.safetensors")) for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert mx.array_equal(a[name], b[name]), name
