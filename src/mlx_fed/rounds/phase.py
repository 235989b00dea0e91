"""One phase of a round: messages to nodes, their replies, refusals, and the phase's figures.

Training and federated evaluation share all of this; only what they do with replies differs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from ..arrays import master_weights
from ..arrays.named_arrays import Arrays, Spec
from ..arrays.spool import Spool
from ..errors import RunError, TooFewReplies
from ..events import PhaseProgress, PhaseStarted, RepliesArrived, ReplyRefused
from ..flower.error_replies import is_missing
from ..flower.one_run_grid import OneRunGrid
from ..runs import round_record
from ..runs.history import History
from ..runs.round_record import Refusal, RoundRecord
from ..tracebacks import is_exception, is_same_failure
from ..training.metrics import placeholder_metrics
from ..training.trainer import Trainer
from ..transforms.update_transform import UpdateTransform
from . import checks, exchange, messages, proportion, reply_names, strategies
from .checkpoint import Checkpoints
from .closing import Closing
from .roster import Participants, RosterGrid
from .settings import RunSettings


class Model(NamedTuple):
    """The global model: a strategy's float32 masters, and running statistics."""

    masters: ArrayRecord
    statistics: Arrays

    def parameters(self, spec: Spec) -> Arrays:
        """The parameters in the model's dtypes."""
        return master_weights.masters_to_arrays(self.masters, spec)


class Run(NamedTuple):
    """Parts of a run that are the same in all rounds.

    Attributes:
        grid (OneRunGrid): Sends messages to nodes and receives their replies.
        strategy (Strategy): The strategy.
        trainer (Trainer): The task with the server's model.
        settings (RunSettings): The run's settings.
        history (History): The run's records and listeners.
        roster (Participants): The nodes that participate.
        config (dict): Sent with each message.
        spool (Spool): Storage for large arrays.
        checkpoints (Checkpoints): The run's checkpoints.
        transform (UpdateTransform, optional): How clients encode their updates.
        closing (Closing): Decides when a phase stops waiting for replies.
    """

    grid: OneRunGrid
    strategy: Strategy
    trainer: Trainer
    settings: RunSettings
    history: History
    roster: Participants
    config: dict[str, Any]
    spool: Spool
    checkpoints: Checkpoints
    transform: UpdateTransform | None
    closing: Closing

    @property
    def min_nodes(self) -> int:
        """The number of nodes that a round needs."""
        return max(self.settings.min_nodes or 1, strategies.least_nodes(self.strategy))

    @property
    def averaged(self) -> Spec:
        """Spec of the running statistics that are averaged; empty if they are local."""
        return self.trainer.statistics_spec

    @property
    def weighted_by(self) -> str:
        """The metric that weighs an evaluation."""
        return strategies.attribute(self.strategy, "weighted_by_key") or "num-examples"

    @property
    def train_weighted_by(self) -> str:
        """The metric that weighs an update."""
        return strategies.train_weighted_by(self.strategy)


