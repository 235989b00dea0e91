"""A language model's fine-tuning as a task like any other."""

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
from . import base_identity, base_model, texts
from .config import ConfigError, LoraConfig

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

Note = Callable[[str], None]
_SHOWN = 3
"""Texts that a message names, of those that are left out."""


def _print(text: str) -> None:
    print(f"Note: {text}")


class _Once:
    """Tells each note once, however often a run loads the texts that it is about."""

    def __init__(self, note: Note):
        self.note = note
        self.told: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.note(text)


def lora_task(config: LoraConfig, note: Note = _print) -> Task:
    """The task that a configuration describes.

    A node's texts are read and checked before its base model is looked for, and that before any of
    it is loaded.

    Args:
        config (LoraConfig): From :func:`~mlx_fed.lm.config.load_config`.
        note (callable): Told what is worth knowing of the data. Default: prints it.

    Raises:
        ConfigError: If MLX cannot make an optimizer or a schedule of what is said of them.

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
        model=partial(build, config, note),
        loss=token_loss,
        optimizer=make_optimizer,
        data=partial(load_texts, config, note),
        config={
            "learning-rate": config.learning_rate,
            "optimizer": config.optimizer,
            "optimizer-config": json.dumps(config.optimizer_config.get(config.optimizer) or {}),
            "lr-schedule": json.dumps(config.lr_schedule),
            "num-rounds": config.federation.rounds,
            **length,
        },
        batch_size=config.batch_size,
        weight_unit="tokens",
        derived=perplexity,
        fingerprint=partial(fingerprint, config),
        fingerprint_covers=is_of_base,
        save=partial(_save, config),
    )
    _check_optimizer(config, task.config)
    return task


def build(config: LoraConfig, note: Note = _print) -> nn.Module:
    """The base model with new adapters, drawn from MLX's random state as it is now.

    Args:
        config (LoraConfig): Which model, and what is trained of it.
        note (callable): Told what is not known of adapters that were trained before.

    Raises:
        FedError: If there is no such base model, or it has no place for the adapters.
    """
    import mlx.core as mx

    from . import adapters

    # Loading draws numbers, too, and only the first time: what is drawn here comes before it.
    seed: Any = mx.random.randint(0, 2**31 - 1).item()
    outline(config)
    model = base_model.share(
        base_model.load(base_model.find(config.model), config.trust_remote_code)
    )
    mx.random.seed(seed)
    adapters.attach(model, config)
    if config.resume_adapter_file:
        adapters.start_from(model, Path(config.resume_adapter_file).expanduser(), config, note)
    return model


def load_tokenizer(config: LoraConfig) -> Any:
    """The base model's tokenizer, for which its weights are not looked for."""
    outline(config)
    folder = base_model.folder_of_tokenizer(config.model)
    return base_model.load_tokenizer(folder, config.trust_remote_code)


def outline(config: LoraConfig) -> nn.Module | None:
    """The model with its adapters and without weights, none of a model that comes with code.

    It is looked at before more is downloaded or read of a model that cannot be trained as asked.

    Raises:
        FedError: As :func:`build`.
    """
    return _outline(config, file_states(base_model.folder_of_config(config.model) / "config.json"))


@lru_cache(maxsize=1)
def _outline(config: LoraConfig, file: FileStates) -> nn.Module | None:
    from . import adapters

    if (model := base_model.outline(config.model)) is not None:
        quantized = base_model.read_config(base_model.folder_of_config(config.model)).get(
            "quantization"
        )
        if config.fine_tune_type == "full" and quantized:
            raise adapters.AdapterError(adapters.FULL_ON_QUANTIZED)
        adapters.attach(model, config)
    return model


def _save(config: LoraConfig, model: nn.Module, folder: Path) -> Path:
    from . import adapters

    return adapters.save(model, folder, config)


