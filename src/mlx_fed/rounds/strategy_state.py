"""State of a strategy: what it needs to continue a run as if the run had not stopped.

It is what ``vars()`` of the strategy holds, all the way down, over a closed set of types. Nothing
is pickled: a tree of JSON names the values, and arrays lie beside it. Whatever else a strategy
holds is refused by its name, unless it says itself what to keep, with ``state()`` and
``load_state()``.
"""

from __future__ import annotations

from collections.abc import Mapping
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

_PLAIN = (type(None), bool, int, float, str)
FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
RECORDS = {kind.__name__: kind for kind in (ArrayRecord, ConfigRecord, MetricRecord)}
STATE_METHODS = (("state", "load_state"), ("state_dict", "load_state_dict"))
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


class _Snapshot:
    """A walk over values. What is met twice is kept once, and is one object again afterwards."""

    def __init__(self) -> None:
        self.arrays: dict[str, mx.array | np.ndarray] = {}
        self.seen: dict[int, str] = {}
        self.alive: list[Any] = []

    def of(self, value: Any, path: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, FUNCTIONS):
            return {"function": path}
        if isinstance(value, np.generic) and not value.dtype.hasobject:
            return {"scalar": value.dtype.str, "bytes": value.tobytes().hex()}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if id(value) in self.seen:
            path_before = self.seen[id(value)]
            if path.startswith(path_before) and type(value) is tuple:
                raise StateError(f"{path} is a tuple within itself, which a run cannot keep.")
            return {"same": path_before}
        self.seen[id(value)] = path
        self.alive.append(value)  # or another object may come to have its id
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value)
        for get, load in STATE_METHODS:
            if callable(getattr(value, get, None)) and callable(getattr(value, load, None)):
                return {"own": self.of(getattr(value, get)(), f"{path}.{get}()"), "at": path}
        if isinstance(value, Strategy):
            attributes = {k: self.of(v, f"{path}.{k}") for k, v in vars(value).items()}
            return {"strategy": class_name(value), "attributes": attributes, "at": path}
        if kind in (list, tuple):
            items = [self.of(item, f"{path}[{n}]") for n, item in enumerate(value)]
            return {kind.__name__: items, "at": path}
        if kind is dict:
            return {"dict": self._items(value, path), "at": path}
        if kind in RECORDS.values():
            return {"record": kind.__name__, "items": self._items(value, path), "at": path}
        if kind in (Array, SegmentedArray):
            header = [value.dtype, list(value.shape), value.stype]
            data = np.frombuffer(value.data, np.uint8)
            return {"Array": self._keep(data, path), "about": header, "at": path}
        if kind is np.ndarray and not value.dtype.hasobject:
            as_it_is = _is_as_it_is(value)
            key = self._keep(value.copy() if as_it_is else _as_bytes(value), path)
            return {"numpy": key, "as_it_is": as_it_is, "at": path}
        if kind is mx.array and value.dtype != mx.float64:
            mx.eval(value)
            return {"mlx": self._keep(value, path), "at": path}
        raise StateError(
            f"{path} is a {class_name(value)}, which a run cannot keep to go on with later: make "
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


def class_name(value: Any) -> str:
    """The full name of a value's class."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _is_as_it_is(array: np.ndarray) -> bool:
    """Whether safetensors hold the array itself; otherwise they hold NumPy's own format."""
    dtype = array.dtype
    is_supported = dtype.kind in "biu" or dtype.name in ("float16", "float32")
    return is_supported and dtype.isnative and array.flags.c_contiguous


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """NumPy's own format."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return np.frombuffer(buffer.getbuffer(), np.uint8)
