"""Named arrays in Flower's records.

Between our server and nodes arrays travel as shards of safetensors: names, shapes and every
MLX dtype survive bit for bit, and many small arrays cost one object on the wire instead of two
each. A :class:`flwr.app.ArrayRecord` of plain NumPy arrays, as Flower's mods leave it, is read
as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import mlx.core as mx
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from .errors import FedError
from .weights import Arrays

STATISTICS = "statistics"
"""The name of the record that carries running statistics beside the parameters."""

ROLL_CALL = "query.roll_call"
LEAVE = "query.leave"

_SHARD_TYPE = "safetensors"
_SHARD_BYTES = 4 * 2**20


class MessageError(FedError):
    """A message that is not laid out as ours are."""


def pack(arrays: Arrays) -> ArrayRecord:
    """Arrays of any dtype as shards of up to 4 MiB, or of one larger array."""
    shards = list(_shards(arrays))
    record = {}
    for number, shard in enumerate(shards, 1):
        buffer = BytesIO()
        mx.save_safetensors(buffer, shard)
        data = buffer.getvalue()
        name = f"shard-{number:05}-of-{len(shards):05}"
        record[name] = Array("uint8", (len(data),), _SHARD_TYPE, data)
    return ArrayRecord(record)


def unpack(record: ArrayRecord) -> Arrays:
    """The arrays in a record, by name, whether packed or plain.

    Raises:
        MessageError: If a shard cannot be read, or an array occurs twice.
    """
    arrays: Arrays = {}
    for name, array in record.items():
        if array.stype == _SHARD_TYPE:
            try:
                part = mx.load(BytesIO(array.data), format="safetensors")
            except (RuntimeError, ValueError) as error:
                raise MessageError(f"record {name!r} is not safetensors: {error}") from error
        else:
            part = {name: mx.array(array.numpy())}
        if twice := arrays.keys() & part.keys():
            raise MessageError(f"parameter {min(twice)!r} occurs twice in the message")
        arrays.update(part)
    return arrays


def is_packed(record: ArrayRecord) -> bool:
    """Whether the arrays are in shards, rather than plain NumPy arrays."""
    return any(array.stype == _SHARD_TYPE for array in record.values())


def parameters_of(content: RecordDict) -> tuple[str, ArrayRecord]:
    """The name and the record of the parameters in a message.

    The name is the strategy's choice (``arrayrecord_key``) and a reply uses the same.

    Raises:
        MessageError: If there is none, or more than one beside the statistics.
    """
    records = {k: v for k, v in content.array_records.items() if k != STATISTICS}
    if len(records) != 1:
        raise MessageError(f"expected one record of parameters in the message, got {len(records)}")
    return next(iter(records.items()))


def config_of(content: RecordDict) -> tuple[str, ConfigRecord]:
    """The name and the record of the settings in a message; empty where there are none."""
    return next(iter(content.config_records.items()), ("config", ConfigRecord()))


def count_bytes(content: RecordDict) -> int:
    """The size of a message's arrays, in bytes."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


def _shards(arrays: Arrays) -> Iterator[Arrays]:
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
