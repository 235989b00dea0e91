"""Nothing that a peer or a file holds crashes, hangs, or passes a check that it should not.

The same entries go on for as long as one likes with ``python -m tests.fuzz``.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fuzz.entries import ENTRIES, seeds

EXAMPLES = 100


@st.composite
def changed(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """Valid bytes with a few edits: overwritten, cut out, put in, cut off."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data[place : place + length] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@pytest.mark.parametrize(
    "name", ["reply", "object tree", "object graph", "roll call", "checkpoint", "answers"]
)
def test_what_is_changed_went_all_the_way_before(name):
    assert ENTRIES[name](seeds()[name][0])


@pytest.mark.parametrize("name", ENTRIES)
def test_any_bytes(name):
    if name == "lora.yaml":
        pytest.importorskip("mlx_lm")
    run, valid = ENTRIES[name], seeds()[name]
    for seed in valid:
        run(seed)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(valid) | st.binary(max_size=200))
    def try_out(data: bytes) -> None:
        run(data)

    try_out()
