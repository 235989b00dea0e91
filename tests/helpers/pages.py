"""Runs that a page shows, and what it reads; and the browser, Debian's chromium, headless."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlx_fed import events
from mlx_fed.monitoring.report import report
from mlx_fed.runs import folders, round_record
from mlx_fed.runs.history import History

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium"),
]
NASTY = "<img src=x onerror=\"document.title='owned'\"></script>"


def begun(folder: Path, num_rounds: int) -> History:
    """The history of a run that has no round yet."""
    folder.mkdir(parents=True)
    history = History(folder)
    history.write_settings({"num_rounds": num_rounds})
    return history


def add_round(history: History, number: int, of: int, clients: int, left_out: list[dict]) -> None:
    chance = random.Random(number)
    nodes = [f"node-{k}" for k in range(clients)]
    loss = 2.0 / number
    own = {
        node: {"num-examples": 10, "loss": loss * (0.8 + 0.4 * chance.random())} for node in nodes
    }
    few = clients <= round_record.MANY
    for phase in ("train", "evaluate"):
        now = {"phase": phase, "round": number, "of": of, "nodes": clients}
        history.notify(events.PhaseStarted(**now, answered=0))
        history.notify(events.RepliesArrived(**now, answered=clients))
    history.add_round(
        {
            "round": number,
            "train": {"loss": loss, "nodes": nodes},
            "evaluate": {"loss": loss, "accuracy": 1 - loss / 2, "nodes": nodes[::2]},
            "seconds": {"train": 0.5, "aggregate": 0.01},
            "bytes": {"down": 1_500_000, "up": 500},
            "refused": left_out,
            ("each" if few else "spread"): {
                "train": own if few else round_record.spread(own.values())
            },
        }
    )


def make(
    folder: Path, rounds: int = 5, clients: int = 4, finish: bool = True, **settings: Any
) -> History:
    folder.mkdir(parents=True)
    history = History(folder, (), {"engine": "simulation", "clients": clients})
    history.write_settings({"num_rounds": rounds, "strategy": {"name": "FedAvg"}, **settings})
    for number in range(1, rounds + 1):
        late = {"node": "node-1", "phase": "train", "reason": "it is on a train", "missing": True}
        refused = {"node": NASTY, "phase": "train", "reason": f"cannot {NASTY}"}
        add_round(history, number, rounds, clients, [late, refused] if number == 2 else [])
    if finish:
        history.notify(events.RunFinished(model=folder, seconds=1.0))
    return history


def written(tmp_path: Path, *paths: Path) -> str:
    path = tmp_path / "report.html"
    path.write_text(report(folders.read_all(paths)))
    return path.as_uri()


def readout(page: Any, title: str) -> str:
    return (
        page.locator(".chart", has=page.get_by_role("heading", name=title))
        .locator(".readout")
        .inner_text()
    )
