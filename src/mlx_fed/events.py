"""Events of a run, of a node, and of what either loads: one dataclass for each, for listeners.

An event's ``name`` and fields are its form as JSON, in ``--json`` lines and in ``status.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Event:
    """A frozen dataclass of something that happened: ``class NodeLeft(Event, name="left")``."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str = ""):
        dataclass(frozen=True)(cls)
        cls.name = name or getattr(cls, "name", "")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, without copies of their values."""
        return {attribute.name: getattr(self, attribute.name) for attribute in fields(self)}  # type: ignore[arg-type]


Listener = Callable[[Event], None]
"""Who watches a run or a node. It is called for each event, for loading from another thread too."""


class Notice(Event, name="note"):
    """A note for the person who runs this process."""

    text: str


# -- what is loaded ----------------------------------------------------------------------------


class LoadProgress(Event, name="loading"):
    """Progress of a download, a decoding or the like.

    ``of`` is None where the whole is unknown; ``unit`` is ``"B"`` for bytes, or a plural.
    """

    what: str
    done: int
    of: int | None
    unit: str


class LoadFinished(Event, name="loaded"):
    """The end of something for which there was a :class:`LoadProgress`."""

    what: str
    seconds: float


# -- a run ---------------------------------------------------------------------------------------


class DashboardReady(Event, name="dashboard"):
    """The URL of the dashboard."""

    address: str


class ServerReady(Event, name="serving"):
    """The server accepts nodes at ``address``; ``secure`` with TLS and keys."""

    address: str
    secure: bool


class NodeInvited(Event, name="invited"):
    """The token of a new node, and the command that takes it. Both are secret."""

    node: str
    token: str
    command: str


class RunResumed(Event, name="resumed"):
    """The run continues after this round; 0 if none was finished."""

    round: int


class RunStarted(Event, name="started"):
    """The run's folder and settings are written."""

    folder: Path
    settings: dict[str, Any]


class NodesAwaited(Event, name="waiting"):
    """The run waits until ``needed`` nodes participate."""

    nodes: int
    needed: int


class NodeJoined(Event, name="joined"):
    """A node participates; ``nodes`` with it."""

    node: str
    nodes: int


class NodeLeft(Event, name="left"):
    """A node's connection ended."""

    node: str


class NodeRefused(Event, name="refused"):
    """A node does not participate."""

    node: str
    reason: str


class PhaseProgress(Event):
    """Progress of a phase: the number of nodes that have answered.

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


class PhaseStarted(PhaseProgress, name="phase"):
    """A phase starts."""


class RepliesArrived(PhaseProgress, name="replies"):
    """More nodes of the phase have answered."""


class ReplyRefused(Event, name="failed"):
    """A node's reply does not count, or there is none."""

    node: str
    phase: str
    reason: str


class ClientTraceback(Event, name="traceback"):
    """The traceback of a simulated client's first exception."""

    text: str


class LabelsCounted(Event, name="labels"):
    """For each of some simulated clients, the number of examples by label."""

    clients: Mapping[int, Mapping[int, int]]


class RoundFinished(Event, name="round"):
    """A round's record, as in ``history.jsonl``."""

    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)


class RunFinished(Event, name="finished"):
    """The run has ended; ``stopped`` is the reason if that was before its last round."""

    model: Path
    seconds: float
    stopped: str | None = None


class RunAborted(Event, name="stopped"):
    """An exception ended the run."""

    reason: str


# -- a node --------------------------------------------------------------------------------------


class NodeReady(Event, name="ready"):
    """The node's partition is loaded."""

    device: str
    partition: int


class ServerAwaited(Event, name="waiting"):
    """The server cannot be reached yet; the node tries again for ``wait`` seconds."""

    server: str
    wait: float
    reason: str


class ServerJoined(Event, name="joined"):
    """The server has registered the node."""

    server: str


class ServerLost(Event, name="lost"):
    """The server cannot be reached any more; the node tries again."""

    server: str
    reason: str


class MessageEvent(Event):
    """The type and round of a message to the node; ``round`` is None for one of no round."""

    kind: str
    round: int | None


class MessageReceived(MessageEvent, name="working"):
    """The node starts to train or evaluate."""


class TrainingProgress(Event, name="steps"):
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

    round: int
    step: int
    of: int | None
    loss: float | None
    steps_per_second: float
    unit: str | None
    units_per_second: float | None
    peak_memory: int
    by_steps: bool


class MessageFailed(MessageEvent, name="failed"):
    """The node's work on a message failed; ``traceback`` is empty if it was told before."""

    reason: str
    traceback: str = ""


class MessageAnswered(MessageEvent, name="answered"):
    """The server has the node's reply."""

    seconds: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


class NodeFinished(Event, name="finished"):
    """The run is over, and the node ends."""
