"""Batches of a client's examples: the indices of each step, and the arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice, pairwise
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
from ..settings_check import KINDS, whole_number
from ..system import calls
from ..task import Config, Data, Task
from ..task_settings import TracedConfig
from . import forward_effects, padding
from .label_range import Ranges, ranges, union, within
from .probe import Probe
from .steps import gradient_accumulation, has_batch_norm

_TAIL_SIZES = 8
"""Number of sizes of a padded last batch: each is one more trace of a program."""

Batch = tuple[Examples, mx.array | None, int]
"""Tree of arrays with a leading axis of examples, mask of the padding, number of examples."""


class BatchIndices(NamedTuple):
    """Indices of the examples of one step.

    ``indices`` is a NumPy array of shape (batch,) and dtype uint32; the first ``size`` are
    examples, the others are padding, to be masked out.
    """

    indices: np.ndarray
    size: int

    def mask(self) -> np.ndarray | None:
        """Mask, float32 of shape (batch,): 1 for examples, 0 for padding; ``None`` if all are 1."""
        if self.size == len(self.indices):
            return None
        return (np.arange(len(self.indices)) < self.size).astype(np.float32)


class Lengths(NamedTuple):
    """Length of local training: ``steps``, or else ``epochs``, of ``batch_size`` examples, those of
    all micro-batches of a step."""

    batch_size: int
    epochs: int
    steps: int | None


class Passes(NamedTuple):
    """Passes over a client's examples from which the steps of a round are taken.

    ``purposes`` has the arguments of :func:`~mlx_fed.arrays.randomness.derive` for the shuffle of
    each pass, ``start`` and ``stop`` the first of their batches and the end; no end: ``None``.
    """

    purposes: Iterable[tuple[int, *tuple[int | str, ...]]]
    start: int
    stop: int | None


def load(task: Task, partition_id: int, num_partitions: int | None) -> Data:
    """Data of a partition, by ``Task.data``, as MLX arrays: NumPy's are released.

    Raises:
        TaskError: If ``Task.data`` returns something else.
    """
    data = calls.call("Task.data", task.data, partition_id, num_partitions)
    if not isinstance(data, Data):
        raise TaskError(
            f"Task.data must return mlx_fed.Data, not a {type(data).__name__}: "
            "Data(train=(x, y), test=(x, y))"
        )
    test = _to_mlx(data.test, "test")
    is_empty = test is not None and not callable(test) and examples.count(test) == 0
    return Data(_to_mlx(data.train, "train"), None if is_empty else test)


def _to_mlx(split: Any, name: str) -> Any:
    return split if split is None or callable(split) else as_arrays(split, name)


class BatchLoader:
    """Loader of the batches that a task's model trains and is evaluated on.

    Args:
        task (Task): The task, whose settings give the batch size.
        model (nn.Module): The model, for probes of its loss and metrics.
        slots (Slots): The model's arrays by kind.
        note (callable): ``note(text)`` logs a problem of the task's functions.
    """

    def __init__(self, task: Task, model: nn.Module, slots: Slots, note: Callable[[str], None]):
        self.task, self.model, self.slots, self.note = task, model, slots, note
        # MLX's batch normalization raises in training for one value a channel.
        self.merge_single = has_batch_norm(model)
        self._paddable: dict[Any, bool] = {}
        self._checked_ranges: dict[Any, Ranges] = {}
        self._arrays: dict[int, tuple[Any, Examples]] = {}

    def training(self, data: Data, config: Config, seed: RoundSeed) -> Iterator[Batch]:
        """Batches of a client in a round, shuffled by keys of its passes."""
        if callable(data.train):
            num_batches = _num_batches(data.train)
            passes = passes_of_round(lengths(self.task, config), seed, num_batches)
            keys = (randomness.key(*purpose) for purpose in passes.purposes)
            steps = _streamed(data.train, keys, num_batches)
            batches = islice(steps, passes.start, passes.stop)
            first = next(batches, None)
            if first is None:
                return batches
            self.check_effects(first[0], config)
            if self.task.train_step is not None:
                return chain([first], batches)
            return chain([first], (self._with_checked_labels(batch, config) for batch in batches))
        arrays = self.resident(data.train)
        return _take_batches(arrays, self.rows(arrays, config, seed))

    def evaluation(
        self,
        split: Any,
        functions: Sequence[Callable],
        config: Config = MappingProxyType({}),
    ) -> Iterator[Batch]:
        """Batches of all examples of a split, in order, padded if each function allows it."""
        if callable(split):
            batches = _streamed(split, [randomness.key(0, "evaluate")])
            return (self._with_checked_labels(batch, config) for batch in batches)
        arrays = self.resident(split)
        self.check_labels(arrays, config)
        pad = self._can_pad(arrays, None, functions, False, config)
        size = self.task.eval_batch_size
        return _take_batches(arrays, epoch(examples.count(arrays), size, pad, None))

    def rows(self, arrays: Examples, config: Config, seed: RoundSeed) -> Iterator[BatchIndices]:
        """Indices of the examples of each step of a client's training."""
        length = lengths(self.task, config)
        total = examples.count(arrays)
        if total:
            self.check_effects(arrays, config, forward_effects.sample)
        # Micro-batches are of real examples alone: padding would divide a batch at other places.
        pad = (
            self.task.train_step is None
            and gradient_accumulation(self.task, config) == 1
            and self._can_pad(arrays, self.task.augment, (self.task.loss,), True, config)
        )
        num_batches = len(batch_bounds(total, length.batch_size, self.merge_single)) - 1
        passes = passes_of_round(length, seed, num_batches)
        epochs = (
            epoch(total, length.batch_size, pad, randomness.derive(*purpose), self.merge_single)
            for purpose in passes.purposes
        )
        return islice(chain.from_iterable(epochs), passes.start, passes.stop)

    def num_steps(self, data: Data, config: Config) -> int | None:
        """Steps of a client in a round; ``None`` for passes over a stream of unknown length."""
        length = lengths(self.task, config)
        if length.steps is not None:
            return length.steps
        if callable(data.train):
            num_batches = _num_batches(data.train)
            return None if num_batches is None else num_batches * length.epochs
        total = examples.count(self.resident(data.train))
        bounds = batch_bounds(total, length.batch_size, self.merge_single)
        return (len(bounds) - 1) * length.epochs

    def check_effects(
        self,
        batch: Examples,
        config: Config,
        sample: Callable[[Examples], Examples] | None = None,
    ) -> None:
        """Check, once for each kind of batch, of what a forward pass changes in the model, and that
        the loss has an output for each label.

        Args:
            batch: A batch, or all of a client's examples.
            config (dict): The settings.
            sample (callable, optional): Selects the examples for a call of the model, of all of a
                client's. Labels outside of the checked ranges are then checked again.

        Raises:
            WeightsError: If a forward pass assigns an array that is no buffer.
            ExamplesError: If a label is out of range.
        """
        kind = tuple((path, a.ndim, a.dtype) for path, a in examples.paths(batch))
        labels = ranges(batch) if sample else {}
        previous = self._checked_ranges.get(kind)
        if self.task.train_step is not None or (previous is not None and within(labels, previous)):
            return
        forward_effects.check_effects(
            self._probe(config, self.task.augment, True),
            self.task.loss,
            sample(batch) if sample else batch,
            self.note,
            has_weight=self.task.weight_unit is not None,
        )
        self._checked_ranges[kind] = union(labels, previous or {})

    def check_labels(self, batch: Examples, config: Config) -> None:
        """Check that the loss has an output for each label of an evaluation, where it has labels
        outside of the ranges that were checked before.

        Raises:
            ExamplesError: If a label is out of range.
        """
        kind = tuple((path, a.ndim, a.dtype) for path, a in examples.paths(batch))
        labels, previous = ranges(batch), self._checked_ranges.get(("labels", kind), {})
        previous = union(self._checked_ranges.get(kind, {}), previous)
        if within(labels, previous):
            return
        forward_effects.check_labels(self._probe(config, None, False), self.task.loss, batch)
        self._checked_ranges["labels", kind] = union(labels, previous)

    def _with_checked_labels(self, batch: Batch, config: Config) -> Batch:
        self.check_labels(batch[0], config)
        return batch

    def resident(self, split: Any) -> Examples:
        """Arrays of a split, converted to MLX once: of the last two splits."""
        entry = self._arrays.get(id(split))
        if entry is None or entry[0] is not split:
            self._arrays = dict(list(self._arrays.items())[-1:])
            entry = (split, as_arrays(split))
        self._arrays.pop(id(split), None)
        self._arrays[id(split)] = entry  # least recently used first
        return entry[1]

    def _can_pad(
        self,
        arrays: Examples,
        augment: Callable | None,
        functions: Sequence[Callable],
        training: bool,
        config: Config,
    ) -> bool:
        """Whether each function returns a value for each example, so that padding can be masked."""
        # Running statistics are over the whole batch: they would include the padding.
        if self.slots.statistics or examples.count(arrays) == 0:
            return False
        key = (augment, tuple(functions), training, examples.kind(arrays))
        if key not in self._paddable:
            self._paddable[key] = padding.is_paddable(
                self._probe(config, augment, training), functions, arrays
            )
        return self._paddable[key]

    def _probe(self, config: Config, augment: Callable | None, training: bool) -> Probe:
        """Probe with the settings of a first round and step."""
        settings = TracedConfig({"server-round": 1, **config, "local-step": 1})
        return Probe(self.model, self.slots, augment, settings, training)


