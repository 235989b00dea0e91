"""Answers to the roll call by which a node must not come to take part."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from ..running import HostileNode, roll_call_answer

Answer = Callable[[Message, str, int], Message]
"""Of the question, the node's name and its number."""
DEEP = "[" * 100_000


def with_field(field: str, value: Any) -> Answer:
    """An honest answer with one other field."""
    return lambda question, name, number: roll_call_answer(question, name, number, **{field: value})


def with_content(content: RecordDict) -> Answer:
    """Another answer altogether."""
    return lambda question, name, number: Message(content, reply_to=question)


def _spec(**changes: Any) -> str:
    sizes = {"0.weight": [16, 2], "0.bias": [16], "2.weight": [2, 16], "2.bias": [2]}
    spec = {f"layers.{name}": [shape, "float32"] for name, shape in sizes.items()}
    return json.dumps({k: v for k, v in {**spec, **changes}.items() if v is not None})


NAMES = {
    "empty": "",
    "of 3 MB": "N" * 3_000_000,
    "of 65 characters": "N" * 65,
    "with escapes": "\x1b[2J\x1b]0;owned\x07",
    "with a line": "a\nnode-9 joined (9 in all)",
    "with a carriage return": "a\rhonest",
    "backwards": "a\u202eb",
    "with NUL": "a\0b",
    "with a paragraph": "a\u2029b",
}
NUMBERS = {
    "below 0": "-1",
    "of 4,000 digits": "9" * 4000,
    "of 2**31": str(2**31),
    "with an exponent": "1e3",
    "in other digits": "\u0662" * 11,
    "a text": "x",
    "empty": "",
    "a fraction": "0.5",
    "another's": "0",
}
SPECS = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "5",
    "deep": DEEP,
    "another shape": _spec(**{"layers.0.bias": [[17], "float32"]}),
    "another type": _spec(**{"layers.0.bias": [[16], "float16"]}),
    "an array less": _spec(**{"layers.0.bias": None}),
    "an array more": _spec(**{"layers.9.bias": [[16], "float32"]}),
    "a shape below 0": _spec(**{"layers.0.bias": [[-16], "float32"]}),
    "a shape that is a text": _spec(**{"layers.0.bias": ["16", "float32"]}),
    "of 200,000 arrays": json.dumps({f"a{n}": [[1], "float32"] for n in range(200_000)}),
}


def with_anothers_name(question: Message, name: str, number: int) -> Message:
    """An answer with the name of an honest node, which is another with TLS."""
    other = "node-0" if number == HostileNode.number else "honest-0"
    return roll_call_answer(question, name, number, name=other)


ACTS: dict[str, Answer] = {
    "a name another's": with_anothers_name,
    **{f"a name {what}": with_field("name", name) for what, name in NAMES.items()},
    **{f"a number {what}": with_field("partition-id", n) for what, n in NUMBERS.items()},
    **{f"parameters: {what}": with_field("parameters", spec) for what, spec in SPECS.items()},
    "statistics that there are not": with_field("statistics", '{"a": [[1], "float32"]}'),
    "statistics: no JSON": with_field("statistics", "{"),
    "a fingerprint that is no JSON": with_field("fingerprint", "{"),
    "a deep fingerprint": with_field("fingerprint", DEEP),
    "frozen arrays: no JSON": with_field("frozen", "{"),
    "no record": with_content(RecordDict()),
    "an empty record": with_content(RecordDict({"node": ConfigRecord()})),
    "metrics": with_content(RecordDict({"node": MetricRecord({"name": 1.0})})),
    "an error": lambda question, name, number: Message(Error(1, "\x1b[2J no"), reply_to=question),
}
