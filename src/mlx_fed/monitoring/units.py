"""Seconds as text for people."""

from __future__ import annotations


def format_seconds(duration: float) -> str:
    """A duration in its two largest units: ``"2 min 5 s"``."""
    seconds = round(duration)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
