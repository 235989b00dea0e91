"""How a run is led."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import FedError
from .weights import Arrays

if TYPE_CHECKING:
    from .task import Config
    from .training import Trainer

EvaluateFn = Callable[[int, Arrays, Arrays], Mapping[str, float | str] | None]


_DEFAULT_ROUNDS = 3
_LEAST = {
    "num_rounds": 1,
    "min_nodes": 1,
    "wait": 0,
    "round_timeout": 0,
    "keep": 0,
    "min_replies": 1,
    "max_repeats": 0,
    "max_examples": 1,
    "max_update_norm": 1,
}


class SettingsError(FedError, ValueError):
    """Settings that a run cannot be led with."""


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
        min_replies (int): Training replies that have to count for a round to be whole. With fewer
            it is repeated. Default: ``1``.
        max_repeats (int): How often a round is repeated before the run stops, to be resumed when
            more nodes are well. Default: ``2``.
        max_examples (float, optional): Examples that a node may say it has trained or evaluated on:
            they weigh its reply. Default: 1,000 times the median of the others in the round, or
            100,000, where there are three replies or more; in a simulation any number.
        max_update_norm (float, optional): How many times the median of all updates' norms one of
            at least three may have; ``math.inf`` for no limit. Default: 100 times the median of
            the others', or as much as the norm of the model where that is more; in a simulation
            no limit.
        keep (int): Checkpoints to keep, beside the best; 0 writes none. Default: ``3``.
        test (tuple, optional): Held-out examples of the server's own, as ``Data.test``: the
            task's loss and metrics of the global model on them are recorded each round.
        evaluate_fn (callable, optional): ``evaluate_fn(round, parameters, statistics)`` returns
            other metrics of the global model, or text such as a sample of what it writes.
    """

    num_rounds: int = _DEFAULT_ROUNDS
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    min_nodes: int | None = None
    wait: float = 600.0
    round_timeout: float = 3600.0
    min_replies: int = 1
    max_repeats: int = 2
    max_examples: float | None = None
    max_update_norm: float | None = None
    keep: int = 3
    test: Sequence[Any] | None = None
    evaluate_fn: EvaluateFn | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # as NaN is not, either
                raise SettingsError(f"{name} is {least} or more, not {value}.")
        if self.test is not None:
            _check_arrays(self.test)

    def for_the_record(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {
            **vars(self),
            "test": None if self.test is None else len(self.test[0]),
            "evaluate_fn": self.evaluate_fn is not None,
        }


def decide_rounds(
    settings: Settings, task: Config, num_rounds: int | None = None, recorded: int | None = None
) -> None:
    """Settles how many rounds there are, for the server and in what is sent to clients.

    Args:
        settings (Settings): Gets the number, and its ``config`` as ``num-rounds``.
        task (dict): The task's own settings.
        num_rounds (int, optional): The argument, which stands over all else; ``num-rounds`` in
            ``settings.config`` comes next.
        recorded (int, optional): What a run that is resumed was last asked for, which stands
            over the task's.

    Raises:
        SettingsError: If it is not a whole number of 1 or more.
    """
    given = (num_rounds, settings.config.get("num-rounds"), recorded, task.get("num-rounds"))
    rounds = next((each for each in given if each is not None), _DEFAULT_ROUNDS)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise SettingsError(f"num_rounds is a whole number, 1 or more, not {rounds!r}.")
    settings.num_rounds = rounds
    settings.config = {**settings.config, "num-rounds": rounds}


def require_one_model(settings: Settings, trainer: Trainer) -> None:
    """Says where the server cannot evaluate: what clients keep to themselves never gets there.

    Raises:
        SettingsError: If there are test examples and clients keep a part of the model.
    """
    if settings.test is None:
        return
    if len(trainer.spec) < len(trainer.slots.parameters):
        kept = "parameters of its own (Task.personal)"
    elif trainer.task.statistics == "local" and trainer.statistics_spec:
        kept = 'running statistics of its own (Task.statistics="local")'
    else:
        return
    raise SettingsError(
        f"The server cannot evaluate on test: each client keeps {kept}, which never travel. "
        "Leave out test; clients evaluate on their own examples."
    )


def _check_arrays(test: Any) -> None:
    if not isinstance(test, (tuple, list)) or not test:
        kind = "a stream" if callable(test) else type(test).__name__
        raise SettingsError(
            f"test is a tuple of arrays that share their leading axis, not {kind}: "
            "test=(images, labels)."
        )
    sizes = [len(array) if getattr(array, "shape", ()) else None for array in test]
    if None in sizes or len(set(sizes)) != 1:
        raise SettingsError(f"test takes arrays of one length; these have {sizes}.")
