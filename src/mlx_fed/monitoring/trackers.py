"""Experiment trackers: TensorBoard, Weights & Biases, or the user's.

A tracker has three methods. An exception of a tracker does not end the run: it is printed once, and
the tracker is not called again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..errors import FedError, install_command
from ..events import Event, RoundFinished, RunStarted
from ..runs.round_record import figures
from .output import print_failure


class Tracker(Protocol):
    """Protocol of an experiment tracker."""

    def start(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        """Called when the run starts or resumes, with its settings as plain values."""

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """Called after a round, with its figures by flat names, such as ``evaluate/accuracy``."""

    def finish(self) -> None:
        """Called when the run has ended, also if it failed."""


class TensorBoard:
    """TensorBoard event files in ``tensorboard/`` in the run's folder."""

    def __init__(self) -> None:
        from tensorboardX import SummaryWriter

        self.writer_type = SummaryWriter

    def start(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self.writer = self.writer_type(str(folder / "tensorboard"))
        text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
        self.writer.add_text("settings", text)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, number)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases, in the project ``WANDB_PROJECT`` or ``mlx-fed``.

    With ``WANDB_MODE=offline`` it logs to the run's folder.
    """

    def __init__(self) -> None:
        import wandb

        self.wandb = wandb

    def start(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        import os

        project = os.environ.get("WANDB_PROJECT", "mlx-fed")
        self.run = self.wandb.init(
            project=project, name=name, dir=str(folder), config=settings, settings={"silent": True}
        )

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=number)

    def finish(self) -> None:
        self.run.finish()


_TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def find_tracker(name: str) -> Tracker:
    """A tracker by its name, or ``module:tracker``, which is an instance or a function or class.

    Raises:
        FedError: If there is no such tracker, or its package is not installed.
    """
    module, colon, attribute = name.partition(":")
    if not colon and name not in _TRACKERS:
        raise FedError(
            f"There is no tracker {name!r}: choose {', '.join(_TRACKERS)} or MODULE:TRACKER."
        )
    try:
        if not colon:
            return _TRACKERS[name]()
        sys.path.insert(0, str(Path.cwd()))
        tracker = getattr(import_module(module), attribute)
        is_instance = hasattr(tracker, "log") and not isinstance(tracker, type)
        return tracker if is_instance else tracker()
    except ImportError as error:
        hint = "check the name" if colon else install_command(name)
        raise FedError(f"The tracker {name!r} cannot be imported ({error}): {hint}.") from error
    except Exception as error:
        raise FedError(f"Cannot create the tracker {name!r}: {error!r}") from error


class Tracking:
    """Listener that logs a run to a tracker, until the tracker's first exception.

    Args:
        name (str): The tracker's name in messages.
        tracker (Tracker): The tracker.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker: Tracker | None = tracker
        self.started = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.started = True
            name, folder, settings = event.folder.resolve().name, event.folder, event.settings
            self._call(lambda tracker: tracker.start(name, folder, settings))
        elif isinstance(event, RoundFinished):
            record = event.record
            self._call(lambda tracker: tracker.log(record["round"], figures(record)))

    def close(self) -> None:
        """Calls the tracker's ``finish`` at the end of the run."""
        if self.started:
            self._call(lambda tracker: tracker.finish())

    def _call(self, method: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            method(self.tracker)
        except Exception as error:
            self.tracker = None
            print_failure(f"The tracker {self.name!r} failed; the run continues without it", error)
