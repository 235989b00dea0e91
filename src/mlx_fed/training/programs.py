"""Compiled steps that are compared with the uncompiled step.

``mx.compile`` makes constants of what Python computes while the step is traced: random numbers
without a key, values of other generators and of clocks are the same at each later step. And it
cannot trace control flow on an array's value. In both cases the step runs uncompiled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import randomness
from .python_state import PythonState

Seed = tuple[int, *tuple[int | str, ...]]
"""Arguments of :func:`~mlx_fed.arrays.randomness.derive`."""

_SERIAL_NUMBERS = count()
_TOLERANCE = 1e-3
"""Tolerance of a comparison, relative to the largest value of the array."""
_NOISE = 1e-5
"""The same, relative to the largest value of all arrays, for arrays of rounding errors around 0."""


CHANGES_STATE = (
    "it changes a global or closure variable, or an attribute, of Python, that it reads as well"
)


class NotPure(Exception):
    """A step that draws random numbers without a key among its arguments."""


class Program:
    """Step of arrays to arrays, compiled where the result is the same.

    The results of the 1st, 2nd, 4th, 8th ... call are compared with those of the uncompiled step.
    If they differ, if the step changes Python state that it reads, if it draws random numbers
    without a key, or if it cannot be compiled, it runs uncompiled from then on.

    Args:
        step (callable): The step.
        compared_arrays (callable): ``compared_arrays(result)`` returns the arrays to compare, by
            name.
        compile (bool): ``False`` runs the step uncompiled.
        note (callable): ``note(text)`` logs why the step is not compiled.
        name (str): The step's name, for that.
        python_state (PythonState): What the step reads of Python.
        raises (type, optional): Exceptions of the step that are passed on without another run.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        compared_arrays: Callable[[Any], dict[str, mx.array]],
        compile: bool,
        note: Callable[[str], None],
        name: str,
        python_state: PythonState,
        raises: type[Exception] | tuple[()] = (),
    ):
        self._step, self._note, self._name = step, note, name
        self._compared_arrays = compared_arrays
        self._compiled = compiled(pure(step)) if compile else None
        self._calls = 0
        self._has_changed_state = False
        self._python_state = python_state
        self._raises = raises

    def __call__(self, seed: Seed, *arguments: Any) -> Any:
        """Result of the step.

        Args:
            seed (tuple): Seed of NumPy's, Python's and MLX's generators for an uncompiled run.
            arguments: The step's, trees of arrays.
        """
        if self._compiled is None:
            return self._run_uncompiled(seed, arguments)
        number = self._calls + 1
        plain: Any = None
        is_compared = not number & (number - 1)
        if is_compared:  # before a trace, which would leave its arrays in what a step changes
            state = self._python_state.snapshot()
            plain = self._run_uncompiled(seed, arguments)  # raises an exception of the task
            if self._python_state.snapshot() != state:
                if self._has_changed_state:
                    self._stop_compiling(CHANGES_STATE)
                self._has_changed_state = True  # or has filled a cache, once
                return plain
        try:
            result = self._compiled(*arguments)
            self._calls = number
            if not is_compared:
                return result
            mx.eval(result)
        except Exception as error:
            if isinstance(error, self._raises):
                raise
            if not is_compared:
                plain = self._run_uncompiled(seed, arguments)
            is_random = isinstance(error, NotPure)
            self._stop_compiling(str(error) if is_random else f"{type(error).__name__}: {error}")
            return plain
        difference = find_difference(self._compared_arrays(result), self._compared_arrays(plain))
        if difference is None:
            return result
        self._stop_compiling(f"compiled, {difference}: it may depend on more than its arguments")
        return plain

    def _stop_compiling(self, reason: str) -> None:
        self._compiled = None
        self._note(f"{self._name} is not compiled: {reason}")

    def _run_uncompiled(self, seed: Seed, arguments: tuple[Any, ...]) -> Any:
        with randomness.seed_generators(*seed):
            return self._step(*arguments)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile`` of a function that may be freed before the process ends.

    MLX caches programs by thread and by the address of their function. When a function is freed,
    only the thread that last called it drops its programs; in any other, a new function at the same
    address would silently run the old one's (seen in MLX 0.32). A constant argument, different for
    each function, distinguishes them.
    """
    program = mx.compile(lambda number, *args: function(*args))
    return partial(program, next(_SERIAL_NUMBERS))


def pure(step: Callable[..., Any]) -> Callable[..., Any]:
    """Step that raises :class:`NotPure` while it is traced if a random state has changed."""

    def traced(*arguments: Any) -> Any:
        states = generator_states()
        result = step(*arguments)
        for name, state in generator_states().items():
            if state is not states[name] and state != states[name]:
                raise NotPure(
                    f"it draws from {name}, so that each step would have the same random numbers. "
                    "Call mx.random's functions by that name (not imported alone), or use the key "
                    "that Task.augment is given"
                )
        return result

    return traced


def generator_states() -> dict[str, Any]:
    """States of the global random generators by name, to be compared by ``==``."""
    keys: Any = mx.random.state
    state: Any = np.random.get_state()
    return {
        "MLX's random state": _ArrayIdentity(keys[0]),
        "NumPy's random state": (state[1].tobytes(), state[2]),
        "Python's random state": random.getstate(),
    }


class _ArrayIdentity:
    """Array compared by identity: a draw replaces the random state's array."""

    def __init__(self, array: mx.array):
        self._array = array

    def __eq__(self, value: object) -> bool:
        return isinstance(value, _ArrayIdentity) and value._array is self._array

    __hash__ = None  # type: ignore[assignment]


def find_difference(
    results: Mapping[str, mx.array],
    reference: Mapping[str, mx.array],
    tolerance: float = _TOLERANCE,
    noise: float = _NOISE,
) -> str | None:
    """First array that differs from the reference by more than rounding, in words, or ``None``.

    Values that are not finite and the same in both are equal.

    Args:
        results (dict): Arrays by name.
        reference (dict): Arrays of the same names.
        tolerance (float): Relative to the largest value of the array, in float32; 16-bit
            arrays have 30 times as much.
        noise (float): Relative to the largest value of all arrays.
    """
    plain = {name: _values(array) for name, array in reference.items()}
    sizes = {
        name: float(np.abs(values[np.isfinite(values)]).max(initial=0))
        for name, values in plain.items()
    }
    largest = max(sizes.values(), default=0.0)
    for name, array in reference.items():
        if name not in results:
            return f"{name} is zero, which it is not in the plain result"
        if results[name].shape != array.shape:
            return f"{name} has the shape {results[name].shape}, not {array.shape}"
        factor = 1.0 if array.dtype.size >= 4 else 30.0
        size, values = sizes[name], _values(results[name])
        with np.errstate(invalid="ignore"):
            errors = np.abs(values - plain[name])
        is_equal = (values == plain[name]) | (np.isnan(values) & np.isnan(plain[name]))
        error = float(np.where(is_equal, 0.0, errors).max(initial=0))
        if not error <= factor * max(tolerance * size, noise * largest):
            return f"{name} differs from the plain result by {error:.2g}, where that is {size:.2g}"
    return None


def _values(array: mx.array) -> np.ndarray:
    """Values of an array in float64 or complex128."""
    if array.dtype == mx.complex64:
        return np.asarray(array).astype(np.complex128)
    return np.asarray(array.astype(mx.float32)).astype(np.float64)
