"""How a run is led: by what settings, past what goes wrong, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import mlx_fed as fed  # before mlx.core

import pytest
from flwr.app import Context, RecordDict

from .loopback import LoopbackGrid
from .tasks import moons
from .test_strategies import CLIENT, TASK, read_history

# -- how many nodes ------------------------------------------------------------------------


def test_one_node_is_enough_where_one_is_asked_for(start, tmp_path: Path):
    nodes = []

    def join(event: str, fields: dict) -> None:
        if event == "serving":
            arguments = ("join", "tests.tasks:moons", "--server", fields["address"])
            nodes.append(start("-m", "mlx_fed", *arguments))

    result = fed.serve(
        moons, num_rounds=1, min_nodes=1, wait=60, port=0, runs=tmp_path, listeners=(join,)
    )
    assert result.rounds[0]["evaluate"]["nodes"] == ["node-0"]
    assert nodes[0].ends() == 0


@pytest.mark.parametrize(("min_nodes", "needed"), [(1, 1), (None, 2)])
def test_the_strategy_of_an_app_waits_for_as_many(min_nodes, needed: int, tmp_path: Path):
    app = fed.server_app(TASK, runs=tmp_path, num_rounds=1, min_nodes=min_nodes, wait=0.1)

    def lead(num_nodes: int, name: str) -> None:
        app(LoopbackGrid([CLIENT] * num_nodes), Context(1, 0, {}, RecordDict(), {"name": name}))

    with pytest.raises(fed.FedError, match=f"{needed - 1} of {needed} nodes came"):
        lead(needed - 1, "fewer")
    lead(needed, "enough")
    assert len(read_history(tmp_path / "enough")[0]["train"]["nodes"]) == needed
