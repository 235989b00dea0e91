"""Bytes and seconds as text for people."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """Bytes with a decimal prefix: ``"1.2 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_seconds(duration: float) -> str:
    """A duration in its two largest units: ``"2 min 5 s"``."""
    seconds = round(duration)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
