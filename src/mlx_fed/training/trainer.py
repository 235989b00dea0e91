"""Local training and evaluation of a client, each step one compiled program.

Arguments and results are named arrays and metrics: there is nothing of Flower here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx

from ..arrays import examples, frozen, named_arrays, randomness, weights
from ..arrays.named_arrays import Arrays
from ..errors import SettingsError
from ..task import Config, Data, Split, Task, fingerprint_of
from ..transforms.clipping import SETTING as CLIP
from ..transforms.run_transform import SETTING, UpdateEncoder, run_transform
from .batches import BatchLoader
from .client_arrays import ClientArrays, restore_counters
from .evaluation import Evaluator
from .metrics import Evaluation, count_units, weighted_mean
from .optimizer_state import STATEFUL_OPTIMIZER, state_of
from .python_state import PythonState
from .step_progress import ProgressFactory
from .steps import StepContext, TrainState
from .training_programs import ProgramCache


class ClientUpdate(NamedTuple):
    """Update of a client after local training: arrays by name, and metrics in kebab-case.

    ``client_state`` is for the client's next training or evaluation: see :meth:`Trainer.train`. It
    is empty where the update is not finite: the state before then stays valid.
    """

    parameters: Mapping[str, mx.array]
    statistics: Mapping[str, mx.array]
    metrics: dict[str, int | float]
    client_state: Mapping[str, mx.array] = MappingProxyType({})


class Trainer:
    """Trainer of a task: its model and compiled programs, resident from round to round.

    Args:
        task (Task): What is trained.
        seed (int): The run's seed; every party that builds the model from it has the same
            initial and frozen values.

    Attributes:
        client_arrays (ClientArrays): Which arrays are averaged, and which stay with a client.
        spec (dict): Shape and dtype of each parameter that is averaged, by name.
        statistics_spec (dict): The same of the running statistics that are averaged.
        all_statistics_spec (dict): The same of all running statistics.
        progress (callable, optional): Creates the progress of a training, which is told of its
            steps: :class:`~mlx_fed.training.step_progress.StepProgress` with a listener.
        notes (dict): Messages for the run's or the node's log, as keys, such as why steps are not
            compiled.
    """

    def __init__(self, task: Task, seed: int = 0):
        self.task, self.seed = task, seed
        self.model = weights.build_model(task.model, seed)
        buffer_kind = task.buffers or (lambda name: None)
        self._is_buffer = lambda name: bool(buffer_kind(name))
        self.slots = weights.find_slots(self.model, self._is_buffer)
        if not self.slots.parameters:
            raise named_arrays.WeightsError(
                "The model has no trainable floating-point parameters: nothing to federate."
            )
        mx.eval(weights.get(self.slots.statistics))
        self.client_arrays = ClientArrays(task, self.slots)
        self.spec = named_arrays.spec(self.parameters())
        self.statistics_spec = named_arrays.spec(self.statistics())
        self.all_statistics_spec = named_arrays.spec(weights.get(self.slots.statistics))
        self.notes: dict[str, None] = {}
        self.progress: ProgressFactory | None = None
        self._num_taken = 0
        self._has_diverged = False
        self.takes_config = task.train_step is not None or examples.takes_config(task.loss)
        functions = task.loss, task.augment, task.optimizer, task.train_step
        layers = dict.fromkeys(type(layer) for layer in self.model.modules())
        self.task_state = PythonState(*functions, *task.metrics.values(), *layers)
        self.batches = BatchLoader(task, self.model, self.slots, self.note)
        self.programs = ProgramCache(task, self.model, self.slots, self.note)
        self._encoder: tuple[Any, UpdateEncoder | None] | None = None
        self.evaluator = Evaluator(task, self.model, self.slots, self.batches, self.note)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Fingerprint of the task, which has to be the same on all machines: the server's asks."""
        return fingerprint_of(self.task)

    @cached_property
    def frozen(self) -> frozen.Digests:
        """Digests of the frozen arrays that the fingerprint does not cover, before training.

        Large arrays are built anew for it, so that they do not stay in memory.
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
        """Current parameters of the model that are averaged, by name."""
        return {name: self.slots.parameters[name].get() for name in self.client_arrays.shared}

    def statistics(self) -> Arrays:
        """Current running statistics of the model that are averaged, by name."""
        names = self.client_arrays.averaged_statistics
        return {name: self.slots.statistics[name].get() for name in names}

    def note(self, text: str) -> None:
        """Adds a message for the log, once in a process."""
        self.notes.setdefault(text)

    def note_divergence(self, losses: Sequence[float], step_weights: Sequence[float]) -> None:
        """Notes, once in a process, the step at which a client's loss stops being finite."""
        if self._has_diverged:
            return
        for step, (loss, weight) in enumerate(zip(losses, step_weights, strict=True), 1):
            if weight and not math.isfinite(loss):
                self._has_diverged = True
                hint = "a smaller learning rate, or max-grad-norm, may help"
                if step == 1:
                    hint = f"the data or the loss may have values that are not finite, or {hint}"
                self.note(f"the loss is {loss} at step {step} of {len(losses)}: {hint}")
                return

    def take_notes(self) -> list[str]:
        """Messages since the last call."""
        texts = list(self.notes)[self._num_taken :]
        self._num_taken += len(texts)
        return texts

    def release_parameters(self) -> None:
        """Frees the memory of the model's parameters: they are zeros until others replace them.

        A server has them as masters. Zeros take no memory before something is computed with them.
        """
        slots = {name: self.slots.parameters[name] for name in self.client_arrays.shared}
        weights.put(slots, {name: mx.zeros_like(a) for name, a in weights.get(slots).items()})

    def train(
        self,
        parameters: Arrays,
        statistics: Arrays,
        data: Data,
        config: Config,
        *,
        client: int = 0,
        client_state: Mapping[str, mx.array] | None = None,
        optimizer: Any = None,
    ) -> ClientUpdate:
        """Local training of a client on ``data.train``, from the global arrays.

        Args:
            parameters (dict): Parameters by name, as :attr:`spec` has them.
            statistics (dict): Running statistics by name.
            data (Data): The client's examples.
            config (dict): The server's settings: ``seed``, ``server-round`` and whatever the
                task's optimizer reads. ``batch-size``, ``gradient-accumulation``,
                ``local-epochs``, ``local-steps`` and ``max-grad-norm`` override the task's,
                ``proximal-mu`` adds FedProx's proximal term (https://arxiv.org/abs/1812.06127).
            client (int): The client's partition, for its random keys.
            client_state (dict, optional): That of the client's last update: its personal
                parameters, its statistics and its optimizer's state, as the task says.
            optimizer (Optimizer, optional): A new one of ``Task.optimizer``. Default: made here.

        Returns:
            ClientUpdate: The metrics are ``num-examples``, the number of examples in a pass (of a
            stream without a length: those that it gave), and ``loss``, the mean over all steps;
            and those of :func:`count_units`.

        Raises:
            WeightsError: If the arrays do not fit the model.
            ValueError: If there are no examples.
        """
        named_arrays.check(self.spec, named_arrays.spec(parameters))
        named_arrays.check(self.statistics_spec, named_arrays.spec(statistics))
        seed = randomness.round_seed(config, client)
        start_time = time.perf_counter()
        start = self.client_arrays.combine(parameters, statistics, client_state)
        with self.load_arrays(*start):
            batches = self.batches.training(data, config, seed)
        batch = next(batches, None)
        if batch is None:
            raise ValueError("The client has no training examples.")
        mx.async_eval(batch[0])  # the device starts while the programs are prepared
        if optimizer is None:
            optimizer = self.programs.make_optimizer(config)[0]
        programs = self.programs.get(optimizer, config)
        counters = restore_counters(state_of(optimizer), client_state)
        optimizer_state = programs.initial_state(counters, start[0])
        optimizer_state |= named_arrays.arrays_of_kind(client_state, "state")
        state = TrainState(*start, optimizer_state, randomness.key(*seed, "layers"))
        proximal = proximal_term(parameters, config)

        losses: list[mx.array] = []
        step_weights: list[mx.array] = []
        num_examples = 0
        progress = None
        if self.progress is not None:
            num_steps = self.batches.num_steps(data, config)
            progress = self.progress(seed[1], num_steps, self.task.weight_unit)
        try:
            for step, (arrays, mask, size) in enumerate(chain([batch], batches), 1):
                context = StepContext(counters, proximal, self.round_and_step(config, step))
                result = programs.step((*seed, step), state, context, arrays, mask)
                state, counters = result.state, result.counters
                mx.async_eval(state, result.loss, result.weight)
                losses.append(result.loss)
                step_weights.append(result.weight)
                num_examples += size
                if progress:
                    progress.update(losses, step_weights)
            mx.eval(state, losses, step_weights)
        except Exception:
            if not self.programs.has_changed(programs.optimizer):
                raise
        if self.programs.has_changed(programs.optimizer):
            self.note(STATEFUL_OPTIMIZER)
            self.programs.one_for_each_client()
            return self.train(
                parameters, statistics, data, config, client=client, client_state=client_state
            )
        seconds = time.perf_counter() - start_time
        loss_weights: Any = [weight.item() for weight in step_weights]
        loss_values: Any = [loss.item() for loss in losses]
        self.note_divergence(loss_values, loss_weights)
        if not callable(data.train):
            num_examples = examples.count(self.batches.resident(data.train))
        elif isinstance(data.train, Sized):
            num_examples = len(data.train)
        metrics: dict[str, int | float] = {
            "num-examples": num_examples,
            "loss": weighted_mean(loss_values, loss_weights),
        }
        metrics |= count_units(self.task, loss_weights, seconds)
        metrics |= self.first_loss(*start, data, config)
        return self.make_update(state, counters, metrics, config)

    def first_loss(
        self, parameters: Arrays, statistics: Arrays, data: Data, config: Config
    ) -> dict[str, float]:
        """Loss before training, by the name in the setting ``train-loss-key``, for QFedAvg.

        Raises:
            SettingsError: If another metric has the name.
        """
        key = config.get("train-loss-key")
        if not key:
            return {}
        if key in ("num-examples", "loss", f"num-{self.task.weight_unit}", *self.task.metrics):
            raise SettingsError(f"The setting train-loss-key is {key!r}, which is another metric.")
        with self.load_arrays(parameters, statistics):
            loss = self.evaluator.loss(parameters, statistics, data.train, config)
        return {str(key): loss}

    def make_update(
        self, state: TrainState, counters: Arrays, metrics: dict[str, int | float], config: Config
    ) -> ClientUpdate:
        """Client update of a training state: what is sent, and the new client state."""
        arrays = self.client_arrays
        if CLIP in config:  # each client counts as much as any other
            metrics["clients"] = 1
        if not arrays.has_client_state:
            return ClientUpdate(state.parameters, state.statistics, metrics)
        client_state = arrays.client_state(state, counters)
        parameters = {name: state.parameters[name] for name in arrays.shared}
        statistics = {name: state.statistics[name] for name in arrays.averaged_statistics}
        # The server rejects an update that diverged; a client state would carry it further.
        is_finite = named_arrays.are_finite(
            (*client_state.values(), *parameters.values(), *statistics.values())
        )
        return ClientUpdate(parameters, statistics, metrics, client_state if is_finite else {})

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
        arrays = self.client_arrays.combine(parameters, statistics, client_state)
        with self.load_arrays(*arrays):
            return self.evaluator.evaluate(*arrays, split, config)

    def update_encoder(self, config: Config) -> UpdateEncoder | None:
        """Encoder of updates in a run with these settings; None if they are sent as they are."""
        key = config.get("run-id"), config.get(SETTING)
        if self._encoder is None or self._encoder[0] != key:
            transform = run_transform(self.task, config, self.spec)
            self._encoder = (key, transform and UpdateEncoder(transform))
        return self._encoder[1]

    def warm_up(self, data: Data, config: Config) -> None:
        """Compiles the programs by a step on one batch, before the first round."""
        start = self.parameters(), self.statistics()
        self.train(*start, data, {"server-round": 1, **config, "local-steps": 1})
        if data.test is None or callable(data.test):
            return
        self.evaluate(*start, examples.first(data.test, self.task.eval_batch_size))

    def round_and_step(self, config: Config, step: int) -> tuple[mx.array, mx.array] | None:
        """Round and local step, int32 scalars, for a loss that takes the settings."""
        if not self.takes_config:
            return None
        return mx.array(int(config.get("server-round", 0))), mx.array(step)

    @contextmanager
    def load_arrays(self, parameters: Arrays, statistics: Arrays) -> Iterator[None]:
        """Context in which the model has these arrays; its arrays before are restored."""
        slots = {**self.slots.parameters, **self.slots.statistics}
        arrays = weights.get(slots)
        weights.put(slots, {**parameters, **statistics})
        try:
            yield
        finally:
            weights.put(slots, arrays)


def proximal_term(parameters: Arrays, config: Config) -> tuple[Arrays, mx.array] | None:
    """Global parameters and FedProx's factor, or ``None`` without the setting ``proximal-mu``."""
    mu = float(config.get("proximal-mu", 0.0))
    return (parameters, mx.array(mu)) if mu else None
