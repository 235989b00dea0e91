"""Errors whose message is meant for the person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install_command(extras: str) -> str:
    """How to install extras of this package: from its repository, as there is no release yet.

    Args:
        extras (str): Their names, with commas between them.
    """
    return f'pip install -e ".[{extras}]" in the repository of mlx-fed'


class FedError(Exception):
    """Error whose message has the cause, the place and the remedy; commands print it without a
    traceback.

    Attributes:
        exit_code (int): That of a command which ends with it.
    """

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the lines of its cells, without those of this package."""
        from .tracebacks import user_traceback

        return user_traceback(self).splitlines()


class SettingsError(FedError, ValueError):
    """Settings that a run cannot have."""


class TaskError(FedError, TypeError):
    """A task's function that takes or returns something else than it should."""


class RunError(FedError):
    """A run that failed. Its finished rounds are kept in its folder."""


class SimulationError(FedError):
    """A simulation that cannot start or continue."""


class TooFewReplies(RunError):
    """A round with fewer replies that count than it needs; it can be repeated."""


@contextmanager
def os_errors(kind: type[FedError], what: str, advice: str = "") -> Iterator[None]:
    """Context in which an OSError becomes ``kind``: what failed, the system's reason, the advice.

    Args:
        kind (type): The exception to raise.
        what (str): ``"Cannot write FILE"``.
        advice (str): A sentence on what to do.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}. {advice}".rstrip()) from error
