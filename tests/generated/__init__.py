"""Random tasks that hold the engines to an oracle: ``python -m tests.generated --help``."""

from __future__ import annotations

from typing import Any

import mlx_fed as fed  # before mlx.core


def task(config: Any) -> fed.Task:
    """The task of ``task-seed``, for processes: ``mlx-fed join tests.generated:task``."""
    from .draw import draw

    return draw(int(config["task-seed"])).task
