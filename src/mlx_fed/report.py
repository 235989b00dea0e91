"""Runs as one HTML file, which needs nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from . import __version__, records, runs
from .page import page


def report(found: Sequence[runs.Recorded]) -> str:
    """The page of runs, laid over each other, as HTML."""
    return page(
        {
            "live": False,
            "runs": [_inlined(run) for run in found],
            "time": time.time(),
            "version": __version__,
        }
    )


def _inlined(run: runs.Recorded) -> dict[str, Any]:
    known = runs.as_plain(run)
    return {**known, "rounds": None, "lines": [records.to_line(each) for each in run.rounds]}
