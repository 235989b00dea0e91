"""A round's record as a line, and as plain figures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fed.runs.round_record import Refusal, RoundRecord
from mlx_fed.runs import round_record

NAMES = st.one_of(
    st.lists(st.text(max_size=4), max_size=60),
    st.sets(st.integers(0, 500), max_size=300).map(lambda ns: [f"node-{n}" for n in sorted(ns)]),
    st.lists(st.integers(0, 60), min_size=30, max_size=60).map(lambda ns: [f"n{n}" for n in ns]),
    st.lists(st.sampled_from(["a1", "a01", "a2", "b3", "7", "a999999999999"]), max_size=50),
)
REASONS = st.sampled_from(["no reply within 9 seconds", "parameter 'w' is missing", ""])


def refusals(names: list[str], reasons: list[str]) -> list[dict[str, Any]]:
    return [
        {"node": node, "phase": "train", "reason": reason, **missing(reason)}
        for node, reason in zip(names, reasons, strict=False)
    ]


def missing(reason: str) -> dict[str, bool]:
    return {"missing": True} if reason.startswith("no reply") else {}


@given(NAMES, NAMES, st.lists(REASONS, min_size=60, max_size=300))
def test_a_record_comes_back_as_it_was(trained, left_out, reasons):
    record = {
        "round": 3,
        "train": {"loss": 0.5, "nodes": trained},
        "evaluate": {},
        "refused": refusals(left_out, reasons),
    }
    kept = json.loads(json.dumps(record))
    line = round_record.to_line(record)
    assert "\n" not in line
    assert record == kept  # it is not changed
    back = round_record.from_line(line)
    refused = [tuple(entry.items()) for entry in back.pop("refused")]
    assert sorted(refused) == sorted(tuple(entry.items()) for entry in record.pop("refused"))
    assert back == record


def test_a_thousand_nodes_take_little_room():
    names = [f"node-{number}" for number in range(1000)]
    record = {
        "round": 1,
        "train": {"nodes": names},
        "evaluate": {"nodes": names[::2]},
        "refused": refusals(names, ["no reply within 60 seconds"] * 300),
    }
    assert len(round_record.to_line(record)) < 3000


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", "{}", '{"round": "x"}', '{"round": 1, "train": 5}']
)
def test_what_is_no_record_is_an_error(line):
    with pytest.raises(ValueError, match=r"not a round's record|Expecting|invalid literal"):
        round_record.from_line(line)


def test_the_spread_of_many_nodes():
    own = [{"loss": float(number), "text": "x"} for number in range(101)]
    assert round_record.spread(own) == {"loss": [0, 25, 50, 75, 100]}
    assert round_record.spread([]) == {}


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-1000, 1000), min_size=1, max_size=50))
def test_a_spread_has_numpys_quantiles(values: list[float]):
    found = round_record.spread([{"loss": value} for value in values])["loss"]
    assert found == pytest.approx(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), rel=1e-5, abs=1e-9)


def test_figures_are_flat():
    record = {
        "round": 1,
        "train": {"loss": 0.5, "nodes": ["a", "b"]},
        "evaluate": {"accuracy": np.float64(0.25), "nodes": ["a"]},
        "central": {"loss": 0.75, "sample": "once upon a time"},
        "seconds": {"train": 2.0},
        "bytes": {"down": 10, "up": 20},
        "each": {"train": {"a": {"loss": 1.0}, "b": {"loss": 3.0}}},
        "spread": {"evaluate": {"accuracy": [0, 0.1, 0.2, 0.3, 1]}},
        "refused": refusals(["c"], ["no"]),
    }
    assert round_record.figures(record) == {
        "train/loss": 0.5,
        "train/nodes": 2,
        "evaluate/accuracy": 0.25,
        "evaluate/nodes": 1,
        "central/loss": 0.75,
        "seconds/train": 2.0,
        "bytes/down": 10,
        "bytes/up": 20,
        "train/loss/median": 2.0,
        "evaluate/accuracy/median": 0.2,
        "refused": 1,
    }


def test_a_record_has_only_what_the_round_had():
    record = RoundRecord(3)
    record.refused += [Refusal("a", "train", "late", missing=True), Refusal("b", "train", "odd")]
    assert record.to_dict() == {
        "round": 3,
        "train": {},
        "evaluate": {},
        "seconds": {},
        "bytes": {"down": 0, "up": 0},
        "refused": [
            {"node": "a", "phase": "train", "reason": "late", "missing": True},
            {"node": "b", "phase": "train", "reason": "odd"},
        ],
    }
    record.central, record.repeats = {}, 1
    assert record.to_dict()["central"] == {}
    assert record.to_dict()["repeats"] == 1