class Phase:
    """A phase of a round.

    Args:
        run (Run): The run.
        name (str): ``"train"``, ``"evaluate"`` or ``"central"``.
        record (RoundRecord): The round's record.

    Attributes:
        num_messages (int): Messages to nodes.
        num_replies (int): Replies with content or an error of the node's own.
    """

    def __init__(self, run: Run, name: str, record: RoundRecord):
        self.run, self.name, self.record = run, name, record
        self.run_id = 0
        self.number = record.round
        self.num_messages = self.num_replies = 0
        self.record_name = "arrays"
        self.not_finite: list[Refusal] = []
        self.progress: PhaseProgress

    def configure(self, model: Model) -> list[Message]:
        """The strategy's messages, as they travel and in the roster's order."""
        run = self.run
        # By its name a node's policy allows the strategy.
        strategy = {"strategy": type(run.strategy).__name__}
        config = {**strategy, **run.config, "server-round": self.number}
        if self.name == "train" and (loss := strategies.attribute(run.strategy, "train_loss_key")):
            config["train-loss-key"] = loss
        hook = f"configure_{self.name}"
        # A round that is repeated draws other nodes.
        repeat = self.record.repeats
        with self.hook(hook, f"{hook} {repeat}" if repeat else hook):
            outgoing: list[Message] = list(
                getattr(run.strategy, hook)(
                    self.number,
                    model.masters,
                    ConfigRecord(config),
                    RosterGrid(run.grid, run.roster),
                )
            )
            for message in outgoing:
                if (node_id := message.metadata.dst_node_id) not in run.roster.nodes:
                    raise RunError(f"a message to node {node_id}, which has no part in the run")
                if self.name == "train" and run.transform:
                    _, parameters = messages.parameters_of(message.content)
                    if parameters is not model.masters:
                        raise RunError(
                            "it sends other parameters than those that it gets, from which no "
                            "update can be decoded: leave out compress and Task.update_transforms"
                        )
            statistics = model.statistics if run.averaged else {}
            if outgoing:
                self.record_name, _ = messages.parameters_of(outgoing[0].content)
            exchange.pack(outgoing, run.trainer.spec, statistics, config)
        self.num_messages = len(outgoing)
        self.run_id = outgoing[0].metadata.run_id if outgoing else 0
        return sorted(outgoing, key=self._place)

    def _place(self, message: Message) -> tuple[int, str]:
        node = self.run.roster.nodes[message.metadata.dst_node_id]
        return node.partition, node.name

    def node_of(self, message: Message) -> str:
        """The name of the node that a message goes to."""
        return self.run.roster.nodes[message.metadata.dst_node_id].name

    def begin(self, outgoing: list[Message]) -> None:
        """Notifies listeners that the messages are sent."""
        history, of = self.run.history, self.run.settings.num_rounds
        self.progress = PhaseStarted(
            self.name, self.number, of, len(outgoing), 0, *history.so_far(of - self.number + 1)
        )
        history.notify(self.progress)

    def answered(self, count: int) -> None:
        """Notifies listeners of further answers, with an update or without."""
        num_answers = self.progress.answered + count
        self.progress = RepliesArrived(**{**self.progress.to_dict(), "answered": num_answers})
        self.run.history.notify(self.progress)

    def exchange(self, outgoing: list[Message]) -> Iterator[tuple[str, Message]]:
        """The replies in the roster's order, each as it comes; who has none is left out.

        The messages are taken out of the list as they are sent.
        """
        self._set_aside(outgoing)
        self.begin(outgoing)
        down = exchange.bytes_to_nodes(self.run.grid, outgoing)
        answers = exchange.exchange(
            self.run.grid,
            outgoing,
            {message.metadata.dst_node_id: self.node_of(message) for message in outgoing},
            self.run.closing,
            self.name,
            lambda node: self.answered(1),
            self.run.spool,
        )
        while True:
            with self.timed(self.name):
                node, answer = next(answers, ("", None))
            if answer is None:
                self.count_bytes(down(), 0)
                return
            if isinstance(answer, str):
                self.refuse(node, answer, missing=True)
                continue
            if is_missing(answer):
                with self.refusing(node, missing=True):
                    checks.check_answer(answer)
                continue
            self.num_replies += 1
            if answer.has_content():
                self.count_bytes(0, messages.count_bytes(answer.content))
            fits = False
            with self.refusing(node):
                checks.check_origin(answer, self.number, self.run_id)
                fits = True
            if fits:
                yield node, answer

    def _set_aside(self, outgoing: list[Message]) -> None:
        """Takes out the messages to nodes that are not asked for now."""
        closing = self.run.closing
        exchange.take_late_replies(self.run.grid, closing)
        node_ids = {self.node_of(message): message.metadata.dst_node_id for message in outgoing}
        reasons = closing.set_aside(self.name, node_ids)
        for node, reason in reasons.items():
            self.refuse(node, reason, missing=True)
        outgoing[:] = [message for message in outgoing if self.node_of(message) not in reasons]

    def refuse_odd_names(self, names: Mapping[str, reply_names.Names]) -> Collection[str]:
        """The nodes whose replies have things of other names or kinds than most: FedAvg and its
        kin would end the run over them."""
        if not strategies.wants_same_names(self.run.strategy):
            return ()
        training = self.name == "train"
        loss_key = strategies.attribute(self.run.strategy, "train_loss_key") if training else None
        odd_nodes = reply_names.odd_names(
            names,
            reply_names.names_of(
                [self.record_name, "metrics"] if training else ["metrics"],
                placeholder_metrics(self.run.trainer.task, self.name, loss_key),
            ),
        )
        for node, reason in odd_nodes.items():
            self.refuse(node, reason)
        return odd_nodes

    @property
    def max_examples(self) -> float:
        """The most that a reply may weigh by itself."""
        if self.name == "train" and (
            limit := strategies.attribute(self.run.strategy, "max_weight")
        ):
            return float(limit)
        return self.run.settings.max_examples or proportion.MAX_EXAMPLES

    def refuse_heavy(
        self, weights: Mapping[str, float], name: str | None = None
    ) -> Collection[str]:
        """Refuses replies that would weigh too much beside the others', unless ``max_examples`` is
        set, and returns their nodes.

        Args:
            weights (dict): Each reply's weight, by the name of its node.
            name (str, optional): What is weighed. Default: the metric that weighs a reply.
        """
        if self.run.roster.stays or self.run.settings.max_examples:
            return ()
        heavy = proportion.explain_weights(weights, name or self.run.train_weighted_by)
        for node, reason in heavy.items():
            self.refuse(node, reason)
        return heavy

    @contextmanager
    def refusing(self, node: str, missing: bool = False) -> Iterator[None]:
        """Context in which a refusal is recorded, and not raised."""
        try:
            yield
        except checks.NotFinite as error:
            self.not_finite.append(self.refuse(node, str(error)))
        except checks.Refused as error:
            self.refuse(node, str(error), missing)

    def refuse(
        self, node: str, reason: str, missing: bool = False, excused: bool = False
    ) -> Refusal:
        """Records why a node's reply does not count, and returns the entry.

        Args:
            node (str): The node's name.
            reason (str): Why its reply does not count.
            missing (bool): The node sent nothing.
            excused (bool): Do not count it against the node: see
                :mod:`~mlx_fed.rounds.exclusion`.
        """
        refusal = Refusal(node, self.name, reason, missing, excused)
        self.record.refused.append(refusal)
        self.run.history.notify(ReplyRefused(node, self.name, reason))
        return refusal

    def excuse_not_finite(self) -> None:
        """Excuses replies that are not finite if at least half of all are not: the cause is the
        model in the messages."""
        if 2 * len(self.not_finite) >= self.num_replies:
            for refusal in self.not_finite:
                refusal.excused = True

    def common_failure(self) -> str | None:
        """The exception with which every node failed, if it is of one type and line for all."""
        refusals = [refusal for refusal in self.record.refused if refusal.phase == self.name]
        if len(refusals) < self.num_messages or refusals[-1].missing:
            return None
        reason, *others = [refusal.reason for refusal in refusals[-self.num_messages :]]
        is_common = all(is_same_failure(reason, reason_of_node) for reason_of_node in others)
        return reason if is_common and is_exception(reason) else None

    def require_replies(self, count: int) -> None:
        """Requires that enough training replies count.

        Args:
            count (int): Replies that count.

        Raises:
            RunError: If all nodes failed with one exception, which a repeat would raise again.
            TooFewReplies: If fewer count than ``min_replies``, or none.
        """
        self.excuse_not_finite()
        if self.num_messages and not count and (reason := self.common_failure()):
            raise RunError(
                f"Round {self.number}: all {self.num_messages} nodes failed with the same error: "
                f"{reason}"
            )
        min_replies = min(self.run.settings.min_replies, self.num_messages)
        if count < min_replies or (self.num_messages and not count):
            some = f"{count} of {self.num_messages}" if count else f"none of {self.num_messages}"
            minimum = f", and {min_replies} are needed" if min_replies > 1 else ""
            raise TooFewReplies(
                f"Round {self.number}: {some} nodes gave a train reply that counts{minimum}. "
                f"{self._explain_refusals()} The model of the round before is kept."
            )

    def _explain_refusals(self) -> str:
        """First reason why replies of the last attempt do not count, and a hint."""
        refusals = [item for item in self.record.refused if item.phase == self.name]
        refusals = refusals[-self.num_messages :]
        if not refusals:
            return "No node says why."
        number = len(refusals) - 1
        more = f" (and {number} more)" if number else ""
        text = f"{refusals[0].node}: {refusals[0].reason}{more}."
        if any("not finite" in item.reason for item in refusals):
            text += " A smaller learning rate, or max-grad-norm, may help."
        return text

    def masters_from_strategy(self, masters: ArrayRecord | None, model: Model) -> ArrayRecord:
        """The strategy's new masters as float32 in the model's order; the old ones if it has
        none."""
        if masters is None:
            return model.masters
        return master_weights.from_strategy(masters, self.run.trainer.spec, self.run.spool)

    def record_each(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Records the metrics of each node, or their quantiles if there are many nodes."""
        if len(metrics) <= round_record.MANY:
            self.record.each[self.name] = {node: {**values} for node, values in metrics.items()}
        else:
            self.record.spread[self.name] = round_record.spread(metrics.values())

    def count_bytes(self, down: int, up: int) -> None:
        """Records the size of arrays that went to nodes and came from them."""
        self.record.bytes["down"] += down
        self.record.bytes["up"] += up

    @contextmanager
    def hook(self, name: str, drawn_by: str | None = None) -> Iterator[None]:
        """Context of a strategy's hook: seeded random numbers, exceptions with the round and the
        hook."""
        strategy, drawn_by = self.run.strategy, drawn_by or name
        try:
            with (
                strategies.collecting_only_new(),
                strategies.seeded(strategy, self.run.settings.seed, self.number, drawn_by),
            ):
                yield
        except Exception as error:
            raise RunError(
                f"Round {self.number}: {type(strategy).__name__}.{name} failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds that the context takes to those of a name."""
        seconds, start = self.record.seconds, time.monotonic()
        yield
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - start, 6)
