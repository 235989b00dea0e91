"""A client's local work: training steps and evaluation, each one compiled program.

Knows nothing of Flower: named arrays come in, named arrays and metrics go out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from types import FunctionType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from . import batches, randomness, weights
from .task import Config, Data, Task
from .weights import Arrays


class Update(NamedTuple):
    """What a round of local training gives: arrays by name, and metrics in kebab-case."""

    parameters: Arrays
    statistics: Arrays
    metrics: dict[str, int | float]


class Trainer:
    """A task's model and compiled programs, resident from round to round.

    Args:
        task (Task): What is trained.
        seed (int): The run's seed; every party that builds the model from it has the same
            initial and frozen values.

    Attributes:
        spec (dict): Shape and dtype of each parameter, by name.
        statistics_spec (dict): The same of the running statistics.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task = task
        self.model = weights.build_model(task.model, seed)
        self.slots = weights.find_slots(self.model)
        if not self.slots.parameters:
            raise weights.WeightsError(
                "The model has no trainable floating-point parameters: nothing to federate."
            )
        self.spec = weights.spec(weights.get(self.slots.parameters))
        self.statistics_spec = weights.spec(weights.get(self.slots.statistics))
        self._programs: dict[str, tuple[Any, Callable]] = {}
        self._paddable: dict[tuple, bool] = {}
        self._arrays: dict[int, tuple[Sequence[Any], tuple[mx.array, ...]]] = {}

    def parameters(self) -> Arrays:
        """The model's parameters by name."""
        return weights.get(self.slots.parameters)

    def statistics(self) -> Arrays:
        """The model's running statistics by name."""
        return weights.get(self.slots.statistics)

    def train(
        self,
        parameters: Arrays,
        statistics: Arrays,
        data: Data,
        config: Config,
        *,
        client: int = 0,
    ) -> Update:
        """Trains from the given arrays on ``data.train``.

        Args:
            parameters (dict): Parameters by name, as :attr:`spec` has them.
            statistics (dict): Running statistics by name.
            data (Data): The client's examples.
            config (dict): The server's settings: ``seed``, ``server-round`` and whatever the
                task's optimizer reads. ``batch-size``, ``local-epochs``, ``local-steps`` and
                ``max-grad-norm`` stand over the task's own, ``proximal-mu`` adds FedProx's
                proximal term (https://arxiv.org/abs/1812.06127).
            client (int): The client's partition, for its random keys.

        Returns:
            Update: The metrics are ``num-examples``, the number of examples in a pass (of a
            stream: those that it gave), and ``loss``, the mean over all steps.

        Raises:
            WeightsError: If the arrays do not fit the model.
            ValueError: If there are no examples.
        """
        weights.check(self.spec, weights.spec(parameters))
        weights.check(self.statistics_spec, weights.spec(statistics))
        moment = (int(config.get("seed", 0)), int(config.get("server-round", 0)), client)
        optimizer = self.task.optimizer(config)
        tree = tree_unflatten(list(parameters.items()))
        optimizer.init(tree)
        state = optimizer.state
        proximal_mu = float(config.get("proximal-mu", 0.0))
        anchor = (tree, mx.array(proximal_mu)) if proximal_mu else ()
        step = self._training_step(optimizer, config)

        training_batches = self._training_batches(data, config, moment)
        randomness.seed_mlx(*moment, "layers")
        losses, shares, num_examples = [], [], 0
        for batch, key, size in training_batches:
            tree, statistics, state, loss, weight = step(
                tree, statistics, state, anchor, key, batch
            )
            mx.async_eval(tree, statistics, state, loss, weight)
            losses.append(loss)
            shares.append(weight)
            num_examples += size
        if not losses:
            raise ValueError("The client has no training examples.")
        mx.eval(tree, statistics, losses, shares)
        loss = _weighted_mean([v.item() for v in losses], [v.item() for v in shares])
        if not callable(data.train):
            num_examples = len(data.train[0])
        metrics = {"num-examples": num_examples, "loss": loss}
        trained = dict(tree_flatten(tree))
        return Update({name: trained[name] for name in parameters}, statistics, metrics)

    def evaluate(
        self,
        parameters: Arrays,
        statistics: Arrays,
        examples: Sequence[Any] | Callable[[mx.array], Iterable[Sequence[mx.array]]],
    ) -> dict[str, int | float]:
        """Loss and metrics of the given arrays on ``examples``, in evaluation mode.

        Returns:
            dict: ``num-examples``, ``loss`` and the task's metrics, each the mean over the
            examples.
        """
        weights.check(self.spec, weights.spec(parameters))
        weights.check(self.statistics_spec, weights.spec(statistics))
        step = self._evaluation_step()
        tree = tree_unflatten(list(parameters.items()))
        results, num_examples = [], 0
        for batch, size in self._evaluation_batches(examples):
            result = step(tree, statistics, batch)
            mx.async_eval(result)
            results.append(result)
            num_examples += size
        if not results:
            raise ValueError("The client has no examples to evaluate on.")
        # Shape (functions, 2, steps): the mean over a step's batch, and its weight.
        columns: Any = mx.stack(results, axis=-1).tolist()
        means = [_weighted_mean(*column) for column in columns]
        names = ("loss", *self.task.metrics)
        return {"num-examples": num_examples, **dict(zip(names, means, strict=True))}

    def warm_up(self, data: Data, config: Config) -> None:
        """Compiles the programs on one batch, so that the first round does not wait for it."""
        start = self.parameters(), self.statistics()
        self.train(*start, data, {**config, "local-steps": 1})
        if data.test is None or callable(data.test):
            return
        self.evaluate(*start, tuple(array[: self.task.eval_batch_size] for array in data.test))

    # -- batches ---------------------------------------------------------------------------

    def _resident(self, examples: Sequence[Any]) -> tuple[mx.array, ...]:
        """The split as MLX arrays, converted once for as long as the same split comes back."""
        held = self._arrays.get(id(examples))
        if held is None or held[0] is not examples:
            self._arrays = dict(list(self._arrays.items())[-1:])
            held = (examples, batches.as_arrays(examples))
        self._arrays.pop(id(examples), None)
        self._arrays[id(examples)] = held  # the last used is the last to go
        return held[1]

    def _training_batches(
        self, data: Data, config: Config, moment: tuple[int, int, int]
    ) -> Iterator[tuple[tuple, mx.array | None, int]]:
        batch_size = int(config.get("batch-size", self.task.batch_size))
        epochs = int(config.get("local-epochs", self.task.local_epochs))
        steps = config.get("local-steps", self.task.local_steps)
        if callable(data.train):
            one_pass = partial(_streamed, data.train)
        else:
            arrays = self._resident(data.train)
            padded = self._can_pad(arrays, self.task.augment, self.task.loss)
            one_pass = partial(_indexed, arrays, batch_size, padded)

        def passes() -> Iterator[tuple[tuple, int]]:
            for number in count() if steps else range(epochs):
                empty = True
                for batch in one_pass(randomness.key(*moment, "shuffle", number)):
                    empty = False
                    yield batch
                if empty:
                    return

        def keyed() -> Iterator[tuple[tuple, mx.array | None, int]]:
            for number, (batch, size) in enumerate(islice(passes(), steps and int(steps))):
                key = randomness.key(*moment, "augment", number) if self.task.augment else None
                yield batch, key, size

        return keyed()

    def _evaluation_batches(self, examples: Any) -> Iterator[tuple[tuple, int]]:
        if callable(examples):
            return _streamed(examples, randomness.key(0, "evaluate"))
        arrays = self._resident(examples)
        padded = self._can_pad(arrays, None, self.task.loss, *self.task.metrics.values())
        return _indexed(arrays, self.task.eval_batch_size, padded, None)

    def _can_pad(
        self, arrays: tuple[mx.array, ...], augment: Callable | None, *functions: Callable
    ) -> bool:
        """Whether padding can be masked out: each function gives one value an example.

        Running statistics are taken over the whole batch, so padding would count in them.
        """
        if self.slots.statistics or len(arrays[0]) == 0:
            return False
        asked = (augment, functions, tuple((a.shape[1:], a.dtype) for a in arrays))
        if asked not in self._paddable:
            probe = [mx.take(array, mx.array([0, 0, 0]), axis=0) for array in arrays]
            # Nothing is evaluated: the shapes of a lazy graph are known when it is built.
            if augment:
                probe = augment(randomness.key(0, "augment"), *probe)
            outputs = [function(self.model, *probe) for function in functions]
            fits = all(isinstance(out, mx.array) and out.shape == (3,) for out in outputs)
            self._paddable[asked] = fits
        return self._paddable[asked]

    # -- programs --------------------------------------------------------------------------

    def _program(self, kind: str, key: Any, build: Callable[[], Callable]) -> Callable:
        """The compiled program of this kind, traced anew only when ``key`` changes."""
        held = self._programs.get(kind)
        if held is None or held[0] != key:
            state = [mx.random.state]
            held = (key, mx.compile(build(), inputs=state, outputs=state))
            self._programs[kind] = held
        return held[1]

    def _training_step(self, optimizer: optim.Optimizer, config: Config) -> Callable[..., tuple]:
        max_norm = config.get("max-grad-norm", self.task.max_grad_norm)
        key = (_signature(optimizer), max_norm, bool(config.get("proximal-mu")))

        def objective(tree, statistics, key, batch):
            arrays, mask = batch
            if self.task.augment:
                arrays = tuple(self.task.augment(key, *arrays))
            with self._holding(tree, statistics, training=True):
                loss, weight = _mean_and_weight(self.task.loss(self.model, *arrays), arrays, mask)
                return loss, weight, weights.get(self.slots.statistics)

        def step(tree, statistics, state, anchor, key, batch):
            gradient = mx.value_and_grad(objective)
            (loss, weight, statistics), grads = gradient(tree, statistics, key, batch)
            if anchor:
                start, mu = anchor
                grads = _map(lambda g, w, w0: g + mu.astype(g.dtype) * (w - w0), grads, tree, start)
            if max_norm is not None:
                grads, _ = optim.clip_grad_norm(grads, float(max_norm))
            optimizer.state = state
            tree = optimizer.apply_gradients(grads, tree)
            return tree, statistics, optimizer.state, loss, weight

        return self._program("train", key, lambda: step)

    def _evaluation_step(self) -> Callable[..., mx.array]:
        def step(tree, statistics, batch):
            arrays, mask = batch
            with self._holding(tree, statistics, training=False):
                pairs = [
                    _mean_and_weight(function(self.model, *arrays), arrays, mask)
                    for function in (self.task.loss, *self.task.metrics.values())
                ]
            return mx.stack([mx.stack(list(pair)) for pair in pairs])

        return self._program("evaluate", None, lambda: step)

    def _holding(self, tree: Any, statistics: Arrays, training: bool) -> _Holding:
        return _Holding(self.model, self.slots, dict(tree_flatten(tree)), statistics, training)


