"""Messages between a simulation and its workers: configuration, requests, clients and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import RecordDict

from ..arrays import frozen
from ..arrays.named_arrays import Arrays
from ..arrays.weighted_mean import Block
from ..errors import FedError
from ..flower.one_run_grid import ClientFailure
from ..task import Config, TaskSource
from .client_states import ClientStateStore
from .faults import Faults


class WorkerConfig(NamedTuple):
    """Configuration of all workers of a run.

    ``folder`` is a temporary one of the run, ``max_bytes`` the size of each worker's cache of
    partitions, and of the data in use beside it. ``frozen_digests`` are those of the main process's
    frozen arrays.
    """

    source: TaskSource
    config: dict[str, Any]
    seed: int
    num_clients: int
    batched: bool
    chunk_size: int | None
    faults: Faults
    folder: Path
    max_bytes: int
    client_states: ClientStateStore
    frozen_digests: frozen.Digests


class WorkRequest(NamedTuple):
    """Request to clients: a message's type and content, and the timeout in seconds.

    ``weighted_by`` names the metric that is the weight of an update in a sum; ``None`` requests a
    reply of each client.
    """

    kind: str
    content: RecordDict
    timeout: float
    weighted_by: str | None


class DecodedRequest(NamedTuple):
    """Request with its arrays and settings for the trainer."""

    request: WorkRequest
    record_name: str
    parameters: Arrays
    statistics: Arrays
    config: Config

    @property
    def server_round(self) -> int:
        """The round of the request."""
        return int(self.config["server-round"])


class SampledClient(NamedTuple):
    """Client of a phase: its position among the sampled ones, its partition, its block of a sum."""

    position: int
    partition: int
    block: int


class WorkResult(NamedTuple):
    """Result of some clients.

    ``blocks`` are the sums of their blocks, ``replies`` the replies by position, ``failures`` the
    reasons of failures, ``traceback`` that of the process's first failure, and ``labels`` the
    number of examples of each label by partition, for partitions that are loaded for the first
    time.
    """

    blocks: list[Block]
    replies: list[tuple[int, RecordDict]]
    failures: list[ClientFailure]
    notes: list[str]
    traceback: str | None
    labels: dict[int, dict[int, int]]


class NoReply(FedError):
    """A client that does not reply, by an injected fault."""
