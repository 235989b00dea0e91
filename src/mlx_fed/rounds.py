"""The round loop, over any Flower strategy and any Flower grid.

Nothing here knows where the clients are or how the loop is watched.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from . import aggregate, checks, exchange, messages, randomness, weights
from .errors import FedError
from .history import History
from .roster import Roster, RosterGrid
from .training import Trainer
from .weights import Arrays

EvaluateFn = Callable[[int, Arrays, Arrays], Mapping[str, float] | None]


class RunError(FedError):
    """A run that could not go on. What it has reached is kept in its folder."""


@dataclass
class Settings:
    """How a run is led.

    Args:
        num_rounds (int): Rounds to train.
        seed (int): Decides initial weights, sampling, shuffling and dropout.
        config (dict): Sent to clients with every message, over the task's own settings.
        min_nodes (int, optional): Nodes to wait for before each round; at least what the
            strategy itself asks for.
        wait (float): Seconds to wait for them. Default: ``600``.
        round_timeout (float): Seconds a phase may take; later replies are dropped.
            Default: ``3600``.
        evaluate_fn (callable, optional): ``evaluate_fn(round, parameters, statistics)`` returns
            metrics of the global model on data of the server's own.
    """

    num_rounds: int = 3
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    min_nodes: int | None = None
    wait: float = 600.0
    round_timeout: float = 3600.0
    evaluate_fn: EvaluateFn | None = None


@dataclass
class Result:
    """What a run ends with.

    Attributes:
        parameters (dict): The global model's parameters, by name.
        statistics (dict): Its running statistics.
        rounds (list): One record a round, as in ``history.jsonl``.
        folder (Path): The run's folder.
        model (Path): The whole model as safetensors.
    """

    parameters: Arrays
    statistics: Arrays
    rounds: list[dict[str, Any]]
    folder: Path
    model: Path


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
    """
    return _Run(grid, strategy, trainer, settings, history).run()


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
        self.masters = aggregate.to_masters(trainer.parameters())
        self.statistics = trainer.statistics()
        self.config = {**trainer.task.config, **settings.config, "seed": settings.seed}
        self.roster = Roster(
            grid,
            trainer.spec,
            trainer.statistics_spec,
            {**self.config, "prepare": True},
            history.notify,
        )
        self.members = RosterGrid(grid, self.roster)
        self.weighted_by = _attribute(strategy, "weighted_by_key") or "num-examples"
        self.loss_key = _attribute(strategy, "train_loss_key")
        self.min_nodes = max(settings.min_nodes or 1, _least_nodes(strategy))

    def run(self) -> Result:
        started = time.monotonic()
        try:
            for number in range(1, self.settings.num_rounds + 1):
                self._wait_for_nodes()
                self._round(number)
        finally:
            model = self._save()
        seconds = time.monotonic() - started
        self.history.notify("finished", model=model, seconds=seconds)
        return Result(
            self.trainer.parameters(),
            self.statistics,
            self.history.rounds,
            self.history.folder,
            model,
        )

    def _save(self) -> Path:
        arrays = aggregate.masters_to_arrays(self.masters, self.trainer.spec)
        weights.put(self.trainer.slots.parameters, arrays)
        weights.put(self.trainer.slots.statistics, self.statistics)
        slots = self.trainer.slots
        return self.history.save_model(
            weights.get({**slots.parameters, **slots.statistics, **slots.frozen})
        )

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + self.settings.wait
        told = None
        while True:
            self.roster.update()
            present = len(self.roster.nodes)
            late = time.monotonic() > deadline
            if present >= self.min_nodes:
                if told is None or late or not self.roster.is_waiting():
                    return
            elif late:
                raise RunError(
                    f"{present} of {self.min_nodes} nodes came within "
                    f"{self.settings.wait:.0f} seconds{_left_out(self.roster.reasons)}. "
                    "Start more nodes, raise --wait, or ask for fewer."
                )
            if present != told:
                told = present
                self.history.notify("waiting", nodes=present, needed=self.min_nodes)
            exchange.pause(self.grid)

    # -- one round -------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        record: dict[str, Any] = {"round": number}
        seconds: dict[str, float] = {}
        traffic = {"down": 0, "up": 0}
        refused: list[dict[str, str]] = []
        record["train"] = self._train(number, seconds, traffic, refused)
        record["evaluate"] = self._evaluate(number, seconds, traffic, refused)
        if self.settings.evaluate_fn:
            with _timed(seconds, "central"):
                arrays = aggregate.masters_to_arrays(self.masters, self.trainer.spec)
                central = self.settings.evaluate_fn(number, arrays, self.statistics)
            record["central"] = dict(central) if central else {}
        record |= {"seconds": seconds, "bytes": traffic, "refused": refused}
        self.history.add_round(record)

    def _train(self, number: int, seconds: dict, traffic: dict, refused: list) -> dict[str, Any]:
        outgoing = self._configure("train", number)
        with _timed(seconds, "train"):
            replies = self._exchange("train", number, outgoing, traffic, refused)
        with _timed(seconds, "aggregate"):
            accepted, updates = [], {}
            for name, reply in replies:
                try:
                    update = checks.check_update(
                        reply, self.trainer.spec, self.trainer.statistics_spec, self.weighted_by
                    )
                except checks.Refused as error:
                    self._refuse("train", name, str(error), refused)
                    continue
                # The strategy gets exactly what it sent: one record of masters, in order.
                reply.content = RecordDict(
                    {
                        update.name: aggregate.to_masters(update.parameters),
                        "metrics": update.metrics,
                    }
                )
                accepted.append((name, reply))
                updates[name] = update
            accepted = self._same_names("train", accepted, refused)
            self._require(accepted, outgoing, "train", number)
            metrics = self._aggregate_train(number, [reply for _, reply in accepted])
            counted = [updates[name] for name, _ in accepted]
            if statistics := [(u.statistics, u.weight) for u in counted if u.statistics]:
                self.statistics = aggregate.mean_statistics(statistics)
        return {**metrics, "nodes": [name for name, _ in accepted]}

    def _aggregate_train(self, number: int, replies: list[Message]) -> dict[str, Any]:
        try:
            with self._seeded(number, "aggregate_train"):
                masters, metrics = self.strategy.aggregate_train(number, replies)
            if masters is not None:
                self.masters = aggregate.from_strategy(masters, self.trainer.spec)
        except Exception as error:
            raise RunError(
                f"Round {number}: {type(self.strategy).__name__}.aggregate_train failed on "
                f"{len(replies)} replies: {type(error).__name__}: {error}"
            ) from error
        return dict(metrics or {})

    def _evaluate(self, number: int, seconds: dict, traffic: dict, refused: list) -> dict[str, Any]:
        outgoing = self._configure("evaluate", number)
        with _timed(seconds, "evaluate"):
            replies = self._exchange("evaluate", number, outgoing, traffic, refused)
        accepted = []
        for name, reply in replies:
            try:
                checks.check_metrics(reply, self.weighted_by)
            except checks.Refused as error:
                self._refuse("evaluate", name, str(error), refused)
            else:
                accepted.append((name, reply))
        accepted = self._same_names("evaluate", accepted, refused)
        metrics: MetricRecord | None = None
        if accepted:
            with self._seeded(number, "aggregate_evaluate"):
                metrics = self.strategy.aggregate_evaluate(number, [r for _, r in accepted])
        return {**dict(metrics or {}), "nodes": [name for name, _ in accepted]}

    def _configure(self, phase: str, number: int) -> list[Message]:
        """The strategy's messages, with arrays and settings as they travel."""
        configure = getattr(self.strategy, f"configure_{phase}")
        config = {**self.config, "server-round": number}
        if phase == "train" and self.loss_key:
            config["train-loss-key"] = self.loss_key
        with self._seeded(number, f"configure_{phase}"):
            outgoing = list(configure(number, self.masters, ConfigRecord(config), self.members))
        packed: dict[int, ArrayRecord] = {}
        configs: dict[int, ConfigRecord] = {}
        statistics = None
        if self.statistics and self.trainer.task.statistics == "average":
            statistics = messages.pack(self.statistics)
        for message in outgoing:
            message.metadata.group_id = str(number)
            # Strategies put one content into all messages: each record is converted once, and
            # none is changed in place.
            content = dict(message.content)
            name, record = messages.parameters_of(message.content)
            if id(record) not in packed:
                arrays = aggregate.masters_to_arrays(record, self.trainer.spec)
                packed[id(record)] = messages.pack(arrays)
            content[name] = packed[id(record)]
            name, own = messages.config_of(message.content)
            if id(own) not in configs:
                configs[id(own)] = ConfigRecord({**config, **own})
            content[name] = configs[id(own)]
            if statistics is not None:
                content[messages.STATISTICS] = statistics
            message.content = RecordDict(content)
        return outgoing

    def _exchange(
        self, phase: str, number: int, outgoing: list[Message], traffic: dict, refused: list
    ) -> list[tuple[str, Message]]:
        """The replies, by name and in the roster's order; who has none is left out."""
        self.history.notify(
            "phase", phase=phase, round=number, of=self.settings.num_rounds, nodes=len(outgoing)
        )
        names = {node_id: node.name for node_id, node in self.roster.nodes.items()}
        replies, missing, down, up = exchange.exchange(
            self.grid,
            outgoing,
            names,
            self.settings.round_timeout,
            lambda name: self.history.notify("reply", node=name, phase=phase),
        )
        traffic["down"] += down
        traffic["up"] += up
        for name, reason in missing.items():
            self._refuse(phase, name, reason, refused)
        return replies

    def _same_names(self, phase: str, accepted: list, refused: list) -> list:
        """Refuses replies with other names than most: FedAvg and its kin would end the run."""
        if not accepted or not any(isinstance(s, FedAvg) for s in _inner(self.strategy)):
            return accepted
        ((usual, _),) = Counter(checks.names_in(reply) for _, reply in accepted).most_common(1)
        same = []
        for name, reply in accepted:
            try:
                checks.check_names(reply, usual)
            except checks.Refused as error:
                self._refuse(phase, name, str(error), refused)
            else:
                same.append((name, reply))
        return same

    def _refuse(self, phase: str, name: str, reason: str, refused: list) -> None:
        refused.append({"node": name, "phase": phase, "reason": reason})
        self.history.notify("failed", node=name, phase=phase, reason=reason)

    def _require(self, accepted: list, outgoing: list, phase: str, number: int) -> None:
        if outgoing and not accepted:
            raise RunError(
                f"Round {number}: none of {len(outgoing)} nodes gave a {phase} reply that counts. "
                "The reasons stand above; the model of the round before is kept."
            )

    @contextmanager
    def _seeded(self, number: int, hook: str) -> Iterator[None]:
        """Seeds the global random states that strategies draw from, and puts them back.

        Noise for privacy is drawn from NumPy's; nodes know the run's seed, so under a strategy
        for differential privacy it comes from the operating system instead.
        """
        states = random.getstate(), np.random.get_state()
        seed = randomness.derive(self.settings.seed, number, hook)
        random.seed(seed)
        private = _draws_private_noise(self.strategy)
        np.random.seed(
            np.frombuffer(secrets.token_bytes(64), np.uint32)
            if private
            else np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
        )
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _left_out(reasons: Mapping[str, str]) -> str:
    """The first reasons why nodes were left out, as the end of a sentence."""
    shown = [f"{name}: {why[:200]}" for name, why in islice(reasons.items(), 3)]
    if len(reasons) > len(shown):
        shown.append(f"and {len(reasons) - len(shown)} more")
    return f"; left out: {'; '.join(shown)}" if shown else ""


def _inner(strategy: Any) -> Iterator[Any]:
    """The strategy and those it wraps."""
    while strategy is not None:
        yield strategy
        strategy = getattr(strategy, "strategy", None)


def _attribute(strategy: Strategy, name: str) -> Any:
    return next((getattr(s, name) for s in _inner(strategy) if hasattr(s, name)), None)


def _least_nodes(strategy: Strategy) -> int:
    names = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
    return max(1, *(int(_attribute(strategy, name) or 1) for name in names))


def _draws_private_noise(strategy: Strategy) -> bool:
    return any(
        kind.__name__.startswith("DifferentialPrivacy")
        for layer in _inner(strategy)
        for kind in type(layer).__mro__
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 6)
