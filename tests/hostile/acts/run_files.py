"""Lines of a run's history that were written by somebody else, which readers pass over."""

from __future__ import annotations

import json
from typing import Any

ROUND: dict[str, Any] = {
    "round": 1,
    "train": {"loss": 0.5, "nodes": ["a"]},
    "evaluate": {},
    "seconds": {"train": 1},
}
_LINES: dict[str, Any] = {
    "many nodes": {**ROUND, "train": {"nodes": {"node-": "0-99999999999999"}}},
    "many refused": {
        **ROUND,
        "refused": [{"phase": "a", "reason": "b", "nodes": {"a": "0-9999999"}}],
    },
    "long names": {**ROUND, "train": {"nodes": {"n" * 10**6: "0-999999"}}},
    "no numbers": {**ROUND, "seconds": {"train": "long"}},
    "lists": {**ROUND, "train": [1], "bytes": [2]},
    "texts": {**ROUND, "spread": {"train": {"loss": "abcde"}}, "each": 5},
    "infinite": '{"round": 1e999, "train": {}}',
    "huge": '{"round": ' + "9" * 4000 + "}",
    "deep": '{"round": 1, "a": ' + "[" * 900 + "]" * 900 + "}",
    "deeper": "[" * 100_000,
}
ACTS = {
    name: lambda line=line: line if isinstance(line, str) else json.dumps(line)
    for name, line in _LINES.items()
}
