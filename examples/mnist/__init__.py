"""The MNIST example as a module, so that ``mlx-fed serve examples.mnist:task`` finds it."""

from .mnist import task

__all__ = ["task"]