def lengths(task: Task, config: Config) -> Lengths:
    """Length of local training, from the server's settings and the task's.

    Raises:
        SettingsError: If a setting is not a whole number of 1 or more.
    """
    for name in ("batch-size", "local-epochs", "local-steps"):
        if name in config:
            KINDS[name].check("", f"The setting {name}", config[name])
    steps = config.get("local-steps", task.local_steps)
    return Lengths(
        int(config.get("batch-size", task.batch_size)) * gradient_accumulation(task, config),
        int(config.get("local-epochs", task.local_epochs)),
        None if steps is None else int(steps),
    )


def passes_of_round(length: Lengths, seed: RoundSeed, num_batches: int | None) -> Passes:
    """Passes of a client in a round, a function of the settings and the seed alone.

    With ``local-epochs`` a round has passes of its own. With ``local-steps`` a client has one
    endless sequence of passes, and round r trains on its batches from (r - 1) x ``local-steps`` on:
    with the same number in each round every example is seen once before any is seen twice. The
    batches of a round in which the client is not asked are skipped.

    Args:
        length (Lengths): Length of local training.
        seed (tuple): The round's seed.
        num_batches (int, optional): Batches of a pass. Of a stream ``None``, if it does not say:
            each round then begins with a new pass.
    """
    run_seed, server_round, client = seed
    if length.steps is None or num_batches is None:
        numbers: Iterable[int] = count() if length.steps else range(length.epochs)
        return Passes(((*seed, "shuffle", number) for number in numbers), 0, length.steps)
    steps_before = max(server_round - 1, 0) * length.steps
    first, start = divmod(steps_before, num_batches) if num_batches else (0, 0)
    numbers = count(first) if num_batches else ()
    purposes = ((run_seed, client, "shuffle", number) for number in numbers)
    return Passes(purposes, start, start + length.steps)


