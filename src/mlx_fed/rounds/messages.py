"""Named arrays in Flower's records.

Between our server and nodes arrays travel as shards of safetensors: names, shapes and every
MLX dtype survive bit for bit, and many small arrays cost one object on the wire instead of two
each. A :class:`flwr.app.ArrayRecord` of plain NumPy arrays, as Flower's mods leave it, is read
as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ..arrays import safetensors
from ..arrays.safetensors import Stored
from ..arrays.spool import Part, WaitingArray, num_bytes, parts_of, records_in
from ..arrays.weights import Arrays, LazyArrays, Spec, dtype_name
from ..errors import FedError
from ..training.metrics import Evaluation

STATISTICS = "statistics"
"""The name of the record that carries running statistics beside the parameters."""
WEIGHTS = "weights"
"""The name of the record that has the weights of an evaluation's metrics, by their names."""
UNDEFINED = "undefined"
"""The name of the record that says why metrics of an evaluation are undefined, by their names."""

ROLL_CALL = "query.roll_call"
LEAVE = "query.leave"

_SHARD_TYPE = "safetensors"
_SHARD_BYTES = 4 * 2**20


class MessageError(FedError):
    """A message that is not laid out as ours are."""


def pack(arrays: Mapping[str, mx.array]) -> ArrayRecord:
    """Arrays of any dtype as shards of up to 4 MiB, or of one larger array.

    Their values stay where they are: the shards are views of them.
    """
    shards = list(_shards(arrays))
    record = ArrayRecord()
    for number, shard in enumerate(shards, 1):
        waiting = tuple(map(Part, safetensors.parts(shard)))
        size = sum(map(len, waiting))
        name = f"shard-{number:05}-of-{len(shards):05}"
        record[name] = WaitingArray("uint8", (size,), _SHARD_TYPE, waiting)
    return record


def unpack(record: ArrayRecord) -> Arrays:
    """The arrays in a record, by name, whether packed or plain.

    Raises:
        MessageError: If the bytes cannot be read, or an array occurs twice.
    """
    arrays: Arrays = {}
    for name, part in parts(record):
        with _reading(name):
            arrays |= {key: stored.read() for key, stored in part.items()}
    return arrays


def parts(record: ArrayRecord) -> Iterator[tuple[str, dict[str, Stored]]]:
    """The arrays in a record, a part at a time, and what the record calls the part.

    Raises:
        MessageError: If the bytes cannot be read, or an array occurs twice.
    """
    seen: set[str] = set()
    for name, array in record.items():
        with _reading(name):
            part = _find(name, array)
        if twice := seen & part.keys():
            raise MessageError(f"parameter {min(twice)!r} occurs twice in the message")
        seen |= part.keys()
        yield name, part


def unread(record: ArrayRecord, spec: Spec, places: Mapping[str, str]) -> LazyArrays:
    """The arrays in a record, read when they are asked for; the part looked at last is kept.

    Args:
        record (ArrayRecord): One that has been looked through before, by :func:`parts`.
        spec (dict): The shape of each array, by name, and the dtype that it is wanted in.
        places (dict): What the record calls the part that has an array, by the array's name.
    """
    last: dict[str, dict[str, Stored]] = {}

    def find(name: str) -> Stored:
        place = places[name]
        if place not in last:
            last.clear()
            last[place] = _find(place, record[place])
        return last[place][name]

    return LazyArrays(
        spec,
        lambda name: find(name).read(spec[name][1]),
        lambda name: find(name).pieces(spec[name][1]),
    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a stranger's bytes can bring about any
        raise MessageError(f"array {name!r} in the message is unreadable: {error}") from error


def _find(name: str, array: Array) -> dict[str, Stored]:
    if array.stype != _SHARD_TYPE:
        values = mx.array(array.numpy())
        held = Part(np.asarray(values.reshape(-1)).view(np.uint8).data)
        return {name: Stored((held,), 0, dtype_name(values.dtype), tuple(values.shape))}
    # Where arrays are many and small, their bytes are joined once rather than looked for each time.
    large = num_bytes(array) > _SHARD_BYTES
    return safetensors.find(parts_of(array) if large else (Part(array.data),))


def is_packed(record: ArrayRecord) -> bool:
    """Whether the arrays are in shards, rather than plain NumPy arrays."""
    return any(array.stype == _SHARD_TYPE for array in record.values())


def parameters_of(content: RecordDict) -> tuple[str, ArrayRecord]:
    """The name and the record of the parameters in a message.

    The name is the strategy's choice (``arrayrecord_key``) and a reply uses the same.

    Raises:
        MessageError: If there is none, or more than one beside the statistics.
    """
    records = {k: v for k, v in records_in(content, ArrayRecord).items() if k != STATISTICS}
    if len(records) != 1:
        raise MessageError(f"expected one record of parameters in the message, got {len(records)}")
    return next(iter(records.items()))


def config_of(content: RecordDict) -> tuple[str, ConfigRecord]:
    """The name and the record of the settings in a message; empty where there are none."""
    return next(iter(records_in(content, ConfigRecord).items()), ("config", ConfigRecord()))


def count_bytes(content: RecordDict) -> int:
    """The size of a message's arrays, in bytes."""
    records = records_in(content, ArrayRecord).values()
    return sum(num_bytes(array) for record in records for array in record.values())


def pack_evaluation(evaluation: Evaluation) -> RecordDict:
    """The reply to a message of evaluation: metrics, with weights and reasons if there are any."""
    content = RecordDict({"metrics": MetricRecord({**evaluation.metrics})})
    if evaluation.weights:
        content[WEIGHTS] = ConfigRecord({**evaluation.weights})
    if evaluation.undefined:
        content[UNDEFINED] = ConfigRecord({**evaluation.undefined})
    return content


def values_of(content: RecordDict, name: str) -> Mapping[str, Any]:
    """A record of settings by its name; empty where there is none."""
    return records_in(content, ConfigRecord).get(name, {})


def nothing_to_evaluate() -> RecordDict:
    """The reply of a client that has no test examples, which is no failure: no metrics."""
    return RecordDict({"metrics": MetricRecord()})


def has_nothing_to_evaluate(reply: Message) -> bool:
    """Whether a reply is :func:`nothing_to_evaluate`."""
    content = reply.content if reply.has_content() else {}
    return [*content] == ["metrics"] and content["metrics"] == MetricRecord()


def _shards(arrays: Mapping[str, mx.array]) -> Iterator[Arrays]:
    shard: Arrays = {}
    size = 0
    for name, array in arrays.items():
        if shard and size + array.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    if shard:
        yield shard
