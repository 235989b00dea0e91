"""Selection of a run's nodes by name, node id or tag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SettingsError

NodeSelectors = str | Sequence[str | int]
"""``"clinic-a,tag:hospital,0-4"``, or a list of such selectors."""
_RANGE = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")
_TAG = "tag:"


@dataclass(frozen=True)
class NodeSelection:
    """The nodes that may participate in a run: all of them, or those with one of the selectors.

    Attributes:
        names (frozenset): Names of nodes.
        tags (frozenset): Tags of nodes.
        ranges (tuple): First and last node id (partition) of each range.
    """

    names: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether every node may participate."""
        return not (self.names or self.tags or self.ranges)

    def includes(self, name: str, partition: int, tags: Iterable[str] = ()) -> bool:
        """Whether the node with this name, node id and tags may participate."""
        return (
            self.is_all
            or name in self.names
            or not self.tags.isdisjoint(tags)
            or any(first <= partition <= last for first, last in self.ranges)
        )


def parse_selection(nodes: NodeSelectors | None) -> NodeSelection:
    """The selection of some selectors: ``NAME``, ``ID``, ``ID-ID``, ``tag:TAG`` or ``all``.

    Args:
        nodes (str or list, optional): The selectors. Default: all nodes.

    Raises:
        SettingsError: If there is an empty selector, or a range that ends before it begins.
    """
    if nodes is None:
        return NodeSelection()
    listed = nodes.split(",") if isinstance(nodes, str) else list(nodes)
    selectors = [str(selector).strip() for selector in listed]
    if selectors == ["all"]:
        return NodeSelection()
    names, tags, ranges = set(), set(), []
    for selector in selectors or [""]:
        if not selector or selector in (_TAG, "all"):
            raise SettingsError(
                f"select_nodes (--select-nodes) is a list of names, node ids and tags, such as "
                f"clinic-a,0-4,tag:hospital, or all: not {nodes!r}."
            )
        if selector.startswith(_TAG):
            tags.add(selector.removeprefix(_TAG))
        elif match := _RANGE.fullmatch(selector):
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise SettingsError(
                    f"select_nodes (--select-nodes): {selector} ends before it begins."
                )
            ranges.append((first, last))
        else:
            names.add(selector)
    return NodeSelection(frozenset(names), frozenset(tags), tuple(ranges))
