"""Runs as one HTML file, which needs nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..runs import folders, round_record
from .page import page


def report(found: Sequence[folders.Recorded]) -> str:
    """The page of runs, laid over each other, as HTML."""
    return page(
        {
            "live": False,
            "runs": [_inlined(run) for run in found],
            "time": time.time(),
            "version": __version__,
        }
    )


def _inlined(run: folders.Recorded) -> dict[str, Any]:
    known = folders.as_plain(run)
    return {**known, "rounds": None, "lines": [round_record.to_line(each) for each in run.rounds]}
