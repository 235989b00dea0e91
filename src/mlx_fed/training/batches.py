"""A client's examples in batches: which make up each step, and the arrays that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import examples, randomness
from ..arrays.examples import Examples, as_arrays, as_batch
from ..arrays.randomness import RoundSeed
from ..arrays.weights import Slots
from ..errors import TaskError
from ..settings_check import KINDS
from ..system import calls
from ..task import Config, Data, Task
from ..task_settings import TracedConfig
from . import probe
from .label_range import Ranges, ranges, union, within

_TAIL_SIZES = 8
"""How many sizes a padded last batch may have: each is one more trace of a program."""

Batch = tuple[Examples, mx.array | None, int]
"""A tree of arrays with a leading axis of examples, the mask of the padding, the number of
examples."""


class BatchIndices(NamedTuple):
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
        TaskError: If ``task.data`` returns something else.
    """
    data = calls.call("Task.data", task.data, partition_id, num_partitions)
    if not isinstance(data, Data):
        raise TaskError(
            f"Task.data must return mlx_fed.Data, not a {type(data).__name__}: "
            "Data(train=(x, y), test=(x, y))"
        )
    test = _converted(data.test, "test")
    has_none = test is not None and not callable(test) and examples.count(test) == 0
    return Data(_converted(data.train, "train"), None if has_none else test)


def _converted(split: Any, name: str) -> Any:
    return split if split is None or callable(split) else as_arrays(split, name)


class BatchLoader:
    """Gives out the batches that a task's model trains and is evaluated on.

    Args:
        task (Task): Whose settings say how many examples a step has.
        model (nn.Module): Asked what its loss and metrics do.
        slots (Slots): The model's arrays by kind.
        note (callable): Told in words what the task should know of.
    """

    def __init__(self, task: Task, model: nn.Module, slots: Slots, note: Callable[[str], None]):
        self.task, self.model, self.slots, self.note = task, model, slots, note
        self._paddable: dict[Any, bool] = {}
        self._checked: dict[Any, Ranges] = {}
        self._arrays: dict[int, tuple[Any, Examples]] = {}

    def training(self, data: Data, config: Config, moment: RoundSeed) -> Iterator[Batch]:
        """A client's batches in a round, shuffled by its keys of that moment."""
        if callable(data.train):
            length = lengths(self.task, config)
            passes = count() if length.steps else range(length.epochs)
            keys = (randomness.key(*moment, "shuffle", number) for number in passes)
            batches = islice(_streamed(data.train, keys), length.steps)
            first = next(batches, None)
            if first is None:
                return batches
            self.check_effects(first[0], config)
            return chain([first], batches)
        arrays = self.resident(data.train)
        return _taken(arrays, self.rows(arrays, config, moment))

    def evaluation(
        self,
        split: Any,
        functions: Sequence[Callable],
        config: Config = MappingProxyType({}),
    ) -> Iterator[Batch]:
        """All examples of a split, in order, padded if each function allows it."""
        if callable(split):
            return _streamed(split, [randomness.key(0, "evaluate")])
        arrays = self.resident(split)
        padded = self._can_pad(arrays, None, functions, False, config)
        size = self.task.eval_batch_size
        return _taken(arrays, epoch(examples.count(arrays), size, padded, None))

    def rows(self, arrays: Examples, config: Config, moment: RoundSeed) -> Iterator[BatchIndices]:
        """Which examples each step of a client's training takes."""
        length = lengths(self.task, config)
        total = examples.count(arrays)
        if total:
            self.check_effects(arrays, config, probe.sample)
        padded = self.task.train_step is None and self._can_pad(
            arrays, self.task.augment, (self.task.loss,), True, config
        )
        passes = count() if length.steps and total else range(length.epochs)
        epochs = (
            epoch(total, length.batch_size, padded, randomness.derive(*moment, "shuffle", number))
            for number in passes
        )
        return islice(chain.from_iterable(epochs), length.steps)

    def check_effects(
        self,
        batch: Examples,
        config: Config,
        sample: Callable[[Examples], Examples] | None = None,
    ) -> None:
        """Checks once for each kind of batch what a forward pass changes in the model, and whether
        the loss has an output for each label.

        Args:
            batch: A batch, or all of a client's examples.
            config (dict): The settings.
            sample (callable, optional): Takes from all of a client's examples those that the model
                is called with. Labels beyond those that were checked are checked again then.

        Raises:
            WeightsError: If it assigns an array that is no buffer.
            ExamplesError: If a label is out of range.
        """
        kind = tuple((path, a.ndim, a.dtype) for path, a in examples.paths(batch))
        labels = ranges(batch) if sample else {}
        checked = self._checked.get(kind)
        if self.task.train_step is not None or (checked is not None and within(labels, checked)):
            return
        probe.check_effects(
            self.model,
            self.slots,
            self.task.loss,
            sample(batch) if sample else batch,
            self.task.augment,
            _first_settings(config),
            self.note,
            has_weight=self.task.weight_unit is not None,
        )
        self._checked[kind] = union(labels, checked or {})

    def resident(self, split: Any) -> Examples:
        """The split as MLX arrays, converted once for as long as the same split comes back."""
        held = self._arrays.get(id(split))
        if held is None or held[0] is not split:
            self._arrays = dict(list(self._arrays.items())[-1:])
            held = (split, as_arrays(split))
        self._arrays.pop(id(split), None)
        self._arrays[id(split)] = held  # the last used is the last to go
        return held[1]

    def _can_pad(
        self,
        arrays: Examples,
        augment: Callable | None,
        functions: Sequence[Callable],
        training: bool,
        config: Config,
    ) -> bool:
        """Whether each function gives one value an example, so that padding can be masked out."""
        # Running statistics are taken over the whole batch: padding would count in them.
        if self.slots.statistics or examples.count(arrays) == 0:
            return False
        key = (augment, tuple(functions), training, examples.kind(arrays))
        if key not in self._paddable:
            self._paddable[key] = probe.is_paddable(
                *(self.model, self.slots, functions, arrays, augment, training),
                _first_settings(config),
            )
        return self._paddable[key]


def _first_settings(config: Config) -> Config:
    """The settings as a loss gets them, with a round and a step."""
    return TracedConfig({"server-round": 1, **config, "local-step": 1})


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


def epoch(
    num_examples: int, batch_size: int, padded: bool, seed: int | None
) -> Iterator[BatchIndices]:
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
        yield BatchIndices(rows, count)


def padded_size(count: int, batch_size: int) -> int:
    """The size that a batch of ``count`` examples is padded to."""
    step = -(-batch_size // _TAIL_SIZES)
    return min(batch_size, -(-count // step) * step)


def _streamed(stream: Callable, keys: Iterable[mx.array]) -> Iterator[Batch]:
    for key in keys:
        empty = True
        for batch in stream(key):
            empty = False
            arrays = as_batch(batch)
            yield arrays, None, examples.count(arrays)
        if empty:
            return


def _taken(arrays: Examples, rows: Iterable[BatchIndices]) -> Iterator[Batch]:
    for step in rows:
        # Not in the compiled step, which would be traced anew for each number of examples.
        mask = step.mask()
        batch = examples.take(arrays, mx.array(step.indices))
        yield batch, None if mask is None else mx.array(mask), step.size
