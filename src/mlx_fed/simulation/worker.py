"""Worker of a simulation: trains and evaluates clients, and sums their updates by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import mlx.core as mx
from flwr.app import MessageType, MetricRecord, RecordDict

from ..arrays import frozen, master_weights, weighted_mean
from ..arrays.examples import Examples, count, kind, leaves
from ..arrays.named_arrays import Arrays, arrays_of_kind, is_finite, name_by_kind
from ..arrays.randomness import round_seed
from ..arrays.weighted_mean import Block, Counted
from ..errors import FedError, SimulationError
from ..flower.one_run_grid import ClientFailure
from ..rounds import checks, messages
from ..task import Data, make_task
from ..task_settings import kebab_case
from ..tracebacks import failure_reason, user_traceback
from ..training.batches import lengths
from ..training.trainer import ClientUpdate, Trainer
from ..transforms.update_transform import decode_parameters
from .batched_trainer import BatchedTrainer, ClientInput, ImpureOptimizer
from .partition_cache import Partitions, size_of
from .worker_messages import (
    DecodedRequest,
    NoReply,
    SampledClient,
    WorkerConfig,
    WorkRequest,
    WorkResult,
)

# A step's examples and the clients' parameters should stay in a core's cache; a GPU needs more work
# at a time.
_CHUNK_BYTES = {mx.DeviceType.cpu: 8 * 2**20, mx.DeviceType.gpu: 2**30}
_MAX_CHUNK = {mx.DeviceType.cpu: 32, mx.DeviceType.gpu: 256}
_TRANSFORM = "transform"
"""The kind of a client state that the update transform has."""
_WINDOW = 4
"""Chunks of clients whose data is loaded at a time, so that clients of one size are grouped; fewer
if their data exceeds ``max_bytes``."""


class Worker:
    """Worker of one process: a model, its compiled programs and a cache of partitions.

    Args:
        worker_config (WorkerConfig): The run's configuration.
        trainer (Trainer, optional): The task's trainer, if there is one in this process.

    Raises:
        SimulationError: If the model's frozen arrays are not those of the main process.
    """

    def __init__(self, worker_config: WorkerConfig, trainer: Trainer | None = None):
        self.worker_config = worker_config
        self.faults, self.seed = worker_config.faults, worker_config.seed
        if trainer is None:
            task = make_task(worker_config.source, worker_config.config)
            trainer = Trainer(task, self.seed)
            difference = frozen.difference(worker_config.frozen_digests, trainer.frozen)
            if difference is not None and not difference.is_rounding:
                raise SimulationError(f"its model is not the main process's: {difference}")
        self.trainer, max_bytes = trainer, worker_config.max_bytes
        can_batch = worker_config.batched and BatchedTrainer.why_not(trainer.task) is None
        self.batched_trainer = BatchedTrainer(trainer) if can_batch else None
        self.partitions = Partitions(
            trainer.task, worker_config.num_clients, max_bytes, trainer.task_state
        )
        self.client_states = worker_config.client_states
        self.request: DecodedRequest | None = None
        self.failures: list[ClientFailure] = []
        self.traceback: str | None = None
        self.has_failed = False

    def work(self, work_request: WorkRequest, clients: Sequence[SampledClient]) -> WorkResult:
        """Local training or evaluation of clients, in the order of their positions."""
        if self.request is None or self.request.request is not work_request:
            self.request = self._decode(work_request)
        request, self.failures = self.request, []
        blocks: list[Block] = []
        replies: list[tuple[int, RecordDict]] = []
        if work_request.kind == MessageType.EVALUATE:
            replies = list(self._evaluate(request, clients))
        elif work_request.weighted_by is None:
            replies = [
                (position, _reply_content(request, update))
                for position, update in self._train(request, clients)
            ]
        else:
            block_of = {client.position: client.block for client in clients}
            groups = groupby(self._train(request, clients), lambda pair: block_of[pair[0]])
            sums = {
                number: self._sum(number, list(group), work_request.weighted_by)
                for number, group in groups
            }
            blocks = [
                sums.get(number) or weighted_mean.sum_block(number, ())
                for number in dict.fromkeys(block_of.values())
            ]
        traceback, self.traceback = self.traceback, None
        notes, labels = self.trainer.take_notes(), self.partitions.new_labels()
        return WorkResult(blocks, replies, self.failures, notes, traceback, labels)

    def _decode(self, work_request: WorkRequest) -> DecodedRequest:
        content = work_request.content
        name, record = messages.parameters_of(content)
        config = kebab_case(messages.config_of(content)[1])  # strategies add to it
        statistics = self.trainer.statistics()
        if messages.STATISTICS in content:
            statistics = messages.unpack(content.array_records[messages.STATISTICS])
        parameters = master_weights.cast(messages.unpack(record), self.trainer.spec)
        return DecodedRequest(work_request, name, parameters, statistics, config)

    def _fail(self, position: int, error: Exception) -> None:
        """Adds a failure; the process's first traceback of the task's code is part of a result."""
        if not self.has_failed and not isinstance(error, FedError):
            self.has_failed = True
            self.traceback = user_traceback(error)
        self.failures.append(
            ClientFailure(position, reason(error), missing=isinstance(error, NoReply))
        )

    # -- evaluation ------------------------------------------------------------------------

    def _evaluate(
        self, request: DecodedRequest, clients: Sequence[SampledClient]
    ) -> Iterator[tuple[int, RecordDict]]:
        for position, partition, _ in clients:
            try:
                self._inject_silence(request, partition)
                data = self.partitions.get(partition)
                if data.test is None:
                    yield position, messages.nothing_to_evaluate()
                    continue
                client_state = self._client_state(request, partition, after=True)
                arrays = request.parameters, request.statistics
                evaluation = self.trainer.evaluate(*arrays, data.test, client_state, request.config)
            except SimulationError:
                raise
            except Exception as error:
                self._fail(position, error)
            else:
                yield position, messages.pack_evaluation(evaluation)

    # -- training --------------------------------------------------------------------------

    def _train(
        self, request: DecodedRequest, clients: Sequence[SampledClient]
    ) -> Iterator[tuple[int, ClientUpdate]]:
        """Updates in the order of positions; data is loaded for a window of clients at a time."""
        window: list[tuple[SampledClient, Data]] = []
        limit, num_bytes = 1, 0
        for client in clients:
            try:
                self._inject_silence(request, client.partition)
                data = self._load(client.partition)
            except SimulationError:
                raise
            except Exception as error:
                self._fail(client.position, error)
                continue
            if self.partitions.changes_state:
                self._train_alone()
                for one in (*(earlier for earlier, _ in window), client):
                    pair = one, self._load(one.partition)
                    yield from self._train_window(request, [pair])
                window = []
                continue
            if not window:
                limit = _WINDOW * self._chunk_size(request, data)
            window.append((client, data))
            num_bytes += size_of(data)
            if len(window) >= limit or num_bytes >= self.worker_config.max_bytes:
                yield from self._train_window(request, window)
                window, num_bytes = [], 0
        if window:
            yield from self._train_window(request, window)

    def _train_alone(self) -> None:
        """From now on clients train one after another, each right after its data is loaded."""
        self.batched_trainer = None
        self.trainer.note(
            "clients train one after another, not together: Task.data changes a global or closure "
            "variable, or an attribute, that another function of the task reads, so it is called "
            "each time before a client trains"
        )

    def _train_window(
        self, request: DecodedRequest, window: list[tuple[SampledClient, Data]]
    ) -> Iterator[tuple[int, ClientUpdate]]:
        updates: dict[int, ClientUpdate] = {}
        for chunk in self._chunks(request, window):
            for (client, _), update in zip(chunk, self._train_chunk(request, chunk), strict=True):
                if isinstance(update, Exception):
                    self._fail(client.position, update)
                    continue
                client_state = update.client_state
                if self.faults.is_hostile(self.seed, client.partition):
                    update = self.faults.on_update(update, request.parameters)
                update, transform_state = self._encode(request, client.partition, update)
                if client_state or not self.trainer.client_arrays.has_client_state:
                    client_state = {**client_state, **transform_state}
                    if client_state:
                        self.client_states.save(
                            client.partition, request.server_round, client_state
                        )
                updates[client.position] = update
        for client, _ in window:
            if client.position in updates:
                yield client.position, updates.pop(client.position)

    def _encode(
        self, request: DecodedRequest, partition: int, update: ClientUpdate
    ) -> tuple[ClientUpdate, Arrays]:
        """The update as the request wants it, and the client's state of the update transform.

        A sum needs the parameters that the server would decode, a reply has the message.
        """
        encoder = self.trainer.update_encoder(request.config)
        if encoder is None:
            return update, {}
        state = arrays_of_kind(self._client_state(request, partition), _TRANSFORM)
        seed = round_seed(request.config, partition)
        arrays, state = encoder.encode(update.parameters, request.parameters, state, seed)
        parameters: Mapping[str, mx.array] = arrays
        if request.request.weighted_by is not None:
            parameters = decode_parameters(encoder.transform, arrays, request.parameters)
        return update._replace(parameters=parameters), name_by_kind(state, _TRANSFORM)

    def _chunks(
        self, request: DecodedRequest, window: list[tuple[SampledClient, Data]]
    ) -> Iterator[list[tuple[SampledClient, Data]]]:
        """Chunks of clients with examples of one kind and similar numbers of them."""
        entries = [
            (repr(kind(_examples(data))), count(_examples(data)), (client, data))
            for client, data in window
            if not callable(data.train)
        ]
        entries.sort(key=lambda entry: entry[:2])
        for _, group in groupby(entries, lambda entry: entry[0]):
            clients = [client for *_, client in group]
            num_chunks = -(-len(clients) // self._chunk_size(request, clients[0][1]))
            ends = [len(clients) * number // num_chunks for number in range(num_chunks + 1)]
            yield from (clients[start:end] for start, end in pairwise(ends))
        yield from ([pair] for pair in window if callable(pair[1].train))

    def _train_chunk(
        self, request: DecodedRequest, chunk: list[tuple[SampledClient, Data]]
    ) -> list[ClientUpdate | Exception]:
        arrays = request.parameters, request.statistics
        failure: Exception | None = None
        optimizer = None
        if self.batched_trainer is not None and len(chunk) > 1:
            inputs = [
                ClientInput(
                    client.partition,
                    _examples(data),
                    self._client_state(request, client.partition),
                )
                for client, data in chunk
            ]
            try:
                return [*self.batched_trainer.train(*arrays, inputs, request.config)]
            except Exception as error:  # of one client, or of the model: one by one shows which
                failure = error
                optimizer = error.optimizer if isinstance(error, ImpureOptimizer) else None
        updates: list[ClientUpdate | Exception] = []
        for client, data in chunk:
            try:
                client_state = self._client_state(request, client.partition)
                update = self.trainer.train(
                    *arrays,
                    data,
                    request.config,
                    client=client.partition,
                    client_state=client_state,
                    optimizer=optimizer,
                )
                updates.append(update)
            except Exception as error:
                updates.append(error)
            optimizer = None
        if failure is not None and not any(isinstance(update, Exception) for update in updates):
            self.batched_trainer = None
            self.trainer.note(f"clients train one after another, not together: {reason(failure)}")
        return updates

    def _sum(self, number: int, updates: list[tuple[int, ClientUpdate]], weighted_by: str) -> Block:
        """Sum of a block's updates; those with values that are not finite fail."""
        pairs = []
        for position, update in updates:
            try:
                checks.check_figures(update.metrics, weighted_by)
            except checks.Refused as error:
                self._fail(position, error)
                continue
            weight = float(update.metrics[weighted_by])
            pairs.append((Counted(position, weight, update.metrics), update))
        block = _sum_block(number, pairs)
        arrays = (*block.parameters.values(), *block.statistics.values())
        if all(is_finite(piece) for array in arrays for piece in weighted_mean.pieces(array)):
            return block
        # A sum of finite values may overflow as well: then no update fails here, and the mean does.
        finite_pairs = []
        for client, update in pairs:
            try:
                checks.check_values(update.parameters, update.statistics, client.weight)
                finite_pairs.append((client, update))
            except checks.Refused as error:
                self._fail(client.place, error)
        return _sum_block(number, finite_pairs)

    # -- clients ---------------------------------------------------------------------------

    def _inject_silence(self, request: DecodedRequest, partition: int) -> None:
        seed = round_seed(request.config, partition)
        kind, timeout = request.request.kind, request.request.timeout
        if why := self.faults.why_silent(seed, kind, timeout):
            raise NoReply(why)

    def _load(self, partition: int) -> Data:
        data = self.partitions.get(partition)
        if not callable(data.train) and count(data.train) == 0:
            raise FedError(
                f"Partition {partition} has no training examples: have fewer clients, or a "
                "partitioner that leaves none empty"
            )
        if self.faults.is_hostile(self.seed, partition):
            return self.faults.on_data(data)
        return data

    def _client_state(
        self, request: DecodedRequest, partition: int, after: bool = False
    ) -> Arrays | None:
        """Client state before the request's round, or after it."""
        encoder = self.trainer.update_encoder(request.config)
        if not (self.trainer.client_arrays.has_client_state or (encoder and encoder.has_state)):
            return None
        return self.client_states.load(partition, request.server_round + after)

    def _chunk_size(self, request: DecodedRequest, data: Data) -> int:
        """Number of clients with such data that train together."""
        if self.batched_trainer is None or callable(data.train):
            return 1
        if self.worker_config.chunk_size is not None:
            return self.worker_config.chunk_size
        device = mx.default_device().type
        batch_size = lengths(self.trainer.task, request.config).batch_size
        rows = min(batch_size, count(data.train))
        example_bytes = sum(rows * array.nbytes // len(array) for array in leaves(data.train))
        # The parameters, their gradients, the optimizer's state, and the new parameters.
        array_bytes = 4 * sum(array.nbytes for array in request.parameters.values())
        chunk_size = _CHUNK_BYTES[device] // (example_bytes + array_bytes)
        return max(1, min(_MAX_CHUNK[device], chunk_size))


def _examples(data: Data) -> Examples:
    assert not callable(data.train), "streams are trained on one client after another"
    return data.train


def _reply_content(request: DecodedRequest, update: ClientUpdate) -> RecordDict:
    """Content of a client's reply."""
    content: dict[str, Any] = {
        request.record_name: messages.pack(update.parameters),
        "metrics": MetricRecord({**update.metrics}),
    }
    if update.statistics:
        content[messages.STATISTICS] = messages.pack(update.statistics)
    return RecordDict(content)


def _sum_block(number: int, pairs: list[tuple[Counted, ClientUpdate]]) -> Block:
    return weighted_mean.sum_block(number, ((c, u.parameters, u.statistics) for c, u in pairs))


def reason(error: Exception) -> str:
    """Reason of a failure in a line; with the exception's type if it is the task's fault, which a
    repeat would not mend."""
    if isinstance(error, FedError) and not isinstance(error, (TypeError, ValueError)):
        return str(error)
    return failure_reason(error)
