"""What a node's exceptions say is its owner's to share: it may hold data."""

from __future__ import annotations

import mlx_fed as fed

import pytest
from flwr.app import Context, Message, MessageType, RecordDict

from mlx_fed.clientapp import client_app
from mlx_fed.flower import one_run_grid

from .running import Running

SAYS = "the disk of this node is full"


@pytest.mark.parametrize("share", [(), pytest.param(("--share-errors",), marks=pytest.mark.slow)])
def test_a_nodes_owner_decides_whether_the_server_reads_its_exceptions(start, tmp_path, share):
    running = Running(start, tmp_path, secure=bool(share), nodes=0, arguments=("--min-nodes", 2))
    running.join(0), running.join(1, "-c", "raise-in=2", *share)
    running.server.line(r"left out of train: RuntimeError.*[^.]\n")
    running.server.line("round 3 ")
    told = running.server.text + (running.folder / "runs/run/history.jsonl").read_text()
    assert (SAYS in told) == bool(share)
    assert ("RuntimeError (tasks.py, line " in told) != bool(share)


@pytest.mark.parametrize("kind", [ValueError, fed.FedError])
@pytest.mark.parametrize("share", [True, False])
def test_the_same_holds_on_a_stock_node(kind, share):
    def data(partition_id, num_partitions):
        raise kind("patient 7 has no date of birth")

    one_run_grid.begin_run()
    asked = Message(RecordDict(), 7, MessageType.EVALUATE)
    config = {"partition-id": 0, "share-errors": share}
    reply = client_app(lambda config: data(0, 1))(asked, Context(1, 7, config, RecordDict(), {}))
    assert ("patient" in reply.error.reason) == share
    assert share or "(test_errors.py, line " in reply.error.reason
