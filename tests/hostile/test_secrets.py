"""What others on the machine, and other machines, get to know of a token."""

from __future__ import annotations

from pathlib import Path

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from .running import FED, TASK, Running


@pytest.fixture(scope="module")
def running(start_once, tmp_path_factory) -> Running:
    arguments = ("--min-nodes", 2)
    return Running(start_once, tmp_path_factory.mktemp("run"), True, nodes=0, arguments=arguments)


@pytest.mark.parametrize("how", ["file", "environment"])
def test_a_token_is_not_in_the_list_of_processes(running, start, how):
    token = running.token(f"by-{how}")
    given, env = (), {"MLX_FED_TOKEN": token}
    if how == "file":
        path = running.folder / "token"
        path.write_text(token + "\n")
        path.chmod(0o600)
        given, env = (f"@{path}",), {}
    node = start(*FED, "join", TASK, *given, MLX_FED_HOME=str(running.folder / "home"), **env)
    running.server.line(f"by-{how} joined")
    assert b"mlxfed-" not in Path(f"/proc/{node.process.pid}/cmdline").read_bytes()


def test_a_token_that_others_can_read_is_not_used(running, start, tmp_path):
    path = tmp_path / "token"
    path.write_text(running.token("readable"))
    path.chmod(0o644)
    node = start(*FED, "join", TASK, f"@{path}")
    assert node.ends() == 1
    assert f"others can read it: chmod 600 {path}" in " ".join(node.text.split())


def test_a_server_without_a_network_asks_what_to_announce(start, tmp_path):
    """In a network namespace of its own, which has no route."""
    code = """
import ctypes, socket
if ctypes.CDLL(None).unshare(0x40000000):
    raise SystemExit(77)
socket.gethostname = lambda: "localhost"
from mlx_fed.__main__ import main
main()
"""
    where = ("--host", "0.0.0.0", "--federation", tmp_path / "federation", "--runs", tmp_path)
    server = start("-c", code, "serve", TASK, "--port", 0, *where)
    if (ended := server.ends()) == 77:
        pytest.skip("this needs the right to make a network namespace")
    assert ended == 1
    assert "--announce HOST:PORT" in server.text
    assert "mlxfed-" not in server.text
