"""Roster of simulated clients: all are always connected, and there is no roll call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..errors import RunError, SettingsError
from ..rounds.node_selection import NodeSelection
from ..rounds.roster import Participant


class SimulatedNodes(Mapping[int, Participant]):
    """Nodes by id, created on access, so that memory does not grow with their number."""

    def __init__(self, num_clients: int, selection: NodeSelection):
        every = range(1, num_clients + 1)
        self.node_ids: Sequence[int] = every
        if not selection.is_all:
            self.node_ids = [i for i in every if selection.includes(_name(i), i - 1)]
        self._selected = self.node_ids if selection.is_all else frozenset(self.node_ids)

    def __getitem__(self, node_id: int) -> Participant:
        if node_id not in self._selected:
            raise KeyError(node_id)
        return Participant(node_id, _name(node_id), node_id - 1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.node_ids)

    def __len__(self) -> int:
        return len(self.node_ids)


def _name(node_id: int) -> str:
    return f"node-{node_id - 1}"


class SimulatedRoster:
    """Counterpart of :class:`~mlx_fed.rounds.roster.Roster` in a simulation.

    Args:
        num_clients (int): Number of clients.
        selection (NodeSelection): The clients that take part. Default: all.

    Attributes:
        stays (bool): Clients stay whatever they reply, so that faults can be studied.
    """

    stays = True

    def __init__(self, num_clients: int, selection: NodeSelection = NodeSelection()):  # noqa: B008
        self.nodes = SimulatedNodes(num_clients, selection)
        names = selection.names and selection.names - {_name(i) for i in self.nodes}
        beyond = [str(last) for _, last in selection.ranges if last >= num_clients]
        if missing := [*sorted(names), *beyond, *(f"tag:{tag}" for tag in sorted(selection.tags))]:
            raise SettingsError(
                f"select_nodes (--select-nodes): there is no client {missing[0]!r}. "
                f"Simulated clients have no tags, and are called node-0 to node-{num_clients - 1}."
            )

    def leave_out(self, name: str, why: str) -> bool:
        """Exclusion of a node, which does not happen in a simulation."""
        return False

    def take_versions(self) -> dict[str, str]:
        """Differences of versions, of which a simulation has none."""
        return {}

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
