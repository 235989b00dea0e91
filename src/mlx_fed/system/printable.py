"""Text from users and nodes, safe for a terminal or a table."""

from __future__ import annotations

_LONGEST = 1000
"""Characters of a line."""


def printable(text: str) -> str:
    """One line that is safe for a terminal, which control characters would steer.

    Line breaks become spaces, other control characters a mark, and a very long text is cut.
    """
    line = " ".join(text.replace("\t", " ").splitlines())
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
    return clean if len(clean) <= _LONGEST else clean[:_LONGEST] + "..."
