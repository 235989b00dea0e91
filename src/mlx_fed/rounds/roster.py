"""Roster of a run, its participants: node ids, their names and partitions, and who is left out.

Flower knows nodes by random ids. The roll call asks each one for its name, its partition and
its model, and strategies then see the nodes in one order, whatever order they came in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..arrays import frozen, named_arrays
from ..arrays.named_arrays import Spec
from ..errors import FedError, RunError
from ..events import Listener, NodeJoined, NodeLeft, NodeRefused, NodesAwaited, Notice
from ..flower.one_run_grid import FlowerGrid, OneRunGrid
from ..system import versions
from ..tracebacks import is_exception, is_same_failure
from . import checks, messages
from .exchange import POLL, push
from .node_selection import NodeSelection

LONGEST_NAME = 64
"""Characters of a node's name."""
_LONGEST_TAGS = 1000
_LARGEST_PARTITION = 2**31
_MOST_REASONS = 1000
_LONGEST = 200
"""Characters of a fingerprint that are shown."""
_LONGEST_REASON = 500
"""Characters of a reason that quotes what a stranger sent."""
_PATIENCE = 60.0
"""Seconds without an answer to the roll call after which a run no longer waits for more."""


def is_name(name: str) -> bool:
    """Whether a name of a node is valid: it is shown in tables, files and terminals."""
    return name.isprintable() and 0 < len(name) <= LONGEST_NAME


class Participant(NamedTuple):
    """A node of the run, with the tags that its owner has given it."""

    id: int
    name: str
    partition: int
    tags: tuple[str, ...] = ()


class Participants(Protocol):
    """The participants of a run: a roster's interface."""

    @property
    def nodes(self) -> Mapping[int, Participant]:
        """The nodes by id, in order."""

    def wait_for(self, min_nodes: int, seconds: float) -> None:
        """Waits until that many nodes participate, or raises RunError."""

    def take_versions(self) -> dict[str, str]:
        """In which versions nodes that joined since the last call differ from the server."""

    @property
    def stays(self) -> bool:
        """Whether every node participates to the end, whatever it replies."""

    def leave_out(self, name: str, why: str) -> bool:
        """Excludes a node from later rounds, and returns whether it was a participant."""


