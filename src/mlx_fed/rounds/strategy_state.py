"""A strategy's own state: what it has to have back so that a run goes on as if it had not stopped.

It is what ``vars()`` of the strategy holds, all the way down, over a closed set of types. Nothing
is pickled: a tree of JSON names the values, and arrays lie beside it. Whatever else a strategy
holds is refused by its name, unless it says itself what to keep, with ``state()`` and
``load_state()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from ..arrays.flower_records import SegmentedArray
from ..errors import FedError
from .strategies import LEAST_NODES

_PLAIN = (type(None), bool, int, float, str)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
_RECORDS = {kind.__name__: kind for kind in (ArrayRecord, ConfigRecord, MetricRecord)}
_OWN = (("state", "load_state"), ("state_dict", "load_state_dict"))
"""How an object says what it keeps; Flower's privacy accountants have the second pair."""


class StateError(FedError):
    """A strategy that holds what cannot be kept, or is not the one whose state was kept."""


class State(NamedTuple):
    """A strategy's state.

    Attributes:
        tree (dict): Values in JSON's types; arrays by name.
        arrays (dict): Arrays, NumPy's or MLX's, of dtypes that safetensors hold. The strategy
            changes none of them later.
    """

    tree: Any
    arrays: Mapping[str, mx.array | np.ndarray]


def snapshot(strategy: Strategy) -> State:
    """The strategy's state as it is now.

    Raises:
        StateError: If it holds something of another type, which is named.
    """
    walk = _Snapshot()
    return State(walk.of(strategy, type(strategy).__name__), walk.arrays)


def restore(strategy: Strategy, state: State, *, new: bool = True) -> None:
    """Gives a strategy the state of one that was made in the same way.

    Functions and nested strategies stay its own, the latter with their state; so do the numbers
    of nodes to wait for, which an operator may have to change.

    Args:
        strategy (Strategy): The one to change.
        state (State): From :func:`snapshot`.
        new (bool): Whether it was just made. One that was the same as in the snapshot loses what
            attributes it has got since.

    Raises:
        StateError: If the strategy is of another class, or lacks a function that the other had.
    """
    _Restoration(state.arrays, new).value(state.tree, strategy, type(strategy).__name__)


class _Snapshot:
    """A walk over values. What is met twice is kept once, and is one object again afterwards."""

    def __init__(self) -> None:
        self.arrays: dict[str, mx.array | np.ndarray] = {}
        self.seen: dict[int, str] = {}
        self.alive: list[Any] = []

    def of(self, value: Any, path: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, _FUNCTIONS):
            return {"function": path}
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return {"scalar": value.dtype.str, "bytes": value.tobytes().hex()}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if id(value) in self.seen:
            same = self.seen[id(value)]
            if path.startswith(same) and type(value) is tuple:
                raise StateError(f"{path} is a tuple within itself, which a run cannot keep.")
            return {"same": same}
        self.seen[id(value)] = path
        self.alive.append(value)  # or another object may come to have its id
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value)
        for get, load in _OWN:
            if callable(getattr(value, get, None)) and callable(getattr(value, load, None)):
                return {"own": self.of(getattr(value, get)(), f"{path}.{get}()"), "at": path}
        if isinstance(value, Strategy):
            attributes = {k: self.of(v, f"{path}.{k}") for k, v in vars(value).items()}
            return {"strategy": _class_name(value), "attributes": attributes, "at": path}
        if kind in (list, tuple):
            items = [self.of(item, f"{path}[{n}]") for n, item in enumerate(value)]
            return {kind.__name__: items, "at": path}
        if kind is dict:
            return {"dict": self._items(value, path), "at": path}
        if kind in _RECORDS.values():
            return {"record": kind.__name__, "items": self._items(value, path), "at": path}
        if kind in (Array, SegmentedArray):
            about = [value.dtype, list(value.shape), value.stype]
            data = np.frombuffer(value.data, np.uint8)
            return {"Array": self._keep(data, path), "about": about, "at": path}
        if kind is np.ndarray and not value.dtype.hasobject:
            as_it_is = _is_as_it_is(value)
            kept = self._keep(value.copy() if as_it_is else _as_bytes(value), path)
            return {"numpy": kept, "as_it_is": as_it_is, "at": path}
        if kind is mx.array and value.dtype != mx.float64:
            mx.eval(value)
            return {"mlx": self._keep(value, path), "at": path}
        raise StateError(
            f"{path} is a {_class_name(value)}, which a run cannot keep to go on with later: make "
            "it of numbers, text, arrays, lists and dicts, or give the strategy state(), which "
            "returns what to keep, and load_state(kept); or keep no checkpoints with --keep 0."
        )

    def _items(self, value: Any, path: str) -> list[list[Any]]:
        return [
            [self.of(key, f"{path}'s key {key!r}"), self.of(item, f"{path}[{key!r}]")]
            for key, item in value.items()
        ]

    def _keep(self, array: mx.array | np.ndarray, path: str) -> str:
        self.arrays[path] = array
        return path


