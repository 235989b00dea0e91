"""A client's local work: training steps and evaluation, each one compiled program.

Knows nothing of Flower: named arrays come in, named arrays and metrics go out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, count, islice
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from . import batches, randomness, weights
from .batches import Rows
from .metrics import counted, derived, weighted_mean
from .steps import (
    Client,
    Shared,
    compiled,
    evaluation_step,
    gives_one_value_an_example,
    initial_state,
    signature,
    training_step,
)
from .task import Config, Data, Task
from .weights import Arrays

Batch = tuple[tuple[mx.array, ...], mx.array | None, int]
"""Arrays with a leading axis of examples, the mask of the padding, the number of examples."""


class Update(NamedTuple):
    """What a round of local training gives: arrays by name, and metrics in kebab-case.

    ``own`` is what the client keeps until it trains or evaluates again: see
    :meth:`Trainer.train`. It is empty where the update is not finite: what the client kept
    before then stands.
    """

    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    metrics: dict[str, int | float]
    own: Mapping[str, mx.array] = MappingProxyType({})


class Trainer:
    """A task's model and compiled programs, resident from round to round.

    Args:
        task (Task): What is trained.
        seed (int): The run's seed; every party that builds the model from it has the same
            initial and frozen values.

    Attributes:
        spec (dict): Shape and dtype of each parameter that is trained together, by name.
        statistics_spec (dict): The same of the running statistics.
        keeps (bool): Whether clients keep arrays of their own from round to round.
        fingerprint (dict): What the task says has to be the same on every machine.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task = task
        self.model = weights.build_model(task.model, seed)
        self.slots = weights.find_slots(self.model)
        if not self.slots.parameters:
            raise weights.WeightsError(
                "The model has no trainable floating-point parameters: nothing to federate."
            )
        mx.eval(weights.get(self.slots.statistics))
        personal = task.personal or (lambda name: False)
        self._shared = [name for name in self.slots.parameters if not personal(name)]
        if not self._shared:
            raise weights.WeightsError(
                "Every parameter is personal (Task.personal): nothing to federate."
            )
        self._personal = [name for name in self.slots.parameters if personal(name)]
        self._keeps_statistics = task.statistics == "local" and bool(self.slots.statistics)
        self.keeps = bool(self._personal) or self._keeps_statistics or task.keep_optimizer
        self.spec = weights.spec(self.parameters())
        self.statistics_spec = weights.spec(weights.get(self.slots.statistics))
        self.fingerprint = dict(task.fingerprint()) if task.fingerprint else {}
        self._training: tuple[Any, Callable] | None = None
        self._evaluation: Callable | None = None
        self._paddable: dict[tuple, bool] = {}
        self._arrays: dict[int, tuple[Sequence[Any], tuple[mx.array, ...]]] = {}

    def parameters(self) -> Arrays:
        """The model's parameters that are trained together, by name."""
        return {name: self.slots.parameters[name].get() for name in self._shared}

    def statistics(self) -> Arrays:
        """The model's running statistics by name."""
        return weights.get(self.slots.statistics)

    def let_go(self) -> None:
        """Frees the model's parameters, which are zeros until others are put in their place.

        A server has them as masters. Zeros take no memory before something is computed with them.
        """
        shared = {name: self.slots.parameters[name] for name in self._shared}
        weights.put(
            shared, {name: mx.zeros_like(array) for name, array in weights.get(shared).items()}
        )

    def train(
        self,
        parameters: Arrays,
        statistics: Arrays,
        data: Data,
        config: Config,
        *,
        client: int = 0,
        own: Mapping[str, mx.array] | None = None,
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
            own (dict, optional): What the client kept of its last update: its personal
                parameters, its statistics and its optimizer's state, as the task says.

        Returns:
            Update: The metrics are ``num-examples``, the number of examples in a pass (of a
            stream without a length: those that it gave), and ``loss``, the mean over all steps;
            and what :func:`counted` gives.

        Raises:
            WeightsError: If the arrays do not fit the model.
            ValueError: If there are no examples.
        """
        weights.check(self.spec, weights.spec(parameters))
        weights.check(self.statistics_spec, weights.spec(statistics))
        moment = moment_of(config, client)
        optimizer = self.task.optimizer(config)
        everything, statistics = self.with_own(parameters, statistics, own)
        counters, state = initial_state(optimizer, everything)
        counters, state = _kept(own, "counters", counters), _kept(own, "state", state)
        at = Client(everything, statistics, state, randomness.key(*moment, "layers"))
        mu = float(config.get("proximal-mu", 0.0))
        anchor = (parameters, mx.array(mu)) if mu else None
        step = self.training_program(optimizer, config)

        losses, shares, num_examples = [], [], 0
        began = time.perf_counter()
        for batch, mask, size in self._training_batches(data, config, moment):
            at, counters, loss, weight = step(at, Shared(counters, anchor), batch, mask)
            mx.async_eval(at, loss)
            losses.append(loss)
            shares.append(weight)
            num_examples += size
        if not losses:
            raise ValueError("The client has no training examples.")
        mx.eval(at, losses, shares)
        seconds = time.perf_counter() - began
        counts = [share.item() for share in shares]
        loss = weighted_mean([v.item() for v in losses], counts)
        if not callable(data.train):
            num_examples = len(data.train[0])
        elif isinstance(data.train, Sized):
            num_examples = len(data.train)
        metrics = {"num-examples": num_examples, "loss": loss}
        metrics |= counted(self.task, counts, seconds)
        metrics |= self.first_loss(everything, statistics, data, config)
        return self.update(at, counters, metrics)

    def first_loss(
        self, parameters: Arrays, statistics: Arrays, data: Data, config: Config
    ) -> dict[str, float]:
        """The loss before training, under the setting ``train-loss-key``: QFedAvg's asks for it."""
        key = config.get("train-loss-key")
        if not key:
            return {}
        return {str(key): self._evaluate(parameters, statistics, data.train)["loss"]}

    def with_own(
        self, parameters: Arrays, statistics: Arrays, own: Mapping[str, mx.array] | None
    ) -> tuple[Arrays, Arrays]:
        """All parameters in the model's order, and the statistics: the client's own ones of
        those that it keeps, the model's first ones before it has any."""
        if not self.keeps:
            return parameters, statistics
        if self._keeps_statistics:
            statistics = _kept(own, "statistics", self.statistics())
        personal = {name: self.slots.parameters[name].get() for name in self._personal}
        both = {**parameters, **_kept(own, "parameters", personal)}
        return {name: both[name] for name in self.slots.parameters}, statistics

    def update(self, at: Client, counters: Arrays, metrics: dict[str, int | float]) -> Update:
        """What is sent of what a client has come to, and what it keeps."""
        if not self.keeps:
            return Update(at.parameters, at.statistics, metrics)
        own = {f"parameters/{name}": at.parameters[name] for name in self._personal}
        statistics = at.statistics
        if self._keeps_statistics:
            own |= {f"statistics/{name}": array for name, array in statistics.items()}
            statistics = {}
        if self.task.keep_optimizer:
            own |= {f"counters/{name}": array for name, array in counters.items()}
            own |= {f"state/{name}": array for name, array in at.state.items()}
            mx.eval(own)
        shared = {name: at.parameters[name] for name in self._shared}
        # The server passes over a round that diverged; kept, it would be in all that follow.
        finite = weights.are_finite((*own.values(), *shared.values(), *statistics.values()))
        return Update(shared, statistics, metrics, own if finite else {})

    def evaluate(
        self,
        parameters: Arrays,
        statistics: Arrays,
        examples: Sequence[Any] | Callable[[mx.array], Iterable[Sequence[mx.array]]],
        own: Mapping[str, mx.array] | None = None,
    ) -> dict[str, int | float]:
        """Loss and metrics of the given arrays on ``examples``, in evaluation mode.

        ``own`` is what the client has kept, as for :meth:`train`.

        Returns:
            dict: ``num-examples``, ``loss`` and the task's metrics, each the mean over the
            examples, and what follows from them.
        """
        weights.check(self.spec, weights.spec(parameters))
        weights.check(self.statistics_spec, weights.spec(statistics))
        return self._evaluate(*self.with_own(parameters, statistics, own), examples)

    def _evaluate(
        self, parameters: Arrays, statistics: Arrays, examples: Any
    ) -> dict[str, int | float]:
        step = self.evaluation_program()
        results, num_examples = [], 0
        for batch, mask, size in self._evaluation_batches(examples):
            result = step(parameters, statistics, batch, mask)
            mx.async_eval(result)
            results.append(result)
            num_examples += size
        if not results:
            raise ValueError("The client has no examples to evaluate on.")
        # Shape (functions, 2, steps): the mean over a step's batch, and its weight.
        columns: Any = mx.stack(results, axis=-1).tolist()
        means = [weighted_mean(*column) for column in columns]
        names = ("loss", *self.task.metrics)
        metrics = {"num-examples": num_examples, **dict(zip(names, means, strict=True))}
        return metrics | counted(self.task, columns[0][1]) | derived(self.task, metrics)

    def warm_up(self, data: Data, config: Config) -> None:
        """Compiles the programs on one batch, so that the first round does not wait for it."""
        start = self.parameters(), self.statistics()
        self.train(*start, data, {"server-round": 1, **config, "local-steps": 1})
        if data.test is None or callable(data.test):
            return
        self.evaluate(*start, tuple(array[: self.task.eval_batch_size] for array in data.test))

    # -- batches ---------------------------------------------------------------------------

    def resident(self, examples: Sequence[Any]) -> tuple[mx.array, ...]:
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
    ) -> Iterator[Batch]:
        if callable(data.train):
            length = lengths(self.task, config)
            passes = count() if length.steps else range(length.epochs)
            keys = (randomness.key(*moment, "shuffle", number) for number in passes)
            return islice(_streamed(data.train, keys), length.steps)
        arrays = self.resident(data.train)
        return _taken(arrays, self.rows(arrays, config, moment))

    def rows(
        self, arrays: tuple[mx.array, ...], config: Config, moment: tuple[int, int, int]
    ) -> Iterator[Rows]:
        """Which examples each step of a client's training takes."""
        length = lengths(self.task, config)
        total = len(arrays[0])
        padded = self.can_pad(arrays, self.task.augment, self.task.loss)
        passes = count() if length.steps and total else range(length.epochs)
        epochs = (
            batches.epoch(
                total, length.batch_size, padded, randomness.derive(*moment, "shuffle", number)
            )
            for number in passes
        )
        return islice(chain.from_iterable(epochs), length.steps)

    def _evaluation_batches(self, examples: Any) -> Iterator[Batch]:
        if callable(examples):
            return _streamed(examples, [randomness.key(0, "evaluate")])
        arrays = self.resident(examples)
        padded = self.can_pad(arrays, None, self.task.loss, *self.task.metrics.values())
        size = self.task.eval_batch_size
        return _taken(arrays, batches.epoch(len(arrays[0]), size, padded, None))

    def can_pad(
        self, arrays: tuple[mx.array, ...], augment: Callable | None, *functions: Callable
    ) -> bool:
        """Whether padding can be masked out: each function gives one value an example.

        Running statistics are taken over the whole batch, so padding would count in them.
        """
        if self.slots.statistics or len(arrays[0]) == 0:
            return False
        asked = (augment, functions, tuple((a.shape[1:], a.dtype) for a in arrays))
        if asked not in self._paddable:
            probe: Any = [mx.take(array, mx.array([0, 0, 0]), axis=0) for array in arrays]
            if augment:
                probe = augment(randomness.key(0, "augment"), *probe)
            self._paddable[asked] = gives_one_value_an_example(functions, self.model, probe)
        return self._paddable[asked]

    # -- programs --------------------------------------------------------------------------

    def training_program(self, optimizer: optim.Optimizer, config: Config) -> Callable[..., Any]:
        """The compiled training step, traced anew only when what is baked into it changes."""
        key = self.training_key(optimizer, config)
        if self._training is None or self._training[0] != key:
            mx.eval(self.model.parameters())  # or each step would compute the frozen ones anew
            step = training_step(self.model, self.slots, self.task, optimizer, config)
            self._training = (key, compiled(step))
        return self._training[1]

    def training_key(self, optimizer: optim.Optimizer, config: Config) -> Any:
        """What is baked into a traced step, apart from the task and the shapes."""
        return signature(optimizer), config.get("max-grad-norm", self.task.max_grad_norm)

    def evaluation_program(self) -> Callable[..., mx.array]:
        """The compiled evaluation step."""
        if self._evaluation is None:
            mx.eval(self.model.parameters())
            step = evaluation_step(self.model, self.slots, self.task)
            self._evaluation = compiled(step)
        return self._evaluation


