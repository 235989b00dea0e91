"""The round loop, over any Flower strategy and any Flower grid.

The order within a round is in :func:`_round` and :func:`_train`: configure, exchange and check,
aggregate, evaluate, record.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..arrays import master_weights, named_arrays
from ..arrays.spool import Spool
from ..errors import RunError, TooFewReplies
from ..events import Notice, RunFinished
from ..flower.one_run_grid import OneRunGrid, one_run_grid
from ..runs.history import History
from ..runs.previous import Previous, previous_of
from ..runs.result import Result
from ..runs.round_record import RoundRecord
from ..system import versions
from ..training.trainer import Trainer
from ..transforms.run_transform import run_transform
from . import coverage, strategies, strategy_state
from .changes import record_changes
from .checked_updates import all_updates, mean_statistics, mean_update
from .checkpoint import Checkpoints
from .closing import QuorumClosing
from .evaluate_phase import evaluate, evaluate_centrally
from .exclusion import to_leave_out
from .model_files import save_best_model, save_model
from .node_selection import parse_selection
from .phase import Model, Phase, Run
from .resume import RunState, identity_of, resume_state
from .roster import Participants, Roster
from .settings import RunSettings, require_one_model
from .stopping import reason_at_start, stopping_of
from .strategy_restore import restore
from .strategy_state import State, StateError

__all__ = ["Result", "RunError", "run"]


def run(
    grid: Grid,
    strategy: Strategy,
    trainer: Trainer,
    settings: RunSettings,
    history: History,
    roster: Participants | None = None,
    *,
    resume: bool = False,
) -> Result:
    """Trains for ``settings.num_rounds`` rounds, or until something ends the run early.

    Each round is on disk, with all that the run needs to continue after it, before the round after
    the next starts.

    Args:
        grid (Grid): Sends messages to nodes and receives their replies.
        strategy (Strategy): Any of Flower's strategies, or a user's.
        trainer (Trainer): The task with the initial model, and in the end with the final one.
        settings (RunSettings): The run's settings.
        history (History): Where the run is recorded.
        roster (Participants, optional): The participants. Default: nodes that answer the roll call.
        resume (bool): Continue the run in the history's folder.

    Raises:
        SettingsError: If the server is to evaluate what never travels.
        PrivacyError: If running statistics would go around the strategy's differential privacy.
        RunError: If too few nodes come, no reply of a round counts, or the strategy fails. The
            model of the last whole round is saved.
        StateError: If the strategy holds what cannot be kept.
        CheckpointError: If the run to resume is not the same any more.
        HistoryError: If the run's folder cannot be written, or another process leads the run.
    """
    start_time = time.monotonic()
    previous = previous_of(history.folder) if resume else Previous()
    stopping = stopping_of(settings, strategy, previous)
    run = _set_up(one_run_grid(grid), strategy, trainer, settings, history, roster, previous)
    identity = identity_of(run)
    if settings.keep:
        strategy_state.snapshot(strategy)  # raises for a state that no checkpoint can hold
    with history.held(), run.spool.open():
        state = (resume_state(run, identity, previous) if resume else None) or _initial_state(run)
        trainer.release_parameters()
        stopping, stop_reason = reason_at_start(
            stopping, history.rounds, state.best, settings, previous
        )
        _write_settings(run, previous, stopping.after, state.round + 1)
        snapshot = _snapshot(strategy)
        try:
            for number in range(state.round + 1, settings.num_rounds + 1):
                if stop_reason:
                    break
                run.roster.wait_for(run.min_nodes, settings.wait)
                state = _round(run, state, number, snapshot)
                run.checkpoints.wait()
                if settings.keep:
                    run.checkpoints.save(state.checkpoint(strategy, identity), history.sync)
                # The checkpoint has the strategy's state from now on, if there is one.
                snapshot = None if settings.keep else _snapshot(strategy)
                stop_reason = stopping.reason(history.rounds, state.best)
        finally:
            path = save_model(run, state.model)
            run.checkpoints.wait()
            best_path = save_best_model(run, state.best, state.model)
        if stop_reason:
            history.write_end(stop_reason)
    history.notify(RunFinished(path, time.monotonic() - start_time, stop_reason))
    return Result(
        trainer.parameters(),
        state.model.statistics,
        history.rounds,
        history.folder,
        path,
        best_path,
        stop_reason,
        trainer.task,
        trainer.seed,
    )


# -- a round -------------------------------------------------------------------------------------


def _round(run: Run, state: RunState, number: int, snapshot: State | None) -> RunState:
    """One round; it is whole once its record is written."""
    record = RoundRecord(number)
    while True:
        try:
            model = _train(run, state.model, record)
            break
        except TooFewReplies as error:
            if record.repeats == run.settings.max_repeats:
                raise
            _prepare_repeat(run, record, snapshot, error)
    evaluate(run, model, record)
    evaluate_centrally(run, model, record)
    # Not earlier: a strategy that needs more nodes than are left would wait for them in a phase.
    _leave_out(run, record)
    record.versions = run.roster.take_versions()
    run.history.add_round(record.to_dict())
    return state.after(record, model)


def _train(run: Run, model: Model, record: RoundRecord) -> Model:
    """Federated training: from the model before a round to the strategy's new model.

    Raises:
        TooFewReplies: If fewer replies count than have to.
        RunError: If the strategy fails.
    """
    phase = Phase(run, "train", record)
    outgoing = phase.configure(model)
    nodes = [phase.node_of(message) for message in outgoing]
    masters: ArrayRecord | None
    if strategies.is_linear(run.strategy):
        mean = mean_update(phase, outgoing, model)
        metrics = {nodes[client.place]: client.metrics for client in mean.counted}
        phase.require_replies(len(metrics))
        if not metrics:
            return model
        with phase.timed("aggregate"):
            content = mean.as_reply(model.masters, run.train_weighted_by, run.spool)
            with phase.hook("aggregate_train"):
                masters, train_metrics = strategies.aggregate_mean(
                    run.strategy, phase.number, content, list(metrics.values())
                )
                masters = phase.masters_from_strategy(masters, model)
    else:
        updates = all_updates(phase, outgoing, model)
        metrics = {update.node: update.reply.metrics for update in updates}
        phase.require_replies(len(metrics))
        with phase.timed("aggregate"):
            replies = [update.for_strategy() for update in updates]
            with phase.hook("aggregate_train"):
                masters, train_metrics = run.strategy.aggregate_train(phase.number, replies)
                masters = phase.masters_from_strategy(masters, model)
            mean = mean_statistics(updates, nodes)
    has_statistics = run.averaged and metrics
    statistics = mean.running_statistics(run.averaged) if has_statistics else model.statistics
    record.train = {**(train_metrics or {}), "nodes": list(metrics)}
    phase.record_each(metrics)
    return Model(masters, statistics)


def _prepare_repeat(
    run: Run, record: RoundRecord, snapshot: State | None, error: TooFewReplies
) -> None:
    """Before training is repeated: the strategy in its state before the round, and enough nodes.

    Args:
        run (Run): The run.
        record (RoundRecord): The round's record.
        snapshot (State, optional): The strategy's state. Default: that of the last checkpoint.
        error (TooFewReplies): Why training is repeated.
    """
    _leave_out(run, record)
    record.repeats += 1
    repeat = f"repeat {record.repeats} of {run.settings.max_repeats}"
    run.history.notify(Notice(f"{error} The round is run again ({repeat})."))
    if snapshot is None and run.settings.keep:
        run.checkpoints.wait()
        snapshot = run.checkpoints.state_after(record.round - 1)
    if snapshot is not None:
        restore(run.strategy, snapshot, new=False)
    run.roster.wait_for(run.min_nodes, run.settings.wait)


def _leave_out(run: Run, record: RoundRecord) -> None:
    """Excludes nodes from later rounds whose replies were refused several times in a row."""
    if run.roster.stays:  # thousands of simulated clients may fail in each of hundreds of rounds
        return
    for node, reason in to_leave_out([*run.history.rounds, record.to_dict()]).items():
        if run.roster.leave_out(node, reason):
            record.left_out.append(node)


# -- before the first round ----------------------------------------------------------------------


def _set_up(
    grid: OneRunGrid,
    strategy: Strategy,
    trainer: Trainer,
    settings: RunSettings,
    history: History,
    roster: Participants | None,
    previous: Previous,
) -> Run:
    require_one_model(settings, trainer)
    # Nodes recognize a run by its id after its server was started again.
    run_id = str(previous.config.get("run-id") or uuid4().hex)
    run_config: dict[str, Any] = {
        "num-rounds": settings.num_rounds,
        "seed": settings.seed,
        "run-id": run_id,
    }
    client_config = strategies.attribute(strategy, "client_config") or {}
    config = {**trainer.task.config, **settings.config, **client_config, **run_config}
    roster = roster or Roster(
        grid,
        trainer.spec,
        trainer.all_statistics_spec,
        {"strategy": type(strategy).__name__, **config, "prepare": True},
        history.notify,
        trainer.fingerprint,
        trainer.frozen,
        parse_selection(settings.select_nodes),
    )
    spool = grid.spool or Spool(history.folder / "waiting")
    checkpoints = Checkpoints(history.folder, settings.keep)
    transform = run_transform(trainer.task, config, trainer.spec)
    run = Run(
        grid,
        strategy,
        trainer,
        settings,
        history,
        roster,
        config,
        spool,
        checkpoints,
        transform,
        QuorumClosing(settings),
    )
    if transform is not None:
        size, message_size = (
            named_arrays.size(spec)["bytes"] for spec in (trainer.spec, transform.spec)
        )
        history.notify(
            Notice(
                f"updates: {', then '.join(transform.notes)}; {message_size:,} bytes each in "
                f"place of {size:,}; statistics and metrics are sent as they are"
            )
        )
    if strategies.attribute(strategy, "proximal_mu") == 0 and "proximal-mu" not in config:
        history.notify(Notice("FedProx without proximal-mu is FedAvg: set it, such as to 0.1"))
    if private := strategies.name_of_private(strategy):
        coverage.require_covered(private, run.averaged)
        history.notify(Notice(coverage.note(private, trainer.task)))
    return run


def _initial_state(run: Run) -> RunState:
    masters = master_weights.to_masters(run.trainer.parameters(), run.spool)
    return RunState(0, Model(masters, run.trainer.statistics()), None)


def _write_settings(run: Run, previous: Previous, went_on_after: int, first_round: int) -> None:
    changes = record_changes(previous, run.settings.change, first_round)
    if before := versions.difference(dict(previous.versions), versions.versions()):
        run.history.notify(Notice(f"before round {first_round} the run had {before}"))
    run.history.write_settings(
        {
            **run.settings.for_the_record(),
            **({"initial": previous.initial} if previous.initial else {}),
            **({"went_on_after": went_on_after} if went_on_after else {}),
            **({"changes": changes} if changes else {}),
            "config": run.config,
            "strategy": strategies.describe(run.strategy),
            "model": named_arrays.size(run.trainer.spec),
            "versions": versions.versions(),
        }
    )


def _snapshot(strategy: Strategy) -> State | None:
    """A strategy's state; None for one that cannot be kept, which a run without checkpoints
    allows."""
    with suppress(StateError):
        return strategy_state.snapshot(strategy)
    return None
