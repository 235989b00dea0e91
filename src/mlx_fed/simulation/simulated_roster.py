"""Roster of simulated clients: all are always connected, and there is no roll call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import RunError
from ..rounds.roster import Participant


class SimulatedNodes(Mapping[int, Participant]):
    """Nodes by id, created on access, so that memory does not grow with their number."""

    def __init__(self, num_clients: int):
        self.num_clients = num_clients

    def __getitem__(self, node_id: int) -> Participant:
        if not 0 < node_id <= self.num_clients:
            raise KeyError(node_id)
        return Participant(node_id, f"node-{node_id - 1}", node_id - 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self.num_clients + 1))

    def __len__(self) -> int:
        return self.num_clients


class SimulatedRoster:
    """Counterpart of :class:`~mlx_fed.rounds.roster.Roster` in a simulation.

    Args:
        num_clients (int): Number of clients.

    Attributes:
        stays (bool): Clients stay whatever they reply, so that faults can be studied.
    """

    stays = True

    def __init__(self, num_clients: int):
        self.nodes = SimulatedNodes(num_clients)

    def leave_out(self, name: str, why: str) -> bool:
        """Exclusion of a node, which does not happen in a simulation."""
        return False

    def wait_for(self, min_nodes: int, seconds: float) -> None:
        """Wait for nodes, which returns at once.

        Raises:
            RunError: If the strategy wants more clients than there are.
        """
        if min_nodes > len(self.nodes):
            raise RunError(
                f"The strategy waits for {min_nodes} clients, and there are {len(self.nodes)}. "
                "Simulate more clients, or lower the strategy's min_available_nodes, "
                "min_train_nodes and min_evaluate_nodes."
            )