class _Restoration:
    """The walk back. ``now`` is what the strategy has in a value's place."""

    def __init__(self, arrays: Mapping[str, mx.array | np.ndarray], new: bool):
        self.arrays, self.new = arrays, new
        self.made: dict[str, Any] = {}

    def value(self, node: Any, now: Any, path: str) -> Any:
        if not isinstance(node, dict):  # all but plain values are kept as one
            return node
        if "function" in node:
            if not isinstance(now, _FUNCTIONS):
                raise StateError(f"{path} was a function, and the strategy has none there now.")
            return now
        if "scalar" in node:
            dtype, data = np.dtype(node["scalar"]), bytes.fromhex(node["bytes"])
            return np.frombuffer(data, dtype)[0] if dtype.itemsize else dtype.type()
        if "bytes" in node:
            return bytes.fromhex(node["bytes"])
        if "same" in node:
            return self.made[node["same"]]
        return self._object(node, now, path)

    def _object(self, node: dict[str, Any], now: Any, path: str) -> Any:
        made: Any
        match node:
            case {"own": own}:
                made = now
                _loader(now, path)(self.value(own, None, path))
            case {"strategy": name, "attributes": attributes}:
                if _class_name(now) != name:
                    raise StateError(f"{path} was a {name}, and is a {_class_name(now)} now.")
                made = self.made[node["at"]] = now
                for key in () if self.new else vars(now).keys() - attributes.keys():
                    del vars(now)[key]
                for key, value in attributes.items():
                    if key not in LEAST_NODES:
                        # Past what the class may do when an attribute is set.
                        vars(now)[key] = self.value(value, vars(now).get(key), f"{path}.{key}")
            case {"list": items}:
                made = self.made[node["at"]] = []
                made += self._list(items, now, path)
            case {"tuple": items}:
                made = tuple(self._list(items, now, path))
            case {"dict": items}:
                made = self.made[node["at"]] = {}
                made.update(self._items(items, now, path))
            case {"record": name, "items": items}:
                made = _RECORDS[name](dict(self._items(items, now, path)))
            case {"Array": key, "about": [dtype, shape, stype]}:
                made = Array(dtype, tuple(shape), stype, np.asarray(self.arrays[key]).tobytes())
            case {"numpy": key, "as_it_is": as_it_is}:
                made = np.array(self.arrays[key])
                if not as_it_is:
                    made = np.load(BytesIO(made.tobytes()), allow_pickle=False)
            case {"mlx": key}:
                made = self.arrays[key]
        self.made[node["at"]] = made
        return made

    def _list(self, nodes: list[Any], now: Any, path: str) -> Iterator[Any]:
        have = now if isinstance(now, (list, tuple)) else ()
        for place, node in enumerate(nodes):
            old = have[place] if place < len(have) else None
            yield self.value(node, old, f"{path}[{place}]")

    def _items(self, nodes: list[list[Any]], now: Any, path: str) -> Iterator[tuple[Any, Any]]:
        have = now if isinstance(now, dict) else {}
        for key_node, node in nodes:
            key = self.value(key_node, None, path)
            yield key, self.value(node, have.get(key), f"{path}[{key!r}]")


def _loader(now: Any, path: str) -> Callable[[Any], Any]:
    for _, load in _OWN:
        if callable(found := getattr(now, load, None)):
            return found
    raise StateError(f"{path} had a state of its own, and is a {_class_name(now)} now.")


def _class_name(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _is_as_it_is(array: np.ndarray) -> bool:
    """Whether safetensors hold the array itself; otherwise they hold NumPy's own format."""
    dtype = array.dtype
    held = dtype.kind in "biu" or dtype.name in ("float16", "float32")
    return held and dtype.isnative and array.flags.c_contiguous


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """NumPy's own format."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return np.frombuffer(buffer.getbuffer(), np.uint8)
