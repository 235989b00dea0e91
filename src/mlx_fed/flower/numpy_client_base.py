"""``NumPyClient`` of Flower's deprecated API, which only :mod:`mlx_fed.numpy_client` uses."""

from flwr.client import NumPyClient

__all__ = ["NumPyClient"]
