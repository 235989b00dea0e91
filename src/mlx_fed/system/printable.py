"""Text from elsewhere, as a terminal or a table may show it."""

from __future__ import annotations

_LONGEST = 1000
"""Characters of a line."""


def printable(text: str) -> str:
    """One line that is safe to show: what the other side sends may steer a terminal.

    Line breaks become spaces, other control characters a mark, and what is very long is cut.
    """
    line = " ".join(text.replace("\t", " ").splitlines())
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "..."
