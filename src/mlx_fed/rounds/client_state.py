"""Client state across rounds, in the client's Flower context.

A round is repeated if too few replies counted, or if its server died and the run was resumed. The
client then trains from its state before the round. So the context has the states before its last
two rounds as well: a run is resumed at the last round or at the one before.
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

TRAINING, TRANSFORM = "own-", "transform-"
"""Kinds of state, of training and of the update transform: prefixes of a record's name, which ends
with the round of the state. The record of the client's first round stays, without arrays, when its
state is dropped."""


class ClientStateError(FedError):
    """A state that has been dropped."""


def load(context: RecordDict, server_round: int | None, kind: str = TRAINING) -> Arrays | None:
    """The state after a round, or after the client's last round before it.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the client's last one.
        kind (str): Of training, or of the update transform.

    Returns:
        dict: Arrays by name, or None if the client had not trained yet.

    Raises:
        ClientStateError: If the state has been dropped.
    """
    states = _states(context, kind)
    numbers = [number for number in states if server_round is None or number <= server_round]
    if not numbers:
        return None
    state = states[max(numbers)]
    if not state:
        raise ClientStateError(
            "This client has only its states of the last rounds, not that after round "
            f"{max(numbers)}: start a new run, or resume at a later round."
        )
    return messages.unpack(state)


def rewind(context: RecordDict, server_round: int | None, kind: str = TRAINING) -> Arrays | None:
    """The state before a round. The states of that and later rounds are dropped: they are repeated.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the one after the client's last.
        kind (str): Of training, or of the update transform.

    Raises:
        ClientStateError: If the state has been dropped.
    """
    before = load(context, None if server_round is None else server_round - 1, kind)
    for number in _states(context, kind):
        if server_round is not None and number >= server_round:
            del context[f"{kind}{number}"]
    return before


def save(
    context: RecordDict,
    server_round: int | None,
    arrays: Mapping[str, mx.array],
    kind: str = TRAINING,
) -> None:
    """Saves the state after a round, and drops states that no resumed run needs.

    Args:
        context (RecordDict): The state of the client's context.
        server_round (int, optional): The round. Default: the one after the client's last.
        arrays (dict): Arrays by name; empty if the client has no state.
        kind (str): Of training, or of the update transform.
    """
    if not arrays:
        return
    numbers = _states(context, kind)
    if server_round is None:
        server_round = max(numbers, default=0) + 1
    context[f"{kind}{server_round}"] = messages.pack(arrays)
    first, *older = sorted(number for number in numbers if number <= server_round - 2) or [0]
    if older:
        context[f"{kind}{first}"] = ArrayRecord()
    for number in older[:-1]:
        del context[f"{kind}{number}"]


def round_of(config: Mapping[str, Any]) -> int | None:
    """The server round in the settings of a message."""
    number = config.get("server-round")
    return number if isinstance(number, int) else None


def _states(context: RecordDict, kind: str) -> dict[int, ArrayRecord]:
    return {
        int(name.removeprefix(kind)): record
        for name, record in records_in(context, ArrayRecord).items()
        if name.startswith(kind)
    }
