"""A module's arrays by name: which of them a federation trains, and how they go back in.

Three kinds of arrays make up a module. *Parameters* are floating and trainable: they are what
clients train and servers aggregate. *Statistics* are what the forward pass changes without a
gradient: the running mean and variance of normalization layers, and buffers that the task names.
Everything else is *frozen*
(a base model under LoRA, packed integers of a quantized layer) and stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import FedError
from . import module_state, randomness

Arrays = dict[str, mx.array]
Spec = dict[str, tuple[tuple[int, ...], str]]

PIECE = 2**18
"""Numbers of an array that are worked on at a time, at most."""
_STATISTICS = ("running_mean", "running_var")


class WeightsError(FedError, ValueError):
    """Arrays that do not fit the module they were meant for; the message names the first."""


class Slot(NamedTuple):
    """The one place where an array of a module is held: ``owner[key]``."""

    owner: Any
    key: Any

    def get(self) -> mx.array:
        return self.owner[self.key]


class Slots(NamedTuple):
    """Where a module's arrays are held, by kind and by name."""

    parameters: dict[str, Slot]
    statistics: dict[str, Slot]
    frozen: dict[str, Slot]


def build_model(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module, its random initial values drawn from ``seed``, with what it trains evaluated.

    Frozen arrays, a base model's from a file, need not be in memory before they are computed with:
    a server that only aggregates holds none of them.
    """
    module = make_module(model, seed)
    mx.eval(module.trainable_parameters())
    return module


def make_module(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module, of which nothing is evaluated.

    The global generators of MLX, NumPy and Python are seeded while it is made, so that it is the
    same in every process.
    """
    with randomness.generators_seeded(seed, "initial weights"):
        module = model()
    if not isinstance(module, nn.Module):
        raise TypeError(f"Task.model must return an mlx.nn.Module, not a {type(module).__name__}.")
    for name, each in module.named_modules():
        if "_no_grad" not in vars(each):  # MLX's own message is about an attribute of its own
            where = f" ({name})" if name else ""
            raise WeightsError(
                f"{type(each).__name__}{where} has an __init__ that does not call "
                "super().__init__(), without which MLX cannot train a module: call it there."
            )
    return module


def find_slots(module: nn.Module, is_buffer: Callable[[str], bool] = lambda name: False) -> Slots:
    """Where each array of ``module`` is held.

    ``is_buffer`` says which further arrays, private ones too, count as statistics.

    Names are those of ``mlx.utils.tree_flatten(module.parameters())``. A module reached by
    two paths (tied weights) is listed once, under the first. Frozen parameters, integers among
    the trainable and running statistics that an ``unfreeze()`` made trainable are not listed
    as parameters.

    Raises:
        WeightsError: If two arrays have one name (a dot in a dictionary's key), or one is
            float64: safetensors cannot hold it, and the frozen ones are saved, too.
    """
    slots = Slots({}, {}, {})
    seen: set[tuple[int, Any]] = set()
    names: set[str] = set()
    trainable = dict(tree_flatten(module.trainable_parameters()))
    for name, slot in _walk(module, ""):
        place = (id(slot.owner), slot.key)
        if place in seen:
            continue
        seen.add(place)
        if name in names:
            raise WeightsError(f"Two arrays of the model have the name {name!r}: rename one.")
        names.add(name)
        if slot.get().dtype == mx.float64:
            raise WeightsError(
                f"parameter {name!r} is float64, which safetensors lacks: make it float32"
            )
        if is_buffer(name) or (isinstance(slot.owner, nn.Module) and slot.key in _STATISTICS):
            slots.statistics[name] = slot
        elif name in trainable and mx.issubdtype(slot.get().dtype, mx.inexact):
            slots.parameters[name] = slot
        else:
            slots.frozen[name] = slot
    for name, slot in _hidden(module):
        if name not in names and is_buffer(name):
            slots.statistics[name] = slot
    return slots


def is_private(name: str) -> bool:
    """Whether MLX leaves an array out of ``parameters()`` and of files, by its name."""
    return any(key.startswith("_") for key in name.split("."))


def _hidden(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Every array that can be assigned, with those that ``parameters()`` leaves out."""
    for path, container in module_state.containers(module):
        if isinstance(container, tuple):
            continue
        items = dict.items(container) if isinstance(container, dict) else enumerate(container)
        for key, child in items:
            if isinstance(child, mx.array):
                yield f"{path}.{key}" if path else str(key), Slot(container, key)


def _walk(value: Any, name: str) -> Iterator[tuple[str, Slot]]:
    """Yields every array below ``value`` in the order of ``tree_flatten``."""
    is_module = isinstance(value, nn.Module)
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, child in items:
        if is_module and not nn.Module.valid_parameter_filter(value, key, child):
            continue
        child_name = f"{name}.{key}" if name else str(key)
        if isinstance(child, mx.array):
            yield child_name, Slot(value, key)
        elif isinstance(child, (dict, list)):
            yield from _walk(child, child_name)


def get(slots: Mapping[str, Slot]) -> Arrays:
    """The arrays in their slots, by name."""
    return {name: slot.get() for name, slot in slots.items()}


def put(slots: Mapping[str, Slot], arrays: Mapping[str, mx.array]) -> None:
    """Puts arrays into their slots, unchecked: see :func:`load` for arrays from elsewhere."""
    for name, array in arrays.items():
        slot = slots[name]
        slot.owner[slot.key] = module_state.reference(array)


def load(slots: Mapping[str, Slot], arrays: Mapping[str, mx.array]) -> None:
    """Puts arrays into their slots after checking that every one fits.

    Raises:
        WeightsError: If a name is missing or unknown, or a shape or dtype differs.
    """
    check(spec(get(slots)), spec(arrays))
    put(slots, arrays)


def dtype_name(dtype: mx.Dtype) -> str:
    """``"float32"`` for ``mx.float32``."""
    return str(dtype).removeprefix("mlx.core.")


def spec(arrays: Mapping[str, mx.array]) -> Spec:
    """The shape and dtype of each array, by name."""
    return {name: (tuple(a.shape), dtype_name(a.dtype)) for name, a in arrays.items()}


def size(spec: Spec) -> dict[str, int]:
    """How many arrays there are, and their numbers and bytes."""
    numbers = {name: math.prod(shape) for name, (shape, _) in spec.items()}
    total = sum(number * getattr(mx, spec[name][1]).size for name, number in numbers.items())
    return {"arrays": len(spec), "parameters": sum(numbers.values()), "bytes": total}


def check(expected: Spec, got: Spec) -> None:
    """Checks that ``got`` has the names, shapes and dtypes of ``expected``, in any order.

    Raises:
        WeightsError: Naming the first parameter that differs, and both shapes or dtypes.
    """
    for name in expected:
        if name not in got:
            raise WeightsError(f"parameter {name!r} is missing")
    for name in got:
        if name not in expected:
            raise WeightsError(f"parameter {name!r} is not one of the model's")
    for name, (shape, dtype) in expected.items():
        got_shape, got_dtype = got[name]
        if got_shape != shape:
            raise WeightsError(f"parameter {name!r} has shape {got_shape}, expected {shape}")
        if got_dtype != dtype:
            raise WeightsError(f"parameter {name!r} has dtype {got_dtype}, expected {dtype}")


class StackedRow(Mapping[str, mx.array]):
    """One entry along the leading axis of stacked arrays, sliced where it is asked for.

    Args:
        stack (dict): Arrays that are evaluated, by name.
        host (dict): Where their values in NumPy are kept, for all rows of the stack.
        index (int): Which entry this is.
    """

    def __init__(self, stack: Mapping[str, mx.array], host: dict[str, np.ndarray], index: int):
        self._stack, self._host, self._index = stack, host, index

    def __getitem__(self, name: str) -> mx.array:
        return self._stack[name][self._index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stack)

    def __len__(self) -> int:
        return len(self._stack)

    def float32(self, name: str) -> np.ndarray:
        """The values in NumPy, without a graph for each slice."""
        if name not in self._host:
            self._host[name] = to_float32(self._stack[name])
        return self._host[name][self._index]


class LazyArrays(Mapping[str, mx.array]):
    """Named arrays that are read one at a time, each when it is asked for.

    Args:
        spec (dict): The shape and dtype that each has, by name and in order.
        read (callable): Gives the array of a name.
        pieces (callable, optional): Gives what :func:`pieces` does, without the whole array in
            memory.
    """

    def __init__(
        self,
        spec: Spec,
        read: Callable[[str], mx.array],
        pieces: Callable[[str], Iterator[np.ndarray]] | None = None,
    ):
        self.spec, self._read = spec, read
        self.pieces = pieces or (lambda name: cut(to_float32(read(name))))

    def __getitem__(self, name: str) -> mx.array:
        if name not in self.spec:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec)

    def __len__(self) -> int:
        return len(self.spec)


def pieces(arrays: Mapping[str, mx.array], name: str) -> Iterator[np.ndarray]:
    """The values of an array as float32, flat and :data:`PIECE` at a time.

    A core's cache holds a piece: what is done with it costs little beside reading it from memory
    or from disk.
    """
    if isinstance(arrays, LazyArrays):
        return arrays.pieces(name)
    return cut(to_float32(arrays[name]))


def cut(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values of an array in memory, flat and :data:`PIECE` at a time."""
    flat = values.reshape(-1)
    return (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))


def to_float32(array: mx.array) -> np.ndarray:
    """The values of an array as float32 in NumPy: without a copy where that is what they are."""
    return np.asarray(array.astype(mx.float32))


def are_finite(arrays: Iterable[mx.array]) -> bool:
    """Whether no floating-point array has a value that is infinite or not a number."""
    floating = (array for array in arrays if mx.issubdtype(array.dtype, mx.floating))
    return all(is_finite(to_float32(array)) for array in floating)


def is_finite(values: np.ndarray, times: float = 1.0) -> bool:
    """Whether no value is infinite or not a number, nor would be ``times`` as large."""
    flat = np.ravel(values)
    with np.errstate(all="ignore"):
        # One pass at the speed of memory. Where the sum of squares is finite, so is each value,
        # times whatever is believed to be a number of examples.
        if np.isfinite(np.dot(flat, flat)):
            return True
        return bool(np.isfinite(flat * np.float32(times)).all())