class _Holding:
    """Puts arrays into the model while a program is traced, and the old ones back.

    Without this the model is left holding tracers, which fail when next they are used.
    """

    def __init__(self, model, slots, parameters, statistics, training):
        self.model, self.slots, self.training = model, slots, training
        self.arrays = {**parameters, **statistics}
        self.places = {**slots.parameters, **slots.statistics}

    def __enter__(self):
        self.before = weights.get(self.places)
        self.was_training = self.model.training
        weights.put(self.places, self.arrays)
        self.model.train(self.training)

    def __exit__(self, *exception):
        weights.put(self.places, self.before)
        self.model.train(self.was_training)


def _streamed(examples: Callable, key: mx.array) -> Iterator[tuple[tuple, int]]:
    for batch in examples(key):
        yield (tuple(batch), None), len(batch[0])


def _indexed(
    arrays: tuple[mx.array, ...], size: int, padded: bool, key: mx.array | None
) -> Iterator[tuple[tuple, int]]:
    total = len(arrays[0])
    for number, (index, mask) in enumerate(batches.epoch(total, size, padded, key)):
        # Not in the compiled step, which would be traced anew for each number of examples.
        batch = tuple(mx.take(array, index, axis=0) for array in arrays)
        yield (batch, mask), min(size, total - number * size)


