"""Progress bars of Hugging Face's libraries, reported like other loading.

``datasets`` and ``huggingface_hub`` show downloads by tqdm, each with its own class. Within
:func:`loading_with_tqdm` their bars report their progress and draw nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .loading import LoadingProgress, loading

_patch_lock = threading.Lock()
"""Held while the libraries' classes are patched: of several threads one reports."""


@contextmanager
def loading_with_tqdm(what: str, *bars: Any) -> Iterator[None]:
    """Reports the loading of a library, with the progress of its bars.

    Args:
        what (str): As for :func:`~mlx_fed.system.loading.loading`.
        bars (type): The library's classes of bars, subclasses of tqdm's.
    """
    with loading(what) as progress, ExitStack() as stack:
        if _patch_lock.acquire(blocking=False):
            stack.callback(_patch_lock.release)
            null_file = stack.enter_context(Path(os.devnull).open("w"))
            for bar_class in bars:
                stack.enter_context(_patch(bar_class, progress, null_file))
        yield


@contextmanager
def _patch(bar_class: Any, progress: LoadingProgress, null_file: Any) -> Iterator[None]:
    original_init = bar_class.__init__

    def __init__(bar: Any, *args: Any, **options: Any) -> None:
        # disable=None is "unless on a terminal". A bar writes to its file at its end.
        options |= {"disable": bool(options.get("disable")), "file": null_file}
        original_init(bar, *args, **options)

    def display(bar: Any, *args: Any, **options: Any) -> None:
        progress.update(int(bar.n), int(bar.total) if bar.total else None, bar.unit.strip())

    bar_class.__init__, bar_class.display = __init__, display
    try:
        yield
    finally:
        bar_class.__init__ = original_init
        del bar_class.display  # tqdm's own is in effect again
