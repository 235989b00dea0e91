"""Random tasks, each a pure function of one integer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx_fed as fed  # before mlx.core

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pandas as pd
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from mlx.utils import tree_flatten, tree_map

from . import models
from .models import VOCABULARY, WIDTH

MOST_STEPS = 16
"""Training steps of all clients in all rounds, about."""


@dataclass(frozen=True)
class Drawn:
    """A task, how it is run, and what is in it.

    Attributes:
        features (dict): What was drawn, for a report: "loss" -> "vector".
        follows (bool): Whether the oracle can follow it: no randomness within a step.
    """

    seed: int
    task: fed.Task
    strategy_name: str
    options: dict[str, Any]
    fractions: dict[str, float]
    num_clients: int
    num_rounds: int
    chunk_size: int | None
    config: dict[str, Any]
    features: dict[str, Any]
    follows: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the strategy."""
        least = dict.fromkeys(("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"), 1)
        return {**least, **self.fractions, **self.options}

    def strategy(self) -> Strategy:
        """A new one, for each run."""
        return getattr(flower, self.strategy_name)(**self.arguments)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
        return "\n".join(lines + [f"  {name}: {value}" for name, value in self.features.items()])


class Draw:
    """Draws from one seed, and notes what it drew."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.features: dict[str, Any] = {}

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def small(self, low: int, high: int) -> int:
        """Small numbers more often."""
        return low + int((high - low + 1) * self.rng.random() ** 2)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)


# -- data ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One array of a batch: the shape and dtype of an example, and what its values are."""

    shape: tuple[int, ...]
    dtype: str
    values: str
    classes: int = VOCABULARY
    container: str = "numpy"

    def make(self, rng: np.random.Generator, number: int, only: int | None = None) -> Any:
        """The values of so many examples; with ``only`` whole numbers are this one alone."""
        shape = (number, *self.shape)
        if self.values == "whole":
            array: Any = rng.integers(0, self.classes, shape)
            array = array if only is None else np.full(shape, only % self.classes)
        elif self.values == "weight":
            array = rng.uniform(0.5, 2.0, shape)
        else:
            array = rng.normal(size=shape)
            if self.values == "sparse":
                array *= rng.random((number, *[1] * len(self.shape))) < 0.4
        if self.dtype == "bool" and self.values != "whole":
            array = array > 0
        if self.container == "mlx" or self.dtype == "bfloat16":
            return mx.array(array.astype(np.float32)).astype(
                mx.bool_ if self.dtype == "bool" else getattr(mx, self.dtype)
            )
        array = array.astype(self.dtype)
        if self.container == "pandas" and array.ndim < 3:
            return (pd.Series if array.ndim == 1 else pd.DataFrame)(array)
        return array.tolist() if self.container == "list" else array

    def __str__(self) -> str:
        return f"{self.values} {self.dtype}{list(self.shape)} {self.container}"


def rows_of(array: Any, rows: Sequence[int]) -> Any:
    """Some examples of what :meth:`Column.make` returns."""
    if isinstance(array, mx.array):
        return array[mx.array(rows)]
    if isinstance(array, list):
        return [array[row] for row in rows]
    return array[rows] if isinstance(array, np.ndarray) else array.iloc[rows]


def draw_container(draw: Draw) -> str:
    return draw.pick(*["numpy"] * 6, *["mlx"] * 4, "list", "pandas")


WHOLE = ("int32", "int32", "int64", "uint8", "uint32", "int16")
FLOATS = ("float32", "float32", "float32", "float32", "float16", "bfloat16")


def draw_input(draw: Draw) -> Column:
    container = draw_container(draw)
    kind = draw.pick("float", "float", "float", "whole", "bool")
    if kind == "float":
        shape = draw.pick((), (4,), (4,), (4,), (2, 3), (3, 2), (4, 4, 1), (4, 4, 2))
        values = draw.pick("normal", "normal", "normal", "normal", "sparse")
        return Column(shape, draw.pick(*FLOATS), values, container=container)
    shape = draw.pick((), (3,), (4,))
    dtype = "bool" if kind == "bool" else draw.pick(*WHOLE)
    return Column(shape, dtype, "normal" if kind == "bool" else "whole", container=container)


