"""State that a client keeps from round to round, in its Flower context, by round.

A round is repeated where too few replies counted in it, and where its server died and the run was
resumed. The client then trains from the state that it had before the round, so it keeps the states
before its last two rounds as well: a run is resumed at the last round or at the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from flwr.app import ArrayRecord, RecordDict

from ..arrays.flower_records import records_in
from ..arrays.named_arrays import Arrays
from ..errors import FedError
from . import messages

_NAME = "own-"
"""The beginning of a record's name, which ends with the round that the state is of. Of the client's
first round the record stays when the state is not kept any more, and is empty then."""


class ClientStateError(FedError):
    """A state that is not there any more."""


def load(context: RecordDict, server_round: int | None) -> Arrays | None:
    """The state after a round, or after the client's last round before it.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the client's last one.

    Returns:
        dict: Arrays by name, or None if the client had not trained yet.

    Raises:
        ClientStateError: If it was so long ago that the state is not kept.
    """
    states = _states(context)
    numbers = [number for number in states if server_round is None or number <= server_round]
    if not numbers:
        return None
    state = states[max(numbers)]
    if not state:
        raise ClientStateError(
            f"This client keeps its state of the last rounds only, not that after round "
            f"{max(numbers)}: the run cannot go back so far with what it keeps for itself."
        )
    return messages.unpack(state)


def take_back(context: RecordDict, server_round: int | None) -> Arrays | None:
    """The state before a round, which with all later ones is dropped: it is trained now.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the one after the client's last.

    Raises:
        ClientStateError: If it was so long ago that the state is not kept.
    """
    before = load(context, None if server_round is None else server_round - 1)
    for number in _states(context):
        if server_round is not None and number >= server_round:
            del context[f"{_NAME}{number}"]
    return before


def save(context: RecordDict, server_round: int | None, arrays: Mapping[str, mx.array]) -> None:
    """Keeps the state after a round, and of those before it as many as may be needed again.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the one after the client's last.
        arrays (dict): Arrays by name; none where the client keeps nothing of the round.
    """
    if not arrays:
        return
    numbers = _states(context)
    if server_round is None:
        server_round = max(numbers, default=0) + 1
    context[f"{_NAME}{server_round}"] = messages.pack(arrays)
    first, *old = sorted(number for number in numbers if number <= server_round - 2) or [0]
    if old:
        context[f"{_NAME}{first}"] = ArrayRecord()
    for number in old[:-1]:
        del context[f"{_NAME}{number}"]


def round_of(config: Mapping[str, Any]) -> int | None:
    """The round that a message is of, as its settings have it."""
    number = config.get("server-round")
    return number if isinstance(number, int) else None


def _states(context: RecordDict) -> dict[int, ArrayRecord]:
    return {
        int(name.removeprefix(_NAME)): record
        for name, record in records_in(context, ArrayRecord).items()
        if name.startswith(_NAME)
    }
