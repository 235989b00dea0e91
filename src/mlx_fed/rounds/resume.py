"""Resumption of a run from its last whole checkpoint, if it is still the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from flwr.serverapp.strategy import Strategy

from ..arrays import frozen, named_arrays, weights
from ..arrays.flower_records import copy_record
from ..events import Notice
from ..runs.previous import Previous
from ..runs.round_record import RoundRecord
from ..task_settings import kebab_case
from . import strategies, strategy_state
from .changes import names_of
from .checkpoint import Best, Checkpoint, CheckpointError
from .phase import Model, Run
from .strategy_restore import restore

_FROZEN = "frozen"
_SHOWN = 5
"""Differences that are named."""


class RunState(NamedTuple):
    """State of a run after a round: its number, the model, and the best round so far."""

    round: int
    model: Model
    best: Best | None

    def after(self, record: RoundRecord, model: Model) -> RunState:
        """The state after one more round."""
        number, best = record.round, self.best
        central = record.central or {}
        loss, undefined_share = central.get("loss"), 0.0
        if "loss" not in central:
            loss = record.evaluate.get("loss")
            num_undefined = record.undefined.get("evaluate", {}).get("loss", 0)
            undefined_share = num_undefined / max(1, len(record.evaluate.get("nodes", ())))
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            new = Best(number, float(loss), undefined_share)
            if best is None or (undefined_share, new.loss) < (best.undefined, best.loss):
                best = new
        return RunState(number, model, best)

    def checkpoint(self, strategy: Strategy, identity: dict[str, Any]) -> Checkpoint:
        """The run as it is now, in arrays that nothing changes any more."""
        mx.eval(self.model.statistics)  # it is written by another thread
        return Checkpoint(
            self.round,
            copy_record(self.model.masters),
            {**self.model.statistics},
            strategy_state.snapshot(strategy),
            self.best,
            identity,
        )


def resume_state(run: Run, identity: dict[str, Any], previous: Previous) -> RunState | None:
    """Resumes a run from its last whole checkpoint, with the strategy's state.

    Args:
        run (Run): The run, set up as at its start.
        identity (dict): From :func:`identity_of`.
        previous (Previous): The settings that it was last started with.

    Returns:
        RunState: None if no round was finished.

    Raises:
        CheckpointError: If the run is not the same, or no checkpoint is whole.
        StateError: If the strategy does not fit its state.
        HistoryError: If the run's folder cannot be written.
    """

    def damaged(path: Path, why: str) -> None:
        run.history.notify(Notice(f"checkpoint {path} is damaged, {why}: trying another"))

    checkpoints = run.checkpoints
    checkpoint = checkpoints.last(damaged, run.spool)
    if checkpoint is None:
        if paths := checkpoints.paths():
            raise CheckpointError(
                f"None of the {len(paths)} checkpoints in {checkpoints.folder} is whole: bring "
                "one back from a copy, or start a new run."
            )
        if initial := previous.initial:
            raise CheckpointError(
                f"The run in {run.history.folder} has no complete round yet, and its initial "
                f"weights ({initial}) are not in its folder: start a new run with them."
            )
        run.history.go_on_after(0)
        return None
    # Older versions kept no such things.
    before = {**_simulated(run), _FROZEN: identity[_FROZEN], **checkpoint.identity}
    if isinstance(before.get("setting"), dict):  # older versions kept how they were spelled
        before["setting"] = kebab_case(before["setting"])
    changed = names_of(previous.changes) | kebab_case(run.settings.change or {}).keys()
    _require_same(_without(before, changed), _without(identity, changed), run.history.folder)
    restore(run.strategy, checkpoint.strategy)
    run.history.go_on_after(checkpoint.round)
    model = Model(checkpoint.masters, checkpoint.statistics)
    return RunState(checkpoint.round, model, checkpoint.best)


def identity_of(run: Run) -> dict[str, Any]:
    """Identity of a run: all that must not change when it is resumed, in JSON's types."""
    task = run.trainer.task
    fields = (
        *("batch_size", "local_epochs", "local_steps", "eval_batch_size", "max_grad_norm"),
        *("gradient_accumulation", "statistics", "keep_optimizer", "weight_unit"),
    )
    personal = run.trainer.slots.parameters.keys() - run.trainer.spec.keys()
    free = ("num-rounds", "seed", "run-id")
    identity = {
        "seed": run.settings.seed,
        "strategy": _without_least_nodes(strategies.describe(run.strategy)),
        "setting": {key: value for key, value in run.config.items() if key not in free},
        "task": {name: getattr(task, name) for name in fields},
        "fingerprint": run.trainer.fingerprint,
        "model": {
            kind: {
                name: f"{dtype} {shape}{', personal' if name in personal else ''}"
                for name, (shape, dtype) in named_arrays.spec(weights.get(slots)).items()
            }
            for kind, slots in run.trainer.slots.kinds().items()
        },
        _FROZEN: run.trainer.frozen,
        **_simulated(run),
    }
    return json.loads(json.dumps(identity, default=str))


def _without(identity: dict[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """An identity without the settings that were changed on purpose."""
    settings = {k: v for k, v in identity.get("setting", {}).items() if k not in changed}
    return {**identity, "setting": settings}


def _simulated(run: Run) -> dict[str, Any]:
    """Number of clients of a simulation and their faults; empty for a federation, whose nodes come
    and go."""
    description = run.history.about
    return {key: description[key] for key in ("clients", "faults") if key in description}


def _without_least_nodes(description: dict[str, Any]) -> dict[str, Any]:
    result = {k: v for k, v in description.items() if k not in strategies.LEAST_NODES}
    if "strategy" in result:
        result["strategy"] = _without_least_nodes(result["strategy"])
    return result


def _require_same(before: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    before, current = dict(before), dict(current)
    difference = frozen.difference(before.pop(_FROZEN), current.pop(_FROZEN))
    differences = list(_differences("", before, current))
    if difference is not None and not difference.is_rounding:
        differences.append(str(difference))
    if differences:
        text = "; ".join(differences[:_SHOWN])
        rest_text = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"The run in {folder} cannot go on, it is not the same any more: {text}{rest_text}. "
            "Resume it with what it was started with, or start a new run."
        )


def _differences(name: str, before: Any, current: Any) -> Iterator[str]:
    """Each value that changed, by its name."""
    if isinstance(before, dict) and isinstance(current, dict):
        for key in [*before, *(key for key in current if key not in before)]:
            yield from _differences(f"{name} {key}".strip(), before.get(key), current.get(key))
    elif before != current:
        yield f"{name} was {_text_of(before)} and is {_text_of(current)}"


def _text_of(value: Any) -> str:
    return "absent" if value is None else str(value)
