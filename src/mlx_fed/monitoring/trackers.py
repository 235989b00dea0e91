"""Trackers that people have already: TensorBoard, Weights & Biases, or one of their own.

A tracker has three methods and reads what the run's history has. One that fails never ends a run:
it is told of once, and asked no more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..errors import FedError
from ..runs.round_record import figures


class Tracker(Protocol):
    """What a run is logged to."""

    def start(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        """The run begins, or goes on: its name, its folder, and its settings as plain values."""

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        """A round is over; its numbers by flat names, such as ``evaluate/accuracy``."""

    def finish(self) -> None:
        """The run is over, whatever became of it."""


class TensorBoard:
    """Writes event files to ``tensorboard/`` in the run's folder, for ``tensorboard --logdir``."""

    def __init__(self) -> None:
        from tensorboardX import SummaryWriter

        self.make = SummaryWriter

    def start(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self.writer = self.make(str(folder / "tensorboard"))
        text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
        self.writer.add_text("settings", text)

    def log(self, number: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            self.writer.add_scalar(key, value, number)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class WandB:
    """Logs to Weights & Biases, or to the run's folder with ``WANDB_MODE=offline``.

    The project is ``WANDB_PROJECT`` or ``mlx-fed``.
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


_KNOWN: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


def find_tracker(name: str) -> Tracker:
    """A tracker by its name, or ``module:tracker``: one, or what makes one.

    Raises:
        FedError: If there is none of that name, or its package is not installed.
    """
    module, colon, attribute = name.partition(":")
    if not colon and name not in _KNOWN:
        raise FedError(
            f"There is no tracker {name!r}: there are {', '.join(_KNOWN)}, and MODULE:TRACKER of "
            "your own."
        )
    try:
        if not colon:
            return _KNOWN[name]()
        sys.path.insert(0, str(Path.cwd()))
        made = getattr(import_module(module), attribute)
        return made if hasattr(made, "log") and not isinstance(made, type) else made()
    except ImportError as error:
        hint = f'pip install "mlx-fed[{name}]"' if not colon else "look at the name"
        raise FedError(f"The tracker {name!r} cannot be imported ({error}): {hint}.") from error
    except Exception as error:
        raise FedError(f"Cannot make the tracker {name!r}: {error!r}") from error


class Tracking:
    """Listens to a run and logs it to a tracker, for as long as that works.

    Args:
        name (str): What the tracker is called in a message.
        tracker (Tracker): Where to.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.name = name
        self.tracker: Tracker | None = tracker
        self.started = False

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event == "started":
            self.started = True
            folder = Path(fields["folder"])
            self._ask(lambda to: to.start(folder.resolve().name, folder, fields["settings"]))
        elif event == "round":
            self._ask(lambda to: to.log(fields["round"], figures(fields)))

    def close(self) -> None:
        """Tells the tracker that the run is over."""
        if self.started:
            self._ask(lambda to: to.finish())

    def _ask(self, what: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            what(self.tracker)
        except Exception as error:
            self.tracker = None
            from .output import print_failure

            print_failure(f"The tracker {self.name!r} failed and is asked no more", error)
