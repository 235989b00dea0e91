"""Result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arrays.named_arrays import Arrays
from ..task import Task
from . import curves
from .model_file import ModelFileError, load_model, model_with

if TYPE_CHECKING:
    import mlx.nn as nn
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(repr=False)
class Result:
    """Result of a run: the global model, the records of its rounds, its files.

    Attributes:
        parameters (dict): The global model's parameters, by name.
        statistics (dict): Its running statistics.
        rounds (list): One record a round, as in ``history.jsonl``.
        folder (Path): The run's folder.
        model (Path): The whole model as safetensors.
        best (Path, optional): The same of the round with the lowest loss, as the server itself
            or else its nodes measured it.
        stopped (str, optional): Why the run ended before its last round, if it did: for lack of
            progress (``patience``), at its ``target``, by ``stop`` or by its strategy.
        task (Task, optional): The task, for :meth:`load`.
        seed (int): The run's seed.

    Example:
        >>> result = fed.simulate(task, num_clients=10)
        >>> labels = result.load(best=True)(images).argmax(axis=1)
        >>> result.to_pandas().plot(x="round", y="evaluate/accuracy")
    """

    parameters: Arrays
    statistics: Arrays
    rounds: list[dict[str, Any]]
    folder: Path
    model: Path
    best: Path | None = None
    stopped: str | None = None
    task: Task | None = field(default=None, compare=False)
    seed: int = 0

    def load(self, best: bool = False) -> nn.Module:
        """The task's model after the last round, ready to predict: in evaluation mode.

        Personal parameters and local statistics have their initial values: each client's stay with
        the client.

        Args:
            best (bool): The model after the best round instead. Default: ``False``.

        Raises:
            ModelFileError: If the best model was not saved, or only by ``Task.save``.
        """
        if self.task is None:
            raise ModelFileError("This result has no task: use mlx_fed.load_model(task, path).")
        if not best:
            return model_with(self.task, self.seed, self.parameters, self.statistics)
        if self.best is None:
            raise ModelFileError(
                "The best model was not saved: it needs an evaluation with a finite loss, and "
                "checkpoints (keep=1 or more)."
            )
        if self.task.save is not None:
            raise ModelFileError(
                f"Task.save wrote the best model in its own form, {self.best}: load it as that."
            )
        return load_model(self.task, self.best)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each round: ``round``, metrics such as ``evaluate/loss``, seconds and bytes.

        Raises:
            MissingLibrary: If pandas is not installed.
        """
        return curves.to_pandas(self.rounds)

    def plot(self, *metrics: str) -> list[Axes]:
        """A chart of Matplotlib for each metric, or for some: ``result.plot("accuracy")``.

        Raises:
            MissingLibrary: If Matplotlib is not installed.
        """
        return curves.plot(self.rounds, *metrics)

    def __repr__(self) -> str:
        return f"Result({curves.summary(self.rounds)}, folder={str(self.folder)!r})"

    def _repr_html_(self) -> str:
        return curves.to_html(str(self.folder), self.rounds)