class Lengths(NamedTuple):
    """How long a client trains: ``steps``, or else ``epochs``, of ``batch_size`` examples."""

    batch_size: int
    epochs: int
    steps: int | None


def lengths(task: Task, config: Config) -> Lengths:
    """A task's lengths, with the server's settings over them.

    Raises:
        ValueError: If a setting is below 1.
    """
    for name in ("batch-size", "local-epochs", "local-steps"):
        if name in config and int(config[name]) < 1:
            raise ValueError(f"The setting {name} must be 1 or more, not {config[name]}.")
    steps = config.get("local-steps", task.local_steps)
    return Lengths(
        int(config.get("batch-size", task.batch_size)),
        int(config.get("local-epochs", task.local_epochs)),
        None if steps is None else int(steps),
    )


def moment_of(config: Config, client: int) -> tuple[int, int, int]:
    """What a client's random keys in a round come from: seed, round and partition."""
    return int(config.get("seed", 0)), int(config.get("server-round", 0)), client


def _kept(own: Mapping[str, mx.array] | None, kind: str, otherwise: Arrays) -> Arrays:
    """What a client has kept of a kind, by name; ``otherwise`` before it has kept anything."""
    kept = {
        name.removeprefix(f"{kind}/"): array
        for name, array in (own or {}).items()
        if name.startswith(f"{kind}/")
    }
    return {**otherwise, **kept}


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
