"""Compiled programs of a task's training, and what they are keyed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..arrays import examples
from ..arrays.named_arrays import Arrays
from ..arrays.weights import Slots
from ..errors import TaskError
from ..system import calls
from ..task import Config, Task
from ..task_settings import TracedConfig
from .optimizer_state import initial_state, named_optimizers, signature
from .programs import Program, compiled, generator_states
from .python_state import PythonState, Snapshot
from .steps import StepResult, custom_step, gradient_accumulation, training_step

_MOST_CHANGES = 2
"""Changes of Python state after which steps are not compiled: each is another trace."""


class TrainingPrograms(NamedTuple):
    """Compiled functions of training: a new optimizer's state, and a step (see
    :mod:`~mlx_fed.training.steps`), which takes a seed first; and the optimizer whose methods they
    call."""

    initial_state: Callable[..., Arrays]
    step: Callable[..., StepResult]
    optimizer: Any


class ProgramCache:
    """The last programs of a task's training, traced anew when a constant in them changes.

    Args:
        task (Task): What is trained.
        model (nn.Module): The task's model.
        slots (Slots): Where its arrays are held.
        note (callable): ``note(text)`` logs why steps are not compiled.

    Attributes:
        python_state (PythonState): Python state that a step reads.
    """

    def __init__(self, task: Task, model: nn.Module, slots: Slots, note: Callable[[str], None]):
        self.task, self.model, self.slots, self.note = task, model, slots, note
        self.takes_config = examples.takes_config(task.loss)
        self.python_state = PythonState(task.loss, task.augment, model)
        self._optimizer_source = PythonState(task.optimizer)
        self._entry: tuple[Any, TrainingPrograms] | None = None
        self._last_state: Snapshot | None = None
        self._num_changes = 0
        self._is_for_one_client = False
        self._last_optimizers: list[Any] = []

    def make_optimizer(self, config: Config) -> tuple[Any, bool]:
        """A new optimizer of the task's, and whether making it has has_changed Python state that
        ``Task.optimizer`` reads, so that the next call may return another one."""
        state, generators = self._optimizer_source.snapshot(), generator_states()
        optimizer = calls.call("Task.optimizer", self.task.optimizer, TracedConfig(config))
        self._require_new(optimizer)
        has_changed = state != self._optimizer_source.snapshot() or generators != generator_states()
        return optimizer, has_changed

    def _require_new(self, optimizer: Any) -> None:
        """Raises TaskError for an optimizer that has been returned before: it has the state of
        another client."""
        children = [child for _, child in named_optimizers(optimizer)]
        if any(child is optimizer for child in children for optimizer in self._last_optimizers):
            raise TaskError(
                "Task.optimizer returned an optimizer that it has returned before, which has the "
                "state of another round: make a new one in each call. Task(keep_optimizer=True) "
                "keeps that of each client."
            )
        self._last_optimizers = children

    def get(self, optimizer: Any, config: Config) -> TrainingPrograms:
        """Programs for an optimizer and the settings."""
        key = self.key(optimizer, config)
        if self._entry is None or self._entry[0] != key:
            mx.eval(self.model.parameters())  # or each step would compute the frozen ones anew
            self._entry = (key, self._new_programs(optimizer, config))
        return self._entry[1]

    def key(self, optimizer: Any, config: Config) -> Any:
        """Key of the constants in a traced step, apart from the task and the shapes."""
        if self.task.train_step is not None or self._is_for_one_client:
            return object()
        settings: Any = ()
        if self.takes_config:
            settings = sorted((k, v) for k, v in config.items() if k != "server-round")
        norm = config.get("max-grad-norm", self.task.max_grad_norm)
        accumulation = gradient_accumulation(self.task, config)
        return signature(optimizer), norm, accumulation, settings, self._follow_state()

    def has_changed(self, optimizer: Any) -> bool:
        """Whether a step has changed attributes of the programs' optimizer: Python state of one
        client."""
        if self._entry is None or optimizer is None or self._is_for_one_client:
            return False
        return signature(optimizer) != self._entry[0][0]

    def one_for_each_client(self) -> None:
        """From now on programs are for one client, with its own optimizer, and not compiled."""
        self._is_for_one_client = True

    @property
    def has_changing_state(self) -> bool:
        """Whether Python state that the loss or the model reads changes again and again."""
        return self._num_changes >= _MOST_CHANGES

    def _follow_state(self) -> Snapshot:
        """The Python state that a step reads; counts its changes."""
        state = self.python_state.snapshot()
        if self._last_state not in (None, state):
            self._num_changes += 1
            if self.has_changing_state and self.task.compile:
                self.note(
                    "training is not compiled: a global or closure variable, or an attribute, that "
                    "Task.loss, Task.augment or the model reads changes from time to time"
                )
        self._last_state = state
        return state

    def _new_programs(self, optimizer: Any, config: Config) -> TrainingPrograms:
        arguments = self.model, self.slots, self.task, optimizer, config
        if self.task.train_step is not None:
            program = self._program(custom_step(*arguments), False)
            return TrainingPrograms(lambda counters, parameters: {}, program, None)
        compile = self.task.compile and not self.has_changing_state and not self._is_for_one_client
        program = self._program(training_step(*arguments), compile)
        first = initial_state(optimizer)
        state = first if self._is_for_one_client else compiled(first)
        return TrainingPrograms(state, program, optimizer)

    def _program(self, step: Callable[..., StepResult], compile: bool) -> Program:
        return Program(step, _compared_arrays, compile, self.note, "training", self.python_state)


def _compared_arrays(step: StepResult) -> Arrays:
    """Arrays of a step's result that have to be the same, compiled or not."""
    statistics = {f"statistics {name!r}": a for name, a in step.state.statistics.items()}
    # Adam's first update is the gradient's sign, rounding's where the gradient is zero. The state
    # has the gradient itself; plain SGD leaves it zero.
    update = {f"the optimizer's state {p!r}": a for p, a in step.state.optimizer_state.items()}
    if not any(array.any().item() for array in update.values()):
        update = {f"parameter {name!r}": a for name, a in step.state.parameters.items()}
    return {"the loss": step.loss, "its weight": step.weight, **statistics, **update}
