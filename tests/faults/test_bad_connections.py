"""Connections break, dawdle and end in the middle; nodes are cut off, and sleep.

``MLX_FED_CONNECTIONS=20 pytest -m slow tests/faults`` tries as many seeds, and
``MLX_FED_SLEEP=3600`` has a node sleep for an hour.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import pytest

from ..conftest import Started
from ..helpers.proxy import HARMS, Proxy
from ..helpers.fleet_commands import assert_same_bits, join, serve
from ..helpers.run_folders import read_history

SLEEP = float(os.environ.get("MLX_FED_SLEEP", "0"))
"""Seconds that a node goes on sleeping after it has been given up."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240 + SLEEP)]
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
    rounds = read_history(tmp_path / "run")
    missing = sum(len(record["refused"]) for record in rounds)
    repeats = sum(record.get("repeats", 0) for record in rounds)
    print(f"{dict(done)}, {missing} replies missing, {repeats} rounds repeated")
    assert all(done[harm] for harm in HARMS)
    assert_same_bits(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_connections_that_break_while_nodes_work_cost_no_reply(
    start, proxy, tmp_path: Path, encrypted: bool
):
    """Each lasts for a second or two, of which nodes train for a good part."""
    secure = ("--secure", "--federation", tmp_path / "federation") if encrypted else ()
    server, address = serve(start, tmp_path, "--rounds", 20, "--min-nodes", 3, *secure)
    ways = [proxy(address, number, inf, 2.0) for number in NODES]
    tokens: list[str] = []
    if encrypted:
        server.line("(?s)(mlxfed-.*){3}\n")
        tokens = re.findall(r"mlxfed-\S+", server.text)
    home = {"MLX_FED_HOME": str(tmp_path / "home")}
    slow = ("-c", "slow=0.4")
    nodes = [
        join(start, f"127.0.0.1:{way.port}", number, *slow, *tokens[number : number + 1], **home)
        for number, way in zip(NODES, ways, strict=True)
    ]
    assert server.ends(200) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0, 0], nodes[0].text
    broken = sum(way.done["drop"] for way in ways)
    print(f"{broken} connections broken")
    assert broken >= len(NODES)  # how many there are depends on how long the rounds take
    assert [r for record in read_history(tmp_path / "run") for r in record["refused"]] == []


@pytest.mark.parametrize("cut", [Proxy.refuse, Proxy.swallow], ids=["refused", "swallowed"])
def test_a_node_that_is_cut_off_comes_back(start, proxy, tmp_path: Path, cut):
    server, address = serve(start, tmp_path, "--rounds", 10_000)
    way = proxy(address)
    places = [address, address, f"127.0.0.1:{way.port}"]
    nodes = [join(start, place, i, "-c", "slow=0.2") for i, place in enumerate(places)]
    takes_part(server, tmp_path / "run")
    cut(way)
    is_given_up(server, tmp_path / "run")
    way.mend()
    comes_back(server, tmp_path / "run")
    assert [node.ends() for node in nodes] == [3, 3, 3], nodes[2].text


def test_a_node_that_sleeps_until_it_counts_as_gone_comes_back(start, tmp_path: Path):
    """Nothing of its connections breaks: the server hears no heartbeat, and gives it up."""
    server, address = serve(start, tmp_path, "--rounds", 10_000)
    slow = f"slow={0.2 + SLEEP / 2000}"
    nodes = [join(start, address, number, "-c", slow) for number in NODES]
    takes_part(server, tmp_path / "run")
    nodes[2].process.send_signal(signal.SIGSTOP)
    is_given_up(server, tmp_path / "run")
    time.sleep(SLEEP)
    nodes[2].process.send_signal(signal.SIGCONT)
    comes_back(server, tmp_path / "run")
    assert [node.ends() for node in nodes] == [3, 3, 3], nodes[2].text


def takes_part(server: Started, run: Path) -> None:
    """node-2 is in a round."""
    server.line("node-2 joined")
    server.line("round 1 ")
    more_rounds(server, run)
    assert read_history(run)[-1]["train"]["nodes"] == ["node-0", "node-1", "node-2"]


def is_given_up(server: Started, run: Path) -> None:
    """The server takes node-2 off its list, and rounds go on without it."""
    server.line("node-2 left\n")
    more_rounds(server, run)
    assert read_history(run)[-1]["train"]["nodes"] == ["node-0", "node-1"]


def comes_back(server: Started, run: Path) -> None:
    """node-2 is in a round again; the run says that it was missing, and nothing worse."""
    began = time.monotonic()
    server.line("(?s)node-2 left.*node-2 joined", 120)
    print(f"back after {time.monotonic() - began:.0f} s")
    more_rounds(server, run)
    server.interrupt()
    assert server.ends() == 130
    rounds = read_history(run)
    assert rounds[-1]["train"]["nodes"] == ["node-0", "node-1", "node-2"]
    missing = [entry for record in rounds for entry in record["refused"]]
    assert {(entry["node"], entry["missing"]) for entry in missing} == {("node-2", True)}


def more_rounds(server: Started, run: Path) -> None:
    server.line(rf"round {len(read_history(run)) + 3} ")