def _mean_and_weight(
    output: Any, arrays: Sequence[mx.array], mask: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The mean over a batch of what a loss or metric returned, and the batch's weight."""
    if isinstance(output, tuple):
        mean, weight = output
        return mean.astype(mx.float32), mx.array(weight, mx.float32)
    output = output.astype(mx.float32)  # a bfloat16 cannot count to 257
    if output.ndim == 0:
        return output, mx.array(len(arrays[0]), mx.float32)
    if mask is None:
        return output.mean(), mx.array(len(output), mx.float32)
    weight = mask.sum()
    return (output * mask).sum() / weight, weight


def _map(function: Callable, tree: Any, *others: Any) -> Any:
    rest = [dict(tree_flatten(other)) for other in others]
    flat = dict(tree_flatten(tree))
    pairs = [(name, function(array, *(r[name] for r in rest))) for name, array in flat.items()]
    return tree_unflatten(pairs)


def _weighted_mean(values: Sequence[float], shares: Sequence[float]) -> float:
    return math.fsum(v * s for v, s in zip(values, shares, strict=True)) / math.fsum(shares)


def _signature(optimizer: optim.Optimizer) -> Any:
    """What a traced step has baked in of its optimizer: everything but its state.

    The learning rate is part of the state and may change from round to round without a new
    trace; momentum or another schedule may not.
    """
    settings = {k: v for k, v in vars(optimizer).items() if k not in ("_state", "_initialized")}
    return (type(optimizer), _comparable(settings))


def _comparable(value: Any) -> Any:
    if isinstance(value, optim.Optimizer):
        return _signature(value)
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    if isinstance(value, FunctionType):
        # A task makes its schedules and filters anew each round: same code, same values.
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = (value.__defaults__, value.__kwdefaults__)
        return (value.__code__, _comparable(defaults), _comparable(cells))
    return value.tolist() if hasattr(value, "tolist") else value
