"""The round loop, over any Flower strategy and any Flower grid.

Nothing here knows where the clients are or how the loop is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..arrays import master_weights, named_arrays, weights
from ..arrays.spool import Spool
from ..errors import RunError, TooFewReplies
from ..events import Notice, RunFinished
from ..runs.history import History, Previous, Result, previous_of
from ..training.trainer import Trainer
from . import privacy, strategies, strategy_state
from .checkpoint import Checkpoints
from .evaluate_phase import evaluate, evaluate_centrally
from .exclusion import to_leave_out
from .phase import Model, Run
from .resume import Position, identity_of
from .resume import resume as taken_up
from .roster import Members, Roster
from .settings import Settings, require_one_model
from .stopping import reason_at_start, stopping_of
from .strategy_state import State, StateError
from .train_phase import train

__all__ = ["Result", "RunError", "run"]


def run(
    grid: Grid,
    strategy: Strategy,
    trainer: Trainer,
    settings: Settings,
    history: History,
    roster: Members | None = None,
    *,
    resume: bool = False,
) -> Result:
    """Trains for ``settings.num_rounds`` rounds, or until something ends the run early.

    Each is on disk, with all that the run needs to go on from there, before the one after the
    next begins.

    Args:
        grid (Grid): Takes messages to nodes and brings their replies.
        strategy (Strategy): Any of Flower's, or one's own.
        trainer (Trainer): The task with the initial model, which ends up with the final one.
        settings (Settings): How the run is led.
        history (History): Where it is recorded.
        roster (Members, optional): Who takes part. Default: who answers the roll call.
        resume (bool): Go on with the run in the history's folder.

    Raises:
        SettingsError: If the server is to evaluate what never travels.
        PrivacyError: If running statistics would go around the strategy's differential privacy.
        RunError: If too few nodes come, no reply of a round counts, or the strategy fails. The
            model of the last whole round is saved.
        StateError: If the strategy holds what cannot be kept.
        CheckpointError: If the run to resume is not the same any more.
        HistoryError: If the run's folder cannot be written, or another process leads the run.
    """
    started = time.monotonic()
    previous = previous_of(history.folder) if resume else Previous()
    run_id = str(previous.config.get("run-id") or uuid4().hex)
    stopping = stopping_of(settings, strategy, previous)
    run = _set_up(grid, strategy, trainer, settings, history, roster, run_id)
    min_nodes = max(settings.min_nodes or 1, strategies.least_nodes(strategy))
    checkpoints = Checkpoints(history.folder, settings.keep)
    if private := strategies.name_of_private(strategy):
        privacy.require_covered(private, run.averaged)
        history.notify(Notice(privacy.note(private, trainer.task)))
    identity = identity_of(run)
    if settings.keep:
        strategy_state.snapshot(strategy)  # what cannot be kept is refused now, not after a round

    def again(number: int) -> None:
        """Before a round is repeated: the strategy as it was, and nodes that are there now."""
        state = before
        if state is None and settings.keep:
            checkpoints.wait()
            state = checkpoints.state_after(number - 1)
        if state is not None:
            strategy_state.restore(strategy, state, new=False)
        run.roster.wait_for(min_nodes, settings.wait)

    with history.held(), run.spool.open():
        position = (taken_up(run, checkpoints, identity) if resume else None) or Position(
            0,
            Model(master_weights.to_masters(trainer.parameters(), run.spool), trainer.statistics()),
            None,
        )
        trainer.release_parameters()
        first = position.round + 1
        stopping, stopped = reason_at_start(
            stopping, history.rounds, position.best, settings, previous
        )
        history.write_settings(
            {
                **settings.for_the_record(),
                **({"went_on_after": stopping.after} if stopping.after else {}),
                "config": run.config,
                "strategy": strategies.describe(strategy),
                "model": named_arrays.size(trainer.spec),
            }
        )
        try:
            for number in range(first, settings.num_rounds + 1):
                if stopped:
                    break
                run.roster.wait_for(min_nodes, settings.wait)
                # Before later rounds it is in a checkpoint, if there are any.
                before = _state(strategy) if number == first or not settings.keep else None
                position = _round(run, position, number, again)
                checkpoints.wait()
                if settings.keep:
                    checkpoints.save(position.checkpoint(strategy, identity), history.sync)
                stopped = stopping.reason(history.rounds, position.best)
        finally:
            path = _save(run, position.model)
            checkpoints.wait()
            best = _save_best(run, position, checkpoints)
        if stopped:
            history.write_end(stopped)
    seconds = time.monotonic() - started
    history.notify(RunFinished(path, seconds, stopped))
    return Result(
        trainer.parameters(),
        position.model.statistics,
        history.rounds,
        history.folder,
        path,
        best,
        stopped,
    )


def _set_up(
    grid: Grid,
    strategy: Strategy,
    trainer: Trainer,
    settings: Settings,
    history: History,
    roster: Members | None,
    run_id: str,
) -> Run:
    require_one_model(settings, trainer)
    # By its id nodes know a run again whose server was started again.
    own = {"seed": settings.seed, "run-id": run_id}
    config = {**trainer.task.config, **settings.config, **own}
    roster = roster or Roster(
        grid,
        trainer.spec,
        trainer.all_statistics_spec,
        {**config, "prepare": True},
        history.notify,
        trainer.fingerprint,
        trainer.frozen,
    )
    # A federation's grid puts there what nodes send.
    spool = getattr(grid, "spool", None) or Spool(history.folder / "waiting")
    return Run(grid, strategy, trainer, settings, history, roster, config, spool)


def _state(strategy: Strategy) -> State | None:
    """A strategy's state; none of one that holds what cannot be kept, as it may without
    checkpoints."""
    with suppress(StateError):
        return strategy_state.snapshot(strategy)
    return None


def _save(run: Run, model: Model, name: str = "model") -> Path:
    """Puts a model into the trainer and writes it: as the task says, or as NAME.safetensors."""
    _put(run, model)
    slots = run.trainer.slots
    if save := run.trainer.task.save:
        return run.history.save_with(lambda folder: save(run.trainer.model, folder), name)
    whole = {**slots.parameters, **slots.statistics, **slots.frozen}
    public = {key: slot for key, slot in whole.items() if not weights.is_private(key)}
    return run.history.save_model(weights.get(public), f"{name}.safetensors")


def _save_best(run: Run, position: Position, checkpoints: Checkpoints) -> Path | None:
    """Writes the model of the best round, beside that of the last."""
    checkpoint = checkpoints.best(position.best, run.spool) if position.best else None
    if checkpoint is None:
        return None
    path = _save(run, Model(checkpoint.masters, checkpoint.statistics), "best")
    _put(run, position.model)
    return path


def _put(run: Run, model: Model) -> None:
    slots = run.trainer.slots
    weights.put(slots.parameters, model.parameters(run.trainer.spec))
    weights.put(slots.statistics, model.statistics)


def _round(run: Run, position: Position, number: int, again: Callable[[int], None]) -> Position:
    """Where the run is after the round, which is whole once its record is written."""
    record: dict[str, Any] = {
        "round": number,
        "train": {},
        "evaluate": {},
        "seconds": {},
        "bytes": {"down": 0, "up": 0},
        "refused": [],
    }
    while True:
        try:
            model = train(run, position.model, record)
            break
        except TooFewReplies as error:
            repeats, most = record.get("repeats", 0), run.settings.max_repeats
            if repeats == most:
                raise
            _leave_out(run, record)
            record["repeats"] = repeats + 1
            text = f"{error} The round is repeated, for time {repeats + 1} of {most}."
            run.history.notify(Notice(text))
            again(number)
    evaluate(run, model, record)
    evaluate_centrally(run, model, record)
    # Not sooner: a strategy that asks for more nodes than are left would wait for them in a phase.
    _leave_out(run, record)
    run.history.add_round(record)
    return position.after(record, model)


def _leave_out(run: Run, record: dict[str, Any]) -> None:
    """Leaves out of what follows whose replies are refused time and again."""
    if run.roster.stays:  # thousands of clients may fail in each of hundreds of rounds
        return
    for node, why in to_leave_out([*run.history.rounds, record]).items():
        if run.roster.leave_out(node, why):
            record.setdefault("left_out", []).append(node)
