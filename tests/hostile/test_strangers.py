"""What anyone can do who reaches the port: nodes that are known work on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from mlx_fed.monitoring.dashboard import serving
from mlx_fed.flower.connections import MAX_PAGE_CONNECTIONS

from ..helpers.idle_connections import assert_room_is_made
from ..helpers.ids import stable_id
from .running import Running

FILES = 400
"""Files that the server may have open."""
LIMITED = (
    "-c",
    f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({FILES}, {FILES})); "
    "from mlx_fed.__main__ import main; main()",
)


@pytest.fixture(scope="module", params=["TLS", pytest.param("plaintext", marks=pytest.mark.slow)])
def running(request, start_once, tmp_path_factory) -> Iterator[Running]:
    running = Running(
        start_once, tmp_path_factory.mktemp("run"), request.param == "TLS", command=LIMITED
    )
    running.goes_on()
    return running


def flood(running: Running, count: int, first: bytes = b"") -> list[socket.socket]:
    """Connections on which nothing more is said, from an address that no node has."""
    opened = []
    for _ in range(count):
        connection = socket.socket()
        connection.setblocking(False)
        connection.bind(("127.0.0.2", 0))
        with suppress(BlockingIOError):
            connection.connect(("127.0.0.1", running.port))
        opened.append(connection)
        if len(opened) % 100 == 0:
            time.sleep(0.05)
    time.sleep(1)
    for connection in opened:
        with suppress(OSError):
            connection.send(first)
    return opened


@pytest.mark.parametrize(
    "first",
    [
        b"",
        pytest.param(b"\x16\x03\x01", marks=pytest.mark.slow),
        pytest.param(b"POST /v1/fleet/", marks=pytest.mark.slow),
    ],
    ids=stable_id,
)
def test_idle_connections_neither_end_a_run_nor_keep_nodes_out(running, first):
    connections = flood(running, 300, first) + flood(running, 300)
    running.goes_on()
    newcomer = running.hostile(f"newcomer-{len(first)}")
    assert newcomer.asked()
    newcomer.leave()
    running.goes_on()
    for connection in connections:
        connection.close()
    assert "Too many open files" not in running.server.text
    assert "Traceback" not in running.server.text


def test_connections_to_a_page_take_only_so_many_files(tmp_path):
    """It is served by the process that leads the run."""
    with serving(tmp_path, port=0) as page:
        port = int(page.rstrip("/").rpartition(":")[2])
        assert_room_is_made(port, page, MAX_PAGE_CONNECTIONS + 10)
