"""Fine-tuning of a language model as a :class:`~mlx_fed.Task`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system.cache import FileStates, file_states
from ..task import Config, Data, Task
from . import base_fingerprint, base_model, texts
from .config import ConfigError, LoraConfig, Note

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

_MAX_NAMES = 3
"""Texts that a note names."""


def _print(text: str) -> None:
    print(f"Note: {text}")


class _Once:
    """Passes each note on once, however often texts are loaded."""

    def __init__(self, note: Note):
        self.note = note
        self.notes: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self.notes:
            self.notes.add(text)
            self.note(text)


def lora_task(config: LoraConfig, note: Note = _print) -> Task:
    """Task of a configuration.

    A node checks its texts first, then the base model's configuration, and then loads the model.

    Args:
        config (LoraConfig): From :func:`~mlx_fed.lm.config.load_config`.
        note (callable): Called with notes about the data. Default: prints them.

    Raises:
        ConfigError: If MLX cannot create the optimizer or the schedule.

    Example:
        >>> task = lora_task(load_config("lora.yaml"))
        >>> fed.simulate(task, FedAvg(weighted_by_key="num-tokens"), num_clients=3, workers=0)
    """
    note = _Once(note)
    steps = config.local_steps()
    length: dict[str, int] = (
        {"local-epochs": config.federation.local_epochs or 1}
        if steps is None
        else {"local-steps": steps}
    )
    task = Task(
        model=partial(build_model, config, note),
        loss=token_loss,
        optimizer=make_optimizer,
        data=partial(load_texts, config, note),
        config={
            "learning-rate": config.learning_rate,
            "optimizer": config.optimizer,
            "optimizer-config": json.dumps(config.optimizer_arguments()),
            "lr-schedule": json.dumps(config.lr_schedule),
            "num-rounds": config.federation.rounds,
            **length,
        },
        batch_size=config.batch_size,
        gradient_accumulation=config.grad_accumulation_steps,
        keep_optimizer=config.federation.keep_optimizer,
        weight_unit="tokens",
        derived=perplexity,
        fingerprint=partial(fingerprint, config),
        fingerprint_covers=is_base_array,
        save=partial(_save, config),
    )
    _check_optimizer(config, task.config)
    return task


def build_model(config: LoraConfig, note: Note = _print) -> nn.Module:
    """The base model with new adapters, initialized from MLX's random state.

    Args:
        config (LoraConfig): The configuration.
        note (callable): Called with notes about ``resume_adapter_file``.

    Raises:
        FedError: If the base model is missing or the adapters do not fit.
    """
    import mlx.core as mx

    from . import adapters

    # The first loading draws random numbers, too: this seed is drawn before it.
    seed: Any = mx.random.randint(0, 2**31 - 1).item()
    outline(config)
    model = base_model.share(
        base_model.load(base_model.find(config.model), config.trust_remote_code)
    )
    mx.random.seed(seed)
    adapters.attach(model, config)
    if config.resume_adapter_file:
        adapters.load_adapters(model, Path(config.resume_adapter_file).expanduser(), config, note)
    return model


def load_tokenizer(config: LoraConfig) -> Any:
    """The base model's tokenizer; weights are not needed."""
    outline(config)
    folder = base_model.folder_of_tokenizer(config.model)
    return base_model.load_tokenizer(folder, config.trust_remote_code)


def outline(config: LoraConfig) -> nn.Module | None:
    """The model with its adapters and without weights; ``None`` for a model with code.

    It checks the configuration before more of the model is downloaded or read.

    Raises:
        FedError: As :func:`build_model`.
    """
    return _outline(config, file_states(base_model.folder_of_config(config.model) / "config.json"))


@lru_cache(maxsize=1)
def _outline(config: LoraConfig, file: FileStates) -> nn.Module | None:
    from . import adapters

    if (model := base_model.outline(config.model)) is not None:
        base_config = base_model.read_config(base_model.folder_of_config(config.model))
        if config.fine_tune_type == "full" and base_config.get("quantization"):
            raise adapters.AdapterError(adapters.FULL_ON_QUANTIZED)
        adapters.attach(model, config)
    return model


def _save(config: LoraConfig, model: nn.Module, folder: Path) -> Path:
    from . import adapters

    return adapters.save(model, folder, config)


