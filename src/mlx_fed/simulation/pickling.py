"""Pickling of tasks for other processes: lambdas, closures and definitions of a script."""

from __future__ import annotations

import copyreg
import functools
from collections import ChainMap
from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

import cloudpickle

from ..arrays import reducers  # noqa: F401, for what MLX cannot pickle


def dumps(value: Any) -> bytes:
    """Bytes of a value that ``pickle.loads`` reads in a process that has not run this script."""
    file = BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def _cached(function: Any) -> str | tuple[Any, ...]:
    """Reduction of a script's function under ``functools.cache``, which pickle would import."""
    if function.__module__ != "__main__":
        return str(function.__qualname__)
    return _cache_again, (function.__wrapped__, function.cache_parameters())


def _cache_again(function: Callable, parameters: dict[str, Any]) -> Callable:
    return functools.lru_cache(**parameters)(function)


class _Pickler(cloudpickle.Pickler):
    dispatch_table: ClassVar = ChainMap(
        {type(functools.cache(len)): _cached},
        cloudpickle.Pickler.dispatch_table,
        copyreg.dispatch_table,
    )
