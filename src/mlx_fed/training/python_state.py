"""Snapshots of the Python state that functions read: the values that a trace makes constants.

A compiled step has the value of each global, closure variable and attribute at the time of its
trace. So a program is keyed by a snapshot of them, and traced anew where one has changed.
"""

from __future__ import annotations

import pickle
import random
import sys
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from functools import lru_cache, partial
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

Snapshot = tuple[Hashable, ...]
"""Values in the order in which they are found, to be compared by ``==``."""

_MOST_VALUES = 20_000
"""Values of a snapshot, so that a function that reads a large table costs little."""
_MOST_BYTES = 2**16
"""Bytes of an array that is compared whole; of a larger one a sample."""
_LIBRARIES = {
    *sys.stdlib_module_names,
    *("PIL", "datasets", "flwr", "flwr_datasets", "matplotlib", "mlx", "mlx_fed", "mlx_lm"),
    *("nanobind", "numpy", "pandas", "scipy", "sklearn", "tokenizers", "torch", "transformers"),
} - {"__main__"}
"""Top-level modules whose functions and globals are not read."""
_NOT_READ = {"__init__", "__new__", "__repr__", "__init_subclass__", "__class_getitem__"}
_OPTIMIZER_STATE = {"_state", "_initialized"}
_ATOMS = (type(None), bool, int, float, complex, str, bytes, CodeType)


class PythonState:
    """Python state that functions read.

    Of a function: its code, default arguments, closure, and the globals that it names. Of an
    object: its methods and the attributes that one of the functions names. Of layers and
    optimizers: all attributes but arrays and an optimizer's state. Of a container: its items.

    Args:
        values: Functions, and objects that they read.

    Example:
        >>> rates = {"first": 0.1}
        >>> state = PythonState(lambda step: rates["first"])
        >>> before = state.snapshot()
        >>> rates["first"] = 0.2
        >>> before == state.snapshot()
        False
    """

    def __init__(self, *values: Any):
        self._values = values
        self._names: set[str] = set()

    def snapshot(self) -> Snapshot:
        """The state now."""
        while True:
            walk = _Walk(self._names)
            walk.visit(self._values)
            if walk.names <= self._names:
                return tuple(walk.tokens)
            self._names |= walk.names


