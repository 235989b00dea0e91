"""The round loop, over any Flower strategy and any Flower grid.

Nothing here knows where the clients are or how the loop is watched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from . import aggregate, checks, exchange, strategies, weights
from .errors import RunError
from .history import History, Result
from .roster import Roster, RosterGrid
from .settings import Settings
from .training import Trainer
from .weights import Arrays


def run(
    grid: Grid, strategy: Strategy, trainer: Trainer, settings: Settings, history: History
) -> Result:
    """Trains for ``settings.num_rounds`` rounds.

    Args:
        grid (Grid): Takes messages to nodes and brings their replies.
        strategy (Strategy): Any of Flower's, or one's own.
        trainer (Trainer): The task with the initial model, which ends up with the final one.
        settings (Settings): How the run is led.
        history (History): Where it is recorded.

    Raises:
        RunError: If too few nodes come, no reply of a round counts, or the strategy fails. The
            model of the last whole round is saved.
        HistoryError: If the run's folder cannot be written.
    """
    return _Run(grid, strategy, trainer, settings, history).run()


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
    ):
        self.grid, self.strategy, self.trainer = grid, strategy, trainer
        self.settings, self.history = settings, history
        self.model = _Model(aggregate.to_masters(trainer.parameters()), trainer.statistics())
        # The statistics that travel: none where each client keeps its own.
        self.averaged = trainer.statistics_spec if trainer.task.statistics == "average" else {}
        self.config = {**trainer.task.config, **settings.config, "seed": settings.seed}
        self.roster = Roster(
            grid,
            trainer.spec,
            trainer.statistics_spec,
            {**self.config, "prepare": True},
            history.notify,
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
        if self.settings.evaluate_fn:
            with _timed(record, "central"):
                central = self.settings.evaluate_fn(
                    number, self._parameters(model), model.statistics
                )
            record["central"] = dict(central or {})
        self.history.add_round(record)
        return model

    def _train(self, record: dict[str, Any]) -> _Model:
        number = record["round"]
        masters, statistics = self.model
        outgoing = self._configure("train", self.model, record)
        replies = self._exchange("train", outgoing, record)
        with _timed(record, "aggregate"):
            accepted: list[tuple[str, Message]] = []
            updates: dict[str, checks.Reply] = {}
            for name, reply in replies:
                with self._refusing("train", name, record):
                    update = checks.check_update(
                        reply, self.trainer.spec, self.averaged, self.weighted_by
                    )
                    reply.content = update.for_strategy()
                    accepted.append((name, reply))
                    updates[name] = update
            accepted = self._same_names("train", accepted, record)
            if outgoing and not accepted:
                raise RunError(
                    f"Round {number}: none of {len(outgoing)} nodes gave a train reply that "
                    "counts. The reasons stand above; the model of the round before is kept."
                )
            with self._hook("aggregate_train", number):
                result, metrics = self.strategy.aggregate_train(number, [r for _, r in accepted])
                if result is not None:
                    masters = aggregate.from_strategy(result, self.trainer.spec)
            if self.averaged and accepted:
                counted = [updates[name] for name, _ in accepted]
                statistics = aggregate.mean_statistics((u.statistics, u.weight) for u in counted)
        record["train"] = {**(metrics or {}), "nodes": [name for name, _ in accepted]}
        return _Model(masters, statistics)

    def _evaluate(self, model: _Model, record: dict[str, Any]) -> None:
        number = record["round"]
        outgoing = self._configure("evaluate", model, record)
        accepted: list[tuple[str, Message]] = []
        for name, reply in self._exchange("evaluate", outgoing, record):
            with self._refusing("evaluate", name, record):
                checks.check_metrics(reply, self.weighted_by)
                accepted.append((name, reply))
        accepted = self._same_names("evaluate", accepted, record)
        metrics: MetricRecord | None = None
        if accepted:
            with self._hook("aggregate_evaluate", number):
                metrics = self.strategy.aggregate_evaluate(number, [r for _, r in accepted])
        record["evaluate"] = {**(metrics or {}), "nodes": [name for name, _ in accepted]}

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
        return outgoing

    def _exchange(
        self, phase: str, outgoing: list[Message], record: dict[str, Any]
    ) -> list[tuple[str, Message]]:
        """The replies, by name and in the roster's order; who has none is left out."""
        fields = {"phase": phase, "round": record["round"], "of": self.settings.num_rounds}
        self.history.notify("phase", **fields, nodes=len(outgoing))
        with _timed(record, phase):
            replies, missing, down, up = exchange.exchange(
                self.grid,
                outgoing,
                {node.id: node.name for node in self.roster.nodes.values()},
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
        odd = checks.odd_names(accepted)
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


@contextmanager
def _timed(record: dict[str, Any], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    record["seconds"][name] = round(time.monotonic() - start, 6)