def draw_encoder(draw: Draw, column: Column, dtype: mx.Dtype) -> tuple[str, Callable]:
    shape = column.shape
    if column.values == "whole" and draw.chance(0.8):
        return "tokens", models.Tokens
    if len(shape) == 3 and draw.chance(0.7):
        pool = draw.pick("max", "average")
        return f"image {pool}", partial(models.Image, shape[-1], pool, dtype)
    if len(shape) == 2 and draw.chance(0.8):
        kind = draw.pick("gru", "lstm", "rnn", "conv", "attention")
        return f"series {kind}", partial(models.Series, kind, shape[-1], dtype)
    return "flat", partial(models.Flat, max(1, int(np.prod(shape))), dtype)


def draw_target(draw: Draw, inputs: Sequence[Column]) -> Column | None:
    kind = draw.pick("class", "class", "class", "value", "like an input", "none")
    like = [c for c in inputs if c.values in ("normal", "sparse") and c.dtype != "bool"]
    if kind == "class":
        dtype = draw.pick(*WHOLE, "bool")
        return Column((), dtype, "whole", 2 if dtype == "bool" else 3, draw_container(draw))
    if kind == "like an input" and like:
        return draw.pick(*like)
    if kind == "none":
        return None
    shape, dtype = draw.pick((), (2,), (4,)), draw.pick(*FLOATS)
    return Column(shape, dtype, "normal", container=draw_container(draw))


class Stream:
    """Batches in an order that the key decides."""

    def __init__(self, pack: Callable, columns: Sequence[Any], number: int, size: int):
        self.pack, self.columns, self.number, self.size = pack, columns, number, size

    def __call__(self, key: mx.array) -> Any:
        rng = np.random.default_rng(np.array(key).astype(np.uint32))
        order = rng.permutation(self.number)
        for at in range(0, self.number, self.size):
            rows = order[at : at + self.size]
            yield self.pack([rows_of(column, rows) for column in self.columns])


