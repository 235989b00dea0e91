"""Processes that several tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ..conftest import Started, starting


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """``start``, for the tests of a whole file."""
    yield from starting(tmp_path_factory.mktemp("output"))
