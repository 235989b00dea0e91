"""A task as a Flower ClientApp: each message is answered by some local training or evaluation.

The same app answers on a resident node, on a stock SuperNode and in Flower's simulation. In a
process that stays, the model, its compiled programs and the data stay too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .arrays import master_weights, randomness, reducers  # noqa: F401, for Flower's simulation
from .arrays.flower_records import records_in
from .arrays.named_arrays import Arrays
from .errors import FedError
from .flower.error_replies import error_reply
from .rounds import client_state, coverage, messages
from .system.versions import versions
from .task import Config, Data, Task, TaskSource, fingerprint_of, make_task
from .task_settings import kebab_case
from .training import batches
from .training.step_progress import ProgressFactory
from .training.trainer import Trainer

if TYPE_CHECKING:
    from flwr.clientapp.typing import Mod


RunConfig = tuple[tuple[str, Any], ...]
"""A run's settings, as a cache takes them."""
SHARE_ERRORS = "share-errors"
"""In a node's configuration: the server is told what exceptions say, not only where they were."""


class ClientError(FedError):
    """A node without the partition or the examples for a request."""


def client_app(task: TaskSource, mods: Sequence[Mod] | None = None) -> ClientApp:
    """The task as a Flower ClientApp.

    Args:
        task (Task or callable): What is trained, or a function that makes it from the run's
            settings (``context.run_config``).
        mods (list, optional): Flower mods around training, such as ``fixedclipping_mod``. They
            see one record of float32 arrays, whatever the model's dtypes are.

    Returns:
        flwr.clientapp.ClientApp: Answers ``train``, ``evaluate`` and the server's roll call.
        The node's configuration needs ``partition-id``, and ``num-partitions`` where the data
        is partitioned. With ``share-errors`` the server is told what exceptions say, which may
        hold data, and not only their type and the line of the task that raised them.
    """
    return raising_app(task, mods, [_errors_as_replies])


