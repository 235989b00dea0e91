"""Ids of parametrized tests, which are the same in every process."""

import re


def stable_id(value: object) -> str:
    """A value as text, without the address of an object in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
