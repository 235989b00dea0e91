"""The progress bars of Hugging Face's libraries, told like all else that takes long.

``datasets`` and ``huggingface_hub`` draw what they download and prepare with tqdm, each with a
class of its own. While one of ours tells what they do, their bars say how far it has come and draw
nothing; where nobody watches they draw nothing either.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .loading import Loading, loading

_at_work = threading.Lock()
"""Held while the libraries' classes are changed: of several threads one tells."""


@contextmanager
def loading_with_bars(what: str, *bars: Any) -> Iterator[None]:
    """Tells of something that a library does, and how far by what its bars say.

    Args:
        what (str): As for :func:`~mlx_fed.system.loading.loading`.
        bars (type): The library's classes of bars, which are tqdm's.
    """
    with loading(what) as progress, ExitStack() as until_the_end:
        if _at_work.acquire(blocking=False):
            until_the_end.callback(_at_work.release)
            nowhere = until_the_end.enter_context(Path(os.devnull).open("w"))
            for kind in bars:
                until_the_end.enter_context(_telling(kind, progress, nowhere))
        yield


@contextmanager
def _telling(kind: Any, progress: Loading, nowhere: Any) -> Iterator[None]:
    begin = kind.__init__

    def __init__(bar: Any, *args: Any, **options: Any) -> None:
        # None is "only on a terminal"; and what bars write at their end is for none.
        options |= {"disable": bool(options.get("disable")), "file": nowhere}
        begin(bar, *args, **options)

    def display(bar: Any, *args: Any, **options: Any) -> None:
        progress.reached(int(bar.n), int(bar.total) if bar.total else None, bar.unit.strip())

    kind.__init__, kind.display = __init__, display
    try:
        yield
    finally:
        kind.__init__ = begin
        del kind.display  # it is tqdm's own again