class Roster:
    """The nodes of a federation: those that answer the roll call.

    Args:
        grid (Grid): Where the nodes are.
        parameters (dict): The shape and dtype of each parameter of the server's model.
        statistics (dict): The same of its running statistics.
        config (dict): Sent with the roll call.
        listener (callable): Called with the events of nodes that come and go.
        fingerprint (dict, optional): What else has to be the same on a node as on the server.
        identities (dict, optional): What the frozen arrays are known by, which have to be the same.
        selection (NodeSelection): The nodes that may take part. Default: all.

    Attributes:
        nodes (dict): The nodes that take part and are online, by id, in order.
        reasons (dict): Why nodes were left out, by the names that they gave.
        unread (set): Messages whose answers are dropped: of nodes that were sent away or have gone.
        stays (bool): No node stays for certain.
    """

    stays = False

    def __init__(
        self,
        grid: OneRunGrid,
        parameters: Spec,
        statistics: Spec,
        config: dict[str, Any],
        listener: Listener,
        fingerprint: Mapping[str, str] | None = None,
        identities: Mapping[str, frozen.ArrayDigest] | None = None,
        selection: NodeSelection = NodeSelection(),  # noqa: B008, it never changes
    ):
        self.selection = selection
        self.grid = grid
        self.fingerprint, self.identities = fingerprint or {}, identities or {}
        self.specs = {"parameters": parameters, "statistics": statistics}
        self.config = config
        self.listener = listener
        self.nodes: dict[int, Participant] = {}
        self.asked: dict[str, int] = {}
        self.heard = 0.0
        self.left_out: set[int] = set()
        self.unread: set[str] = set()
        self.reasons: dict[str, str] = {}
        self.versions = versions.versions()
        self._other_versions: dict[str, str] = {}
        self._noted_versions: set[str] = set()

    def update(self) -> None:
        """Asks newcomers for their names, takes in answers, drops who has gone."""
        online = set(self.grid.get_node_ids())
        for node_id in self.nodes.keys() - online:
            self.listener(NodeLeft(self.nodes.pop(node_id).name))
        self.left_out &= online
        self._ask(online - self.nodes.keys() - self.left_out)
        if self.asked:
            for answer in self.grid.pull_messages(list(self.asked)):
                self._take_in(answer)
        if self.unread:  # a grid keeps an answer until it is pulled
            answers = self.grid.pull_messages(list(self.unread))
            self.unread -= {answer.metadata.reply_to_message_id for answer in answers}

    def wait_for(self, min_nodes: int, seconds: float) -> None:
        """Waits until that many nodes participate, and longer while others answer the roll call.

        Raises:
            RunError: If they have not come in time.
        """
        deadline = time.monotonic() + seconds
        last_count = None
        while True:
            self.update()
            present = len(self.nodes)
            is_late = time.monotonic() > deadline
            if present >= min_nodes:
                if last_count is None or is_late or not self._is_waiting():
                    return
            elif reason := self._common_failure(min_nodes):
                raise RunError(
                    f"All {len(self.reasons)} nodes failed with the same error: {reason}"
                )
            elif is_late:
                raise RunError(
                    f"{present} of {min_nodes} nodes came within {seconds:.0f} seconds"
                    f"{self._why_others_do_not()}. "
                    "Start more nodes, raise --wait, or ask for fewer."
                )
            if present != last_count:
                last_count = present
                self.listener(NodesAwaited(present, min_nodes))
            self.grid.wait(POLL)

    def leave_out(self, name: str, why: str) -> bool:
        """Sends a node away. It may come back as another: when it has been started again."""
        for node in list(self.nodes.values()):
            if node.name == name:
                del self.nodes[node.id]
                self._leave_out(node.id, name, why)
                return True
        return False

    def take_versions(self) -> dict[str, str]:
        """In which versions nodes that joined since the last call differ from the server."""
        differences, self._other_versions = self._other_versions, {}
        return differences

    def _common_failure(self, min_nodes: int) -> str | None:
        """The exception with which all nodes answered the roll call, if they are as many as the
        run needs, and two or more: one node alone ends no run."""
        reasons = list(self.reasons.values())
        if self.nodes or self.asked or len(reasons) < max(2, min_nodes):
            return None
        is_common = all(is_same_failure(reason, reasons[0]) for reason in reasons)
        return reasons[0] if is_common and is_exception(reasons[0]) else None

    def _why_others_do_not(self) -> str:
        """The first reasons why nodes were left out, as the end of a sentence."""
        texts = [f"{name}: {why}"[:240] for name, why in islice(self.reasons.items(), 3)]
        if len(self.reasons) > len(texts):
            texts.append(f"and {len(self.reasons) - len(texts)} more")
        return f"; left out: {'; '.join(texts)}" if texts else ""

    def _is_waiting(self) -> bool:
        """Whether a node that came lately has still to answer the roll call."""
        return bool(self.asked) and time.monotonic() - self.heard < _PATIENCE

    def _ask(self, node_ids: set[int]) -> None:
        """Asks those not asked yet; who could not be sent the question is asked next time."""
        stale_ids = {message for message, node_id in self.asked.items() if node_id not in node_ids}
        self.unread |= stale_ids
        for message_id in stale_ids:
            del self.asked[message_id]
        newcomers = sorted(node_ids - set(self.asked.values()))
        config = {**self.config, "fingerprint": json.dumps(dict(self.fingerprint))}
        content = RecordDict({"config": ConfigRecord(config)})
        questions = [Message(content, node_id, messages.ROLL_CALL) for node_id in newcomers]
        if node_ids_by_message := push(self.grid, questions):
            self.asked |= node_ids_by_message
            self.heard = time.monotonic()

    def _take_in(self, answer: Message) -> None:
        node_id = self.asked.pop(answer.metadata.reply_to_message_id)
        self.heard = time.monotonic()
        name = self.grid.name_of(node_id) or f"node {node_id}"
        try:
            checks.check_answer(answer)
            _, record = messages.config_of(answer.content)
            node = _node(node_id, record)
            self._check_name(node)
            name = node.name
            self._check_number(node)
            if not self.selection.includes(node.name, node.partition, node.tags):
                raise checks.Refused(
                    "it is not among the nodes that this run selects (--select-nodes)"
                )
            if failure := record.get("failure"):
                raise checks.Refused(str(failure))
            self._check_fingerprint(record)
            self._check_model(record)
            rounding = self._check_frozen(record)
            self._check_free(node)
            other_versions = self._compare_versions(record)
        except Exception as error:  # whatever a stranger's bytes can bring about
            why = str(error) if isinstance(error, FedError) else f"unreadable answer: {error!r}"
            # JSON has halves of characters, which no message can carry back.
            reason = why[:_LONGEST_REASON].encode(errors="replace").decode()
            self._leave_out(node_id, name, reason)
            return
        self.reasons.pop(name, None)
        self.nodes[node_id] = node
        nodes = sorted(self.nodes.values(), key=lambda node: (node.partition, node.name))
        self.nodes = {node.id: node for node in nodes}
        self.listener(NodeJoined(node.name, len(self.nodes)))
        if rounding is not None:
            self.listener(Notice(f"{node.name}: its {rounding}, as devices differ"))
        if other_versions:
            self._note_versions(node.name, other_versions)

    def _note_versions(self, name: str, difference: str) -> None:
        """Says once for each difference that a node's results may have other last bits."""
        self._other_versions[name] = difference
        if difference not in self._noted_versions and len(self._noted_versions) < _MOST_REASONS:
            self._noted_versions.add(difference)
            text = f"{name} has {difference}: the same seeds may give other last bits"
            self.listener(Notice(text))

    def _compare_versions(self, record: ConfigRecord) -> str:
        theirs = json.loads(str(record.get("versions", "{}")))
        return versions.difference(theirs, self.versions)

    def _check_name(self, node: Participant) -> None:
        """Check that a node has the name that the grid knows."""
        key_name = self.grid.name_of(node.id)
        if key_name not in (None, node.name):
            raise checks.Refused(f"its key is that of {key_name}, whose name it has to have")

    def _check_number(self, node: Participant) -> None:
        """Check that a node has the partition that the grid knows."""
        number = self.grid.number_of(node.id)
        if number not in (None, node.partition):
            raise checks.Refused(
                f"its key is that of node id {number}, and it says {node.partition}: join without "
                f"--node-id by a token, or with --node-id {number} by a key"
            )

    def _check_fingerprint(self, record: ConfigRecord) -> None:
        theirs = json.loads(str(record.get("fingerprint", "{}")))
        for what, ours in self.fingerprint.items():
            if (value := theirs.get(what)) != ours:
                raise checks.Refused(
                    f"its {what} is not the server's: {str(value)[:_LONGEST]}, expected {ours}"
                )

    def _check_model(self, record: ConfigRecord) -> None:
        for kind, ours in self.specs.items():
            theirs = {
                name: (tuple(shape), dtype)
                for name, (shape, dtype) in json.loads(str(record[kind])).items()
            }
            try:
                named_arrays.check(ours, theirs)
            except named_arrays.WeightsError as error:
                raise checks.Refused(f"its model is not the server's: {error}") from error

    def _check_frozen(self, record: ConfigRecord) -> frozen.Difference | None:
        """Difference of frozen arrays by rounding alone, if there is one."""
        theirs = json.loads(str(record.get("frozen", "{}")))
        difference = frozen.difference(self.identities, theirs)
        if difference is not None and not difference.is_rounding:
            raise checks.Refused(f"its model is not the server's: {difference}")
        return difference

    def _check_free(self, node: Participant) -> None:
        for member in self.nodes.values():
            if node.partition == member.partition:
                raise checks.Refused(
                    f"node id {node.partition} is taken by a node that is online: "
                    "give each node its own --node-id"
                )
            if node.name == member.name:
                raise checks.Refused(
                    f"its name is taken by the node with id {member.partition}, which is online: "
                    "give each node its own --name"
                )

    def _leave_out(self, node_id: int, name: str, why: str) -> None:
        """Excludes a node, sends it the reason, and asks it no more."""
        self.left_out.add(node_id)
        self.reasons.pop(name, None)
        self.reasons[name] = why
        for oldest in list(self.reasons)[:-_MOST_REASONS]:
            del self.reasons[oldest]
        self.listener(NodeRefused(name, why))
        content = RecordDict({"config": ConfigRecord({"reason": why})})
        if node_id in set(self.grid.get_node_ids()):
            self.unread |= push(self.grid, [Message(content, node_id, messages.LEAVE)]).keys()