def token_loss(model: nn.Module, tokens: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's loss: the mean over tokens, and how many they are."""
    from mlx_lm.tuner.trainer import default_loss

    mean, count = default_loss(model, tokens, spans)
    return mean, count


def perplexity(metrics: Any) -> dict[str, float]:
    return {"perplexity": math.exp(min(float(metrics["loss"]), 700.0))}  # above, exp overflows


def fingerprint(config: LoraConfig) -> dict[str, str | Callable[[], str]]:
    """What has to be the same on the server and its nodes; last what takes the model's weights.

    Layers and keys are those that are trained, however they are written.
    """
    prints: dict[str, str | Callable[[], str]] = {"fine_tune_type": config.fine_tune_type}
    if config.fine_tune_type != "full":
        rank, scale = (config.lora_parameters[key] for key in ("rank", "scale"))
        prints |= {"LoRA rank": str(rank), "LoRA scale": str(float(scale))}
        prints["freeze_a"] = str(config.federation.freeze_a)
    known = base_identity.of_config(base_model.folder_of_config(config.model))
    prints |= {f"base model's {key}": value for key, value in known.items()}
    prints["num_layers"] = partial(_num_layers, config)
    if config.fine_tune_type != "full":
        prints["LoRA keys"] = partial(_keys, config)
    return prints | {
        "tokenizer": lambda: base_identity.of_tokenizer(load_tokenizer(config)),
        "base model": lambda: base_identity.of_weights(base_model.find(config.model)),
    }


def _num_layers(config: LoraConfig) -> str:
    model = outline(config)
    return str(len(model.layers) if model and config.num_layers == -1 else config.num_layers)


def _keys(config: LoraConfig) -> str:
    from . import adapters

    model = outline(config)
    keys = adapters.adapted(model) if model else config.lora_parameters.get("keys")
    return base_identity.shown(keys)


def is_of_base(name: str) -> bool:
    """Whether an array of this name is the base model's, and none that ``freeze_a`` freezes."""
    return not name.endswith(".lora_a")


def load_texts(config: LoraConfig, note: Note, partition: int, num_partitions: int | None) -> Data:
    """A node's texts, read and checked before its tokenizer is looked for."""
    splits = texts.read_splits(config, partition, num_partitions)
    tokenizer = load_tokenizer(config)
    most = None if config.val_batches < 0 else config.val_batches
    train = texts.tokenize(splits.train, tokenizer, config)
    valid = texts.tokenize(splits.valid, tokenizer, config) if splits.valid and most != 0 else None
    limit, place = config.max_seq_length, splits.train.where(0).rsplit(",", 1)[0]
    if left_out := [*train.left_out, *(valid.left_out if valid else [])]:
        first = "; ".join(left_out[:_SHOWN]) + (" and others" if len(left_out) > _SHOWN else "")
        if not train.tokens:
            raise texts.TextError(
                f"No text of {place} has anything to learn within max_seq_length {limit}: {first}."
            )
        note(
            f"{len(left_out)} texts have nothing to learn within max_seq_length {limit} and are "
            f"left out: {first}."
        )
    if cut := [*train.cut, *(valid.cut if valid else [])]:
        note(
            f"{len(cut)} texts are longer than max_seq_length {limit} and "
            f"are cut, the first is {cut[0]}."
        )
    if splits.valid is None:
        note(f"there is no valid.jsonl beside {place}: its node trains and does not validate.")
    elif valid and not valid.tokens:
        note(f"there is nothing to validate on beside {place}: its node trains and does not.")
    return Data(
        train=texts.Batches(train, config.batch_size),
        test=texts.Batches(valid, config.batch_size, most) if valid and valid.tokens else None,
    )


# -- the optimizer -------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A learning rate over all rounds, though the optimizer is new in each.

    The steps before this round are in the state of the optimizer that it belongs to, so that one
    compiled step serves all rounds. Two are equal that have the same settings.
    """

    settings: str
    optimizers: list[optim.Optimizer] = field(default_factory=list, compare=False)

    def __call__(self, step: mx.array) -> mx.array:
        from mlx_lm.tuner.utils import build_schedule

        before = sum(optimizer.state["steps-before"] for optimizer in self.optimizers)
        rate: mx.array = build_schedule(json.loads(self.settings))(step + before)
        return rate


def _check_optimizer(config: LoraConfig, settings: Config) -> None:
    """Takes a step, so that what the arguments lack is said at the start and not in a round."""
    import mlx.core as mx

    fixed = {**settings, "lr-schedule": "null"}
    for key, tried in ((f"optimizer_config.{config.optimizer}", fixed), ("lr_schedule", settings)):
        try:
            weight = {"weight": mx.ones((2, 2))}
            mx.eval(make_optimizer(tried).apply_gradients(weight, weight))
        except Exception as error:  # whatever arguments that are none bring about
            raise ConfigError(f"MLX cannot train with this {key}: {error}") from error


def make_optimizer(config: Config) -> optim.Optimizer:
    """mlx-lm's optimizer of that name, with the server's settings."""
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
