"""The image example as a module, so that ``mlx-fed serve examples.images:task`` finds it."""

from .images import central_test, task

__all__ = ["central_test", "task"]
