"""A task: a model, its loss, its data, and how a client trains on them.

Imports nothing of Flower's: a task is a plain description, the same in one process, on a
federation of machines and under ``flwr run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .errors import TaskError
from .settings_check import KINDS
from .task_settings import TracedConfig, kebab_case, plain
from .tracebacks import definition, misfit

if TYPE_CHECKING:
    import mlx.nn as nn

Config = Mapping[str, Any]
"""Settings in kebab-case, such as ``{"learning-rate": 0.1}``, as Flower's ConfigRecord."""


Split = Sequence[Any] | Mapping[str, Any] | Callable[[Any], Iterable[Any]]
"""Examples: a tree of arrays, or a callable that takes a random key and returns batches."""


@dataclass(frozen=True)
class Data:
    """One client's examples.

    Args:
        train (tuple, dict or callable): Arrays (of MLX, NumPy, pandas or PyTorch, or lists of
            numbers) that share their leading axis, the examples. A tuple's arrays are the loss's
            arguments one by one, a dictionary is one argument; both may be nested. For what does
            not fit in memory or is ragged: a callable that takes a random key and returns an
            iterable of batches. If it has a length, that is the number of its examples; if it has
            ``num_batches``, that is the number of batches of each pass.
        test (tuple, dict or callable): The held-out examples, in the same form. ``None``, or
            arrays without examples, where a client has nothing to evaluate on: it trains, and
            evaluations go on without it.

    Example:
        >>> Data(train=(images, labels), test=(held_out_images, held_out_labels))
    """

    train: Split
    test: Split | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            arrays = getattr(self, split)
            if arrays is None and split == "train":
                raise TypeError(
                    "Data.train is None: it takes a tuple or dictionary of arrays, or a callable "
                    "that returns batches."
                )
            if arrays is None or callable(arrays):
                continue
            if hasattr(arrays, "shape"):  # its rows would be taken for arrays
                raise TypeError(
                    f"Data.{split} takes a tuple of arrays: write (array,) where there is one."
                )
            if not isinstance(arrays, (tuple, list, Mapping)):
                raise TypeError(
                    f"Data.{split} takes a tuple or dictionary of arrays, or a callable that "
                    f"returns batches, not a {type(arrays).__name__}."
                )
            entries = [*_entries(arrays)]
            for entry in entries:
                if not hasattr(entry, "__len__"):
                    raise TypeError(
                        f"Data.{split} takes arrays, of one entry an example; it has a "
                        f"{type(entry).__name__}."
                    )
            lengths = [len(entry) for entry in entries]
            if len(set(lengths)) != 1:
                raise ValueError(
                    f"Data.{split} takes arrays of one length, the number of examples; "
                    f"these have {lengths}."
                )


def _entries(examples: Any, top: bool = True) -> Iterator[Any]:
    """The arrays of a tree; a list is a tuple of arrays at the top and an array below."""
    if isinstance(examples, Mapping):
        for child in examples.values():
            yield from _entries(child, False)
    elif isinstance(examples, tuple) or (top and isinstance(examples, list)):
        for child in examples:
            yield from _entries(child, False)
    else:
        yield examples


@dataclass(frozen=True)
class DatasetMetric:
    """A metric over all of a client's examples at once, which no mean over batches is: an area
    under a curve, an F1 score, a correlation.

    Over clients it is the mean weighted by the number of examples, of those for which it is
    defined: not what it would be on all their examples together.

    Args:
        predict (callable): ``predict(model, *batch)`` returns what is kept of each batch: an
            array, a tuple of arrays or a dictionary of them, each with the examples as leading
            axis.
        compute (callable): ``compute(*arrays)``, or ``compute(**arrays)`` for a dictionary,
            returns the metric, a number. The arrays have the examples of all batches, without
            padding; they are MLX's, and ``numpy.asarray`` of them works (bfloat16 has become
            float32). ``None`` or NaN where it is not defined, as on examples of one class: the
            client then does not count in it.

    Example:
        >>> def error(scores, labels):
        ...     return 1 - np.corrcoef(np.asarray(scores), np.asarray(labels))[0, 1]
        >>> metric = DatasetMetric(lambda model, x, y: (model(x)[:, 0], y), error)
    """

    predict: Callable[..., Any]
    compute: Callable[..., float | None]