def token_loss(model: nn.Module, tokens: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's loss: the mean over tokens, and their number."""
    from mlx_lm.tuner.trainer import default_loss

    mean, count = default_loss(model, tokens, spans)
    return mean, count


def perplexity(metrics: Any) -> dict[str, float]:
    return {"perplexity": math.exp(min(float(metrics["loss"]), 700.0))}  # above, exp overflows


def fingerprint(config: LoraConfig) -> dict[str, str | Callable[[], str]]:
    """Properties that must be equal on the server and its nodes; those of the weights are last.

    Layers and keys are compared after resolution: ``num_layers: -1`` is 16 of 16.
    """
    prints: dict[str, str | Callable[[], str]] = {"fine_tune_type": config.fine_tune_type}
    prints["keep_optimizer"] = str(config.federation.keep_optimizer)
    if config.fine_tune_type != "full":
        rank, scale = (config.lora_parameters[key] for key in ("rank", "scale"))
        prints |= {"LoRA rank": str(rank), "LoRA scale": str(float(scale))}
        prints["freeze_a"] = str(config.federation.freeze_a)
    base_values = base_fingerprint.describe_config(base_model.folder_of_config(config.model))
    prints |= {f"base model's {key}": value for key, value in base_values.items()}
    prints["num_layers"] = partial(_num_layers, config)
    if config.fine_tune_type != "full":
        prints["LoRA keys"] = partial(_keys, config)
    return prints | {
        "tokenizer": lambda: base_fingerprint.hash_tokenizer(load_tokenizer(config)),
        "base model": lambda: base_fingerprint.hash_weights(base_model.find(config.model)),
    }


def _num_layers(config: LoraConfig) -> str:
    model = outline(config)
    return str(len(model.layers) if model and config.num_layers == -1 else config.num_layers)


def _keys(config: LoraConfig) -> str:
    from . import adapters

    model = outline(config)
    keys = adapters.adapted_modules(model) if model else config.lora_parameters.get("keys")
    return base_fingerprint.describe(keys)


def is_base_array(name: str) -> bool:
    """Whether an array belongs to the base model: ``freeze_a`` freezes the others."""
    return not name.endswith(".lora_a")


def load_texts(config: LoraConfig, note: Note, partition: int, num_partitions: int | None) -> Data:
    """Training and validation batches of a node's texts."""
    splits = texts.read_splits(config, partition, num_partitions)
    tokenizer = load_tokenizer(config)
    max_batches = None if config.val_batches < 0 else config.val_batches
    train = texts.tokenize(splits.train, tokenizer, config)
    valid = (
        texts.tokenize(splits.valid, tokenizer, config)
        if splits.valid and max_batches != 0
        else None
    )
    limit, location = config.max_seq_length, splits.train.where(0).rsplit(",", 1)[0]
    if left_out := [*train.left_out, *(valid.left_out if valid else [])]:
        first = "; ".join(left_out[:_MAX_NAMES]) + (
            " and others" if len(left_out) > _MAX_NAMES else ""
        )
        if not train.tokens:
            raise texts.TextError(
                f"No text of {location} can be trained within max_seq_length {limit}: {first}."
            )
        note(
            f"{len(left_out)} texts have no tokens to train on within max_seq_length {limit} and "
            f"are left out: {first}."
        )
    if cut := [*train.cut, *(valid.cut if valid else [])]:
        note(
            f"{len(cut)} texts are longer than max_seq_length {limit} and "
            f"are cut, the first is {cut[0]}."
        )
    if splits.valid is None:
        note(f"there is no valid.jsonl beside {location}: the node trains, but does not validate.")
    elif valid and not valid.tokens:
        note(
            f"no validation text beside {location} can be used: the node trains, but does not "
            "validate."
        )
    return Data(
        train=texts.TextBatches(train, config.texts_per_step),
        test=texts.TextBatches(valid, config.batch_size, max_batches)
        if valid and valid.tokens
        else None,
    )


# -- the optimizer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule over all rounds, with a new optimizer in each round.

    The optimizer's state has the number of steps before the round, so that one compiled step
    serves all rounds. Schedules with the same settings are equal.
    """

    settings: str
    optimizers: list[optim.Optimizer] = field(default_factory=list, compare=False)

    def __call__(self, step: mx.array) -> mx.array:
        from mlx_lm.tuner.utils import build_schedule

        before = sum(optimizer.state["steps-before"] for optimizer in self.optimizers)
        rate: mx.array = build_schedule(json.loads(self.settings))(step + before)
        return rate


def _check_optimizer(config: LoraConfig, settings: Config) -> None:
    """Check of an optimizer's arguments by one step, before the first round."""
    import mlx.core as mx

    constant = {**settings, "lr-schedule": "null"}
    for key, values in (
        (f"optimizer_config.{config.optimizer}", constant),
        ("lr_schedule", settings),
    ):
        try:
            weight = {"weight": mx.ones((2, 2))}
            mx.eval(make_optimizer(values).apply_gradients(weight, weight))
        except Exception as error:  # any error that invalid arguments cause
            raise ConfigError(f"MLX cannot train with this {key}: {error}") from error


def make_optimizer(config: Config) -> optim.Optimizer:
    """mlx-lm's optimizer with the server's settings."""
    import mlx.core as mx
    import mlx.optimizers as optim

    kinds = {
        "adam": optim.Adam,
        "adamw": optim.AdamW,
        "muon": optim.Muon,
        "sgd": optim.SGD,
        "adafactor": optim.Adafactor,
    }
    kind = kinds[config["optimizer"]]
    arguments = json.loads(config["optimizer-config"])
    if json.loads(config["lr-schedule"]) is None:
        return kind(learning_rate=config["learning-rate"], **arguments)
    schedule = Schedule(config["lr-schedule"])
    optimizer = kind(learning_rate=schedule, **arguments)
    rounds_before = max(int(config.get("server-round", 1)) - 1, 0)
    before = rounds_before * int(config["local-steps"])
    optimizer.state["steps-before"] = mx.array(before, mx.uint64)
    schedule.optimizers.append(optimizer)
    return optimizer
