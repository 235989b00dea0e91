"""Simulated clients as a run's roster: all of them, always there, and no roll call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import RunError
from ..rounds.roster import Node


class SimulatedNodes(Mapping[int, Node]):
    """Nodes by id, made when they are asked for: a hundred thousand cost no more than one."""

    def __init__(self, num_clients: int):
        self.num_clients = num_clients

    def __getitem__(self, node_id: int) -> Node:
        if not 0 < node_id <= self.num_clients:
            raise KeyError(node_id)
        return Node(node_id, f"node-{node_id - 1}", node_id - 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self.num_clients + 1))

    def __len__(self) -> int:
        return self.num_clients


class SimulatedRoster:
    """What :class:`~mlx_fed.rounds.roster.Roster` is on a federation.

    Args:
        num_clients (int): How many clients there are.

    Attributes:
        stays (bool): Clients stay, whatever they reply: that is what is simulated.
    """

    stays = True

    def __init__(self, num_clients: int):
        self.nodes = SimulatedNodes(num_clients)

    def leave_out(self, name: str, why: str) -> bool:
        """Nobody is left out."""
        return False

    def wait_for(self, needed: int, seconds: float) -> None:
        """Nobody else will come.

        Raises:
            RunError: If the strategy wants more clients than there are.
        """
        if needed > len(self.nodes):
            raise RunError(
                f"The strategy waits for {needed} clients, and there are {len(self.nodes)}. "
                "Simulate more clients, or lower the strategy's min_available_nodes, "
                "min_train_nodes and min_evaluate_nodes."
            )
