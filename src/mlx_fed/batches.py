"""A client's examples in batches: which make up each step, and the arrays that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import randomness
from .errors import FedError
from .randomness import Moment
from .task import Config, Data, Task
from .task_config import KINDS

_TAIL_SIZES = 8
"""How many sizes a padded last batch may have: each is one more trace of a program."""

Batch = tuple[tuple[mx.array, ...], mx.array | None, int]
"""Arrays with a leading axis of examples, the mask of the padding, the number of examples."""


class Rows(NamedTuple):
    """The examples of one step.

    ``indices`` is a NumPy array of shape (batch,) and dtype uint32; the first ``size`` are
    examples, what follows is padding, to be masked out.
    """

    indices: np.ndarray
    size: int

    def mask(self) -> np.ndarray | None:
        """float32 of shape (batch,): 1 for an example, 0 for padding; ``None`` if all are 1."""
        if self.size == len(self.indices):
            return None
        return (np.arange(len(self.indices)) < self.size).astype(np.float32)


class Lengths(NamedTuple):
    """How long a client trains: ``steps``, or else ``epochs``, of ``batch_size`` examples."""

    batch_size: int
    epochs: int
    steps: int | None


def load(task: Task, partition_id: int, num_partitions: int | None) -> Data:
    """A partition's data, its arrays as MLX's: NumPy's are not kept beside them.

    Raises:
        FedError: If ``task.data`` returns something else.
    """
    data = task.data(partition_id, num_partitions)
    if not isinstance(data, Data):
        raise FedError(f"Task.data must return mlx_fed.Data, not a {type(data).__name__}")
    return Data(_converted(data.train), _converted(data.test))


def _converted(examples: Any) -> Any:
    return examples if examples is None or callable(examples) else as_arrays(examples)


def as_arrays(arrays: Sequence[Any]) -> tuple[mx.array, ...]:
    """NumPy or MLX arrays as evaluated MLX arrays: the one copy that is made of a split."""
    converted = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in arrays)
    mx.eval(converted)
    return converted


class Batches:
    """Gives out the batches that a task's model trains and is evaluated on.

    Args:
        task (Task): Whose settings say how many examples a step has.
        model (nn.Module): Asked what its loss and metrics give.
        masked (bool): Whether padding can be masked out at all. Running statistics are taken
            over the whole batch, so padding would count in them.
    """

    def __init__(self, task: Task, model: nn.Module, masked: bool):
        self.task, self.model, self.masked = task, model, masked
        self._paddable: dict[tuple, bool] = {}
        self._arrays: dict[int, tuple[Sequence[Any], tuple[mx.array, ...]]] = {}

    def training(self, data: Data, config: Config, moment: Moment) -> Iterator[Batch]:
        """A client's batches in a round, shuffled by its keys of that moment."""
        if callable(data.train):
            length = lengths(self.task, config)
            passes = count() if length.steps else range(length.epochs)
            keys = (randomness.key(*moment, "shuffle", number) for number in passes)
            return islice(_streamed(data.train, keys), length.steps)
        arrays = self._resident(data.train)
        return _taken(arrays, self.rows(arrays, config, moment))

    def evaluation(self, examples: Any) -> Iterator[Batch]:
        """All examples of a split, in order."""
        if callable(examples):
            return _streamed(examples, [randomness.key(0, "evaluate")])
        arrays = self._resident(examples)
        padded = self._can_pad(arrays, None, self.task.loss, *self.task.metrics.values())
        size = self.task.eval_batch_size
        return _taken(arrays, epoch(len(arrays[0]), size, padded, None))

    def rows(self, arrays: tuple[mx.array, ...], config: Config, moment: Moment) -> Iterator[Rows]:
        """Which examples each step of a client's training takes."""
        length = lengths(self.task, config)
        total = len(arrays[0])
        padded = self._can_pad(arrays, self.task.augment, self.task.loss)
        passes = count() if length.steps and total else range(length.epochs)
        epochs = (
            epoch(total, length.batch_size, padded, randomness.derive(*moment, "shuffle", number))
            for number in passes
        )
        return islice(chain.from_iterable(epochs), length.steps)

    def _resident(self, examples: Sequence[Any]) -> tuple[mx.array, ...]:
        """The split as MLX arrays, converted once for as long as the same split comes back."""
        held = self._arrays.get(id(examples))
        if held is None or held[0] is not examples:
            self._arrays = dict(list(self._arrays.items())[-1:])
            held = (examples, as_arrays(examples))
        self._arrays.pop(id(examples), None)
        self._arrays[id(examples)] = held  # the last used is the last to go
        return held[1]

    def _can_pad(
        self, arrays: tuple[mx.array, ...], augment: Callable | None, *functions: Callable
    ) -> bool:
        """Whether each function gives one value an example, so that padding can be masked out."""
        if not self.masked or len(arrays[0]) == 0:
            return False
        asked = (augment, functions, tuple((a.shape[1:], a.dtype) for a in arrays))
        if asked not in self._paddable:
            probe: Any = [mx.take(array, mx.array([0, 0, 0]), axis=0) for array in arrays]
            if augment:
                probe = augment(randomness.key(0, "augment"), *probe)
            self._paddable[asked] = _gives_one_value_an_example(functions, self.model, probe)
        return self._paddable[asked]


