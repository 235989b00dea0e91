"""Versions of what bits depend on: of this machine, and in which another one differs."""

from __future__ import annotations

import sys

import mlx_fed as fed  # noqa: F401  before mlx.core

import numpy as np
import pytest

from mlx_fed.system import versions


def test_versions_of_this_machine():
    ours = versions.versions()
    assert ours["numpy"] == np.__version__
    assert ours["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(ours.values())
    assert "/" not in ours["blas"], "a path differs between machines"


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"numpy": "1.0", "mlx": "2"}, "numpy 1.0, here 2.0"),
        ({"numpy": "1.0", "mlx": "3"}, "numpy 1.0, here 2.0; mlx 3, here 2"),
        ({"numpy": "2.0", "another": "1"}, ""),
        ({}, ""),
    ],
)
def test_differences_are_named(theirs, words):
    assert versions.difference(theirs, {"numpy": "2.0", "mlx": "2"}) == words