class _Walk:
    """Walk through values, each once.

    Args:
        read_names (set): Names of attributes that functions read.

    Attributes:
        tokens (list): The snapshot.
        names (set): Names in the functions that were visited.
    """

    def __init__(self, read_names: Set[str]):
        self.read_names = read_names
        self.tokens: list[Any] = []
        self.names: set[str] = set()
        self._numbers: dict[int, int] = {}
        self._values: list[Any] = []  # kept, or another value could have its address

    def visit(self, value: Any) -> None:
        """Adds a value."""
        if isinstance(value, _ATOMS):
            is_number = isinstance(value, (bool, int, float, complex))
            self.tokens.append(repr(value) if is_number else value)  # 1, 1.0 and True differ
            return
        if len(self.tokens) > _MOST_VALUES:
            return
        number = self._numbers.setdefault(id(value), len(self._values))
        self.tokens.append(number)
        if number == len(self._values):
            self._values.append(value)
            self._visit_first(value)

    def _visit_first(self, value: Any) -> None:
        if isinstance(value, (mx.array, np.ndarray, np.generic)):
            self.tokens.append(_array_token(value))
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, MethodType):
            self.visit((value.__func__, value.__self__))
        elif isinstance(value, partial):
            self.visit((value.func, value.args, value.keywords))
        elif isinstance(value, ModuleType):
            self.tokens.append(value.__name__)
            if not _is_library(value):
                self._visit_pairs(self._read(vars(value)))
        elif isinstance(value, (nn.Module, optim.Optimizer)):
            self.tokens.append(type(value))
            self._visit_pairs(_attributes(value))
            self._visit_pairs(self._read_members(type(value)))
        elif isinstance(value, (dict, MappingProxyType)):
            self._visit_pairs(list(value.items()))
        elif isinstance(value, (list, tuple)):
            self._visit_pairs(enumerate(list(value)))
        elif isinstance(value, (set, frozenset)):
            self._visit_pairs(enumerate(sorted(value, key=repr)))
        elif isinstance(value, type):
            self.tokens.append(value)
            self._visit_pairs(self._read_members(value))
        else:
            self._visit_object(value)

    def _visit_object(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, random.Random):
            self.tokens.append(value.getstate())
            return
        attributes = getattr(value, "__dict__", None)
        if _is_library(kind) and (attributes is None or not _is_standard(kind)):
            self.tokens.append(_library_token(value))
            return
        self.tokens.append(kind)
        self._visit_pairs(self._read(attributes or {}))
        slots = [name for base in kind.__mro__ for name in vars(base).get("__slots__", ())]
        self._visit_pairs((name, getattr(value, name)) for name in slots if hasattr(value, name))
        self._visit_pairs(self._read_members(kind))

    def _visit_function(self, function: FunctionType) -> None:
        self.tokens.append(function.__code__)
        self.visit((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # it has no value yet
                self.tokens.append("no value")
        if _is_library(function):
            return
        names = _names(function.__code__)
        self.names.update(names)
        scope = function.__globals__
        self._visit_pairs((name, scope[name]) for name in names if name in scope)
        imported = (name for name in names if name in sys.modules and name not in scope)
        self._visit_pairs((name, sys.modules[name]) for name in imported)

    def _visit_pairs(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, child in pairs:
            if len(self.tokens) > _MOST_VALUES:
                return
            self.tokens.append(key if isinstance(key, str) else repr(key))
            self.visit(child)

    def _read(self, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Those of the attributes that a function reads."""
        by_name = bool({"__dict__", "getattr", "vars"} & self.read_names)
        return ((n, v) for n, v in attributes.items() if by_name or n in self.read_names)

    def _read_members(self, kind: type) -> Iterator[tuple[str, Any]]:
        """Methods and attributes of a class and its bases that a function reads, or Python does."""
        for base in kind.__mro__:
            if _is_library(base):
                continue
            for name, member in list(vars(base).items()):
                is_special = isinstance(member, FunctionType) and name.startswith("__")
                if name in self.read_names or (is_special and name not in _NOT_READ):
                    member = member.fget if isinstance(member, property) else member
                    yield name, getattr(member, "__func__", member)


def _attributes(value: nn.Module | optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Attributes of a module of layers, without arrays, or of an optimizer, without its state."""
    if isinstance(value, optim.Optimizer):
        return ((name, v) for name, v in vars(value).items() if name not in _OPTIMIZER_STATE)
    pairs = [*vars(value).items(), *dict.items(value)]
    return ((name, child) for name, child in pairs if not isinstance(child, mx.array))


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """Names of globals and attributes in a function, and in the functions within it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= set(_names(constant))
    return tuple(sorted(names))


def _root(value: Any) -> str:
    """Top-level module of a module, class or function."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return str(name).partition(".")[0]


def _is_library(value: Any) -> bool:
    return _root(value) in _LIBRARIES


def _is_standard(value: Any) -> bool:
    return _root(value) in sys.stdlib_module_names


def _array_token(array: Any) -> Hashable:
    """Shape, dtype and checksum of an array's values, of a large array a sample of them."""
    values: Any
    if isinstance(array, mx.array):
        values = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
        values = values.reshape(-1)
    else:
        values = np.asarray(array).reshape(-1)
    step = max(1, array.nbytes // _MOST_BYTES)
    try:
        sample = np.ascontiguousarray(np.asarray(values[::step]))
    except Exception:  # a tracer that was left behind
        return _Same(array)
    return array.shape, str(array.dtype), zlib.crc32(sample.tobytes())


class _Same:
    """Value that is equal to itself alone."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def _library_token(value: Any) -> Hashable:
    """Token of an object of a library's: its content where it may be pickled and is no function."""
    if callable(value) or hasattr(value, "__dict__"):
        return _Same(value)
    try:
        return pickle.dumps(value)
    except Exception:
        return _Same(value)
