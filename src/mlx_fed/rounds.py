"""The round loop, over any Flower strategy and any Flower grid.

Nothing here knows where the clients are or how the loop is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from . import aggregate, checks, exchange, messages, strategies, sums, weights
from .errors import RunError
from .history import History, Result
from .roster import Members, Roster, RosterGrid
from .settings import Settings
from .training import Trainer, derived
from .weights import Arrays

_MOST_SHOWN = 32
"""Nodes in a phase whose own metrics are recorded."""


def run(
    grid: Grid,
    strategy: Strategy,
    trainer: Trainer,
    settings: Settings,
    history: History,
    roster: Members | None = None,
) -> Result:
    """Trains for ``settings.num_rounds`` rounds.

    Args:
        grid (Grid): Takes messages to nodes and brings their replies.
        strategy (Strategy): Any of Flower's, or one's own.
        trainer (Trainer): The task with the initial model, which ends up with the final one.
        settings (Settings): How the run is led.
        history (History): Where it is recorded.
        roster (Members, optional): Who takes part. Default: who answers the roll call.

    Raises:
        RunError: If too few nodes come, no reply of a round counts, or the strategy fails. The
            model of the last whole round is saved.
        HistoryError: If the run's folder cannot be written.
    """
    return _Run(grid, strategy, trainer, settings, history, roster).run()


class _Model(NamedTuple):
    """The global model: a strategy's float32 masters, and running statistics."""

    masters: ArrayRecord
    statistics: Arrays


