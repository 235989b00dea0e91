"""Values that leave a client beside its update, without the update's clipping and noise.

Flower's strategies and mods for differential privacy work on the parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod

from ..arrays.named_arrays import Spec
from ..errors import FedError
from ..task import Task

_SHOWN = 4
"""Running statistics that are named."""


class PrivacyError(FedError):
    """Values that a client would send, and that differential privacy does not cover."""


def name_of_private(mods: Iterable[Any]) -> str | None:
    """The name of the first mod that clips updates or adds noise for differential privacy: one of
    Flower's, or one with the attribute ``private_noise = True``."""
    for mod in mods:
        function = mod.func if isinstance(mod, partial) else mod
        if (
            isinstance(function, LocalDpMod)
            or function in (adaptiveclipping_mod, fixedclipping_mod)
            or getattr(function, "private_noise", False)
        ):
            return str(getattr(function, "__name__", type(function).__name__))
    return None


def require_covered(private: str, statistics: Spec) -> None:
    """Check that no running statistics go around differential privacy.

    Args:
        private (str): The name of the strategy or mod that is to provide it.
        statistics (dict): The running statistics that travel.

    Raises:
        PrivacyError: If there are any.
    """
    if not statistics:
        return
    rest_text = f" and {len(statistics) - _SHOWN} more" if len(statistics) > _SHOWN else ""
    raise PrivacyError(
        f"{private} covers the parameters alone: the model's running statistics "
        f"({', '.join([*statistics][:_SHOWN])}{rest_text}) would leave each client exactly, "
        "without clipping and noise, and tell of its inputs. Let clients keep them "
        '(Task.statistics="local"), or use a norm without running statistics, such as '
        "nn.GroupNorm or nn.LayerNorm."
    )


def note(private: str, task: Task) -> str:
    """Note on the values that leave clients uncovered in any case."""
    names: Sequence[str] = ("num-examples", "loss", *task.metrics)
    return (
        f"{private} covers the parameters alone: {', '.join(names)} leave each client exactly, "
        "without noise"
    )