_KINDS = {
    "batch_size": KINDS["batch-size"],
    "gradient_accumulation": KINDS["gradient-accumulation"],
    "local_epochs": KINDS["local-epochs"],
    "local_steps": KINDS["local-steps"],
    "eval_batch_size": KINDS["batch-size"],
    "max_grad_norm": KINDS["max-grad-norm"],
}


_RETURNS = {
    "model": " that returns a new model, such as model=lambda: nn.Linear(8, 1)",
    "optimizer": " of the settings that returns a new optimizer, such as "
    "optimizer=lambda config: optim.SGD(0.1)",
}
_ARGUMENTS = {
    "model": "",
    "optimizer": "config",
    "data": "partition_id, num_partitions",
    "train_step": "model, optimizer, batch, key, config",
    "buffers": "name",
    "personal": "name",
    "derived": "metrics",
    "update_transforms": "config",
    "fingerprint": "",
    "fingerprint_covers": "name",
    "save": "model, folder",
}
"""The arguments that a task's functions are called with."""


@dataclass(frozen=True)
class Task:
    """A model to train, and what one client does with its own data in a round.

    Args:
        model (callable): Returns a new ``mlx.nn.Module``.
        loss (callable): ``loss(model, *batch)``: the mean over the batch (a scalar) or the loss
            of each example (a vector). With a vector whose examples do not depend on each other
            a last batch that is not full is padded and masked, so that clients of any number of
            examples share a few compiled programs. Of a tuple the first value is the loss and
            the rest is not used, as in ``(loss, accuracy)``; with ``weight_unit`` it is
            ``(mean, weight)``, as mlx-lm's losses return. A loss with a parameter ``config``
            gets the settings, with the round as ``config["server-round"]`` and the step of the
            round as ``config["local-step"]``, both from 1.
        optimizer (callable): ``optimizer(config)`` returns a new ``mlx.optimizers`` optimizer.
            Its state is fresh in every round, unless ``keep_optimizer``.
        data (callable): ``data(partition_id, num_partitions)`` returns the client's
            :class:`Data`; the number is ``None`` on a node that was not told one.
        metrics (dict): Names to ``metric(model, *batch)``, computed on the held-out examples:
            each returns a value for each example (shape (batch,) or (batch, ...)), a mean
            (a scalar) or ``(mean, weight)``; or to a :class:`DatasetMetric`.
            ``{"accuracy": accuracy}``
        config (dict): Settings that the server sends with every message, its own over these, in
            kebab-case or snake_case. What is declared here can be set by ``-c`` and ``config=``.
            ``optimizer`` reads them, and the keys ``batch-size``, ``gradient-accumulation``,
            ``local-epochs``, ``local-steps`` and ``max-grad-norm`` stand over the fields below.
        batch_size (int): Examples in memory at once in training. Default: ``32``.
        gradient_accumulation (int): Micro-batches of a training step, which sums their gradients:
            a step on ``batch_size`` times as many examples, in the memory of ``batch_size``. A
            stream's batches are divided into as many. Default: ``1``.
        local_epochs (int): Passes over the client's data a round. Default: ``1``.
        local_steps (int, optional): Steps a round, in place of ``local_epochs``. A pass over the
            data goes on from round to round.
        eval_batch_size (int): Examples an evaluation step. Default: ``512``.
        max_grad_norm (float, optional): Clip the gradient of each step to this norm.
        augment (callable, optional): ``augment(key, *batch)`` returns the batch to train on.
        train_step (callable, optional): ``train_step(model, optimizer, batch, key, config)``
            does one training step itself, in place of one loss, one gradient and one update: it
            updates the model in place and returns the loss, in a form that ``loss`` may have.
            For adversarial training, sharpness-aware minimization, queues. ``optimizer`` is what
            ``Task.optimizer`` returns, which may be several in a dictionary; ``key`` is a random
            key. It runs uncompiled and one client after another; ``loss`` is for evaluation.
        compile (bool): Compile training and evaluation steps with ``mx.compile``. Where that
            fails, as for Python's control flow on an array's value, they run uncompiled, which
            the run says. Default: ``True``.
        statistics (str): What becomes of running statistics (BatchNorm's mean and variance):
            ``"average"`` averages them over clients as updates, ``"local"`` leaves each
            client its own, as in FedBN (https://arxiv.org/abs/2102.07623).
        buffers (callable, optional): ``buffers(name)`` says which other arrays the model's
            forward pass assigns, such as a codebook, an exponential moving average or the
            statistics of a normalization of one's own: ``"average"`` and ``"local"`` are treated
            like ``statistics``, ``None`` is no buffer. A name may be that of a private array.
        personal (callable, optional): ``personal(name)`` says of which parameters each client
            keeps its own: they are trained with the others and never travel, as in FedPer
            (https://arxiv.org/abs/1912.00818). Tied weights are personal if it says so of any of
            their names. ``lambda name: name.startswith("head")``
        keep_optimizer (bool): Let each client's optimizer go on from round to round, instead of
            beginning anew; its learning rate is that of each round's. Default: ``False``.
        weight_unit (str, optional): What the weight of a loss that returns ``(mean, weight)``
            counts, without which a tuple has no weight: with ``"tokens"`` clients report
            ``num-tokens``, by which a strategy may weigh them
            (``FedAvg(weighted_by_key="num-tokens")``), and ``tokens-per-second``.
        derived (callable, optional): ``derived(metrics)`` returns further metrics that follow from
            the mean loss and metrics of an evaluation, a client's and the mean over clients; one
            that is undefined is NaN there:
            ``lambda metrics: {"perplexity": math.exp(metrics["loss"])}``.
        update_transforms (callable, optional): ``update_transforms(config)`` returns transforms of
            a client's update before it is sent, in their order, such as
            ``[mlx_fed.transforms.top_k(0.01)]``; what the setting ``compress`` names comes after
            them. Called once in a run.
        fingerprint (callable, optional): ``fingerprint()`` returns what has to be the same on the
            server and its nodes, each with a short text that tells it from others:
            ``{"base model": "3f2a5c..."}``. A node that differs is turned away. A function in
            place of a text is called when all before it agree: what takes a download comes last.
        fingerprint_covers (callable, optional): ``fingerprint_covers(name)`` says for which frozen
            arrays the fingerprint stands: they are not compared by their values, as all others
            are, and so need not be read for it.
        save (callable, optional): ``save(model, folder)`` writes the final model below a run's
            folder and returns the path, or None for the folder. Default: all arrays, as
            ``model.safetensors``.

    Example:
        >>> task = Task(
        ...     model=lambda: MLP(2, 784, 32, 10),
        ...     loss=lambda model, x, y: nn.losses.cross_entropy(model(x), y),
        ...     optimizer=lambda config: optim.SGD(config["learning-rate"]),
        ...     data=load_partition,
        ...     config={"learning-rate": 0.1},
        ... )
    """

    model: Callable[[], nn.Module]
    loss: Callable[..., Any]
    optimizer: Callable[[Config], Any]
    data: Callable[[int, int | None], Data]
    metrics: Mapping[str, Callable[..., Any] | DatasetMetric] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    batch_size: int = 32
    gradient_accumulation: int = 1
    local_epochs: int = 1
    local_steps: int | None = None
    eval_batch_size: int = 512
    max_grad_norm: float | None = None
    augment: Callable[..., Any] | None = None
    train_step: Callable[..., Any] | None = None
    compile: bool = True
    statistics: Literal["average", "local"] = "average"
    buffers: Callable[[str], Literal["average", "local"] | None] | None = None
    personal: Callable[[str], bool] | None = None
    keep_optimizer: bool = False
    weight_unit: str | None = None
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    update_transforms: Callable[[Config], Sequence[Any]] | None = None
    fingerprint: Callable[[], Mapping[str, str | Callable[[], str]]] | None = None
    fingerprint_covers: Callable[[str], bool] | None = None
    save: Callable[[nn.Module, Path], Path | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", kebab_case(self.config, "Task.config"))
        for name, kind in _KINDS.items():
            if (value := plain(getattr(self, name))) is not None:
                kind.check("", f"Task.{name}", value)
            object.__setattr__(self, name, value)
        for name in ("compile", "keep_optimizer"):
            if not isinstance(value := getattr(self, name), bool):
                raise TaskError(f"Task.{name} is True or False, not {value!r}.")
        if not (
            self.weight_unit is None or (isinstance(self.weight_unit, str) and self.weight_unit)
        ):
            raise TaskError(
                "Task.weight_unit names what the loss's weight counts, such as "
                f'weight_unit="tokens"; it is {self.weight_unit!r}.'
            )
        if not isinstance(self.metrics, Mapping):
            raise TaskError(
                'Task.metrics is a dictionary of functions by name, {"accuracy": accuracy}, and '
                f"this is a {type(self.metrics).__name__}."
            )
        for name in ("loss", "num-examples", "nodes"):
            if name in self.metrics:
                raise ValueError(
                    f"Task.metrics has {name!r}, which every evaluation reports itself: give "
                    "the metric another name."
                )
        if self.train_step is not None and self.max_grad_norm is not None:
            raise ValueError(
                "Task.max_grad_norm clips the gradient between loss and update, which "
                "Task.train_step computes itself: clip there with mlx.optimizers.clip_grad_norm."
            )
        if self.train_step is not None and self.gradient_accumulation > 1:
            raise ValueError(
                "Task.gradient_accumulation sums gradients between loss and update, which "
                "Task.train_step computes itself: sum them there."
            )
        for name, metric in self.metrics.items():
            if not callable(metric) and not isinstance(metric, DatasetMetric):
                raise TypeError(
                    f"Task.metrics[{name!r}] is a {type(metric).__name__}: it is a function, "
                    "metric(model, *batch), or an mlx_fed.DatasetMetric."
                )
        for name in ("loss", *_ARGUMENTS):
            _check_function(name, getattr(self, name))
        functions: dict[str, Any] = {"loss": self.loss, **self.metrics}
        for name, function in functions.items():
            if getattr(function, "__module__", "").startswith("mlx.nn."):  # of (outputs, targets)
                field_name = "loss" if name == "loss" else f"metrics[{name!r}]"
                raise TaskError(
                    f"Task.{field_name} is called with the model and a batch, and "
                    f"nn.losses.{function.__name__} takes the model's outputs: write "
                    f"lambda model, x, y: nn.losses.{function.__name__}(model(x), y)."
                )
        if self.statistics not in ("average", "local"):
            raise ValueError(
                f'Task.statistics must be "average" or "local", not {self.statistics!r}.'
            )


def _check_function(name: str, function: Any) -> None:
    """Refuses what is no function, or one that does not take the arguments of its field.

    Raises:
        TaskError: With the field, the arguments that it is called with, and the function's line.
    """
    if function is None:
        return
    is_instance = name == "model" and hasattr(type(function), "trainable_parameters")
    if is_instance or not callable(function):
        raise TaskError(
            f"Task.{name} is a function{_RETURNS.get(name, '')}, not an object of the "
            f"class {type(function).__name__}."
        )
    if (arguments := _ARGUMENTS.get(name)) is not None:
        problem = misfit(function, *filter(None, arguments.split(", ")))
        if problem is not None:
            raise TaskError(
                f"Task.{name} is called as {name}({arguments}), and the function"
                f"{definition(function)} does not take that: {problem}."
            )


TaskSource = Task | Callable[[dict[str, Any]], Task]
"""A task, or a function that makes one from the settings it is run with."""


def fingerprint_of(
    task: Task, reference: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """The task's fingerprint, what has to be the same on every machine: all of it, or up to the
    first entry that differs from the reference."""
    fingerprint: dict[str, str] = {}
    for what, value in (task.fingerprint() if task.fingerprint else {}).items():
        fingerprint[what] = value() if callable(value) else value
        if reference.get(what, fingerprint[what]) != fingerprint[what]:
            break
    return fingerprint


def make_task(source: TaskSource, config: Config | None = None) -> Task:
    """The task itself, made from ``config`` where ``source`` is a function.

    Raises:
        TypeError: If the source is neither a :class:`Task` nor a function that returns one.
    """
    task: Any = source
    if callable(source) and not isinstance(source, Task):
        settings = TracedConfig.of(config)
        if reason := misfit(source, settings):
            raise TaskError(
                f"The task is a Task, or a function of the settings, such as def task(config); "
                f"this one{definition(source)} does not take them: {reason}."
            )
        task = source(settings)
    if not isinstance(task, Task):
        raise TypeError(
            f"Expected an mlx_fed.Task, or a function of the settings that returns one, "
            f"got {type(task).__name__}."
        )
    return task
