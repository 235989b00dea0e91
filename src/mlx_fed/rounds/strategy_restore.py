"""Restoration of a strategy from a state that :mod:`~mlx_fed.rounds.strategy_state` describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import mlx.core as mx
import numpy as np
from flwr.app import Array
from flwr.serverapp.strategy import Strategy

from .strategies import LEAST_NODES
from .strategy_state import FUNCTIONS, RECORDS, STATE_METHODS, State, StateError, class_name


def restore(strategy: Strategy, state: State, *, new: bool = True) -> None:
    """Restores the state of a strategy that was made in the same way.

    Functions and nested strategies stay its own, the latter with their state; so do the numbers
    of nodes to wait for, which an operator may have to change.

    Args:
        strategy (Strategy): The one to change.
        state (State): From :func:`~mlx_fed.rounds.strategy_state.snapshot`.
        new (bool): Whether it was just made. One that was the same as in the snapshot loses what
            attributes it has got since.

    Raises:
        StateError: If the strategy is of another class, or lacks a function that the other had.
    """
    _Restoration(state.arrays, new).value(state.tree, strategy, type(strategy).__name__)


class _Restoration:
    """The walk back. ``current`` is the strategy's value at the same path."""

    def __init__(self, arrays: Mapping[str, mx.array | np.ndarray], new: bool):
        self.arrays, self.new = arrays, new
        self.results: dict[str, Any] = {}

    def value(self, node: Any, current: Any, path: str) -> Any:
        if not isinstance(node, dict):  # all but plain values are kept as one
            return node
        if "function" in node:
            if not isinstance(current, FUNCTIONS):
                raise StateError(f"{path} was a function, and the strategy has none there now.")
            return current
        if "scalar" in node:
            dtype, data = np.dtype(node["scalar"]), bytes.fromhex(node["bytes"])
            return np.frombuffer(data, dtype)[0] if dtype.itemsize else dtype.type()
        if "bytes" in node:
            return bytes.fromhex(node["bytes"])
        if "same" in node:
            return self.results[node["same"]]
        return self._object(node, current, path)

    def _object(self, node: dict[str, Any], current: Any, path: str) -> Any:
        result: Any
        match node:
            case {"own": state_node}:
                result = current
                _loader(current, path)(self.value(state_node, None, path))
            case {"strategy": name, "attributes": attributes}:
                if class_name(current) != name:
                    raise StateError(f"{path} was a {name}, and is a {class_name(current)} now.")
                result = self.results[node["at"]] = current
                for key in () if self.new else vars(current).keys() - attributes.keys():
                    del vars(current)[key]
                for key, value in attributes.items():
                    if key not in LEAST_NODES:
                        # Past what the class may do when an attribute is set.
                        vars(current)[key] = self.value(
                            value, vars(current).get(key), f"{path}.{key}"
                        )
            case {"list": items}:
                result = self.results[node["at"]] = []
                result += self._list(items, current, path)
            case {"tuple": items}:
                result = tuple(self._list(items, current, path))
            case {"dict": items}:
                result = self.results[node["at"]] = {}
                result.update(self._items(items, current, path))
            case {"record": name, "items": items}:
                result = RECORDS[name](dict(self._items(items, current, path)))
            case {"Array": key, "about": [dtype, shape, stype]}:
                result = Array(dtype, tuple(shape), stype, np.asarray(self.arrays[key]).tobytes())
            case {"numpy": key, "as_it_is": as_it_is}:
                result = np.array(self.arrays[key])
                if not as_it_is:
                    result = np.load(BytesIO(result.tobytes()), allow_pickle=False)
            case {"mlx": key}:
                result = self.arrays[key]
        self.results[node["at"]] = result
        return result

    def _list(self, nodes: list[Any], current: Any, path: str) -> Iterator[Any]:
        have = current if isinstance(current, (list, tuple)) else ()
        for index, node in enumerate(nodes):
            old = have[index] if index < len(have) else None
            yield self.value(node, old, f"{path}[{index}]")

    def _items(self, nodes: list[list[Any]], current: Any, path: str) -> Iterator[tuple[Any, Any]]:
        have = current if isinstance(current, dict) else {}
        for key_node, node in nodes:
            key = self.value(key_node, None, path)
            yield key, self.value(node, have.get(key), f"{path}[{key!r}]")


def _loader(current: Any, path: str) -> Callable[[Any], Any]:
    for _, load in STATE_METHODS:
        if callable(function := getattr(current, load, None)):
            return function
    raise StateError(f"{path} had a state of its own, and is a {class_name(current)} now.")
