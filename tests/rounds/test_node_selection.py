"""Which nodes take part in a run: selected by name, node id or tag."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import mlx_fed as fed  # before mlx.core

import pytest
from flwr.serverapp.strategy import FedAvg

from mlx_fed.cli.options import JoinOptions, to_arguments
from mlx_fed.rounds.node_selection import parse_selection
from mlx_fed.rounds.roster import join_tags, split_tags

from ..helpers.fleet_commands import join, serve
from ..helpers.simulated import TASK

NODES = [("clinic-a", 0, ()), ("clinic-b", 1, ("hospital",)), ("lab", 12, ("europe", "hospital"))]


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        (None, ["clinic-a", "clinic-b", "lab"]),
        ("all", ["clinic-a", "clinic-b", "lab"]),
        ("clinic-a", ["clinic-a"]),
        ("clinic-a, tag:europe", ["clinic-a", "lab"]),
        (["tag:hospital"], ["clinic-b", "lab"]),
        ([1, "2-12"], ["clinic-b", "lab"]),
        ("tag:asia,nobody", []),
    ],
)
def test_selectors_are_names_node_ids_and_tags(selectors, names: Iterable[str]):
    selection = parse_selection(selectors)
    assert [node[0] for node in NODES if selection.includes(*node)] == names


@pytest.mark.parametrize("selectors", ["", "a,,b", "tag:", "all,a", "5-2", []])
def test_what_selects_no_nodes_is_refused(selectors, tmp_path: Path):
    with pytest.raises(fed.FedError, match="select_nodes \\(--select-nodes\\)"):
        fed.simulate(TASK, num_clients=4, select_nodes=selectors, runs=tmp_path)


@pytest.mark.parametrize("tags", ["hospital", ["a,b"], [" a"], ["x" * 65], ["\n"], ["ab"] * 500])
def test_tags_that_could_be_read_as_others_are_refused(tags):
    with pytest.raises(fed.FedError):
        join_tags(tags)
    assert split_tags("a,b c,") == ("a", "b c")


def test_selected_clients_train_in_a_simulation_and_after_it_is_resumed(tmp_path: Path):
    arguments = {"num_clients": 6, "runs": tmp_path, "workers": 0, "listeners": ()}
    result = fed.simulate(
        TASK,
        FedAvg(fraction_train=0.5),
        num_rounds=2,
        select_nodes="1,3-4,node-5",
        name="a",
        **arguments,
    )
    selected = {"node-1", "node-3", "node-4", "node-5"}
    assert all(set(record["train"]["nodes"]) <= selected for record in result.rounds)
    assert all(set(record["evaluate"]["nodes"]) == selected for record in result.rounds)
    resumed = fed.simulate(TASK, FedAvg(fraction_train=0.5), num_rounds=4, resume="a", **arguments)
    assert all(set(record["evaluate"]["nodes"]) == selected for record in resumed.rounds)
    assert len(resumed.rounds) == 4
    again = fed.simulate(
        TASK, FedAvg(fraction_train=0.5), num_rounds=5, resume="a", select_nodes="all", **arguments
    )
    assert len(again.rounds[-1]["evaluate"]["nodes"]) == 6


@pytest.mark.parametrize("nodes", ["node-6", "5-6", "tag:hospital"])
def test_a_client_that_a_simulation_has_not_is_named(nodes: str, tmp_path: Path):
    with pytest.raises(fed.FedError, match=r"there is no client .* node-0 to node-5"):
        fed.simulate(TASK, num_clients=6, select_nodes=nodes, runs=tmp_path, listeners=())


def test_a_strategy_sees_names_and_tags_of_nodes(tmp_path: Path):
    class OfOddNumbers(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            messages = super().configure_train(server_round, arrays, config, grid)
            return [m for m in messages if grid.nodes[m.metadata.dst_node_id].partition % 2]

    strategy = OfOddNumbers(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    result = fed.simulate(TASK, strategy, 4, 1, runs=tmp_path, workers=0, listeners=())
    assert result.rounds[0]["train"]["nodes"] == ["node-1", "node-3"]


@pytest.mark.slow
def test_a_fleet_trains_on_nodes_of_a_name_or_a_tag(start, tmp_path: Path):
    options = ("--select-nodes", "clinic,tag:hospital", "--rounds", 2)
    server, address = serve(start, tmp_path, *options)
    other = join(start, address, 0, "--tag", "office", "--tag", "laboratory")
    assert other.ends() == 1
    assert "it is not among the nodes that this run selects (--select-nodes)" in other.text
    server.line("node-0 refused: it is not among the nodes that this run selects")
    nodes = [join(start, address, 1, "--name", "clinic")]
    nodes.append(join(start, address, 2, "--tag", "europe", "--tag", "hospital"))
    assert server.ends() == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    lines = (tmp_path / "run/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["train"]["nodes"] for line in lines] == 2 * [["clinic", "node-2"]]
    assert json.loads((tmp_path / "run/settings.json").read_text())["select_nodes"] == options[1]


def test_the_option_of_tags_is_passed_on():
    assert to_arguments(JoinOptions(tags=["a", "b"])) == ["--tag=a", "--tag=b"]
