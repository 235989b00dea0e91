"""State of an MLX module: its arrays, entries and attributes, and their restoration after a trace.

A traced forward pass leaves tracers in a module: where parameters were assigned for the trace,
where ``nn.utils.checkpoint`` updates parameters, where a layer assigns an array. Tracers raise at
their next use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def containers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every module, dictionary, list and tuple below a module with its path, private ones too.

    A container with two paths is listed once. An object with arrays as attributes that is no
    module, such as a cache, is represented by the dictionary of its attributes.
    """
    visited_ids: set[int] = set()

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if _has_arrays(value):
            value = vars(value)
        if not isinstance(value, (dict, list, tuple)) or id(value) in visited_ids:
            return
        visited_ids.add(id(value))
        yield name, value
        children = _items(value) + (list(vars(value).items()) if _is_module(value) else [])
        for key, child in children:
            yield from walk(child, f"{name}.{key}" if name else str(key))

    return walk(value, name)


@contextmanager
def preserve(module: nn.Module) -> Iterator[None]:
    """Restores every array, entry and attribute of a module and its submodules at the end.

    In-place writes to an array are undone as well.
    """
    before = [
        (
            container,
            list(container) if isinstance(container, list) else dict(dict.items(container)),
            vars(container).copy() if _is_module(container) else None,
        )
        for _, container in containers(module)
        if not isinstance(container, tuple)
    ]
    for container, *_ in before:
        for key, child in _items(container):
            if isinstance(child, mx.array):
                container[key] = alias(child)
    try:
        yield
    finally:
        for container, entries, attributes in before:
            if isinstance(container, list):
                container[:] = entries
                continue
            dict.clear(container)
            dict.update(container, entries)
            if attributes is not None:
                vars(container).clear()
                vars(container).update(attributes)


def alias(array: mx.array) -> mx.array:
    """Another object of the same array: ``array[0] = 1`` changes only one of the two."""
    return array.astype(array.dtype)


def arrays(module: nn.Module) -> dict[str, mx.array]:
    """Every array of a module by its path, private ones too."""
    return {
        f"{name}.{key}" if name else str(key): child
        for name, container in containers(module)
        for key, child in _items(container)
        if isinstance(child, mx.array)
    }


def counters(module: nn.Module) -> dict[str, int | float]:
    """Every Python number among the attributes of a module, by its path."""
    return {
        f"{name}.{key}" if name else key: value
        for name, container in containers(module)
        if _is_module(container)
        for key, value in vars(container).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _items(container: Any) -> list[tuple[Any, Any]]:
    # The built-in class's method: a module may override its own.
    return list(dict.items(container) if isinstance(container, dict) else enumerate(container))


def _has_arrays(value: Any) -> bool:
    """Whether an object that is no container has arrays as attributes."""
    if isinstance(value, (dict, list, tuple, type)) or not hasattr(value, "__dict__"):
        return False
    return any(isinstance(child, mx.array) for child in vars(value).values())


def _is_module(container: Any) -> bool:
    return isinstance(container, nn.Module)