class SizedStream(Stream):
    @property
    def num_batches(self) -> int:
        return -(-self.number // self.size)

    def __len__(self) -> int:
        return self.number


@dataclass(frozen=True)
class Structure:
    """How a batch holds its arrays."""

    kind: str
    number: int

    @property
    def names(self) -> list[str]:
        return [f"{'yxzab'[n]}{n}" for n in range(self.number)]

    def pack(self, arrays: Sequence[Any]) -> Any:
        match self.kind:
            case "dict":
                return dict(zip(self.names, arrays, strict=True))
            case "nested":
                return tuple(arrays[:-1]), arrays[-1]
            case "nested dict":
                return {"rest": tuple(arrays[:-1]), "last": {"of": arrays[-1]}}
            case "list":
                return list(arrays)
        return tuple(arrays)

    def unpack(self, batch: Sequence[Any]) -> list[mx.array]:
        """The arrays, of what a loss is called with."""
        match self.kind:
            case "dict":
                return [batch[0][name] for name in self.names]
            case "nested":
                return [*(batch[0][n] for n in range(self.number - 1)), batch[1]]
            case "nested dict":
                rest = [batch[0]["rest"][n] for n in range(self.number - 1)]
                return [*rest, batch[0]["last"]["of"]]
        return list(batch)


# -- losses and metrics ----------------------------------------------------------------------


def each_loss(out: mx.array, y: mx.array | None) -> mx.array:
    """The loss of each example, by what there is to be learned."""
    out = out.astype(mx.float32)
    if y is None:
        return mx.square(out - 0.3).mean(axis=-1)
    if mx.issubdtype(y.dtype, mx.floating):
        return mx.square(out - y.astype(mx.float32).reshape(len(y), -1)).mean(axis=-1)
    return nn.losses.cross_entropy(out, y.astype(mx.int32))


class Loss:
    """A loss of some form, of a batch whose last arrays are the target and the weights.

    Args:
        form (str): What it returns.
        has_target (bool): Whether the batch has a target.
        has_weight (bool): Whether the batch has a weight for each example, the last array.
    """

    def __init__(self, form: str, has_target: bool, has_weight: bool, structure: Structure):
        self.form, self.has_target, self.has_weight = form, has_target, has_weight
        self.structure = structure

    def outputs(self, model: nn.Module, batch: Sequence[Any]) -> tuple[Any, Any, Any]:
        arrays = self.structure.unpack(batch)
        *rest, weight = arrays if self.has_weight else (*arrays, None)
        *inputs, y = rest if self.has_target else (*rest, None)
        return model(*inputs), y, weight

    def __call__(self, model: nn.Module, *batch: mx.array) -> Any:
        out, y, weight = self.outputs(model, batch)
        losses = each_loss(out, y)
        if weight is not None and self.form != "weighted":
            losses = losses * weight.astype(mx.float32)
        match self.form:
            case "vector":
                return losses
            case "vector half":
                return losses.astype(mx.bfloat16)
            case "mean":
                return losses.mean()
            case "weighted":
                share = 1 + (out[:, 0] > 0) if weight is None else weight.astype(mx.float32)
                total = share.sum()
                return (losses * share).sum() / total, total
            case "weighted whole":
                total = mx.array(len(losses))
                return losses.sum() / total, total
            case "with accuracy":
                return losses.mean(), self.hits(out, y).mean()
            case "with aux":
                return losses.mean(), mx.square(out).mean() * 3
            case "vector with aux":
                return losses, out
            case "pairs":
                kind = losses > 1 if y is None or y.ndim != 1 else y
                other = (kind[:, None] != kind[None, :]).astype(mx.float32)
                out = out.astype(mx.float32)
                away = mx.square(out[:, None] - out[None, :]).mean(axis=-1)
                return losses + (other * mx.exp(-away)).sum(axis=1)
            case "contrast":
                out = out.astype(mx.float32)
                size = mx.sqrt(0.01 + mx.square(out).sum(axis=-1, keepdims=True))  # not 0 / 0
                alike = out @ out.T / size
                return losses + 0.5 * nn.losses.cross_entropy(alike, mx.arange(len(out)))
            case "centered":
                return losses + mx.square(out - out.mean(axis=0)).mean(axis=-1)
            case "share of batch":
                return losses * mx.softmax(mx.stop_gradient(losses)) * len(losses)
        raise ValueError(self.form)

    def hits(self, out: mx.array, y: mx.array | None) -> mx.array:
        if y is None or mx.issubdtype(y.dtype, mx.floating):
            return (out > 0.1).mean(axis=-1)
        return mx.argmax(out, axis=-1) == y.astype(mx.uint32)


class LossOfConfig(Loss):
    """One that changes with the round and the step while it trains."""

    def __call__(self, model: nn.Module, *batch: Any, config: Any = None) -> Any:
        output = super().__call__(model, *batch)
        if not model.training:
            return output
        factor = 1 + 0.2 * config["server-round"] + 0.1 * config["local-step"]
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


class Metric(Loss):
    def __call__(self, model: nn.Module, *batch: mx.array) -> Any:
        out, y, _ = self.outputs(model, batch)
        match self.form:
            case "hits":
                return self.hits(out, y)
            case "mean":
                return each_loss(out, y).mean()
            case "weighted":
                chosen = 1.0 + (out[:, 0] > 0)
                return (each_loss(out, y) * chosen).sum() / chosen.sum(), chosen.sum()
            case "spread":
                return mx.square(out - out.mean(axis=0)).mean(axis=-1)
        raise ValueError(self.form)


class Predict(Loss):
    """What a DatasetMetric keeps of a batch."""

    def __call__(self, model: nn.Module, *batch: Any) -> Any:
        out, y, _ = self.outputs(model, batch)
        losses = each_loss(out, y)
        match self.form:
            case "array":
                return out
            case "tuple":
                return out[:, 0], losses
        return {"losses": losses, "scores": out.mean(axis=-1)}


def compute(*arrays: Any, **named: Any) -> float | None:
    """The difference of two quantiles; not defined on a few examples."""
    columns = [np.asarray(a).astype(np.float64) for a in (*arrays, *named.values())]
    if len(columns[0]) < 4:
        return None if len(arrays) else float("nan")
    return float(sum(n * np.ptp(column) for n, column in enumerate(columns, 1)))


def derived(metrics: Any) -> dict[str, float]:
    return {"perplexity": math.exp(metrics["loss"]), "twice": 2 * metrics["loss"]}


INTERACTING = ("contrast", "centered", "share of batch", "pairs")


class TrainStep:
    """A training step of the task's own."""

    def __init__(self, kind: str, loss: Loss):
        self.kind, self.loss = kind, loss

    def __call__(self, model: Any, optimizer: Any, batch: Any, key: mx.array, config: Any) -> Any:
        arguments = batch if isinstance(batch, tuple) else (batch,)

        def loss_of(model: nn.Module) -> mx.array:
            output = self.loss(model, *arguments)
            return (output[0] if isinstance(output, tuple) else output).mean()

        step = nn.value_and_grad(model, loss_of)
        loss, grads = step(model)
        if self.kind == "two optimizers":
            head = {"head": grads.pop("head")}
            optimizer["head"].update(model, head)
            optimizer["rest"].update(model, grads)
            return loss
        if self.kind == "sharpness-aware":
            before = model.trainable_parameters()
            model.update(tree_map(lambda w, g: w + 0.05 * g, before, grads))
            _, grads = step(model)
            model.update(before)
        optimizer.update(model, grads)
        return loss


# -- optimizers ------------------------------------------------------------------------------


def schedules(rate: float) -> dict[str, Any]:
    return {
        "none": rate,
        "exponential": optim.exponential_decay(rate, 0.8),
        "steps": optim.step_decay(rate, 0.5, 2),
        "cosine": optim.cosine_decay(rate, 6),
        "linear": optim.linear_schedule(rate, rate / 10, 5),
        "joined": optim.join_schedules(
            [optim.linear_schedule(rate / 5, rate, 2), optim.cosine_decay(rate, 6)], [2]
        ),
    }


OPTIMIZERS: dict[str, tuple[float, Callable[[Any], optim.Optimizer]]] = {
    "sgd": (0.1, optim.SGD),
    "momentum": (0.05, partial(optim.SGD, momentum=0.9)),
    "nesterov": (0.05, partial(optim.SGD, momentum=0.8, nesterov=True, weight_decay=0.01)),
    "dampening": (0.1, partial(optim.SGD, momentum=0.9, dampening=0.5)),
    "rmsprop": (0.01, partial(optim.RMSprop, eps=1e-3)),
    "adagrad": (0.05, partial(optim.Adagrad, eps=1e-3)),
    "adadelta": (1.0, partial(optim.AdaDelta, eps=1e-4)),
    "adam": (0.02, partial(optim.Adam, eps=1e-4)),
    "adam corrected": (0.02, partial(optim.Adam, eps=1e-4, bias_correction=True)),
    "adamw": (0.02, partial(optim.AdamW, eps=1e-4, weight_decay=0.1)),
    "adamax": (0.02, partial(optim.Adamax, eps=1e-4)),
    "lion": (0.005, partial(optim.Lion, weight_decay=0.01)),
    "adafactor relative": (0.01, lambda rate: optim.Adafactor(warmup_init=rate is None)),
    "adafactor": (0.02, partial(optim.Adafactor, relative_step=False, scale_parameter=False)),
    "muon": (
        0.02,
        lambda rate: optim.MultiOptimizer(
            [optim.Muon(rate), optim.SGD(0.1)], [lambda _, weight: weight.ndim == 2]
        ),
    ),
    "several": (
        0.05,
        lambda rate: optim.MultiOptimizer(
            [optim.SGD(rate, momentum=0.5), optim.Adam(0.01, eps=1e-4)],
            [lambda _, weight: weight.ndim > 1],
        ),
    ),
}


PLAIN = ("sgd", "momentum", "nesterov", "dampening")
"""Those whose steps are in proportion to the gradient: half precision does not overflow."""


def draw_optimizer(draw: Draw, half: bool) -> Callable[[Any], optim.Optimizer]:
    name = draw.pick("sgd", "sgd", "momentum", "adam", *OPTIMIZERS)
    name = draw.pick(*PLAIN) if half else name
    schedule = draw.pick("none", "none", *schedules(0.1))
    by_config = schedule == "none" and draw.chance(0.3)
    rate, make = OPTIMIZERS[name]
    draw.features |= {"optimizer": name, "schedule": "of config" if by_config else schedule}

    def optimizer(config: Any) -> optim.Optimizer:
        if by_config:
            return make(rate * 0.7 ** config.get("server-round", 0))
        return make(schedules(rate)[schedule])

    return optimizer


STRATEGIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": (0.0, 0.01, 0.3)},
    "FedAvgM": {"server_learning_rate": (0.8, 1.0), "server_momentum": (0.0, 0.7)},
    "FedAdam": {"eta": (0.02, 0.1), "beta_1": (0.0, 0.9), "beta_2": (0.99,), "tau": (0.01,)},
    "FedAdagrad": {"eta": (0.02, 0.1), "tau": (0.01,)},
    "FedYogi": {"eta": (0.02, 0.1), "beta_1": (0.9,), "beta_2": (0.9, 0.99), "tau": (0.01,)},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": (0.0, 0.2, 0.4)},
    "QFedAvg": {"client_learning_rate": (0.1, 0.5), "q": (0.0, 0.5, 1.0)},
    "Krum": {},
    "MultiKrum": {"num_nodes_to_select": (1, 2, 3)},
    "Bulyan": {},
}
"""Those of Flower's, and the values that their arguments have."""
CHOOSE = ("Krum", "MultiKrum", "Bulyan")
"""Those that choose among clients, which in half precision is by rounding."""


