"""Report: runs as one HTML file without other files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..runs import folders, round_record
from ..runs.run_summary import summarize
from .page import page


def report(runs: Sequence[folders.RunRecord]) -> str:
    """HTML page with the curves of several runs in the same charts."""
    return page(
        {
            "live": False,
            "runs": [_data(run) for run in runs],
            "time": time.time(),
            "version": __version__,
        }
    )


def _data(run: folders.RunRecord) -> dict[str, Any]:
    lines = [round_record.to_line(record) for record in run.rounds]
    summary = summarize(run.rounds)
    return {**folders.as_plain(run), "rounds": None, "lines": lines, "summary": summary}
