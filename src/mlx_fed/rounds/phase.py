"""One phase of a round: the strategy's messages to nodes, and their replies that count.

Training and evaluation go the same way here; what is made of the replies is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..arrays import master_weights
from ..arrays.named_arrays import Arrays, Spec
from ..arrays.spool import Spool
from ..errors import RunError
from ..events import PhaseProgress, PhaseStarted, RepliesArrived, ReplyRefused
from ..flower.error_replies import is_missing
from ..runs import round_record
from ..runs.history import History
from ..tracebacks import is_exception
from ..training.metrics import placeholder_metrics
from ..training.trainer import Trainer
from . import checks, exchange, messages, proportion, strategies
from .roster import Members, RosterGrid
from .settings import Settings


class Model(NamedTuple):
    """The global model: a strategy's float32 masters, and running statistics."""

    masters: ArrayRecord
    statistics: Arrays

    def parameters(self, spec: Spec) -> Arrays:
        """The parameters in the model's dtypes."""
        return master_weights.masters_to_arrays(self.masters, spec)


class Run(NamedTuple):
    """What a run is led with, the same in every round.

    ``config`` is sent with each message, and large arrays wait in ``spool``.
    """

    grid: Grid
    strategy: Strategy
    trainer: Trainer
    settings: Settings
    history: History
    roster: Members
    config: dict[str, Any]
    spool: Spool

    @property
    def averaged(self) -> Spec:
        """The running statistics that travel: none where each client keeps its own."""
        return self.trainer.statistics_spec

    @property
    def weighted_by(self) -> str:
        """The metric that weighs a reply."""
        return strategies.attribute(self.strategy, "weighted_by_key") or "num-examples"


