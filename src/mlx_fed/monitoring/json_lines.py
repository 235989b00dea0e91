"""A run's or a node's events as JSON Lines (``--json``), one object a line."""

from __future__ import annotations

import sys
from typing import IO

from ..events import Event, LabelsCounted, LoadFinished, LoadProgress, RepliesArrived
from ..runs import round_record
from .output import Output, stops_at_failure

_OMITTED = (RepliesArrived, LabelsCounted, LoadProgress, LoadFinished)
"""Events of progress within a phase, and of content that the run's folder has."""


class JsonLines(Output):
    """Listener that prints each event as a JSON object: ``{"event": "round", ...}``.

    Args:
        file (file, optional): The text stream. Default: the standard output.
    """

    def __init__(self, file: IO[str] | None = None):
        super().__init__(file or sys.stdout)

    @stops_at_failure
    def __call__(self, event: Event) -> None:
        if not isinstance(event, _OMITTED):
            line = round_record.to_json({"event": event.name, **event.to_dict()})
            print(line, file=self.file, flush=True)
