"""Random tasks on every engine, held to an oracle: see tests/generated."""

from __future__ import annotations

import pytest

from .generated.compare import check, extras
from .generated.draw import draw

FEW, MANY = 300, 3300


@pytest.mark.parametrize("seed", range(FEW))
def test_a_generated_task(seed):
    """``python -m tests.generated --seed`` shows more of one that fails."""
    drawn = draw(seed)
    report = check(drawn, resumed=extras(seed)["resumed"])
    assert not report.faults, f"{drawn}\n" + "\n".join(fault.what for fault in report.faults[:8])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(FEW, MANY, 100))
def test_more_generated_tasks(first):
    failed = {
        seed: report.faults[0]
        for seed in range(first, first + 100)
        if (report := check(draw(seed), **extras(seed))).faults
    }
    assert not failed
