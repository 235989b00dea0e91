"""Early stopping: whether a run ends before its last round, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RunError, SettingsError
from ..runs.run_summary import is_lower_better
from ..settings_check import FINITE
from ..task_settings import nearest
from . import strategies

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..runs.previous import Previous
    from .checkpoint import Best
    from .settings import RunSettings

StopFn = Callable[[list[dict[str, Any]]], str | bool | None]

_TARGET = re.compile(r"(?P<name>[^<>=]+)(?P<sign>=|<=|>=)(?P<value>[^<>=]+)")


_SAMPLED_ROUNDS = 3
"""Rounds after which a sample of the nodes has had one with test examples, if there are any."""


class Target(NamedTuple):
    """A metric's value that ends a run: at least, or at most where less is better."""

    name: str
    value: float
    is_upper: bool

    def __str__(self) -> str:
        return f"{self.name} {'<=' if self.is_upper else '>='} {self.value:g}"

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether a round's metrics have it; not where they lack it or it is not finite."""
        metric = metrics.get(self.name, math.nan)
        if not math.isfinite(metric):
            return False
        return metric <= self.value if self.is_upper else metric >= self.value


def parse_target(target: str | Mapping[str, float] | None) -> list[Target]:
    """Targets as they are written: ``"accuracy=0.95"``, ``"ppl<=12"``, ``{"loss": 0.1}``.

    Raises:
        SettingsError: If it is none of these, or a value is not a finite number.
    """
    if not target:
        return []
    if isinstance(target, Mapping):
        return [_target(str(name), "=", value) for name, value in target.items()]
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        raise SettingsError(
            f"target is METRIC=VALUE, such as accuracy=0.95 or loss=0.1, or METRIC<=VALUE, "
            f"METRIC>=VALUE; not {target!r}."
        )
    value: Any = match["value"].strip()
    with suppress(ValueError):
        value = float(value)
    return [_target(match["name"].strip(), match["sign"], value)]


def _target(name: str, sign: str, value: Any) -> Target:
    FINITE.check("target", name, value)
    is_upper = sign == "<=" or (sign == "=" and is_lower_better(name))
    return Target(name, float(value), is_upper)


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a round's evaluation, the server's in place of the nodes'."""
    metrics = {**record.get("evaluate", {}), **record.get("central", {})}
    return {
        name: math.nan if value is None else value  # as a record that is read has it
        for name, value in metrics.items()
        if isinstance(value, (int, float, type(None))) and not name.startswith("num-")
    }


