"""Who a node says it is: its own name and number, and no other's."""

from __future__ import annotations

import json

import mlx_fed as fed  # noqa: F401  before mlx.core

import pytest

from mlx_fed.flower.fleet_client import FleetClient
from mlx_fed.flower.transport import Unavailable

from .running import Running, roll_call_answer

pytestmark = pytest.mark.slow


def test_a_node_cannot_take_anothers_number(start, tmp_path):
    """The token's number is that of the key, whoever comes first."""
    running = Running(start, tmp_path, secure=True, arguments=("--wait", 120))
    running.goes_on()
    first = running.honest[0]
    first.end()
    running.server.line("honest-0 left")
    hostile = running.hostile()
    hostile.send(roll_call_answer(hostile.asked(), "hostile", 0), 0.0)
    running.server.line("hostile.*its key is that of node id [2-9], and it says 0")
    running.honest[0] = running.join(0)
    running.server.line(r"(?s)honest-0 left.*honest-0 joined")
    running.goes_on()


NAMES = {
    "long": "N" * 3_000_000,
    "escapes": "\x1b[2J\x1b]0;owned\x07",
    "line": "a\nnode-9 joined (9 in all)",
    "backwards": "a\u202eb",
    "empty": "",
}


@pytest.fixture(scope="module")
def running(start_once, tmp_path_factory) -> Running:
    running = Running(start_once, tmp_path_factory.mktemp("run"), secure=False)
    running.goes_on()
    return running


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_short_and_printable(running, name):
    hostile = running.hostile()
    hostile.send(roll_call_answer(hostile.asked(), NAMES[name], 7), 0.0)
    farewell = hostile.asked()
    (config,) = farewell.content.values()
    assert "1 to 64 printable characters" in config["reason"]
    hostile.leave()
    running.goes_on()
    status = (running.folder / "runs/run/status.json").read_text()
    assert len(status) < 50_000
    assert json.loads(status)["state"] in ("running", "waiting")
    assert "\x1b" not in running.server.text


@pytest.mark.parametrize("number", ["-1", "9" * 4000, "1e3", "\u0662" * 11, "x"])
def test_a_number_is_one(running, number):
    hostile = running.hostile()
    hostile.send(roll_call_answer(hostile.asked(), "numbered", number), 0.0)
    (config,) = hostile.asked().content.values()
    assert "its node id is no number below" in config["reason"]
    hostile.leave()


def test_nodes_that_leave_free_their_places(start, tmp_path, monkeypatch):
    """As many register and unregister as may be there at once, and one more."""
    code = (
        "from mlx_fed.flower import link_state; link_state._MAX_NODES = 20; "
        "from mlx_fed.__main__ import main; main()"
    )
    running = Running(start, tmp_path, secure=False, command=("-c", code))
    running.goes_on()
    for number in range(60):
        node = FleetClient("127.0.0.1", running.port)
        node.register()
        if number % 3 == 0:
            node._registers = False  # it is deactivated only, as one that was killed
        node.leave()
    staying = [running.hostile() for _ in range(18)]
    with pytest.raises(Unavailable, match="Too many nodes"):
        running.hostile()
    for node in staying:
        node.leave()
    running.goes_on()
