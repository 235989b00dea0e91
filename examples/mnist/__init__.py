"""The MNIST example as a module, so that ``mlx-fed serve examples.mnist:task`` finds it."""

from .mnist import central_test, task

__all__ = ["central_test", "task"]
