"""Replies to training that must not count: functions of the question."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from mlx_fed.rounds import messages

from ..running import as_it_came

Reply = Callable[[Message], Message]
BIAS, WEIGHT = "layers.0.bias", "layers.0.weight"


def parameters(question: Message) -> dict[str, mx.array]:
    """The arrays that came."""
    return messages.unpack(messages.parameters_of(question.content)[1])


def record_name(question: Message) -> str:
    """What the record of the parameters is called."""
    return messages.parameters_of(question.content)[0]


def with_arrays(change: Callable[[dict[str, mx.array]], Any]) -> Reply:
    """A reply whose arrays are changed in place, or replaced."""

    def reply(question: Message) -> Message:
        arrays = parameters(question)
        changed = change(arrays)
        arrays = changed if isinstance(changed, dict) else arrays
        message = as_it_came(question)
        message.content[record_name(question)] = messages.pack(arrays)
        return message

    return reply


def with_array(name: str, change: Callable[[mx.array], mx.array]) -> Reply:
    """A reply of which one array is changed."""
    return with_arrays(lambda arrays: arrays.update({name: change(arrays[name])}))


def with_shard(change: Callable[[bytes], bytes], stype: str = "safetensors") -> Reply:
    """A reply of which the bytes of the arrays are changed."""

    def reply(question: Message) -> Message:
        message = as_it_came(question)
        (array,) = message.content[record_name(question)].values()
        data = change(bytes(array.data))
        shard = Array("uint8", (len(data),), stype, data)
        message.content[record_name(question)] = ArrayRecord({"shard-00001-of-00001": shard})
        return message

    return reply


def with_header(change: Callable[[dict[str, Any]], Any]) -> Reply:
    """A reply of which the header of the arrays' bytes is changed."""

    def changed(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        text = change(header)
        text = text if isinstance(text, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return with_shard(changed)


def with_metrics(remove: tuple[str, ...] = (), **changes: Any) -> Reply:
    """A reply with other metrics."""

    def reply(question: Message) -> Message:
        metrics = {"num-examples": 160, "loss": 0.5}
        metrics |= {name.replace("_", "-"): value for name, value in changes.items()}
        message = as_it_came(question)
        message.content["metrics"] = MetricRecord(
            {name: value for name, value in metrics.items() if name not in remove}
        )
        return message

    return reply


def with_content(change: Callable[[RecordDict, str], Any]) -> Reply:
    """A reply whose records are changed; the function gets the name of the parameters' record."""

    def reply(question: Message) -> Message:
        message = as_it_came(question)
        change(message.content, record_name(question))
        return message

    return reply


def with_error(code: int, reason: str) -> Reply:
    """An error in place of a result."""
    return lambda question: Message(Error(code, reason), reply_to=question)


def with_metadata(**changes: Any) -> Reply:
    """A reply whose metadata are another's."""

    def reply(question: Message) -> Message:
        message = as_it_came(question)
        for name, value in changes.items():
            message.metadata.__dict__[f"_{name}"] = value
        return message

    return reply


def _fill(value: float) -> Callable[[mx.array], mx.array]:
    return lambda array: mx.full(array.shape, value)


def _one(value: float) -> Callable[[mx.array], mx.array]:
    def change(array: mx.array) -> mx.array:
        values = np.array(array)
        values.reshape(-1)[-1] = value
        return mx.array(values)

    return change


VALUES = {
    f"{where} {value}": with_array(WEIGHT, change(value))
    for where, change in (("one value is", _one), ("all values are", _fill))
    for value in (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3.4e38, 1e25)
}
SHAPES = {
    "transposed": with_array(WEIGHT, lambda array: array.T),
    "flat": with_array(WEIGHT, lambda array: array.reshape(-1)),
    "an axis more": with_array(BIAS, lambda array: array[None]),
    "one that broadcasts": with_array(BIAS, lambda array: array[:1]),
    "a scalar": with_array(BIAS, lambda array: array[0]),
    "no values": with_array(BIAS, lambda array: array[:0]),
    "longer": with_array(BIAS, lambda array: mx.concatenate([array, array])),
    "an array is missing": with_arrays(lambda arrays: {WEIGHT: arrays[WEIGHT]}),
    "no arrays": with_arrays(lambda arrays: arrays.clear()),
    "an array more": with_arrays(lambda arrays: arrays.update(more=mx.zeros(3))),
    "an array without a name": with_arrays(lambda arrays: {**arrays, "": mx.zeros(3)}),
    "another name": with_arrays(lambda arrays: arrays.update(Layers=arrays.pop(BIAS))),
    "a name in capitals": with_arrays(lambda arrays: {k.upper(): a for k, a in arrays.items()}),
    "a long name": with_arrays(lambda arrays: {**arrays, "n" * 100_000: mx.zeros(1)}),
    "names exchanged": with_arrays(
        lambda arrays: arrays.update({BIAS: arrays[WEIGHT], WEIGHT: arrays[BIAS]})
    ),
    "a thousand arrays": with_arrays(
        lambda arrays: {**arrays, **{f"a{n}": mx.zeros(1) for n in range(1000)}}
    ),
    "a hundred times the bytes": with_arrays(lambda arrays: {**arrays, "z": mx.zeros(10**7)}),
}
TYPES = {
    f"values of {dtype}": with_array(BIAS, lambda array, dtype=dtype: array.astype(dtype))
    for dtype in (mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_, mx.complex64)
}
SHARDS = {
    "cut off": with_shard(lambda data: data[:-5]),
    "cut off in its header": with_shard(lambda data: data[:20]),
    "no bytes": with_shard(lambda data: b""),
    "more bytes": with_shard(lambda data: data + b"x" * 8),
    "a pickle": with_shard(lambda data: b"cos\nsystem\n(S'touch owned'\ntR.", "pickle"),
    "an unknown form": with_shard(lambda data: data, "gguf"),
    "objects of NumPy": with_shard(
        lambda data: (
            b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, "
            b"'shape': (1,)}\n\x80\x04N."
        ),
        "numpy.ndarray",
    ),
    "a header of 2**63 bytes": with_shard(lambda data: struct.pack("<Q", 2**63) + data[8:]),
    "a header of -1 bytes": with_shard(lambda data: b"\xff" * 8 + data[8:]),
    "a header that is no JSON": with_header(lambda header: b"{" * 30),
    "a deep header": with_header(lambda header: b'{"a":' * 5000),
    "a header that is a list": with_header(lambda header: b"[1, 2]"),
    "offsets that overlap": with_header(
        lambda header: header[BIAS].update(data_offsets=header[WEIGHT]["data_offsets"])
    ),
    "offsets below 0": with_header(lambda header: header[BIAS].update(data_offsets=[-64, 0])),
    "offsets beyond the end": with_header(
        lambda header: header[BIAS].update(data_offsets=[10**9, 10**9 + 64])
    ),
    "offsets that are texts": with_header(lambda h: h[BIAS].update(data_offsets=["0", "64"])),
    "a type that there is not": with_header(lambda header: header[BIAS].update(dtype="F8_E9")),
    "a shape below 0": with_header(lambda header: header[BIAS].update(shape=[-16])),
    "a shape that overflows": with_header(lambda h: h[BIAS].update(shape=[2**32, 2**32])),
    "a shape that is a text": with_header(lambda header: header[BIAS].update(shape="16")),
}
METRICS = {
    **{
        f"num-examples is {value}": with_metrics(num_examples=value)
        for value in (0, -1, -160.0, 10**12, 10**15, 1e300, float("nan"), float("inf"), [160])
    },
    "num-examples is missing": with_metrics(remove=("num-examples",)),
    "the loss is NaN": with_metrics(loss=float("nan")),
    "the loss is infinite": with_metrics(loss=float("-inf")),
    "the loss is a list": with_metrics(loss=[0.5, 0.5]),
    "the loss is missing": with_metrics(remove=("loss",)),
    "metrics that nobody else has": with_metrics(mine=1.0),
    "a list of 100,000 values": with_metrics(mine=[0.5] * 100_000),
    "20,000 metrics": with_metrics(**{f"m{n}": 0.5 for n in range(20_000)}),
    "a metric with a long name": with_metrics(**{"m" * 100_000: 0.5}),
    "a metric called nodes": with_metrics(nodes=5),
    "a metric with escapes": with_metrics(**{"\x1b[2Jowned": 0.5}),
}
RECORDS = {
    "no content": with_content(lambda content, name: content.clear()),
    "no parameters": with_content(lambda content, name: content.pop(name)),
    "no metrics": with_content(lambda content, name: content.pop("metrics")),
    "two records of parameters": with_content(
        lambda content, name: content.update({"more": content[name]})
    ),
    "two records of metrics": with_content(
        lambda content, name: content.update({"more": MetricRecord({"num-examples": 10**6})})
    ),
    "an empty record": with_content(lambda content, name: content.update({name: ArrayRecord()})),
    "another record's name": with_content(
        lambda content, name: content.update({"mine": content.pop(name)})
    ),
    "settings in place of arrays": with_content(
        lambda content, name: content.update({name: ConfigRecord({"a": 1})})
    ),
    "an error": with_error(1, "\x1b[2J it failed\nnode-9 joined"),
    "an error of a megabyte": with_error(2, "x" * 10**6),
    "an unknown error": with_error(10**6, ""),
}
METADATA = {
    "another node's reply": with_metadata(src_node_id=12345),
    "another run's reply": with_metadata(run_id=12345),
    "a reply to no message": with_metadata(reply_to_message_id=""),
    "a reply to another message": with_metadata(reply_to_message_id="0" * 64),
    "another round's reply": with_metadata(group_id="1000000"),
    "a type that there is not": with_metadata(message_type="steal"),
}

ACTS: dict[str, Reply] = {
    **{f"values: {name}": reply for name, reply in VALUES.items()},
    **{f"arrays: {name}": reply for name, reply in SHAPES.items()},
    **TYPES,
    **{f"bytes: {name}": reply for name, reply in SHARDS.items()},
    **{f"metrics: {name}": reply for name, reply in METRICS.items()},
    **{f"records: {name}": reply for name, reply in RECORDS.items()},
    **{f"metadata: {name}": reply for name, reply in METADATA.items()},
}
