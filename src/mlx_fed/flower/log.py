"""Flower's logger."""

from __future__ import annotations

import logging


def silence_flower() -> None:
    """Hides log lines of Flower below CRITICAL."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
