"""Connections break, dawdle and end in the middle; nodes are cut off, and sleep.

``MLX_FED_CONNECTIONS=20 pytest -m slow tests/faults`` tries as many seeds.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.proxy import HARMS, Proxy
from tests.test_fleet import assert_same_bits, history, join, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SEEDS = range(int(os.environ.get("MLX_FED_CONNECTIONS", "3")))
NODES = range(3)
ROUNDS = 30
SIZE = ("-c", "hidden=20000")
"""A model of 400 kB."""


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Makes proxies, and ends them."""
    made: list[Proxy] = []

    def make(address: str, *arguments) -> Proxy:
        made.append(Proxy(int(address.rpartition(":")[2]), *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to which nothing happened."""
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_connection_does_not_change_a_bit(start, proxy, undisturbed, tmp_path: Path, seed):
    """A round counts when the replies of all three do, so that it has the same nodes always."""
    all_of_them = ("--min-nodes", 3, "--min-replies", 3, "--max-repeats", 100)
    settings = (*SIZE, "--rounds", ROUNDS, *all_of_them)
    if not undisturbed.exists():
        server, address = serve(start, undisturbed.parent, *settings)
        nodes = [join(start, address, number, *SIZE) for number in NODES]
        assert server.ends(120) == 0, server.text
        assert [node.ends() for node in nodes] == [0, 0, 0]

    server, address = serve(start, tmp_path, *settings)
    ways = [proxy(address, 10 * seed + number, 1_500_000) for number in NODES]
    nodes = [
        join(start, f"127.0.0.1:{way.port}", number, *SIZE)
        for number, way in zip(NODES, ways, strict=True)
    ]
    assert server.ends(200) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0, 0], nodes[0].text
    done = sum((way.done for way in ways), Counter())
    rounds = history(tmp_path / "run")
    missing = sum(len(record["refused"]) for record in rounds)
    repeats = sum(record.get("repeats", 0) for record in rounds)
    print(f"{dict(done)}, {missing} replies missing, {repeats} rounds repeated")
    assert all(done[harm] for harm in HARMS)
    assert_same_bits(tmp_path / "run", undisturbed)