def _node(node_id: int, record: ConfigRecord) -> Participant:
    """The participant that an answer to the roll call describes.

    Raises:
        Refused: If a node cannot be called so, or cannot have that number.
    """
    name, partition = str(record["name"]), str(record["partition-id"])
    if not is_name(name):
        raise checks.Refused(
            f"a node's name has 1 to {LONGEST_NAME} printable characters, not {len(name)}: "
            f"{name!r:.90}"
        )
    if not partition.isdecimal() or len(partition) > 10 or int(partition) >= _LARGEST_PARTITION:
        raise checks.Refused(f"its node id is no number below {_LARGEST_PARTITION}")
    tags = split_tags(record.get("tags", ""))
    return Participant(node_id, name, int(partition), tags)


def join_tags(tags: Sequence[str]) -> str:
    """Tags as a text, as a node's configuration has them.

    Raises:
        Refused: As :func:`split_tags` does, and for a tag with a comma.
    """
    text = ",".join(tags)
    if isinstance(tags, str) or split_tags(text) != tuple(tags):
        raise checks.Refused(f"tags is a list of words without commas or spaces around: {tags!r}")
    return text


def split_tags(text: Any) -> tuple[str, ...]:
    """The tags in a text with commas between them.

    Raises:
        Refused: If there are too many of them, or one cannot be printed.
    """
    tags = tuple(filter(None, (tag.strip() for tag in str(text)[:_LONGEST_TAGS].split(","))))
    if len(str(text)) > _LONGEST_TAGS or not all(map(is_name, tags)):
        raise checks.Refused(
            f"a node's tags have 1 to {LONGEST_NAME} printable characters each, and "
            f"{_LONGEST_TAGS} together"
        )
    return tags


class RosterGrid(FlowerGrid):
    """The grid for strategies: participants only, in the roster's order.

    Attributes:
        nodes (dict): Their names, partitions and tags, by node id.
    """

    def __init__(self, grid: Grid, roster: Participants):
        super().__init__(grid)
        self._roster = roster

    @property
    def nodes(self) -> Mapping[int, Participant]:
        return self._roster.nodes

    def get_node_ids(self) -> Iterable[int]:
        return list(self._roster.nodes)
