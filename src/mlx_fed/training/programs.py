"""A step as a compiled program that is held to the step itself.

``mx.compile`` keeps what Python computed while the step was traced: random numbers that are drawn
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

Seed = tuple[int, *tuple[int | str, ...]]
"""What :func:`~mlx_fed.arrays.randomness.derive` takes."""

_SERIAL_NUMBERS = count()
_TOLERANCE = 1e-3
"""How far a result may be from the plain one, relative to the largest value of its array."""
_NOISE = 1e-5
"""The same, relative to the largest value of all arrays: where an array is 0 but for rounding."""


class NotPure(Exception):
    """A step that draws random numbers which are not among its arguments."""


class Program:
    """A step of arrays to arrays, compiled where that gives the same result.

    The results of the 1st, 2nd, 4th, 8th ... call are compared with the step's own. If they differ,
    if the step draws random numbers without a key, or if it cannot be compiled, it runs uncompiled
    from then on.

    Args:
        step (callable): What is run.
        figures (callable): ``figures(result)`` gives the arrays of a result that are compared, by
            name.
        compile (bool): ``False`` runs the step uncompiled.
        note (callable): Told in words why the step is not compiled.
        what (str): What the step does, for that.
        raises (type, optional): An exception of the step's own that is no reason to run it
            uncompiled.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        figures: Callable[[Any], dict[str, mx.array]],
        compile: bool,
        note: Callable[[str], None],
        what: str,
        raises: type[Exception] | tuple[()] = (),
    ):
        self._step, self._figures, self._note, self._what = step, figures, note, what
        self._compiled = compiled(pure(step)) if compile else None
        self._calls = 0
        self._raises = raises

    def __call__(self, seed: Seed, *arguments: Any) -> Any:
        """The step's result.

        Args:
            seed (tuple): Where the step runs uncompiled, NumPy's, Python's and MLX's own
                generators are seeded with it.
            arguments: The step's, trees of arrays.
        """
        if self._compiled is None:
            return self._run_uncompiled(seed, arguments)
        why: Exception | None = None
        result: Any = None
        try:
            result = self._compiled(*arguments)
            self._calls += 1
            if self._calls & (self._calls - 1):
                return result
            mx.eval(result)
        except Exception as error:
            if isinstance(error, self._raises):
                raise
            why = error
        plain = self._run_uncompiled(seed, arguments)  # raises what the task itself raises
        if why is None:
            difference = find_difference(self._figures(result), self._figures(plain))
            if difference is None:
                return result
            reason = f"compiled, {difference}: it may depend on more than its arguments"
        else:
            reason = str(why) if isinstance(why, NotPure) else f"{type(why).__name__}: {why}"
        self._compiled = None
        self._note(f"{self._what} is not compiled: {reason}")
        return plain

    def _run_uncompiled(self, seed: Seed, arguments: tuple[Any, ...]) -> Any:
        with randomness.seed_generators(*seed):
            return self._step(*arguments)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile`` of a function that does not live as long as the process.

    MLX keeps programs by thread and by the address of their function. When a function goes, only
    the thread that last called it forgets its programs; in any other, a new function at the same
    address would silently run the old one's (seen in MLX 0.32). A constant among the arguments,
    different for each function, tells them apart.
    """
    program = mx.compile(lambda number, *args: function(*args))
    return partial(program, next(_SERIAL_NUMBERS))


def pure(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, which raises :class:`NotPure` while it is traced if a generator has moved on."""

    def traced(*arguments: Any) -> Any:
        before = _generator_states()
        result = step(*arguments)
        for name, state in _generator_states().items():
            if state is not before[name] and state != before[name]:
                raise NotPure(
                    f"it draws from {name}, so that each step would have the same random numbers. "
                    "Call mx.random's functions by that name (not imported alone), or use the key "
                    "that Task.augment is given"
                )
        return result

    return traced


def _generator_states() -> dict[str, Any]:
    keys: Any = mx.random.state
    state: Any = np.random.get_state()
    return {
        "MLX's random state": _Same(keys[0]),
        "NumPy's random state": (state[1].tobytes(), state[2]),
        "Python's random state": random.getstate(),
    }


class _Same:
    """An array that is equal to itself alone: one that is drawn from is replaced."""

    def __init__(self, array: mx.array):
        self._array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._array is self._array

    __hash__ = None  # type: ignore[assignment]


def find_difference(
    results: Mapping[str, mx.array],
    expected: Mapping[str, mx.array],
    tolerance: float = _TOLERANCE,
    noise: float = _NOISE,
) -> str | None:
    """The first array that differs from the expected one by more than rounding, in words.

    Values that are not finite and the same in both are equal.

    Args:
        results (dict): Arrays by name.
        expected (dict): Arrays of the same names.
        tolerance (float): Relative to the largest value of the array, in float32; 16-bit
            arrays have 30 times as much.
        noise (float): Relative to the largest value of all arrays.
    """
    plain = {name: _values(array) for name, array in expected.items()}
    sizes = {
        name: float(np.abs(values[np.isfinite(values)]).max(initial=0))
        for name, values in plain.items()
    }
    largest = max(sizes.values(), default=0.0)
    for name, array in expected.items():
        if name not in results:
            return f"{name} is zero, which it is not in the plain result"
        if results[name].shape != array.shape:
            return f"{name} has the shape {results[name].shape}, not {array.shape}"
        factor = 1.0 if array.dtype.size >= 4 else 30.0
        size, values = sizes[name], _values(results[name])
        with np.errstate(invalid="ignore"):
            errors = np.abs(values - plain[name])
        same = (values == plain[name]) | (np.isnan(values) & np.isnan(plain[name]))
        error = float(np.where(same, 0.0, errors).max(initial=0))
        if not error <= factor * max(tolerance * size, noise * largest):
            return f"{name} differs from the plain result by {error:.2g}, where that is {size:.2g}"
    return None


def _values(array: mx.array) -> np.ndarray:
    """Values in float64 or complex128."""
    if array.dtype == mx.complex64:
        return np.asarray(array).astype(np.complex128)
    return np.asarray(array.astype(mx.float32)).astype(np.float64)
