"""Events of a run, of a node, and of what either loads: one dataclass for each, for listeners.

An event's ``name`` and fields are its form as JSON, in ``--json`` lines and in ``status.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Something that a listener is told."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without copies of their values."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self)}


Listener = Callable[[Event], None]
"""Who watches a run or a node. It is called for each event, for loading from another thread too."""


@dataclass(frozen=True)
class Notice(Event):
    """A sentence for whoever runs this process."""

    name = "note"
    text: str


# -- what is loaded ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadProgress(Event):
    """How much of a download, a decoding or the like is done.

    ``of`` is None where the whole is unknown; ``unit`` is ``"B"`` for bytes, or a plural.
    """

    name = "loading"
    what: str
    done: int
    of: int | None
    unit: str


@dataclass(frozen=True)
class LoadFinished(Event):
    """The end of something for which there was a :class:`LoadProgress`."""

    name = "loaded"
    what: str
    seconds: float


# -- a run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DashboardReady(Event):
    """The URL of the dashboard."""

    name = "dashboard"
    address: str


@dataclass(frozen=True)
class ServerReady(Event):
    """The server accepts nodes at ``address``; ``secure`` with TLS and keys."""

    name = "serving"
    address: str
    secure: bool


@dataclass(frozen=True)
class NodeInvited(Event):
    """The token of a new node, and the command that takes it. Both are secret."""

    name = "invited"
    node: str
    token: str
    command: str


@dataclass(frozen=True)
class RunResumed(Event):
    """The run continues after this round; 0 if none was finished."""

    name = "resumed"
    round: int


@dataclass(frozen=True)
class RunStarted(Event):
    """The run's folder and settings are written."""

    name = "started"
    folder: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class NodesAwaited(Event):
    """The run waits until ``needed`` nodes participate."""

    name = "waiting"
    nodes: int
    needed: int


@dataclass(frozen=True)
class NodeJoined(Event):
    """A node participates; ``nodes`` with it."""

    name = "joined"
    node: str
    nodes: int


@dataclass(frozen=True)
class NodeLeft(Event):
    """A node's connection ended."""

    name = "left"
    node: str


@dataclass(frozen=True)
class NodeRefused(Event):
    """A node does not participate."""

    name = "refused"
    node: str
    reason: str


@dataclass(frozen=True)
class PhaseProgress(Event):
    """How many nodes have answered in a phase of a round.

    Attributes:
        phase (str): ``"train"``, ``"evaluate"`` or ``"central"``.
        round (int): The round.
        of (int): The run's number of rounds.
        nodes (int): Nodes with a message in this phase.
        answered (int): Nodes that have replied or failed.
        bytes (int): Bytes of arrays in all rounds before.
        seconds_left (float, optional): Estimated seconds until the last round ends.
    """

    phase: str
    round: int
    of: int
    nodes: int
    answered: int = 0
    bytes: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True)
class PhaseStarted(PhaseProgress):
    """A phase starts."""

    name = "phase"


@dataclass(frozen=True)
class RepliesArrived(PhaseProgress):
    """More nodes of the phase have answered."""

    name = "replies"


@dataclass(frozen=True)
class ReplyRefused(Event):
    """A node's reply does not count, or there is none."""

    name = "failed"
    node: str
    phase: str
    reason: str


@dataclass(frozen=True)
class ClientTraceback(Event):
    """The traceback of a simulated client's first exception."""

    name = "traceback"
    text: str


@dataclass(frozen=True)
class LabelsCounted(Event):
    """For each of some simulated clients, the number of examples by label."""

    name = "labels"
    clients: Mapping[int, Mapping[int, int]]


@dataclass(frozen=True)
class RoundFinished(Event):
    """A round's record, as in ``history.jsonl``."""

    name = "round"
    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)


@dataclass(frozen=True)
class RunFinished(Event):
    """The run is over; ``stopped`` says why if that was before its last round."""

    name = "finished"
    model: Path
    seconds: float
    stopped: str | None = None


@dataclass(frozen=True)
class RunAborted(Event):
    """An exception ended the run."""

    name = "stopped"
    reason: str


# -- a node --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeReady(Event):
    """The node's partition is loaded."""

    name = "ready"
    device: str
    partition: int


@dataclass(frozen=True)
class ServerAwaited(Event):
    """The server cannot be reached yet; the node tries again for ``wait`` seconds."""

    name = "waiting"
    server: str
    wait: float
    reason: str


@dataclass(frozen=True)
class ServerJoined(Event):
    """The server has registered the node."""

    name = "joined"
    server: str


@dataclass(frozen=True)
class ServerLost(Event):
    """The server cannot be reached any more; the node tries again."""

    name = "lost"
    server: str
    reason: str


@dataclass(frozen=True)
class MessageEvent(Event):
    """The type and round of a message to the node; ``round`` is None for one of no round."""

    kind: str
    round: int | None


@dataclass(frozen=True)
class MessageReceived(MessageEvent):
    """The node starts to train or evaluate."""

    name = "working"


@dataclass(frozen=True)
class TrainingProgress(Event):
    """Steps of a training that goes on.

    Attributes:
        round (int): The round.
        step (int): Steps that have ended.
        of (int, optional): Steps of the training, if that is known.
        loss (float, optional): Mean loss of the steps since the last report.
        steps_per_second (float): In these steps.
        unit (str, optional): What the task's losses count, such as ``"tokens"``.
        units_per_second (float, optional): Of these.
        peak_memory (int): Bytes that MLX has held at most in this training.
        by_steps (bool): A report for a number of steps, not for a time.
    """

    name = "steps"
    round: int
    step: int
    of: int | None
    loss: float | None
    steps_per_second: float
    unit: str | None
    units_per_second: float | None
    peak_memory: int
    by_steps: bool


@dataclass(frozen=True)
class MessageFailed(MessageEvent):
    """The node's work on a message failed; ``traceback`` is empty if it was told before."""

    name = "failed"
    reason: str
    traceback: str = ""


@dataclass(frozen=True)
class MessageAnswered(MessageEvent):
    """The server has the node's reply."""

    name = "answered"
    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeFinished(Event):
    """The run is over, and the node ends."""

    name = "finished"