def batch_bounds(num_examples: int, batch_size: int, merge_single: bool = False) -> list[int]:
    """Starts of the batches of one pass, and the end of the last one.

    Args:
        num_examples (int): Number of examples.
        batch_size (int): Examples in a batch.
        merge_single (bool): Add a last batch of one example to the batch before it.
    """
    bounds = [*range(0, num_examples, batch_size), num_examples]
    if merge_single and len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 < batch_size:
        del bounds[-2]
    return bounds


def epoch(
    num_examples: int,
    batch_size: int,
    pad: bool,
    seed: int | None,
    merge_single: bool = False,
) -> Iterator[BatchIndices]:
    """Indices of the steps of one pass over ``num_examples`` examples.

    Args:
        num_examples (int): Number of examples.
        batch_size (int): Examples in a step.
        pad (bool): Pad the last batch to a multiple of an eighth of ``batch_size``, so that
            clients of any number of examples share a few programs: to no more than twice the
            examples, whatever the batch size is.
        seed (int, optional): Seed of the shuffle. In order without.
        merge_single (bool): Add a last batch of one example to the batch before it.
    """
    # NumPy's shuffle: MLX's would wait for the device, and is slower on the CPU.
    order = np.arange(num_examples, dtype=np.uint32)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    largest = min(batch_size, _TAIL_SIZES * num_examples)
    for start, end in pairwise(batch_bounds(num_examples, batch_size, merge_single)):
        indices, size = order[start:end], end - start
        if pad and size < largest:
            indices = np.resize(indices, padded_size(size, largest))
        yield BatchIndices(indices, size)


def padded_size(count: int, batch_size: int) -> int:
    """Size of a padded batch of ``count`` examples."""
    step = -(-batch_size // _TAIL_SIZES)
    return min(batch_size, -(-count // step) * step)


def _num_batches(stream: Callable) -> int | None:
    """Number of batches of each pass over a stream, if it has one."""
    value = getattr(stream, "num_batches", None)
    if value is not None:
        whole_number(1).check("Data.train", "num_batches of a stream", value)
    return value


def _streamed(
    stream: Callable, keys: Iterable[mx.array], num_batches: int | None = None
) -> Iterator[Batch]:
    for key in keys:
        number = 0
        for batch in stream(key):
            number += 1
            arrays = as_batch(batch)
            yield arrays, None, examples.count(arrays)
        if num_batches not in (None, number):
            raise TaskError(
                f"Data.train, a stream, says that a pass has num_batches {num_batches}, and gave "
                f"{number}: give each pass as many, or leave num_batches out."
            )
        if not number:
            return


def _take_batches(arrays: Examples, steps: Iterable[BatchIndices]) -> Iterator[Batch]:
    for step in steps:
        # Not in the compiled step, which would be traced anew for each number of examples.
        mask = step.mask()
        batch = examples.take(arrays, mx.array(step.indices))
        yield batch, None if mask is None else mx.array(mask), step.size
