"""Differential privacy: what a run reveals of each client, stated as an epsilon."""

from .gaussian import Gaussian

__all__ = ["Gaussian"]
