"""A flood by strangers and by an enrolled node: rounds go on, and memory stays.

``benchmarks/flood.py`` measures the speed, over five minutes.
"""

from __future__ import annotations

import time

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from .running import Running

SECONDS = 20
ROOM = 150 * 2**20
"""More than the replies and connections of the flood may take, and less than it sends."""


@pytest.mark.slow
def test_rounds_go_on_and_memory_stays_in_a_flood(start, tmp_path):
    running = Running(start, tmp_path, secure=True)
    running.goes_on()
    flooding = ("-m", "tests.hostile.flooding")
    floods = [
        start(*flooding, "strangers", running.port),
        start(*flooding, "enrolled", running.token("flooder"), tmp_path / "flooder"),
    ]
    floods[0].line("'idle connections': [1-9]")
    floods[1].line("'objects': [1-9]")
    before, deadline = running.memory, time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        running.goes_on(1)
        assert running.memory - before < ROOM
    assert all(flood.process.poll() is None for flood in floods)
    assert "Traceback" not in running.server.text