def raising_app(
    task: TaskSource,
    mods: Sequence[Mod] | None = None,
    around: Sequence[Mod] = (),
    around_training: Sequence[Mod] = (),
    note: Callable[[str], None] | None = None,
    progress: ProgressFactory | None = None,
) -> ClientApp:
    """The ClientApp of :func:`client_app`, which raises exceptions instead of replying with them.

    Args:
        task (Task or callable): What is trained.
        mods (list, optional): Flower mods around training.
        around (list, optional): Flower mods around everything.
        around_training (list, optional): Flower mods around training, within the encoding of
            updates.
        note (callable, optional): Called with what the trainer notes, such as at which step a
            loss diverged. Default: Flower's log.
        progress (callable, optional): As ``Trainer.progress``.
    """
    app = ClientApp(mods=[*around])
    client = _Client(task, private=coverage.name_of_private(mods or ()))
    client.note = note or client.note
    client.progress = progress

    @app.query("roll_call")
    def roll_call(message: Message, context: Context) -> Message:
        return client.answer_roll_call(message, context)

    @app.query("leave")
    def leave(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    plain = [client.plain_for_mods, *mods] if mods else []

    @app.train(mods=[client.encode_update, *around_training, *plain])
    def train(message: Message, context: Context) -> Message:
        return client.train(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return client.evaluate(message, context)

    return app


class _Client:
    """State of a client between messages: the trainer, and the data of the last partitions."""

    progress: ProgressFactory | None = None

    def __init__(self, source: TaskSource, token: str = "", private: str | None = None):
        self.source, self.private = source, private
        self.token = token or uuid4().hex
        self.note: Callable[[str], None] = logging.getLogger("flwr").warning
        self.task = lru_cache(maxsize=1)(self._make_task)
        self.trainer = lru_cache(maxsize=1)(self._make_trainer)
        self.data = lru_cache(maxsize=2)(self._load_data)

    def __reduce__(self) -> tuple[Any, ...]:
        # Flower's simulation sends the app to its workers with every message: a worker goes on
        # with the client that it has.
        return _same_client, (self.token, self.source, self.private)

    def _make_task(self, run_config: RunConfig) -> Task:
        return make_task(self.source, dict(run_config))

    def _make_trainer(self, seed: int, run_config: RunConfig) -> Trainer:
        trainer = Trainer(self.task(run_config), seed)
        trainer.progress = self.progress
        if self.private:
            coverage.require_covered(self.private, trainer.statistics_spec)
            self.note(coverage.note(self.private, trainer.task))
        return trainer

    def _load_data(self, trainer: Trainer, partition: int, num_partitions: int | None) -> Data:
        return batches.load(trainer.task, partition, num_partitions)

    def setting_out(self, message: Message, context: Context) -> tuple[Trainer, Config]:
        _, message_config = messages.config_of(message.content)
        config = kebab_case(message_config)  # strategies add to it, and servers that are not ours
        return self.trainer(int(str(config.get("seed", 0))), _run_config(context)), config

    def data_of(self, trainer: Trainer, context: Context) -> tuple[Data, int]:
        partition, num_partitions = partition_of(context)
        return self.data(trainer, partition, num_partitions), partition

    def answer_roll_call(self, message: Message, context: Context) -> Message:
        _, config = messages.config_of(message.content)
        reference = json.loads(str(config.get("fingerprint", "{}")))
        fingerprint = fingerprint_of(self.task(_run_config(context)), reference)
        answer = {
            **identity_of(context),
            "fingerprint": json.dumps(fingerprint),
            "versions": json.dumps(versions()),
        }
        if reference.items() <= fingerprint.items():  # another's model is not built, nor downloaded
            trainer, _ = self.setting_out(message, context)
            answer["frozen"] = json.dumps(trainer.frozen)
            if config.get("prepare"):
                data, _ = self.data_of(trainer, context)
                trainer.warm_up(data, config)
            answer["parameters"] = json.dumps(trainer.spec)
            answer["statistics"] = json.dumps(trainer.all_statistics_spec)
        return Message(RecordDict({"node": ConfigRecord(answer)}), reply_to=message)

    def encode_update(self, message: Message, context: Context, call_next: Any) -> Message:
        """Encodes the update of a reply by the run's transforms, if it has any."""
        trainer, config = self.setting_out(message, context)
        is_packed = messages.is_packed(messages.parameters_of(message.content)[1])
        encoder = trainer.update_encoder(config) if is_packed else None
        if encoder is None:  # nothing holds the message, whose parameters training releases
            return call_next(message, context)
        name, record = messages.parameters_of(message.content)
        before = master_weights.cast(messages.unpack(record), trainer.spec)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        number, kind = client_state.round_of(config), client_state.TRANSFORM
        seed = randomness.round_seed(config, partition_of(context)[0])
        after = messages.unpack(reply.content.array_records[name])
        state = client_state.rewind(context.state, number, kind)
        update, state = encoder.encode(after, before, state, seed)
        client_state.save(context.state, number, state, kind)
        reply.content[name] = messages.pack(update)
        return reply

    def plain_for_mods(self, message: Message, context: Context, call_next: Any) -> Message:
        """Converts a message for Flower's mods, which work on one record of named float32 arrays.

        They stand in the model's order, as in the reply: mods pair arrays by position.
        Statistics are kept out of their sight in the context, which mods and app share.
        """
        trainer, _ = self.setting_out(message, context)
        name, record = messages.parameters_of(message.content)
        arrays = master_weights.cast(messages.unpack(record), trainer.spec)
        message.content[name] = master_weights.to_masters(arrays)
        statistics = message.content.pop(messages.STATISTICS, None)
        if statistics is not None:
            context.state[messages.STATISTICS] = statistics
        try:
            reply = call_next(message, context)
            if reply.has_error():  # a mod's error about a reply is addressed to nobody
                return Message(reply.error, reply_to=message)
            if statistics is not None:
                reply.content[messages.STATISTICS] = context.state[messages.STATISTICS]
            return reply
        finally:
            if statistics is not None:
                del context.state[messages.STATISTICS]

    def train(self, message: Message, context: Context) -> Message:
        trainer, config = self.setting_out(message, context)
        data, partition = self.data_of(trainer, context)
        statistics = self._statistics(trainer, message, context)
        name, is_packed, parameters = _take_parameters(message, trainer)
        number = client_state.round_of(config)
        state = client_state.rewind(context.state, number)
        update = trainer.train(
            parameters, statistics, data, config, client=partition, client_state=state
        )
        self._pass_notes_on(trainer)
        metrics: dict[str, Any] = dict(update.metrics)
        arrays = messages.pack if is_packed else master_weights.to_masters
        content = RecordDict({name: arrays(update.parameters), "metrics": MetricRecord(metrics)})
        client_state.save(context.state, number, update.client_state)
        if update.statistics:
            (content if is_packed else context.state)[messages.STATISTICS] = messages.pack(
                update.statistics
            )
        return Message(content, reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        trainer, config = self.setting_out(message, context)
        data, partition = self.data_of(trainer, context)
        statistics = self._statistics(trainer, message, context)
        state = client_state.load(context.state, client_state.round_of(config))
        _, is_packed, parameters = _take_parameters(message, trainer)
        if data.test is None:
            if is_packed:  # by a server that knows what it means
                return Message(messages.nothing_to_evaluate(), reply_to=message)
            raise ClientError(f"Partition {partition} has no test examples: Data.test is None.")
        evaluation = trainer.evaluate(parameters, statistics, data.test, state, config)
        self._pass_notes_on(trainer)
        if evaluation.undefined and not is_packed:  # Flower's mean would be NaN for all clients
            name, why = next(iter(evaluation.undefined.items()))
            raise ClientError(f"Metric {name!r} is undefined: {why}")
        return Message(messages.pack_evaluation(evaluation), reply_to=message)

    def _pass_notes_on(self, trainer: Trainer) -> None:
        for text in trainer.take_notes():
            self.note(text)

    def _statistics(self, trainer: Trainer, message: Message, context: Context) -> dict:
        """Running statistics: from the message, past the mods, or the model's first ones."""
        for source in (context.state, message.content):
            if record := records_in(source, ArrayRecord).get(messages.STATISTICS):
                # A server may send what this node's own task leaves with it.
                arrays = messages.unpack(record)
                return {name: a for name, a in arrays.items() if name in trainer.statistics_spec}
        return trainer.statistics()


def _take_parameters(message: Message, trainer: Trainer) -> tuple[str, bool, Arrays]:
    """Name of the record of the parameters, whether it is packed, and the parameters.

    They are in memory once: neither the model's last ones nor the message stay beside them. One
    that is not packed is left as it is, for the mods that it came by.
    """
    trainer.release_parameters()
    content = message.content
    name, record = messages.parameters_of(content)
    parameters = master_weights.cast(messages.unpack(record), trainer.spec)
    is_packed = messages.is_packed(record)
    if is_packed:  # several messages may share their content
        message.content = RecordDict({key: content[key] for key in content if key != name})
    return name, is_packed, parameters


def _run_config(context: Context) -> RunConfig:
    return tuple(sorted(context.run_config.items()))


_UNPICKLED: dict[str, _Client] = {}


def _same_client(token: str, source: TaskSource, private: str | None) -> _Client:
    """The client of this process that was unpickled with the token before, or a new one."""
    return _UNPICKLED.setdefault(token, _Client(source, token, private))


def identity_of(context: Context) -> dict[str, Any]:
    """A node's name, partition and tags, as its answer to the roll call has them."""
    partition, _ = partition_of(context)
    name = str(context.node_config.get("name") or f"node-{partition}")
    tags = str(context.node_config.get("tags", ""))
    return {"name": name, "partition-id": partition, "tags": tags}


def named_failure(reply: Message, question: Message, context: Context) -> Message:
    """A reply; for an error to the roll call, a reply with the node's name and the reason."""
    is_roll_call = question.metadata.message_type == messages.ROLL_CALL
    if not (is_roll_call and reply.has_error()) or "partition-id" not in context.node_config:
        return reply
    answer = {**identity_of(context), "failure": reply.error.reason or "no reason"}
    return Message(RecordDict({"node": ConfigRecord(answer)}), reply_to=question)


def partition_of(context: Context) -> tuple[int, int | None]:
    """The partition of a node, and the number of partitions if the node's configuration has it.

    Raises:
        ClientError: If the node has no partition, or one outside the partitions.
    """
    partition = context.node_config.get("partition-id")
    if partition is None:
        raise ClientError(
            "The node has no partition-id. A stock SuperNode gets one with "
            "--node-config 'partition-id=0 num-partitions=2'."
        )
    num_partitions = context.node_config.get("num-partitions")
    check_partition(int(partition), num_partitions)
    return int(partition), None if num_partitions is None else int(num_partitions)


def check_partition(partition: int, num_partitions: Any) -> None:
    """Raises :class:`ClientError` unless the partition is one of the partitions."""
    if partition < 0 or (num_partitions is not None and partition >= int(num_partitions)):
        last = "" if num_partitions is None else f" to {int(num_partitions) - 1}"
        raise ClientError(
            f"Node id {partition} is outside the partitions of the data, which are 0{last}. "
            "Choose another --node-id, or raise --num-partitions on every node."
        )


def _errors_as_replies(message: Message, context: Context, call_next: Any) -> Message:
    """Flower mod that replies with an exception's type and line, and logs its traceback on the
    node. The exception's text is in the reply only if the node's owner shares it."""
    try:
        return call_next(message, context)
    except Exception as error:
        reply = error_reply(message, error, bool(context.node_config.get(SHARE_ERRORS)))
        logging.getLogger("flwr").error("%s", reply.error.reason, exc_info=error)
        return named_failure(reply, message, context)
