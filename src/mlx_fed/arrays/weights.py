"""The weights of an MLX module by name: parameters, running statistics and frozen arrays.

*Parameters* are floating and trainable: clients train them and the server aggregates them.
*Statistics* change in the forward pass without a gradient: the running mean and variance of
normalization layers, and buffers that the task names. All other arrays are *frozen* (a base model
under LoRA, packed integers of a quantized layer) and do not travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import module_state, randomness
from .named_arrays import Arrays, WeightsError, check, spec

_STATISTICS = ("running_mean", "running_var")


class Slot(NamedTuple):
    """A reference to an array in a module or a container: ``owner[key]``."""

    owner: Any
    key: Any

    def get(self) -> mx.array:
        return self.owner[self.key]


class Slots(NamedTuple):
    """The slots of a module's arrays, by kind and by name; further names of tied weights."""

    parameters: dict[str, Slot]
    statistics: dict[str, Slot]
    frozen: dict[str, Slot]
    aliases: dict[str, list[str]]

    def kinds(self) -> dict[str, dict[str, Slot]]:
        """The slots of each kind of array, by what the kind is called."""
        return {name: getattr(self, name) for name in ("parameters", "statistics", "frozen")}


def build_model(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module with initial weights drawn from ``seed`` and evaluated trainable parameters.

    Frozen arrays, such as a base model's from a file, stay lazy: a server that only aggregates
    holds none of them in memory.
    """
    module = make_module(model, seed)
    mx.eval(module.trainable_parameters())
    return module


def make_module(model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module with initial weights drawn from ``seed``; no array is evaluated.

    The global generators of MLX, NumPy and Python are seeded while ``model`` runs, so that the
    weights are the same in every process.
    """
    with randomness.seed_generators(seed, "initial weights"):
        module = model()
    if not isinstance(module, nn.Module):
        raise TypeError(f"Task.model must return an mlx.nn.Module, not a {type(module).__name__}.")
    for name, submodule in module.named_modules():
        if "_no_grad" not in vars(submodule):  # MLX's own message is about an attribute of its own
            where = f" ({name})" if name else ""
            raise WeightsError(
                f"{type(submodule).__name__}{where} has an __init__ that does not call "
                "super().__init__(), without which MLX cannot train a module: call it there."
            )
    return module


def find_slots(module: nn.Module, is_buffer: Callable[[str], bool] = lambda name: False) -> Slots:
    """The slot of each array of ``module``.

    ``is_buffer`` selects further arrays, private ones too, that count as statistics.

    Names are those of ``mlx.utils.tree_flatten(module.parameters())``. A module reached by
    two paths (tied weights) is listed once, under the first. Frozen parameters, integers among
    the trainable and running statistics that an ``unfreeze()`` made trainable are not listed
    as parameters.

    Raises:
        WeightsError: If two arrays have one name (a dot in a dictionary's key), or one is
            float64: safetensors cannot hold it, and the frozen ones are saved, too.
    """
    slots = Slots({}, {}, {}, {})
    first_names: dict[tuple[int, Any], str] = {}
    names: set[str] = set()
    trainable = dict(tree_flatten(module.trainable_parameters()))
    for name, slot in _walk(module, ""):
        slot_id = (id(slot.owner), slot.key)
        if slot_id in first_names:
            slots.aliases.setdefault(first_names[slot_id], []).append(name)
            continue
        first_names[slot_id] = name
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
    for name, slot in _assignable(module):
        if name not in names and is_buffer(name):
            slots.statistics[name] = slot
    return slots


def is_private(name: str) -> bool:
    """Whether an array of this name is private: MLX omits it from ``parameters()`` and files."""
    return any(key.startswith("_") for key in name.split("."))


def _assignable(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yields every assignable array, with those that ``parameters()`` omits."""
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
    """Assignment of arrays to their slots, unchecked: :func:`load` checks them."""
    for name, array in arrays.items():
        slot = slots[name]
        slot.owner[slot.key] = module_state.alias(array)


def load(slots: Mapping[str, Slot], arrays: Mapping[str, mx.array]) -> None:
    """Assignment of arrays to their slots after a check that every one fits.

    Raises:
        WeightsError: If a name is missing or unknown, or a shape or dtype differs.
    """
    check(spec(get(slots)), spec(arrays))
    put(slots, arrays)
