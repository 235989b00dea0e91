"""A run's models on disk: the last and the best, in the form that the task saves."""

from __future__ import annotations

from pathlib import Path

from ..arrays import weights
from .checkpoint import Best
from .phase import Model, Run


def save_model(run: Run, model: Model, name: str = "model") -> Path:
    """Saves a model with ``Task.save``, or as safetensors, and leaves it in the trainer.

    Args:
        run (Run): The run.
        model (Model): The model.
        name (str): Name of the file or folder, without suffix.

    Raises:
        HistoryError: If it cannot be written.
    """
    _load(run, model)
    slots = run.trainer.slots
    if save := run.trainer.task.save:
        return run.history.save_with(lambda folder: save(run.trainer.model, folder), name)
    arrays = {**slots.parameters, **slots.statistics, **slots.frozen}
    public = {key: slot for key, slot in arrays.items() if not weights.is_private(key)}
    return run.history.save_model(weights.get(public), f"{name}.safetensors")


def save_best_model(run: Run, best: Best | None, model: Model) -> Path | None:
    """Saves the model of the best round if its checkpoint is there, and puts ``model`` back.

    Args:
        run (Run): The run.
        best (Best, optional): The best round.
        model (Model): The model of the last round.
    """
    checkpoint = run.checkpoints.best(best, run.spool) if best else None
    if checkpoint is None:
        return None
    path = save_model(run, Model(checkpoint.masters, checkpoint.statistics), "best")
    _load(run, model)
    return path


def _load(run: Run, model: Model) -> None:
    slots = run.trainer.slots
    weights.put(slots.parameters, model.parameters(run.trainer.spec))
    weights.put(slots.statistics, model.statistics)