class _Run:
    """The state of a run that lives from round to round."""

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        trainer: Trainer,
        settings: Settings,
        history: History,
        roster: Members | None,
    ):
        self.grid, self.strategy, self.trainer = grid, strategy, trainer
        self.settings, self.history = settings, history
        self.model = _Model(aggregate.to_masters(trainer.parameters()), trainer.statistics())
        # The statistics that travel: none where each client keeps its own.
        self.averaged = trainer.statistics_spec if trainer.task.statistics == "average" else {}
        self.config = {**trainer.task.config, **settings.config, "seed": settings.seed}
        self.roster: Members = roster or Roster(
            grid,
            trainer.spec,
            trainer.statistics_spec,
            {**self.config, "prepare": True},
            history.notify,
            trainer.fingerprint,
        )
        self.members = RosterGrid(grid, self.roster)
        self.weighted_by = strategies.attribute(strategy, "weighted_by_key") or "num-examples"
        self.min_nodes = max(settings.min_nodes or 1, strategies.least_nodes(strategy))

    def run(self) -> Result:
        started = time.monotonic()
        self.history.write_settings(
            {
                **self.settings.for_the_record(),
                "config": self.config,
                "strategy": strategies.describe(self.strategy),
            }
        )
        try:
            for number in range(1, self.settings.num_rounds + 1):
                self.roster.wait_for(self.min_nodes, self.settings.wait)
                self.model = self._round(number)
        finally:
            path = self._save()
        self.history.notify("finished", model=path, seconds=time.monotonic() - started)
        return Result(
            self.trainer.parameters(),
            self.model.statistics,
            self.history.rounds,
            self.history.folder,
            path,
        )

    def _save(self) -> Path:
        """Writes the model of the last whole round."""
        slots = self.trainer.slots
        weights.put(slots.parameters, self._parameters(self.model))
        weights.put(slots.statistics, self.model.statistics)
        if save := self.trainer.task.save:
            return self.history.save_with(lambda folder: save(self.trainer.model, folder))
        return self.history.save_model(
            weights.get({**slots.parameters, **slots.statistics, **slots.frozen})
        )

    def _parameters(self, model: _Model) -> Arrays:
        return aggregate.masters_to_arrays(model.masters, self.trainer.spec)

    # -- one round -------------------------------------------------------------------------

    def _round(self, number: int) -> _Model:
        """The model after the round, which is whole once its record is written."""
        record: dict[str, Any] = {
            "round": number,
            "train": {},
            "evaluate": {},
            "seconds": {},
            "bytes": {"down": 0, "up": 0},
            "refused": [],
        }
        model = self._train(record)
        self._evaluate(model, record)
        self._evaluate_centrally(model, record)
        self.history.add_round(record)
        return model

    def _train(self, record: dict[str, Any]) -> _Model:
        outgoing = self._configure("train", self.model, record)
        if strategies.is_linear(self.strategy):
            return self._train_to_a_mean(outgoing, record)
        updates = self._updates(outgoing, record)
        with _timed(record, "aggregate"):
            for _, reply, update in updates:
                reply.content = update.for_strategy()
            replies = [reply for _, reply, _ in updates]
            masters, metrics = self._aggregate(
                record, lambda number: self.strategy.aggregate_train(number, replies)
            )
            statistics = self.model.statistics
            if self.averaged and updates:
                weighed = [(update.statistics, update.weight) for *_, update in updates]
                statistics = aggregate.mean_statistics(weighed)
        record["train"] = {**metrics, "nodes": [name for name, *_ in updates]}
        _record_each(record, "train", {name: update.metrics for name, _, update in updates})
        return _Model(masters, statistics)

    def _train_to_a_mean(self, outgoing: list[Message], record: dict[str, Any]) -> _Model:
        """A round of a strategy that needs no more than the mean, which we take."""
        names = [self._name(message) for message in outgoing]
        if exchange.can_sum(self.grid, outgoing):
            blocks = self._summed(outgoing, names, record)
        else:
            places = {name: place for place, name in enumerate(names)}
            updates = self._updates(outgoing, record)
            with _timed(record, "aggregate"):
                blocks = sums.blocks(
                    (
                        sums.Counted(places[name], update.weight, update.metrics),
                        update.parameters,
                        update.statistics,
                    )
                    for name, _, update in updates
                )
        with _timed(record, "aggregate"):
            mean = sums.mean(blocks)
            self._require(len(mean.counted), outgoing, record)
            if not mean.counted:
                return self.model
            content = mean.as_reply(self.model.masters, self.weighted_by)
            each = [RecordDict({"metrics": MetricRecord({**c.metrics})}) for c in mean.counted]
            masters, metrics = self._aggregate(
                record,
                lambda number: strategies.aggregate_mean(self.strategy, number, content, each),
            )
            statistics = self.model.statistics
            if self.averaged:
                statistics = mean.running_statistics(self.averaged)
        record["train"] = {**metrics, "nodes": [names[c.place] for c in mean.counted]}
        _record_each(record, "train", {names[c.place]: c.metrics for c in mean.counted})
        return _Model(masters, statistics)

    def _summed(
        self, outgoing: list[Message], names: list[str], record: dict[str, Any]
    ) -> list[sums.Block]:
        """Sums that a grid on this machine makes where its clients train."""
        self._begin("train", outgoing, record)
        blocks: list[sums.Block] = []
        sizes = [messages.count_bytes(message.content) for message in outgoing]
        with _timed(record, "train"):
            for outcome in exchange.sum_updates(self.grid, outgoing, self.weighted_by):
                blocks += outcome.blocks
                for place, reason in outcome.failed:
                    self._refuse("train", names[place], reason, record)
                came = [counted.place for block in outcome.blocks for counted in block.counted]
                # An update has the arrays of the message, in as many bytes.
                record["bytes"]["up"] += sum(sizes[place] for place in came)
                self.history.notify("replies", count=len(came) + len(outcome.failed))
        record["bytes"]["down"] += sum(sizes)
        return blocks

    def _updates(
        self, outgoing: list[Message], record: dict[str, Any]
    ) -> list[tuple[str, Message, checks.Reply]]:
        """Each node's name, its reply, and what is in it; only of replies that count."""
        updates: dict[str, checks.Reply] = {}
        accepted: list[tuple[str, Message]] = []
        replies = self._exchange("train", outgoing, record)
        with _timed(record, "aggregate"):
            for name, reply in replies:
                with self._refusing("train", name, record):
                    updates[name] = checks.check_update(
                        reply, self.trainer.spec, self.averaged, self.weighted_by
                    )
                    accepted.append((name, reply))
            accepted = self._same_names("train", accepted, record)
        self._require(len(accepted), outgoing, record)
        return [(name, reply, updates[name]) for name, reply in accepted]

    def _require(self, count: int, outgoing: list[Message], record: dict[str, Any]) -> None:
        if outgoing and not count:
            raise RunError(
                f"Round {record['round']}: none of {len(outgoing)} nodes gave a train reply that "
                "counts. The reasons stand above; the model of the round before is kept."
            )

    def _aggregate(
        self, record: dict[str, Any], hook: Callable[[int], tuple]
    ) -> tuple[ArrayRecord, dict[str, Any]]:
        """The strategy's new masters, or the old ones if it gives none, and its metrics."""
        with self._hook("aggregate_train", record["round"]):
            masters, metrics = hook(record["round"])
            if masters is None:
                return self.model.masters, {**(metrics or {})}
            return aggregate.from_strategy(masters, self.trainer.spec), {**(metrics or {})}

    def _evaluate(self, model: _Model, record: dict[str, Any]) -> None:
        number = record["round"]
        outgoing = self._configure("evaluate", model, record)
        accepted: list[tuple[str, Message]] = []
        each: dict[str, MetricRecord] = {}
        for name, reply in self._exchange("evaluate", outgoing, record):
            with self._refusing("evaluate", name, record):
                each[name] = checks.check_metrics(reply, self.weighted_by)
                accepted.append((name, reply))
        accepted = self._same_names("evaluate", accepted, record)
        metrics: MetricRecord | None = None
        if accepted:
            with self._hook("aggregate_evaluate", number):
                metrics = self.strategy.aggregate_evaluate(number, [r for _, r in accepted])
        if metrics:
            metrics = MetricRecord({**metrics, **derived(self.trainer.task, metrics)})
        record["evaluate"] = {**(metrics or {}), "nodes": [name for name, _ in accepted]}
        _record_each(record, "evaluate", {name: each[name] for name, _ in accepted})

    def _evaluate_centrally(self, model: _Model, record: dict[str, Any]) -> None:
        """What the server itself sees of the model."""
        test, evaluate = self.settings.test, self.settings.evaluate_fn
        if test is None and evaluate is None:
            return
        with _timed(record, "central"):
            parameters = self._parameters(model)
            metrics: dict[str, Any] = {}
            if test is not None:
                metrics |= self.trainer.evaluate(parameters, model.statistics, test)
                del metrics["num-examples"]
            if evaluate is not None:
                metrics |= evaluate(record["round"], parameters, model.statistics) or {}
        record["central"] = metrics

    def _configure(self, phase: str, model: _Model, record: dict[str, Any]) -> list[Message]:
        """The strategy's messages, as they travel."""
        number = record["round"]
        configure = getattr(self.strategy, f"configure_{phase}")
        config = {**self.config, "server-round": number}
        if phase == "train" and (loss := strategies.attribute(self.strategy, "train_loss_key")):
            config["train-loss-key"] = loss
        statistics = model.statistics if self.averaged else {}
        with self._hook(f"configure_{phase}", number):
            outgoing = list(configure(number, model.masters, ConfigRecord(config), self.members))
            for message in outgoing:
                if (node_id := message.metadata.dst_node_id) not in self.roster.nodes:
                    raise RunError(f"a message to node {node_id}, which has no part in the run")
            exchange.pack(outgoing, self.trainer.spec, statistics, config)
        return sorted(outgoing, key=self._place)

    def _place(self, message: Message) -> tuple[int, str]:
        """Orders nodes as the roster does."""
        node = self.roster.nodes[message.metadata.dst_node_id]
        return node.partition, node.name

    def _name(self, message: Message) -> str:
        return self.roster.nodes[message.metadata.dst_node_id].name

    def _begin(self, phase: str, outgoing: list[Message], record: dict[str, Any]) -> None:
        fields = {"phase": phase, "round": record["round"], "of": self.settings.num_rounds}
        self.history.notify("phase", **fields, nodes=len(outgoing))

    def _exchange(
        self, phase: str, outgoing: list[Message], record: dict[str, Any]
    ) -> list[tuple[str, Message]]:
        """The replies, by name and in the messages' order; who has none is left out."""
        self._begin(phase, outgoing, record)
        with _timed(record, phase):
            replies, missing, down, up = exchange.exchange(
                self.grid,
                outgoing,
                {message.metadata.dst_node_id: self._name(message) for message in outgoing},
                self.settings.round_timeout,
                lambda name: self.history.notify("reply", node=name, phase=phase),
            )
        record["bytes"]["down"] += down
        record["bytes"]["up"] += up
        for name, reason in missing.items():
            self._refuse(phase, name, reason, record)
        return replies

    def _same_names(
        self, phase: str, accepted: list[tuple[str, Message]], record: dict[str, Any]
    ) -> list[tuple[str, Message]]:
        """Those with the names of most: FedAvg and its kin would end the run over others."""
        if not strategies.wants_same_names(self.strategy):
            return accepted
        odd = checks.odd_names({name: checks.names_in(r.content) for name, r in accepted})
        for name, reason in odd.items():
            self._refuse(phase, name, reason, record)
        return [(name, reply) for name, reply in accepted if name not in odd]

    @contextmanager
    def _refusing(self, phase: str, name: str, record: dict[str, Any]) -> Iterator[None]:
        """Goes on without a reply that is refused."""
        try:
            yield
        except checks.Refused as error:
            self._refuse(phase, name, str(error), record)

    def _refuse(self, phase: str, name: str, reason: str, record: dict[str, Any]) -> None:
        record["refused"].append({"node": name, "phase": phase, "reason": reason})
        self.history.notify("failed", node=name, phase=phase, reason=reason)

    @contextmanager
    def _hook(self, hook: str, number: int) -> Iterator[None]:
        """What the strategy draws is decided by the seed; what it raises says where."""
        try:
            with strategies.seeded(self.strategy, self.settings.seed, number, hook):
                yield
        except Exception as error:
            raise RunError(
                f"Round {number}: {type(self.strategy).__name__}.{hook} failed: "
                f"{type(error).__name__}: {error}"
            ) from error


def _record_each(
    record: dict[str, Any], phase: str, metrics: Mapping[str, Mapping[str, Any]]
) -> None:
    """Each node's own metrics, unless there are so many that they would be most of the record."""
    if len(metrics) <= _MOST_SHOWN:
        own = {node: {**figures} for node, figures in metrics.items()}
        record.setdefault("each", {})[phase] = own


@contextmanager
def _timed(record: dict[str, Any], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    before = record["seconds"].get(name, 0.0)
    record["seconds"][name] = round(before + time.monotonic() - start, 6)
