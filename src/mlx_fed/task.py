"""What is trained: a model, its loss, its data and how a client works on them.

This room imports nothing of ours and nothing of Flower's: a task is a plain description,
the same in one process, on a federation of machines and under ``flwr run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

Config = Mapping[str, Any]
"""Settings in kebab-case, such as ``{"learning-rate": 0.1}``, as Flower's ConfigRecord."""


@dataclass(frozen=True)
class Data:
    """One client's examples.

    Args:
        train (tuple or callable): Arrays (``mx.array`` or NumPy) that share their leading
            axis, the examples; or, for what does not fit in memory or is ragged, a callable
            that takes a random key and returns an iterable of batches. If it has a length, that
            is the number of its examples.
        test (tuple or callable): The held-out examples, in the same form. ``None`` where a
            client has nothing to evaluate on: it trains, and evaluations go on without it.

    Example:
        >>> Data(train=(images, labels), test=(held_out_images, held_out_labels))
    """

    train: Sequence[Any] | Callable[[mx.array], Iterable[Sequence[mx.array]]]
    test: Sequence[Any] | Callable[[mx.array], Iterable[Sequence[mx.array]]] | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            arrays = getattr(self, split)
            if arrays is None or callable(arrays):
                continue
            if hasattr(arrays, "shape"):  # its rows would be taken for arrays
                raise TypeError(
                    f"Data.{split} takes a tuple of arrays: write (array,) where there is one."
                )
            lengths = [len(array) for array in arrays]
            if len(set(lengths)) != 1:
                raise ValueError(
                    f"Data.{split} takes arrays of one length, the number of examples; "
                    f"these have {lengths}."
                )


@dataclass(frozen=True)
class Task:
    """A model to train, and what one client does with its own data in a round.

    Args:
        model (callable): Returns a new ``mlx.nn.Module``.
        loss (callable): ``loss(model, *batch)``: the mean over the batch (a scalar), the loss
            of each example (a vector), or ``(mean, weight)`` as mlx-lm's losses do. With a
            vector a last batch that is not full is padded and masked, so that clients of any
            number of examples share a few compiled programs.
        optimizer (callable): ``optimizer(config)`` returns a new ``mlx.optimizers`` optimizer.
            Its state is fresh in every round, unless ``keep_optimizer``.
        data (callable): ``data(partition_id, num_partitions)`` returns the client's
            :class:`Data`; the number is ``None`` on a node that was not told one.
        metrics (dict): Names to ``metric(model, *batch)``, each a vector, a mean or
            ``(mean, weight)``, computed on the held-out examples. ``{"accuracy": accuracy}``
        config (dict): Settings that the server sends with every message, its own over these.
            ``optimizer`` reads them, and the keys ``batch-size``, ``local-epochs``,
            ``local-steps`` and ``max-grad-norm`` stand over the fields below.
        batch_size (int): Examples a training step. Default: ``32``.
        local_epochs (int): Passes over the client's data a round. Default: ``1``.
        local_steps (int, optional): Steps a round, in place of ``local_epochs``.
        eval_batch_size (int): Examples an evaluation step. Default: ``512``.
        max_grad_norm (float, optional): Clip the gradient of each step to this norm.
        augment (callable, optional): ``augment(key, *batch)`` returns the batch to train on.
        statistics (str): What becomes of running statistics (BatchNorm's mean and variance):
            ``"average"`` averages them over clients by examples, ``"local"`` leaves each
            client its own, as in FedBN (https://arxiv.org/abs/2102.07623).
        personal (callable, optional): ``personal(name)`` says of which parameters each client
            keeps its own: they are trained with the others and never travel, as in FedPer
            (https://arxiv.org/abs/1912.00818). ``lambda name: name.startswith("head")``
        keep_optimizer (bool): Let each client's optimizer go on from round to round, instead of
            beginning anew; its learning rate is that of each round's. Default: ``False``.
        weight_unit (str, optional): What the weights of a loss that returns ``(mean, weight)``
            count: with ``"tokens"`` clients report ``num-tokens``, by which a strategy may weigh
            them (``FedAvg(weighted_by_key="num-tokens")``), and ``tokens-per-second``.
        derived (callable, optional): ``derived(metrics)`` returns further metrics that follow from
            the mean loss and metrics of an evaluation, a client's and the average over clients:
            ``lambda metrics: {"perplexity": math.exp(metrics["loss"])}``.
        fingerprint (callable, optional): ``fingerprint()`` returns what has to be the same on the
            server and its nodes, each with a short text that tells it from others:
            ``{"base model": "3f2a5c..."}``. A node that differs is turned away. A function in
            place of a text is called when all before it agree: what takes a download comes last.
        fingerprint_covers (callable, optional): ``fingerprint_covers(name)`` says for which frozen
            arrays the fingerprint stands: they are not compared by their values, as all others
            are, and so need not be read for it.
        save (callable, optional): ``save(model, folder)`` writes the final model below a run's
            folder and returns the path. Default: all arrays, as ``model.safetensors``.

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
    optimizer: Callable[[Config], optim.Optimizer]
    data: Callable[[int, int | None], Data]
    metrics: Mapping[str, Callable[..., mx.array]] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    batch_size: int = 32
    local_epochs: int = 1
    local_steps: int | None = None
    eval_batch_size: int = 512
    max_grad_norm: float | None = None
    augment: Callable[..., Sequence[mx.array]] | None = None
    statistics: Literal["average", "local"] = "average"
    personal: Callable[[str], bool] | None = None
    keep_optimizer: bool = False
    weight_unit: str | None = None
    derived: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    fingerprint: Callable[[], Mapping[str, str | Callable[[], str]]] | None = None
    fingerprint_covers: Callable[[str], bool] | None = None
    save: Callable[[nn.Module, Path], Path] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "local_epochs", "local_steps", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Task.{name} must be 1 or more, not {value}.")
        for name in ("loss", "num-examples"):
            if name in self.metrics:
                raise ValueError(
                    f"Task.metrics has {name!r}, which every evaluation reports itself: give "
                    "the metric another name."
                )
        if self.statistics not in ("average", "local"):
            raise ValueError(
                f'Task.statistics must be "average" or "local", not {self.statistics!r}.'
            )


TaskSource = Task | Callable[[Config], Task]
"""A task, or a function that makes one from the settings it is run with."""


def fingerprint_of(
    task: Task, expected: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """What the task says has to be the same on every machine: all of it, or up to the first that
    is not as expected."""
    known: dict[str, str] = {}
    for what, value in (task.fingerprint() if task.fingerprint else {}).items():
        known[what] = value() if callable(value) else value
        if expected.get(what, known[what]) != known[what]:
            break
    return known


def make_task(source: TaskSource, config: Config | None = None) -> Task:
    """The task itself, made from ``config`` where ``source`` is a function.

    Raises:
        TypeError: If the source is neither a :class:`Task` nor a function that returns one.
    """
    task = source if isinstance(source, Task) or not callable(source) else source(config or {})
    if not isinstance(task, Task):
        raise TypeError(
            f"Expected an mlx_fed.Task, or a function of the settings that returns one, "
            f"got {type(task).__name__}."
        )
    return task