def draw_options(draw: Draw, strategy: str, num_trained: int) -> dict[str, Any]:
    """The arguments of a strategy that so many clients reply to."""
    options = {name: draw.pick(*values) for name, values in STRATEGIES[strategy].items()}
    if strategy in CHOOSE:
        most = (num_trained - 3) // 4 if strategy == "Bulyan" else num_trained // 3
        options["num_malicious_nodes"] = draw.number(0, max(0, most))
    return options


# -- the whole -------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path) -> Path:
    model.save_weights(str(folder / "own.safetensors"))
    return folder / "own.safetensors"


def draw(seed: int) -> Drawn:
    """The task of a seed, and how it is run."""
    draw = Draw(seed)
    features = draw.features
    half = draw.pick(*["float32"] * 7, "float16", "bfloat16")
    dtype = getattr(mx, half)
    features["model dtype"] = half

    inputs = [draw_input(draw) for _ in range(draw.small(1, 3))]
    if len(inputs) > 1 and draw.chance(0.35):
        inputs[-1] = inputs[0]
    target = draw_target(draw, inputs)
    form = draw.pick(
        *("vector", "vector", "vector", "vector half", "mean", "weighted", "weighted whole"),
        *("with accuracy", "with aux", "vector with aux", *INTERACTING),
    )
    weight = Column((), "float32", "weight") if draw.chance(0.2) else None
    columns = [*inputs, *(c for c in (target, weight) if c)]
    encoders = [draw_encoder(draw, column, dtype) for column in inputs]
    features |= {"arrays": [str(column) for column in columns], "loss": form}
    kinds = ["tuple"] * 4 + ["list", "dict", "nested", "nested dict"]
    structure = Structure(draw.pick(*kinds), len(columns))
    stream = draw.pick(*[None] * 12, "stream", "sized stream")
    features |= {"structure": structure.kind, "stream": stream}
    features["encoders"] = [name for name, _ in encoders]

    layers = [draw.pick(*models.LAYERS.items()) for _ in range(draw.small(0, 3))]
    layers += [
        (name, partial(models.linear, function))
        for name, function in (
            draw.pick(*models.OPERATIONS.items()) for _ in range(draw.small(0, 2))
        )
    ]
    if draw.chance(0.2):
        name, function = draw.pick(*models.WRITES.items())
        layers.append((name, partial(models.linear, function)))
    if draw.chance(0.12):
        name, function = draw.pick(*models.INTERACTIONS.items())
        layers.append((name, partial(models.linear, function)))
    normalized = draw.chance(0.15)
    if normalized:
        layers.append(("batch norm", partial(nn.BatchNorm, WIDTH)))
    buffer = draw.pick(*models.BUFFERS) if draw.chance(0.12) else None
    if buffer:
        layers.append((buffer, models.BUFFERS[buffer]))
    dropout = draw.chance(0.1)
    if dropout:
        layers.append(("dropout", partial(nn.Dropout, 0.3)))
    layers = [layers[n] for n in draw.rng.permutation(len(layers))]
    features["layers"] = [name for name, _ in layers]
    if target is None:
        outputs = 3
    elif target.values == "whole":
        outputs = target.classes
    else:
        outputs = max(1, int(np.prod(target.shape)))
    zero_input = len(inputs[0].shape) > 0 and draw.chance(0.05)
    features["writes into its input"] = zero_input
    frozen = draw.chance(0.1)
    zero_head = draw.chance(0.12)
    features |= {"frozen encoder": frozen, "head begins at zero": zero_head}

    def model() -> nn.Module:
        makers = [make for _, make in layers]
        module = models.Model([make for _, make in encoders], makers, outputs, zero_input)
        if half != "float32":
            module.set_dtype(dtype)
        if zero_head:
            module.head.update(tree_map(mx.zeros_like, module.head.parameters()))
        if frozen:
            module.encoders["input0"].freeze()
        return module

    has: dict[str, Any] = {"has_target": target is not None, "has_weight": weight is not None}
    has["structure"] = structure
    of_config = draw.chance(0.1)
    loss = (LossOfConfig if of_config else Loss)(form, **has)
    features["loss of config"] = of_config
    names = [n for n in ("hits", "mean", "weighted", "spread") if draw.chance(0.3)]
    metrics = {name.replace(" ", "-"): Metric(name, **has) for name in names}
    kinds = [n for n in ("array", "tuple", "dict") if draw.chance(0.08)]
    metrics |= {f"of-all-{n}": fed.DatasetMetric(Predict(n, **has), compute) for n in kinds}
    features["metrics"] = [*names, *kinds]

    augment = draw.pick(*[None] * 8, "noise", "scale")
    first_float = inputs[0].values == "normal" and inputs[0].dtype != "bool"
    first_float = first_float and structure.kind in ("tuple", "list")
    augment = augment if first_float else None
    features["augment"] = augment

    def augmented(key: mx.array, x: mx.array, *rest: mx.array) -> Sequence[mx.array]:
        if augment == "scale":
            return (x * 1.1).astype(x.dtype), *rest
        return x + mx.random.normal(x.shape, x.dtype, key=key), *rest

    # -- how long, and on how much
    num_clients, num_rounds = draw.small(1, 12), draw.small(1, 3)
    sizes = [draw.small(1, draw.pick(8, 30, 30, 200)) for _ in range(num_clients)]
    if draw.chance(0.3):
        sizes = [sizes[0]] * num_clients
    batch_size = draw.pick(1, 2, 3, 4, 7, 8, 8, 16, 16, 32)
    steps = draw.number(1, 6) if draw.chance(0.3) else None
    epochs = 1 if steps else draw.small(1, 3)

    def all_steps() -> int:
        each = [steps or epochs * -(-size // batch_size) for size in sizes]
        return num_rounds * sum(each)

    while all_steps() > MOST_STEPS and batch_size < 200:
        batch_size = batch_size * 2 + draw.number(0, 1)
    while all_steps() > MOST_STEPS and (epochs > 1 or num_rounds > 1 or (steps or 1) > 1):
        steps = max(1, steps // 2) if steps else None
        epochs, num_rounds = max(1, epochs - 1), max(1, num_rounds - (epochs == 1))
    if normalized:  # MLX's refuses a batch of one example; a last one joins the batch before
        batch_size = max(batch_size, 3)
        sizes = [max(size, 2) for size in sizes]
    other = Draw(seed + 2**32)  # so that everything else is drawn as it was
    num_micro_batches = other.pick(2, 3, 5) if other.chance(0.3) else 1
    batch_size = -(-batch_size // num_micro_batches)
    tests = [None if draw.chance(0.1) else draw.small(1, 20) for _ in sizes]
    if not any(tests):
        tests[0] = 5
    eval_batch_size = draw.pick(4, 8, 16, 512)
    features |= {"clients": num_clients, "rounds": num_rounds, "sizes": sizes, "tests": tests}
    features |= {"batch": batch_size, "epochs": epochs, "steps": steps, "eval": eval_batch_size}

    skewed = draw.chance(0.2)
    features["one label a client"] = skewed

    def examples(rng: np.random.Generator, size: int, partition: int) -> list[Any]:
        return [
            column.make(rng, size, partition if skewed and column is target else None)
            for column in columns
        ]

    def data(partition: int, num_partitions: int | None) -> fed.Data:
        rng = np.random.default_rng([seed, partition])
        number, held_out = sizes[partition], tests[partition]
        train = examples(rng, number, partition)
        test = None if held_out is None else examples(rng, held_out, partition)
        if stream:
            kind = Stream if stream == "stream" else SizedStream
            size = {**declared, **config}.get("batch-size", batch_size) * num_micro_batches
            return fed.Data(
                kind(structure.pack, train, number, size),
                test and kind(structure.pack, test, held_out or 0, eval_batch_size),
            )
        return fed.Data(structure.pack(train), test and structure.pack(test))

    settings: dict[str, Any] = {}
    config: dict[str, Any] = {}
    declared: dict[str, Any] = {}
    norm = draw.pick(0.05, 0.5) if draw.chance(0.2) else None
    lengths = {"batch-size": batch_size, "local-epochs": epochs, "local-steps": steps}
    for key, value in {**lengths, "max-grad-norm": norm}.items():
        if value is not None and draw.chance(0.15):
            settings[key.replace("-", "_")] = value + 1
            if draw.chance(0.5):
                declared[key] = value
                continue
            config[key] = value
            if draw.chance(0.5):
                declared[key] = value + 2
        else:
            settings[key.replace("-", "_")] = value
    own_step = None
    if draw.chance(0.08) and not form.startswith("weighted"):
        own_step = draw.pick("plain", "sharpness-aware", "two optimizers")
        settings["train_step"] = TrainStep(own_step, loss if not of_config else Loss(form, **has))
        for chosen in (settings, config, declared):
            chosen.pop("max_grad_norm", None)
            chosen.pop("max-grad-norm", None)
    features["train step"] = own_step
    if num_micro_batches > 1 and own_step is None:
        features["micro-batches"] = num_micro_batches
        if other.chance(0.5):
            settings["gradient_accumulation"] = num_micro_batches
        else:
            settings["gradient_accumulation"] = other.pick(1, 4)
            (config if other.chance(0.5) else declared)["gradient-accumulation"] = num_micro_batches
    if draw.chance(0.05):
        settings["compile"] = False
    if draw.chance(0.1):
        settings["derived"] = derived
    if draw.chance(0.05):
        settings["fingerprint"] = lambda: {"task": str(seed), "late": lambda: "same"}
        if draw.chance(0.5):
            settings["fingerprint_covers"] = lambda name: "base" in name
    if draw.chance(0.05):
        settings["save"] = save
    if buffer:
        kind = draw.pick("average", "local") if buffer != "count" else "local"
        settings["buffers"] = lambda name: kind if name.endswith(f".{buffer}") else None
        features["buffers"] = kind
    settings["statistics"] = draw.pick("average", "average", "local")
    personal = draw.pick(*[None] * 8, "head", "layers", "encoders", "bias", "weight")
    names = [name for name, _ in tree_flatten(model().trainable_parameters())]
    if personal and not all(personal in name for name in names):
        settings["personal"] = lambda name: personal in name
    settings["keep_optimizer"] = draw.chance(0.15) and own_step != "two optimizers"
    if form.startswith("weighted"):
        settings["weight_unit"] = "words"
    strategy = draw.pick("FedAvg", "FedAvg", "FedAvg", *STRATEGIES)
    strategy = "Krum" if strategy == "Bulyan" and num_clients < 10 else strategy
    strategy = "FedAvg" if own_step and strategy == "FedProx" else strategy
    strategy = "FedMedian" if strategy in CHOOSE and half != "float32" else strategy
    fractions = {}
    for phase, chance in {"train": 0.2, "evaluate": 0.6 if num_clients > 4 else 0.1}.items():
        if draw.chance(chance):
            fractions[f"fraction_{phase}"] = draw.pick(0.3, 0.5, 0.7)
    num_trained = max(1, int(num_clients * fractions.get("fraction_train", 1.0)))
    options = draw_options(draw, strategy, num_trained)
    averages = strategy not in ("FedMedian", "FedTrimmedAvg", "QFedAvg", "Bulyan")
    if form.startswith("weighted") and averages and draw.chance(0.4):
        options["weighted_by_key"] = "num-words"
    if strategy == "QFedAvg":
        config["train-loss-key"] = "train_loss"
    plain = {k: v for k, v in settings.items() if not callable(v) and k not in features}
    features |= plain
    features["personal"] = personal if "personal" in settings else None
    features |= {"strategy": strategy, **options, **fractions, "config": config}
    optimizer = draw_optimizer(draw, half != "float32")
    if own_step == "two optimizers":
        one = optimizer

        def optimizer(settings: Any) -> Any:
            return {"head": optim.SGD(0.1), "rest": one(settings)}

    task = fed.Task(
        model=model,
        loss=loss,
        optimizer=optimizer,
        data=data,
        metrics=metrics,
        config=declared,
        eval_batch_size=eval_batch_size,
        augment=augmented if augment else None,
        **settings,
    )
    chunk_size = draw.pick(None, None, 2, 3, 5)
    features["chunk"] = chunk_size
    return Drawn(
        seed=seed,
        task=task,
        strategy_name=strategy,
        options=options,
        fractions=fractions,
        num_clients=num_clients,
        num_rounds=num_rounds,
        chunk_size=chunk_size,
        config=config,
        features=features,
        follows=not dropout and augment != "noise",
    )


def of_processes(number: int) -> list[int]:
    """Seeds of tasks for nodes in processes of their own: 2 or 3, which end with one file."""
    seeds = range(100)
    return [s for s in seeds if 2 <= draw(s).num_clients <= 3 and not draw(s).task.save][:number]
