"""The second half of the random tasks of ``test_generated.py``, in a file for another process."""

from __future__ import annotations

import pytest

from .generated.compare import check, extras
from .generated.draw import draw


@pytest.mark.parametrize("seed", range(150, 300))
def test_a_generated_task(seed):
    drawn = draw(seed)
    report = check(drawn, resumed=extras(seed)["resumed"])
    assert not report.faults, f"{drawn}\n" + "\n".join(fault.what for fault in report.faults[:8])
