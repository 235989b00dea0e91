"""A client's local work: training steps and evaluation, each one compiled program.

Knows nothing of Flower: named arrays come in, named arrays and metrics go out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim

from . import frozen, randomness, weights
from .batches import Batches
from .metrics import counted, derived, weighted_mean
from .steps import (
    Client,
    Shared,
    Step,
    compiled,
    counters_of,
    evaluation_step,
    initial_state,
    signature,
    training_step,
)
from .task import Config, Data, Task, fingerprint_of
from .weights import Arrays


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


class TrainingPrograms(NamedTuple):
    """What runs compiled: a new optimizer's state, and a step (see :mod:`~mlx_fed.steps`)."""

    initial_state: Callable[..., Arrays]
    step: Callable[..., Step]


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
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task, self.seed = task, seed
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
        self.batches = Batches(task, self.model, masked=not self.slots.statistics)
        self._training: tuple[Any, TrainingPrograms] | None = None
        self._evaluation: Callable | None = None

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the task says has to be the same on every machine: asked for by who leads a run."""
        return fingerprint_of(self.task)

    @cached_property
    def frozen(self) -> frozen.Identities:
        """What the frozen arrays are known by, but for those that the fingerprint stands for.

        It is asked for before anything is trained. Of large ones nothing stays in memory for it.
        """
        covers = self.task.fingerprint_covers or (lambda name: False)
        names = [name for name in self.slots.frozen if not covers(name)]
        arrays = {name: self.slots.frozen[name].get() for name in names}
        if sum(array.nbytes for array in arrays.values()) > frozen.WHOLE:
            apart = weights.find_slots(weights.make_module(self.task.model, self.seed)).frozen
            arrays = {name: slot.get() for name, slot in apart.items() if not covers(name)}
            del apart
        return frozen.identities(arrays)

    @property
    def averaged(self) -> weights.Spec:
        """The running statistics that travel: none where each client keeps its own."""
        return self.statistics_spec if self.task.statistics == "average" else {}

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
        moment = randomness.moment_of(config, client)
        began = time.perf_counter()
        given = self.batches.training(data, config, moment)
        first = next(given, None)
        if first is None:
            raise ValueError("The client has no training examples.")
        mx.async_eval(first[0])  # the device is at it while the rest is made ready
        optimizer = self.task.optimizer(config)
        programs = self.training_programs(optimizer, config)
        everything, statistics = self.with_own(parameters, statistics, own)
        counters = _going_on(counters_of(optimizer), own)
        state = _kept(own, "state", programs.initial_state(counters, everything))
        at = Client(everything, statistics, state, randomness.key(*moment, "layers"))
        mu = float(config.get("proximal-mu", 0.0))
        anchor = (parameters, mx.array(mu)) if mu else None

        losses: list[Any] = []
        shares: list[Any] = []
        num_examples = 0
        for batch, mask, size in chain([first], given):
            at, counters, loss, weight = programs.step(at, Shared(counters, anchor), batch, mask)
            mx.async_eval(at, loss)
            losses.append(loss)
            shares.append(weight)
            num_examples += size
        mx.eval(at, losses, shares)
        seconds = time.perf_counter() - began
        counts = [share.item() for share in shares]
        mean = weighted_mean([loss.item() for loss in losses], counts)
        if not callable(data.train):
            num_examples = len(data.train[0])
        elif isinstance(data.train, Sized):
            num_examples = len(data.train)
        metrics: dict[str, int | float] = {"num-examples": num_examples, "loss": mean}
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
        for batch, mask, size in self.batches.evaluation(examples):
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

    # -- programs --------------------------------------------------------------------------

    def training_programs(self, optimizer: optim.Optimizer, config: Config) -> TrainingPrograms:
        """The compiled programs, traced anew only when what is baked into them changes."""
        key = self.training_key(optimizer, config)
        if self._training is None or self._training[0] != key:
            mx.eval(self.model.parameters())  # or each step would compute the frozen ones anew
            step = training_step(self.model, self.slots, self.task, optimizer, config)
            programs = TrainingPrograms(compiled(initial_state(optimizer)), compiled(step))
            self._training = (key, programs)
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


def _going_on(counters: Arrays, own: Mapping[str, mx.array] | None) -> Arrays:
    """A new optimizer's scalars with what a client has kept of them, such as its steps.

    The learning rate, which MLX has among them, stays the new one's: settings and tasks may give
    each round another, and a schedule computes it from the steps.
    """
    kept = _kept(own, "counters", {}).items()
    return counters | {k: v for k, v in kept if k.rpartition(".")[2] != "learning_rate"}


def _kept(own: Mapping[str, mx.array] | None, kind: str, otherwise: Arrays) -> Arrays:
    """What a client has kept of a kind, by name; ``otherwise`` before it has kept anything."""
    kept = {
        name.removeprefix(f"{kind}/"): array
        for name, array in (own or {}).items()
        if name.startswith(f"{kind}/")
    }
    return {**otherwise, **kept}