class Phase:
    """A phase, ``"train"`` or ``"evaluate"``, of the round whose record it writes to."""

    def __init__(self, run: Run, name: str, record: dict[str, Any]):
        self.run, self.name, self.record = run, name, record
        self.run_id = 0
        self.number: int = record["round"]
        self.asked = self.came = 0
        self.record_name = "arrays"
        self.not_finite: list[dict[str, Any]] = []
        self.progress: PhaseProgress

    def configure(self, model: Model) -> list[Message]:
        """The strategy's messages, as they travel and in the roster's order."""
        run = self.run
        config = {**run.config, "server-round": self.number}
        if self.name == "train" and (loss := strategies.attribute(run.strategy, "train_loss_key")):
            config["train-loss-key"] = loss
        hook = f"configure_{self.name}"
        # A round that is repeated draws other nodes.
        repeat = self.record.get("repeats", 0)
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
            statistics = model.statistics if run.averaged else {}
            if outgoing:
                self.record_name, _ = messages.parameters_of(outgoing[0].content)
            exchange.pack(outgoing, run.trainer.spec, statistics, config)
        self.asked = len(outgoing)
        self.run_id = outgoing[0].metadata.run_id if outgoing else 0
        return sorted(outgoing, key=self._place)

    def _place(self, message: Message) -> tuple[int, str]:
        node = self.run.roster.nodes[message.metadata.dst_node_id]
        return node.partition, node.name

    def node_of(self, message: Message) -> str:
        """The name of the node that a message goes to."""
        return self.run.roster.nodes[message.metadata.dst_node_id].name

    def begin(self, outgoing: list[Message]) -> None:
        """Says that the messages are on their way."""
        history, of = self.run.history, self.run.settings.num_rounds
        self.progress = PhaseStarted(
            self.name, self.number, of, len(outgoing), 0, *history.so_far(of - self.number + 1)
        )
        history.notify(self.progress)

    def answered(self, count: int) -> None:
        """Says that so many more nodes have answered, with an update or without."""
        answered = self.progress.answered + count
        self.progress = RepliesArrived(**{**self.progress.to_dict(), "answered": answered})
        self.run.history.notify(self.progress)

    def exchange(self, outgoing: list[Message]) -> Iterator[tuple[str, Message]]:
        """The replies in the roster's order, each as it comes; who has none is left out.

        The messages are taken out of the list as they are sent.
        """
        self.begin(outgoing)
        down = exchange.bytes_to_nodes(self.run.grid, outgoing)
        answers = exchange.exchange(
            self.run.grid,
            outgoing,
            {message.metadata.dst_node_id: self.node_of(message) for message in outgoing},
            self.run.settings.round_timeout,
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
            self.came += 1
            if answer.has_content():
                self.count_bytes(0, messages.count_bytes(answer.content))
            fits = False
            with self.refusing(node):
                checks.check_origin(answer, self.number, self.run_id)
                fits = True
            if fits:
                yield node, answer

    def refuse_odd_names(self, names: Mapping[str, checks.Names]) -> Collection[str]:
        """The nodes whose replies have things of other names or kinds than most: FedAvg and its
        kin would end the run over them."""
        if not strategies.wants_same_names(self.run.strategy):
            return ()
        training = self.name == "train"
        loss_key = strategies.attribute(self.run.strategy, "train_loss_key") if training else None
        odd = checks.odd_names(
            names,
            checks.names_of(
                [self.record_name, "metrics"] if training else ["metrics"],
                placeholder_metrics(self.run.trainer.task, self.name, loss_key),
            ),
        )
        for node, reason in odd.items():
            self.refuse(node, reason)
        return odd

    @property
    def max_examples(self) -> float:
        """The most that a reply may weigh by itself."""
        return self.run.settings.max_examples or proportion.MAX_EXAMPLES

    def refuse_heavy(
        self, weights: Mapping[str, float], name: str | None = None
    ) -> Collection[str]:
        """The nodes whose replies would weigh too much beside the others', unless it was said how
        much is believed.

        Args:
            weights (dict): Each reply's weight, by the name of its node.
            name (str, optional): What is weighed. Default: the metric that weighs a reply.
        """
        if self.run.roster.stays or self.run.settings.max_examples:
            return ()
        heavy = proportion.explain_weights(weights, name or self.run.weighted_by)
        for node, reason in heavy.items():
            self.refuse(node, reason)
        return heavy

    @contextmanager
    def refusing(self, node: str, missing: bool = False) -> Iterator[None]:
        """Goes on without a reply that is refused."""
        try:
            yield
        except checks.NotFinite as error:
            self.not_finite.append(self.refuse(node, str(error)))
        except checks.Refused as error:
            self.refuse(node, str(error), missing)

    def refuse(
        self, node: str, reason: str, missing: bool = False, excused: bool = False
    ) -> dict[str, Any]:
        """Records why a node has no part in the phase, and gives the entry.

        Args:
            node (str): Its name.
            reason (str): Why.
            missing (bool): It sent nothing.
            excused (bool): That is not held against it: see :mod:`~mlx_fed.rounds.exclusion`.
        """
        entry: dict[str, Any] = {"node": node, "phase": self.name, "reason": reason}
        flags = {"missing": missing, "excused": excused}
        entry |= {flag: True for flag, is_set in flags.items() if is_set}
        self.record["refused"].append(entry)
        self.run.history.notify(ReplyRefused(node, self.name, reason))
        return entry

    def excuse_not_finite(self) -> None:
        """Holds it against no node that its reply is not finite, where that is so of half of them
        or more: it is the model which they were sent that fails."""
        if 2 * len(self.not_finite) >= self.came:
            for entry in self.not_finite:
                entry["excused"] = True

    def common_failure(self) -> str | None:
        """The exception that every node of the phase failed with, which a repeat would not mend."""
        refused = [each for each in self.record["refused"] if each["phase"] == self.name]
        reasons = {each["reason"] for each in refused[-self.asked :]}
        if len(reasons) != 1 or len(refused) < self.asked or refused[-1].get("missing"):
            return None
        (reason,) = reasons
        return reason if is_exception(reason) else None

    def record_each(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Records each node's own metrics, or their spread where there are many."""
        if len(metrics) <= round_record.MANY:
            own = {node: {**figures} for node, figures in metrics.items()}
            self.record.setdefault("each", {})[self.name] = own
        else:
            self.record.setdefault("spread", {})[self.name] = round_record.spread(metrics.values())

    def count_bytes(self, down: int, up: int) -> None:
        """Records the size of arrays that went to nodes and came from them."""
        self.record["bytes"]["down"] += down
        self.record["bytes"]["up"] += up

    @contextmanager
    def hook(self, name: str, drawn_by: str | None = None) -> Iterator[None]:
        """What the strategy draws is decided by the seed; what it raises says where."""
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

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Records how long it takes."""
        return timed(self.record, name)


@contextmanager
def timed(record: dict[str, Any], name: str) -> Iterator[None]:
    """Records how long it takes, in seconds; what other names time within it counts as theirs."""
    seconds = record["seconds"]

    def elsewhere() -> float:
        return sum(value for other, value in seconds.items() if other != name)

    start = time.monotonic() - elsewhere()
    yield
    took = time.monotonic() - elsewhere() - start
    seconds[name] = round(seconds.get(name, 0.0) + max(0.0, took), 6)
