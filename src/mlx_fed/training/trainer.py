"""A client's local work: training steps and evaluation, each one compiled program.

Knows nothing of Flower: named arrays come in, named arrays and metrics go out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from ..arrays import examples, frozen, named_arrays, randomness, weights
from ..arrays.named_arrays import Arrays
from ..system import calls
from ..task import Config, Data, Split, Task, fingerprint_of
from ..task_settings import TracedConfig
from .batches import BatchLoader
from .evaluation import Evaluator
from .metrics import Evaluation, count_units, weighted_mean
from .programs import Program, compiled
from .steps import (
    Client,
    Shared,
    Step,
    counters_of,
    custom_step,
    initial_state,
    signature,
    training_step,
)


class ClientUpdate(NamedTuple):
    """What a round of local training gives: arrays by name, and metrics in kebab-case.

    ``client_state`` is what the client keeps until it trains or evaluates again: see
    :meth:`Trainer.train`. It is empty where the update is not finite: what the client kept
    before then stands.
    """

    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    metrics: dict[str, int | float]
    client_state: Mapping[str, mx.array] = MappingProxyType({})


class TrainingPrograms(NamedTuple):
    """What runs compiled: a new optimizer's state, and a step (see
    :mod:`~mlx_fed.training.steps`) with
    what seeds it."""

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
        statistics_spec (dict): The same of the running statistics that travel.
        all_statistics_spec (dict): The same of all running statistics.
        notes (dict): In words, as keys: what the run should say, such as why steps are not
            compiled.
        has_client_state (bool): Whether clients keep arrays from round to round.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task, self.seed = task, seed
        self.model = weights.build_model(task.model, seed)
        travels = task.buffers or (lambda name: None)
        self._is_buffer = lambda name: bool(travels(name))
        self.slots = weights.find_slots(self.model, self._is_buffer)
        if not self.slots.parameters:
            raise named_arrays.WeightsError(
                "The model has no trainable floating-point parameters: nothing to federate."
            )
        mx.eval(weights.get(self.slots.statistics))
        personal = task.personal or (lambda name: False)
        self._shared = [name for name in self.slots.parameters if not personal(name)]
        if not self._shared:
            raise named_arrays.WeightsError(
                "Every parameter is personal (Task.personal): nothing to federate."
            )
        self._personal = [name for name in self.slots.parameters if personal(name)]
        local = {name: (travels(name) or task.statistics) for name in self.slots.statistics}
        self._local = _local_statistics(self.slots, local)
        self.has_client_state = bool(self._personal or self._local) or task.keep_optimizer
        self.spec = named_arrays.spec(self.parameters())
        self.statistics_spec = named_arrays.spec(self.statistics())
        self.all_statistics_spec = named_arrays.spec(weights.get(self.slots.statistics))
        self.notes: dict[str, None] = {}
        self._taken: set[str] = set()
        self.takes_config = task.train_step is not None or examples.takes_config(task.loss)
        self.batches = BatchLoader(task, self.model, self.slots, self.note)
        self._training: tuple[Any, TrainingPrograms] | None = None
        self.evaluator = Evaluator(task, self.model, self.slots, self.batches, self.note)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the task says has to be the same on every machine: asked for by who leads a run."""
        return fingerprint_of(self.task)

    @cached_property
    def frozen(self) -> frozen.Digests:
        """What the frozen arrays are known by, but for those that the fingerprint stands for.

        It is asked for before anything is trained. Of large ones nothing stays in memory for it.
        """
        covers = self.task.fingerprint_covers or (lambda name: False)
        names = [name for name in self.slots.frozen if not covers(name)]
        arrays = {name: self.slots.frozen[name].get() for name in names}
        if sum(array.nbytes for array in arrays.values()) > frozen.WHOLE:
            module = weights.make_module(self.task.model, self.seed)
            slots = weights.find_slots(module, self._is_buffer).frozen
            arrays = {name: slot.get() for name, slot in slots.items() if not covers(name)}
            del module, slots
        return frozen.digest_arrays(arrays)

    def parameters(self) -> Arrays:
        """The model's parameters that are trained together, by name."""
        return {name: self.slots.parameters[name].get() for name in self._shared}

    def statistics(self) -> Arrays:
        """The model's running statistics that travel, by name."""
        local = self._local
        return {name: s.get() for name, s in self.slots.statistics.items() if name not in local}

    def note(self, text: str) -> None:
        """Notes once in a process what the run or the node's log should say."""
        self.notes.setdefault(text)

    def take_notes(self) -> list[str]:
        """The notes that were not taken before."""
        texts = [text for text in self.notes if text not in self._taken]
        self._taken.update(texts)
        return texts

    def release_parameters(self) -> None:
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
        client_state: Mapping[str, mx.array] | None = None,
    ) -> ClientUpdate:
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
            client_state (dict, optional): What the client kept of its last update: its personal
                parameters, its statistics and its optimizer's state, as the task says.

        Returns:
            Update: The metrics are ``num-examples``, the number of examples in a pass (of a
            stream without a length: those that it gave), and ``loss``, the mean over all steps;
            and what :func:`counted` gives.

        Raises:
            WeightsError: If the arrays do not fit the model.
            ValueError: If there are no examples.
        """
        named_arrays.check(self.spec, named_arrays.spec(parameters))
        named_arrays.check(self.statistics_spec, named_arrays.spec(statistics))
        moment = randomness.round_seed(config, client)
        began = time.perf_counter()
        everything, statistics = self.combine_client_state(parameters, statistics, client_state)
        with self.holding(everything, statistics):
            batches = self.batches.training(data, config, moment)
        first = next(batches, None)
        if first is None:
            raise ValueError("The client has no training examples.")
        mx.async_eval(first[0])  # the device is at it while the rest is made ready
        optimizer = calls.call("Task.optimizer", self.task.optimizer, TracedConfig(config))
        programs = self.training_programs(optimizer, config)
        counters = _going_on(counters_of(optimizer), client_state)
        state = _kept(client_state, "state", programs.initial_state(counters, everything))
        at = Client(everything, statistics, state, randomness.key(*moment, "layers"))
        mu = float(config.get("proximal-mu", 0.0))
        anchor = (parameters, mx.array(mu)) if mu else None

        losses: list[Any] = []
        shares: list[Any] = []
        num_examples = 0
        for step, (batch, mask, size) in enumerate(chain([first], batches), 1):
            shared = Shared(counters, anchor, self.moment(config, step))
            at, counters, loss, weight = programs.step((*moment, step), at, shared, batch, mask)
            mx.async_eval(at, loss)
            losses.append(loss)
            shares.append(weight)
            num_examples += size
        mx.eval(at, losses, shares)
        seconds = time.perf_counter() - began
        counts = [share.item() for share in shares]
        mean = weighted_mean([loss.item() for loss in losses], counts)
        if not callable(data.train):
            num_examples = examples.count(self.batches.resident(data.train))
        elif isinstance(data.train, Sized):
            num_examples = len(data.train)
        metrics: dict[str, int | float] = {"num-examples": num_examples, "loss": mean}
        metrics |= count_units(self.task, counts, seconds)
        metrics |= self.first_loss(everything, statistics, data, config)
        return self.update(at, counters, metrics)

    def first_loss(
        self, parameters: Arrays, statistics: Arrays, data: Data, config: Config
    ) -> dict[str, float]:
        """The loss before training, under the setting ``train-loss-key``: QFedAvg's asks for it."""
        key = config.get("train-loss-key")
        if not key:
            return {}
        with self.holding(parameters, statistics):
            loss = self.evaluator.loss(parameters, statistics, data.train, config)
        return {str(key): loss}

    def combine_client_state(
        self, parameters: Arrays, statistics: Arrays, client_state: Mapping[str, mx.array] | None
    ) -> tuple[Arrays, Arrays]:
        """All parameters in the model's order, and the statistics: the client's own ones of
        those that it keeps, the model's first ones before it has any."""
        if not self.has_client_state:
            return parameters, statistics
        local = {name: self.slots.statistics[name].get() for name in self._local}
        statistics = {**statistics, **_kept(client_state, "statistics", local)}
        statistics = {name: statistics[name] for name in self.slots.statistics}
        personal = {name: self.slots.parameters[name].get() for name in self._personal}
        both = {**parameters, **_kept(client_state, "parameters", personal)}
        return {name: both[name] for name in self.slots.parameters}, statistics

    def update(self, at: Client, counters: Arrays, metrics: dict[str, int | float]) -> ClientUpdate:
        """What is sent of what a client has come to, and what it keeps."""
        if not self.has_client_state:
            return ClientUpdate(at.parameters, at.statistics, metrics)
        client_state = {f"parameters/{name}": at.parameters[name] for name in self._personal}
        client_state |= {f"statistics/{name}": at.statistics[name] for name in self._local}
        statistics = {name: at.statistics[name] for name in self.statistics_spec}
        if self.task.keep_optimizer:
            client_state |= {f"counters/{name}": array for name, array in counters.items()}
            client_state |= {f"state/{name}": array for name, array in at.state.items()}
            mx.eval(client_state)
        shared = {name: at.parameters[name] for name in self._shared}
        # The server passes over a round that diverged; kept, it would be in all that follow.
        finite = named_arrays.are_finite(
            (*client_state.values(), *shared.values(), *statistics.values())
        )
        return ClientUpdate(shared, statistics, metrics, client_state if finite else {})

    def evaluate(
        self,
        parameters: Arrays,
        statistics: Arrays,
        split: Split,
        client_state: Mapping[str, mx.array] | None = None,
        config: Config = MappingProxyType({}),
    ) -> Evaluation:
        """Loss and metrics of the given arrays on the examples of a split, in evaluation mode.

        Args:
            parameters (dict): Parameters by name, as :attr:`spec` has them.
            statistics (dict): Running statistics by name.
            split (tuple, dict or callable): As ``Data.test``.
            client_state (dict, optional): As for :meth:`train`.
            config (dict): The settings, for functions that take them.

        Returns:
            Evaluation: ``metrics`` has ``num-examples``, ``loss`` and the task's metrics, each the
            mean over the examples, and what ``Task.derived`` adds; NaN where there is no value.

        Raises:
            WeightsError: If the arrays do not fit the model.
            ExamplesError: If there are no examples.
        """
        named_arrays.check(self.spec, named_arrays.spec(parameters))
        named_arrays.check(self.statistics_spec, named_arrays.spec(statistics))
        everything, statistics = self.combine_client_state(parameters, statistics, client_state)
        with self.holding(everything, statistics):
            return self.evaluator.evaluate(everything, statistics, split, config)

    def warm_up(self, data: Data, config: Config) -> None:
        """Compiles the programs on one batch, so that the first round does not wait for it."""
        start = self.parameters(), self.statistics()
        self.train(*start, data, {"server-round": 1, **config, "local-steps": 1})
        if data.test is None or callable(data.test):
            return
        self.evaluate(*start, examples.first(data.test, self.task.eval_batch_size))

    # -- programs --------------------------------------------------------------------------

    def training_programs(self, optimizer: Any, config: Config) -> TrainingPrograms:
        """The compiled programs, traced anew only when what is baked into them changes."""
        key = self.training_key(optimizer, config)
        if self._training is None or self._training[0] != key:
            mx.eval(self.model.parameters())  # or each step would compute the frozen ones anew
            self._training = (key, self._new_programs(optimizer, config))
        return self._training[1]

    def _new_programs(self, optimizer: Any, config: Config) -> TrainingPrograms:
        arguments = (self.model, self.slots, self.task, optimizer, config)
        if self.task.train_step is not None:
            step: Callable[..., Step] = custom_step(*arguments)
            program = Program(step, _figures, False, self.note, "training")
            return TrainingPrograms(lambda counters, parameters: {}, program)
        step = training_step(*arguments)
        program = Program(step, _figures, self.task.compile, self.note, "training")
        return TrainingPrograms(compiled(initial_state(optimizer)), program)

    def moment(self, config: Config, step: int) -> tuple[mx.array, mx.array] | None:
        """The round and the step as arrays, for a loss that takes the settings."""
        if not self.takes_config:
            return None
        return mx.array(int(config.get("server-round", 0))), mx.array(step)

    @contextmanager
    def holding(self, parameters: Arrays, statistics: Arrays) -> Iterator[None]:
        """Puts arrays into the model for a while."""
        slots = {**self.slots.parameters, **self.slots.statistics}
        before = weights.get(slots)
        weights.put(slots, {**parameters, **statistics})
        try:
            yield
        finally:
            weights.put(slots, before)

    def training_key(self, optimizer: Any, config: Config) -> Any:
        """What is baked into a traced step, apart from the task and the shapes."""
        if self.task.train_step is not None:
            return object()  # its optimizers are new with each client
        settings: Any = ()
        if self.takes_config:
            settings = sorted((k, v) for k, v in config.items() if k != "server-round")
        norm = config.get("max-grad-norm", self.task.max_grad_norm)
        return signature(optimizer), norm, settings


