"""Findings of checks before a run: what was checked, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..errors import FedError
from ..tracebacks import location


class Finding(NamedTuple):
    """The result of one check.

    Args:
        name (str): What was checked.
        text (str): What was found.
        advice (str): What to do; empty where all is well.
        is_fault (bool): Whether a run would fail, and not only be slow or in doubt.
    """

    name: str
    text: str
    advice: str = ""
    is_fault: bool = False


class Fault(Exception):
    """A fault that ends a check, with advice."""

    def __init__(self, text: str, advice: str):
        super().__init__(text)
        self.advice = advice


def check(
    name: str, run: Callable[[], Any], describe: Callable[[Any], str], advice: str
) -> Iterator[Finding]:
    """The finding of one check; an exception is a fault."""
    try:
        result = run()
        yield Finding(name, describe(result))
    except Fault as fault:
        yield Finding(name, str(fault), fault.advice, True)
    except Exception as error:
        prefix = "" if isinstance(error, FedError) else f"{type(error).__name__}: "
        line = location(error)
        where = f" ({line[0]}, line {line[1]})" if line else ""
        yield Finding(name, f"{prefix}{error}{where}", advice, True)
