"""What one worker does: trains clients, together or one after another, and sums them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from flwr.app import MessageType, MetricRecord, RecordDict

from ..arrays import frozen, master_weights, weighted_mean
from ..arrays.examples import Examples, count, kind, leaves
from ..arrays.named_arrays import Arrays, is_finite
from ..arrays.randomness import round_seed
from ..arrays.weighted_mean import Block, Counted
from ..errors import FedError, SimulationError
from ..rounds import checks, messages
from ..rounds.exchange import Failed
from ..task import Config, Data, TaskSource, make_task
from ..task_settings import kebab_case
from ..tracebacks import user_traceback
from ..training.batches import lengths
from ..training.trainer import ClientUpdate, Trainer
from .batched_trainer import BatchedTrainer, ClientInput
from .client_states import ClientStateStore
from .faults import Faults
from .partition_cache import Partitions, size_of

# A step's examples and the clients' parameters should stay in a core's cache; a GPU has to be
# given enough to do.
_CHUNK_BYTES = {mx.DeviceType.cpu: 8 * 2**20, mx.DeviceType.gpu: 2**30}
_LARGEST_CHUNK = {mx.DeviceType.cpu: 32, mx.DeviceType.gpu: 256}
_WINDOW = 4
"""Chunks of clients that are looked at together, so that those of one size are together: or fewer,
when their data comes to as much as is kept."""


class WorkerConfig(NamedTuple):
    """What all workers of a run are set up with.

    ``folder`` is for what lasts as long as the run, ``most_bytes`` how much of the data each
    worker keeps, and about as much as it has at hand beside that. ``identities`` are what the
    frozen arrays of the process that starts them are known by.
    """

    source: TaskSource
    config: dict[str, Any]
    seed: int
    num_clients: int
    batched: bool
    chunk_size: int | None
    faults: Faults
    folder: Path
    most_bytes: int
    kept: ClientStateStore
    identities: frozen.Digests


class WorkRequest(NamedTuple):
    """What clients are asked: a message's type and content, and the seconds they have.

    ``weighted_by`` names the metric that weighs updates which are to be summed; ``None`` asks
    for each client's own.
    """

    kind: str
    content: RecordDict
    timeout: float
    weighted_by: str | None


class DecodedRequest(NamedTuple):
    """A request as the trainer takes it."""

    request: WorkRequest
    record_name: str
    parameters: Arrays
    statistics: Arrays
    config: Config


class SampledClient(NamedTuple):
    """A client that is asked, its place in the phase and the block that it is summed in."""

    place: int
    client: int
    block: int


class WorkResult(NamedTuple):
    """The result of some clients: sums of all their blocks, or replies by place; who failed, and
    why, with the traceback of the first failure in the process; and of those who were new, how many
    examples of each label they have."""

    blocks: list[Block]
    replies: list[tuple[int, RecordDict]]
    failures: list[Failed]
    notes: list[str]
    traceback: str | None
    labels: dict[int, dict[int, int]]


class NoReply(FedError):
    """A client that does not answer."""


class Worker:
    """A process's model, compiled programs and loaded partitions, from round to round.

    Args:
        job (Job): The run's set-up.
        trainer (Trainer, optional): The task's, where there is one in this process already.
    """

    def __init__(self, job: WorkerConfig, trainer: Trainer | None = None):
        self.job = job
        self.trainer = trainer or Trainer(make_task(job.source, job.config), job.seed)
        other = None if trainer else frozen.difference(job.identities, self.trainer.frozen)
        if other is not None and not other.is_rounding:
            raise SimulationError(f"its model is not the main process's: {other}")
        may = job.batched and BatchedTrainer.why_not(self.trainer.task) is None
        self.batched = BatchedTrainer(self.trainer) if may else None
        self.partitions = Partitions(self.trainer.task, job.num_clients, job.most_bytes)
        self.kept = job.kept if self.trainer.has_client_state else None
        self.phase: DecodedRequest | None = None
        self.traceback: str | None = None
        self.has_failed = False

    def work(self, request: WorkRequest, seats: Sequence[SampledClient]) -> WorkResult:
        """Lets clients train or evaluate, in the order of their places."""
        if self.phase is None or self.phase.request is not request:
            self.phase = self._phase(request)
        phase = self.phase
        failed: list[Failed] = []
        if request.kind == MessageType.EVALUATE:
            replies = list(self._evaluate(phase, seats, failed))
            return self._outcome([], replies, failed)
        updates = self._train(phase, seats, failed)
        if request.weighted_by is None:
            replies = [(place, _content(phase, update)) for place, update in updates]
            return self._outcome([], replies, failed)
        block = {seat.place: seat.block for seat in seats}
        summed = {
            number: _sum(number, list(group), request.weighted_by, failed)
            for number, group in groupby(updates, lambda pair: block[pair[0]])
        }
        numbers = dict.fromkeys(block.values())
        blocks = [summed.get(number) or weighted_mean.sum_block(number, ()) for number in numbers]
        return self._outcome(blocks, [], failed)

    def _outcome(
        self, blocks: list[Block], replies: list[tuple[int, RecordDict]], failed: list[Failed]
    ) -> WorkResult:
        notes, labels = self.trainer.take_notes(), self.partitions.new_labels()
        traceback, self.traceback = self.traceback, None
        return WorkResult(blocks, replies, failed, notes, traceback, labels)

    def _failed(self, place: int, error: Exception) -> Failed:
        """Why a client has no reply; the first traceback of the task's own code is kept."""
        if not self.has_failed and not isinstance(error, FedError):
            self.has_failed = True
            self.traceback = user_traceback(error)
        return _failed(place, error)

    def _phase(self, request: WorkRequest) -> DecodedRequest:
        name, record = messages.parameters_of(request.content)
        config = kebab_case(messages.config_of(request.content)[1])  # strategies add to it
        statistics = self.trainer.statistics()
        if messages.STATISTICS in request.content:
            statistics = messages.unpack(request.content.array_records[messages.STATISTICS])
        parameters = master_weights.cast(messages.unpack(record), self.trainer.spec)
        return DecodedRequest(request, name, parameters, statistics, config)

    # -- evaluation ------------------------------------------------------------------------

    def _evaluate(
        self, phase: DecodedRequest, seats: Sequence[SampledClient], failed: list[Failed]
    ) -> Iterator[tuple[int, RecordDict]]:
        for place, client, _ in seats:
            try:
                self._require_answer(phase, client)
                data = self.partitions.get(client)
                if data.test is None:
                    yield place, messages.nothing_to_evaluate()
                    continue
                client_state = self._client_state(phase, client, later=True)
                start = phase.parameters, phase.statistics
                evaluation = self.trainer.evaluate(*start, data.test, client_state, phase.config)
            except SimulationError:
                raise
            except Exception as error:
                failed.append(self._failed(place, error))
            else:
                yield place, messages.pack_evaluation(evaluation)

    # -- training --------------------------------------------------------------------------

    def _train(
        self, phase: DecodedRequest, seats: Sequence[SampledClient], failed: list[Failed]
    ) -> Iterator[tuple[int, ClientUpdate]]:
        """Updates in the order of places; what they need is loaded a window at a time."""
        window: list[tuple[SampledClient, Data]] = []
        limit, held = 1, 0
        for seat in seats:
            try:
                self._require_answer(phase, seat.client)
                data = self._data(seat.client)
            except SimulationError:
                raise
            except Exception as error:
                failed.append(self._failed(seat.place, error))
                continue
            if not window:
                limit = _WINDOW * self._chunk_size(phase, data)
            window.append((seat, data))
            held += size_of(data)
            if len(window) >= limit or held >= self.job.most_bytes:
                yield from self._train_window(phase, window, failed)
                window, held = [], 0
        if window:
            yield from self._train_window(phase, window, failed)

    def _train_window(
        self, phase: DecodedRequest, window: list[tuple[SampledClient, Data]], failed: list[Failed]
    ) -> Iterator[tuple[int, ClientUpdate]]:
        updates: dict[int, ClientUpdate] = {}
        for chunk in self._chunks(phase, window):
            for (seat, _), update in zip(chunk, self._train_chunk(phase, chunk), strict=True):
                if isinstance(update, Exception):
                    failed.append(self._failed(seat.place, update))
                else:
                    updates[seat.place] = self._finish(phase, seat.client, update)
        for seat, _ in window:
            if seat.place in updates:
                yield seat.place, updates.pop(seat.place)

    def _chunks(
        self, phase: DecodedRequest, window: list[tuple[SampledClient, Data]]
    ) -> Iterator[list[tuple[SampledClient, Data]]]:
        """Clients whose examples are alike and about as many take their steps together."""
        together = [
            (_kind(data), count(_examples(data)), (seat, data))
            for seat, data in window
            if not callable(data.train)
        ]
        together.sort(key=lambda entry: entry[:2])
        for _, alike in groupby(together, lambda entry: entry[0]):
            clients = [client for *_, client in alike]
            chunks = -(-len(clients) // self._chunk_size(phase, clients[0][1]))
            ends = [len(clients) * number // chunks for number in range(chunks + 1)]
            yield from (clients[start:end] for start, end in pairwise(ends))
        yield from ([pair] for pair in window if callable(pair[1].train))

    def _train_chunk(
        self, phase: DecodedRequest, chunk: list[tuple[SampledClient, Data]]
    ) -> list[ClientUpdate | Exception]:
        why: Exception | None = None
        if self.batched is not None and len(chunk) > 1:
            members = [
                ClientInput(seat.client, _examples(data), self._client_state(phase, seat.client))
                for seat, data in chunk
            ]
            try:
                return list(
                    self.batched.train(phase.parameters, phase.statistics, members, phase.config)
                )
            except Exception as error:  # one client's, or the model's: one by one it shows
                why = error
        updates = [self._train_one(phase, seat.client, data) for seat, data in chunk]
        if why is not None and not any(isinstance(update, Exception) for update in updates):
            self.batched = None
            self.trainer.note(f"clients train one after another, not together: {reason(why)}")
        return updates

    def _train_one(
        self, phase: DecodedRequest, client: int, data: Data
    ) -> ClientUpdate | Exception:
        try:
            client_state = self._client_state(phase, client)
            start = phase.parameters, phase.statistics
            return self.trainer.train(
                *start, data, phase.config, client=client, client_state=client_state
            )
        except Exception as error:
            return error

    def _finish(self, phase: DecodedRequest, client: int, update: ClientUpdate) -> ClientUpdate:
        """What a client sends of its update, and what it keeps."""
        if self.kept is not None and update.client_state:
            self.kept.save(client, int(phase.config["server-round"]), update.client_state)
        if self.job.faults.is_hostile(self.job.seed, client):
            update = self.job.faults.on_update(update, phase.parameters)
        return update

    # -- clients ---------------------------------------------------------------------------

    def _require_answer(self, phase: DecodedRequest, client: int) -> None:
        moment = round_seed(phase.config, client)
        if why := self.job.faults.why_silent(moment, phase.request.kind, phase.request.timeout):
            raise NoReply(why)

    def _data(self, client: int) -> Data:
        data = self.partitions.get(client)
        if not callable(data.train) and count(data.train) == 0:
            raise FedError(
                f"Partition {client} has no training examples: have fewer clients, or a "
                "partitioner that leaves none empty"
            )
        if self.job.faults.is_hostile(self.job.seed, client):
            return self.job.faults.on_data(data)
        return data

    def _client_state(
        self, phase: DecodedRequest, client: int, later: bool = False
    ) -> Arrays | None:
        """What the client has kept of the rounds before, or with this one."""
        if self.kept is None:
            return None
        return self.kept.load(client, int(phase.config["server-round"]) + later)

    def _chunk_size(self, phase: DecodedRequest, data: Data) -> int:
        """How many clients like this one train together."""
        if self.batched is None or callable(data.train):
            return 1
        if self.job.chunk_size is not None:
            return self.job.chunk_size
        device = mx.default_device().type
        batch_size = lengths(self.trainer.task, phase.config).batch_size
        rows = min(batch_size, count(data.train))
        examples = sum(rows * array.nbytes // len(array) for array in leaves(data.train))
        # The parameters, their gradients, the optimizer's state, and what comes of them.
        arrays = 4 * sum(array.nbytes for array in phase.parameters.values())
        fits = _CHUNK_BYTES[device] // (examples + arrays)
        return max(1, min(_LARGEST_CHUNK[device], fits))


def _examples(data: Data) -> Examples:
    assert not callable(data.train), "streams are trained on one client after another"
    return data.train


def _kind(data: Data) -> str:
    """What one example is: the same for clients that can be stacked."""
    return repr(kind(_examples(data)))


def _content(phase: DecodedRequest, update: ClientUpdate) -> RecordDict:
    """A client's update as its reply's content."""
    content: dict[str, Any] = {
        phase.record_name: messages.pack(update.parameters),
        "metrics": MetricRecord({**update.metrics}),
    }
    if update.statistics:
        content[messages.STATISTICS] = messages.pack(update.statistics)
    return RecordDict(content)


def _sum(
    number: int,
    updates: list[tuple[int, ClientUpdate]],
    weighted_by: str,
    failed: list[Failed],
) -> Block:
    fit = []
    for place, update in updates:
        try:
            checks.check_figures(update.metrics, weighted_by)
            fit.append((Counted(place, float(update.metrics[weighted_by]), update.metrics), update))
        except checks.Refused as refused:
            failed.append(_failed(place, refused))
    block = weighted_mean.sum_block(number, ((c, u.parameters, u.statistics) for c, u in fit))
    every = (*block.parameters.values(), *block.statistics.values())
    if all(is_finite(piece) for part in every for piece in weighted_mean.pieces(part)):
        return block
    # A sum of finite values may overflow as well: then all of them are fit, and the mean says so.
    good = []
    for client, update in fit:
        try:
            checks.check_values(update.parameters, update.statistics, client.weight)
            good.append((client, update))
        except checks.Refused as refused:
            failed.append(_failed(client.place, refused))
    return weighted_mean.sum_block(number, ((c, u.parameters, u.statistics) for c, u in good))


def _failed(place: int, error: Exception) -> Failed:
    return Failed(place, reason(error), missing=isinstance(error, NoReply))


def reason(error: Exception) -> str:
    """What went wrong, in a line; what no repeat mends, a fault of the task, as an exception."""
    if isinstance(error, FedError) and not isinstance(error, (TypeError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