def _local_statistics(slots: weights.Slots, travels: Mapping[str, str]) -> set[str]:
    """The names of the statistics that each client keeps for itself.

    Raises:
        WeightsError: If Task.buffers says something else, or would average whole numbers.
    """
    for name, how in travels.items():
        if how not in ("average", "local"):
            raise named_arrays.WeightsError(
                f'Task.buffers gives {how!r} for {name!r}: it gives "average", "local" or None.'
            )
        dtype = slots.statistics[name].get().dtype
        if how == "average" and not mx.issubdtype(dtype, mx.floating):
            raise named_arrays.WeightsError(
                f"The buffer {name!r} is {named_arrays.dtype_name(dtype)}, which has no average: "
                'let Task.buffers give "local" for it, so that each client keeps its own.'
            )
    return {name for name, how in travels.items() if how == "local"}


def _figures(step: Step) -> Arrays:
    """What of a step's result has to be the same, compiled or not."""
    statistics = {f"statistics {name!r}": a for name, a in step.client.statistics.items()}
    # Adam's first update is the gradient's sign, rounding's where the gradient is zero. The state
    # has the gradient itself; plain SGD leaves it zero.
    after = {f"the optimizer's state {path!r}": a for path, a in step.client.state.items()}
    if not any(array.any().item() for array in after.values()):
        after = {f"parameter {name!r}": a for name, a in step.client.parameters.items()}
    return {"the loss": step.loss, "its weight": step.weight, **statistics, **after}


def _going_on(counters: Arrays, client_state: Mapping[str, mx.array] | None) -> Arrays:
    """A new optimizer's scalars with what a client has kept of them, such as its steps.

    The learning rate, which MLX has among them, stays the new one's: settings and tasks may give
    each round another, and a schedule computes it from the steps.
    """
    kept = _kept(client_state, "counters", {}).items()
    return counters | {k: v for k, v in kept if k.rpartition(".")[2] != "learning_rate"}


def _kept(client_state: Mapping[str, mx.array] | None, kind: str, otherwise: Arrays) -> Arrays:
    """What a client has kept of a kind, by name; ``otherwise`` before it has kept anything."""
    kept = {
        name.removeprefix(f"{kind}/"): array
        for name, array in (client_state or {}).items()
        if name.startswith(f"{kind}/")
    }
    return {**otherwise, **kept}
