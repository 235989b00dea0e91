"""The figures of a run's rounds as a table, a chart, and HTML for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import FedError
from . import round_record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_PHASES = ("train", "evaluate", "central")
_WIDTH, _HEIGHT = 120, 24
"""Pixels of a small curve."""

Curve = list[tuple[int, float]]
"""The values of a metric, each with its round; without rounds in which it is undefined."""


class MissingLibrary(FedError):
    """A library that is optional, and not installed."""


def curves(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The curve of each metric over rounds, by names such as ``evaluate/loss``."""
    result: dict[str, Curve] = {}
    for record in rounds:
        for name, value in round_record.figures(record).items():
            phase, _, metric = name.partition("/")
            if phase in _PHASES and metric != "nodes" and not round_record.is_detail(metric):
                result.setdefault(name, []).append((record["round"], value))
    return dict(sorted(result.items(), key=lambda item: _PHASES.index(item[0].split("/")[0])))


def to_pandas(rounds: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each round: ``round``, and the columns of ``mlx-fed runs export``.

    Raises:
        MissingLibrary: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingLibrary(
            "to_pandas() needs pandas: pip install pandas. Without it, result.rounds is a list of "
            "dictionaries, and mlx-fed runs export writes CSV."
        ) from error
    rows = [{"round": record["round"], **round_record.figures(record)} for record in rounds]
    return pd.DataFrame(rows, columns=None if rows else ["round"])


def plot(rounds: Sequence[Mapping[str, Any]], *metrics: str) -> list[Axes]:
    """A chart for each metric, with a line for training, evaluation and the server's evaluation.

    Args:
        rounds (list): The records of the rounds.
        metrics (str): Names such as ``loss`` and ``accuracy``. Default: all.

    Returns:
        list: The axes of Matplotlib, in the order of the metrics.

    Raises:
        MissingLibrary: If Matplotlib is not installed.
        FedError: If there is no such metric.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingLibrary("plot() needs Matplotlib: pip install matplotlib.") from error
    lines = curves(rounds)
    names = list(dict.fromkeys(name.partition("/")[2] for name in lines))
    for metric in metrics:
        if metric not in names:
            raise FedError(f"There is no metric {metric!r}: there are {', '.join(names)}.")
    shown = metrics or names
    if not shown:
        raise FedError("There is nothing to plot: no round has a metric.")
    _, grid = plt.subplots(
        1, len(shown), squeeze=False, figsize=(4.5 * len(shown), 3.2), layout="constrained"
    )
    for axes, metric in zip(grid[0], shown, strict=True):
        for phase in _PHASES:
            if curve := lines.get(f"{phase}/{metric}"):
                axes.plot(*zip(*curve, strict=True), label=phase, marker="." * (len(curve) < 30))
        axes.set(title=metric, xlabel="round")
        axes.legend()
    return list(grid[0])


def summary(rounds: Sequence[Mapping[str, Any]]) -> str:
    """``3 rounds, train/loss 0.92 -> 0.41, evaluate/loss 0.61 -> 0.31``."""
    number = f"{len(rounds)} round{'s' * (len(rounds) != 1)}"
    metrics = [f"{name} {_first_and_last(curve)}" for name, curve in curves(rounds).items()]
    return ", ".join([number, *metrics])


def to_html(title: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    """A table with the first and last value and a small curve of each metric, for a notebook."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{curve[0][1]:.4g}</td><td>{curve[-1][1]:.4g}</td>"
        f"<td>{_svg(curve)}</td></tr>"
        for name, curve in curves(rounds).items()
    )
    number = f"{len(rounds)} round{'s' * (len(rounds) != 1)}"
    return (
        f"<table><caption>{escape(title)}, {number}</caption>"
        f"<tr><th></th><th>first</th><th>last</th><th>by round</th></tr>{rows}</table>"
    )


def _first_and_last(curve: Curve) -> str:
    first, last = curve[0][1], curve[-1][1]
    return f"{first:.4g} -> {last:.4g}" if len(curve) > 1 else f"{last:.4g}"


def _svg(curve: Curve) -> str:
    steps, values = zip(*curve, strict=True)
    low, left = min(values), min(steps)
    height, width = max(values) - low or 1.0, max(steps) - left or 1
    points = " ".join(
        f"{1 + (step - left) / width * (_WIDTH - 2):.1f},"
        f"{_HEIGHT - 1 - (value - low) / height * (_HEIGHT - 2):.1f}"
        for step, value in curve
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
    )