def _has_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a round has metrics, or an evaluation that failed."""
    failures = (failure.get("phase") for failure in record.get("refused", ()))
    return bool(metrics_of(record)) or "evaluate" in failures


def _are_reached(targets: Sequence[Target], metrics: Mapping[str, float]) -> bool:
    return all(target.is_reached(metrics) for target in targets)


class Stopping(NamedTuple):
    """Rules that end a run early.

    Attributes:
        patience (int): Rounds without a new lowest loss; 0 is no limit.
        targets (list): Metrics that are to be reached, all of them.
        stop (callable, optional): A function of the user's: see
            :class:`~mlx_fed.rounds.settings.RunSettings`.
        after (int): The round after which the run ended early and was given more rounds, 0 if it
            was not: patience counts from there, and what was reached then is reached no more.
        evaluation_deadline (int): The round by which an evaluation has to have given metrics;
            0 if that is unknown, as with a strategy that evaluates in some rounds.
        strategy_reason (callable, optional): Why the strategy wants no further round, such as a
            privacy budget that is spent.
    """

    patience: int
    targets: list[Target]
    stop: StopFn | None = None
    after: int = 0
    evaluation_deadline: int = 0
    strategy_reason: Callable[[], str | None] | None = None

    def reason(self, rounds: Sequence[dict[str, Any]], best: Best | None) -> str | None:
        """Reason why a run is over after these rounds, or None if it continues.

        Args:
            rounds (list): The records of all rounds so far.
            best (Best, optional): The round with the lowest loss, if any had one.

        Raises:
            RunError: If no round has a target's metric, or the user's function fails.
        """
        if not rounds:
            return None
        if not rounds[-1]["train"].get("nodes"):
            return "the strategy asked no node to train"
        if self.strategy_reason and (reason := self.strategy_reason()):
            return reason
        return self._reached(rounds) or self._out_of_patience(rounds, best) or self._asked(rounds)

    def _reached(self, rounds: Sequence[dict[str, Any]]) -> str | None:
        if not self.targets:
            return None
        metrics = metrics_of(rounds[-1])
        if len(rounds) >= self.evaluation_deadline > 0 and not any(map(_has_evaluation, rounds)):
            raise RunError(
                f"The target {self.targets[0].name} is judged by an evaluation, and no node has "
                f"test examples (Data.test), after {len(rounds)} rounds: give nodes such examples, "
                "or the server (test)."
            )
        is_partial = rounds[-1].get("central") == {}  # the user's own evaluation skips rounds
        for target in self.targets:
            if metrics and not is_partial and target.name not in metrics:
                suggestion = nearest(target.name, metrics)
                hint = (
                    f"Did you mean {suggestion}?"
                    if suggestion
                    else f"There are {', '.join(metrics)}."
                )
                raise RunError(f"The target {target.name} is no metric of the evaluation. {hint}")
        before = next((record for record in rounds if record["round"] == self.after), {})
        if not _are_reached(self.targets, metrics) or _are_reached(
            self.targets, metrics_of(before)
        ):
            return None
        values = (f"{name} is {metrics[name]:.4g}" for name, *_ in self.targets)
        return f"{', '.join(values)}, and the target was {', '.join(map(str, self.targets))}"

    def _out_of_patience(self, rounds: Sequence[dict[str, Any]], best: Best | None) -> str | None:
        num_rounds = rounds[-1]["round"] - max(best.round if best else 0, self.after)
        if not self.patience or num_rounds < self.patience:
            return None
        if best is None:
            return f"no round had a finite loss, and patience was {self.patience}"
        return (
            f"no loss was below {best.loss:.4g}, that of round {best.round}, for {num_rounds} "
            f"rounds, and patience was {self.patience}"
        )

    def _asked(self, rounds: Sequence[dict[str, Any]]) -> str | None:
        if self.stop is None:
            return None
        try:
            answer = self.stop(list(rounds))
        except Exception as error:
            raise RunError(
                f"Round {rounds[-1]['round']}: stop failed: {type(error).__name__}: {error}"
            ) from error
        if isinstance(answer, str):
            return answer or None
        return "stop returned True" if answer else None


def stopping_of(settings: RunSettings, strategy: Strategy, previous: Previous) -> Stopping:
    """Rules of early stopping, from a run's settings and those of the run that is resumed.

    Args:
        settings (RunSettings): The run's.
        strategy (Strategy): Its strategy.
        previous (Previous): What the run that is resumed had.

    Raises:
        SettingsError: If there is no evaluation to go by.
    """
    if settings.patience is None:
        settings.patience = previous.patience
    if settings.target is None:
        settings.target = previous.target
    name = "patience" if settings.patience else "target" if settings.target else None
    evaluates = strategies.attribute(strategy, "fraction_evaluate") != 0
    if name and not (evaluates or settings.test is not None or settings.evaluate_fn):
        raise SettingsError(
            f"{name} needs an evaluation after each round, and there is none: let nodes evaluate "
            "(fraction_evaluate is 0), or give the server test examples."
        )
    targets = parse_target(settings.target)
    has_server_evaluation = settings.test is not None or settings.evaluate_fn is not None
    deadline = 0 if has_server_evaluation else _evaluation_deadline(strategy)
    return Stopping(
        settings.patience or 0,
        targets,
        settings.stop,
        previous.went_on_after,
        deadline,
        strategies.attribute(strategy, "stop_reason"),
    )


def _evaluation_deadline(strategy: Strategy) -> int:
    """The round by which some node has evaluated, if any can: see :class:`Stopping`."""
    hooks = (type(layer).configure_evaluate for layer in strategies.layers(strategy))
    if not all(hook.__module__.startswith("flwr.serverapp.strategy.") for hook in hooks):
        return 0
    return 1 if strategies.attribute(strategy, "fraction_evaluate") == 1.0 else _SAMPLED_ROUNDS


def reason_at_start(
    stopping: Stopping,
    rounds: Sequence[dict[str, Any]],
    best: Best | None,
    settings: RunSettings,
    previous: Previous,
) -> tuple[Stopping, str | None]:
    """Rules of a resumed run, and the reason why it is over; None if it continues.

    It goes on with more rounds than it had, and with another patience or target that has not ended
    it yet.
    """
    reason = stopping.reason(rounds, best)
    rules = settings.patience, settings.target, settings.stop
    if rules == (previous.patience, previous.target, None):
        reason = reason or previous.stopped
    if reason is None or settings.num_rounds <= previous.num_rounds:
        return stopping, reason
    return stopping._replace(after=rounds[-1]["round"]), None
