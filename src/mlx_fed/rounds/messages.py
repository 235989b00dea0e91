"""Wire format: named arrays in Flower's records, as shards of safetensors.

Names, shapes and every MLX dtype are preserved bit for bit, and many small arrays cost one object
on the wire instead of two each. A :class:`flwr.app.ArrayRecord` of plain NumPy arrays, as Flower's
mods write it, is read as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ..arrays import safetensors
from ..arrays.flower_records import Segment, SegmentedArray, num_bytes, records_in, segments_of
from ..arrays.named_arrays import Arrays, LazyArrays, Spec, dtype_name
from ..arrays.safetensors import TensorView
from ..errors import FedError
from ..training.metrics import Evaluation

STATISTICS = "statistics"
"""The name of the record of running statistics."""
WEIGHTS = "weights"
"""The name of the record of the weights of an evaluation's metrics, by metric."""
UNDEFINED = "undefined"
"""The name of the record of reasons why metrics of an evaluation are undefined, by metric."""
COUNTS = "counts"
"""The name of the record of counts of confusion matrices, by metric."""

ROLL_CALL = "query.roll_call"
LEAVE = "query.leave"

_SHARD_TYPE = "safetensors"
_SHARD_BYTES = 4 * 2**20


class MessageError(FedError):
    """A message in another format than ours."""


def pack(arrays: Mapping[str, mx.array]) -> ArrayRecord:
    """Arrays of any dtype as shards of up to 4 MiB, or of one larger array each.

    The shards are views of the arrays, without a copy.
    """
    shards = list(_shards(arrays))
    record = ArrayRecord()
    for number, shard in enumerate(shards, 1):
        segments = tuple(map(Segment, safetensors.serialize(shard)))
        size = sum(map(len, segments))
        name = f"shard-{number:05}-of-{len(shards):05}"
        record[name] = SegmentedArray("uint8", (size,), _SHARD_TYPE, segments)
    return record


def unpack(record: ArrayRecord) -> Arrays:
    """The arrays in a record, by name, whether packed or plain.

    Raises:
        MessageError: If the bytes cannot be read, or an array occurs twice.
    """
    arrays: Arrays = {}
    for shard_name, views in shards(record):
        with _explain_errors(shard_name):
            arrays |= {name: view.read() for name, view in views.items()}
    return arrays


def shards(record: ArrayRecord) -> Iterator[tuple[str, dict[str, TensorView]]]:
    """The arrays in a record, a shard at a time: the shard's name, and lazy arrays by name.

    Raises:
        MessageError: If the bytes cannot be read, or an array occurs twice.
    """
    names: set[str] = set()
    for shard_name, array in record.items():
        with _explain_errors(shard_name):
            views = _parse_shard(shard_name, array)
        if duplicates := names & views.keys():
            raise MessageError(f"parameter {min(duplicates)!r} occurs twice in the message")
        names |= views.keys()
        yield shard_name, views


def lazy_arrays(record: ArrayRecord, spec: Spec, shard_names: Mapping[str, str]) -> LazyArrays:
    """The arrays in a record, read at each access; the last shard stays parsed.

    Args:
        record (ArrayRecord): A record whose :func:`shards` have been checked.
        spec (dict): The shape of each array and the dtype to read it in, by name.
        shard_names (dict): The name of the shard of each array, by the array's name.
    """
    cache: dict[str, dict[str, TensorView]] = {}

    def find(name: str) -> TensorView:
        shard_name = shard_names[name]
        if shard_name not in cache:
            cache.clear()
            cache[shard_name] = _parse_shard(shard_name, record[shard_name])
        return cache[shard_name][name]

    return LazyArrays(
        spec,
        lambda name: find(name).read(spec[name][1]),
        lambda name: find(name).pieces(spec[name][1]),
    )


@contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # bytes of a stranger can cause any
        raise MessageError(f"array {name!r} in the message is unreadable: {error}") from error


def _parse_shard(name: str, array: Array) -> dict[str, TensorView]:
    if array.stype != _SHARD_TYPE:
        values = mx.array(array.numpy())
        segment = Segment(np.asarray(values.reshape(-1)).view(np.uint8).data)
        return {name: TensorView((segment,), 0, dtype_name(values.dtype), tuple(values.shape))}
    # The segments of many small arrays are joined once, not searched for each array.
    is_large = num_bytes(array) > _SHARD_BYTES
    return safetensors.parse(segments_of(array) if is_large else (Segment(array.data),))


def is_packed(record: ArrayRecord) -> bool:
    """Whether the arrays are in shards, rather than plain NumPy arrays."""
    return any(array.stype == _SHARD_TYPE for array in record.values())


def parameters_of(content: RecordDict) -> tuple[str, ArrayRecord]:
    """The name and the record of the parameters in a message.

    The strategy chooses the name (``arrayrecord_key``), and a reply has the same.

    Raises:
        MessageError: If there is none, or more than one beside the statistics.
    """
    records = {k: v for k, v in records_in(content, ArrayRecord).items() if k != STATISTICS}
    if len(records) != 1:
        raise MessageError(f"expected one record of parameters in the message, got {len(records)}")
    return next(iter(records.items()))


def config_of(content: RecordDict) -> tuple[str, ConfigRecord]:
    """The name and the record of the settings in a message; empty if there are none."""
    return next(iter(records_in(content, ConfigRecord).items()), ("config", ConfigRecord()))


def count_bytes(content: RecordDict) -> int:
    """The size of the arrays of a message, in bytes."""
    records = records_in(content, ArrayRecord).values()
    return sum(num_bytes(array) for record in records for array in record.values())


def pack_evaluation(evaluation: Evaluation) -> RecordDict:
    """The reply to an evaluate message: metrics; weights, reasons and counts if there are any."""
    content = RecordDict({"metrics": MetricRecord({**evaluation.metrics})})
    if evaluation.weights:
        content[WEIGHTS] = ConfigRecord({**evaluation.weights})
    if evaluation.undefined:
        content[UNDEFINED] = ConfigRecord({**evaluation.undefined})
    if evaluation.counts:
        content[COUNTS] = ConfigRecord({**evaluation.counts})
    return content


def config_record(content: RecordDict, name: str) -> Mapping[str, Any]:
    """The ``ConfigRecord`` of a name in a message; empty if there is none."""
    return records_in(content, ConfigRecord).get(name, {})


def nothing_to_evaluate() -> RecordDict:
    """The reply of a client without test examples, which is no failure: no metrics."""
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