def lengths(task: Task, config: Config) -> Lengths:
    """A task's lengths, with the server's settings over them.

    Raises:
        SettingsError: If a setting is not a whole number of 1 or more.
    """
    for name in ("batch-size", "local-epochs", "local-steps"):
        if name in config:
            KINDS[name].check("", f"The setting {name}", config[name])
    steps = config.get("local-steps", task.local_steps)
    return Lengths(
        int(config.get("batch-size", task.batch_size)),
        int(config.get("local-epochs", task.local_epochs)),
        None if steps is None else int(steps),
    )


def epoch(num_examples: int, batch_size: int, padded: bool, seed: int | None) -> Iterator[Rows]:
    """The steps of one pass over ``num_examples`` examples.

    Args:
        num_examples (int): How many examples there are.
        batch_size (int): Examples a step.
        padded (bool): Pad the last batch to a multiple of an eighth of ``batch_size``, so that
            clients of any number of examples share a few programs.
        seed (int, optional): Shuffle by this seed. In order without.
    """
    # NumPy's shuffle: MLX's would wait for the device, and is slower on the CPU.
    order = np.arange(num_examples, dtype=np.uint32)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, num_examples, batch_size):
        rows = order[start : start + batch_size]
        count = len(rows)
        if padded and count < batch_size:
            rows = np.resize(rows, padded_size(count, batch_size))
        yield Rows(rows, count)


def padded_size(count: int, batch_size: int) -> int:
    """The size that a batch of ``count`` examples is padded to."""
    step = -(-batch_size // _TAIL_SIZES)
    return min(batch_size, -(-count // step) * step)


def _gives_one_value_an_example(
    functions: Sequence[Callable], model: nn.Module, probe: Any
) -> bool:
    """Whether each loss or metric returns a vector with a value for each example of ``probe``.

    Nothing is evaluated: the shapes of a lazy graph are known when it is built.
    """
    outputs = [function(model, *probe) for function in functions]
    shape = (len(probe[0]),)
    return all(isinstance(output, mx.array) and output.shape == shape for output in outputs)


def _streamed(examples: Callable, keys: Iterable[mx.array]) -> Iterator[Batch]:
    for key in keys:
        empty = True
        for batch in examples(key):
            empty = False
            arrays = tuple(a if isinstance(a, mx.array) else mx.array(a) for a in batch)
            yield arrays, None, len(arrays[0])
        if empty:
            return


def _taken(arrays: tuple[mx.array, ...], rows: Iterable[Rows]) -> Iterator[Batch]:
    for step in rows:
        # Not in the compiled step, which would be traced anew for each number of examples.
        index = mx.array(step.indices)
        mask = step.mask()
        batch = tuple(mx.take(array, index, axis=0) for array in arrays)
        yield batch, None if mask is None else mx.array(mask), step.size
