"""Configuration: mlx-lm's YAML file with a section ``federation:``, and command-line options."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from .config_file import ConfigError as ConfigError
from .config_file import read


@dataclass(frozen=True)
class LoraFederation:
    """The section ``federation:``."""

    rounds: Annotated[int, "Rounds to train."] = 10
    local_iters: Annotated[
        int | None, "Iterations of a node in a round; default: iters / rounds."
    ] = None
    local_epochs: Annotated[int | None, "Or: passes over a node's texts in a round."] = None
    nodes: Annotated[int | None, "Nodes that a round needs, or clients of a simulation."] = None
    fraction: Annotated[float, "Share of the nodes that train in a round."] = 1.0
    strategy: Annotated[str, "A Flower strategy, or MODULE:STRATEGY."] = "FedAvg"
    strategy_options: Annotated[dict, "Its arguments."] = field(default_factory=dict, hash=False)
    weighting: Annotated[str, "Weights of nodes in the average: examples or tokens."] = "examples"
    freeze_a: Annotated[bool, "Train and average B only (FFA-LoRA)."] = False
    keep_optimizer: Annotated[bool, "Let a node's optimizer go on from round to round."] = False
    bias_correction: Annotated[bool, "Adam's bias correction, in adam and adamw."] = False
    partitioner: Annotated[str, "Partitioner of a Hugging Face dataset."] = "iid"
    partitioner_options: Annotated[dict, "The partitioner's arguments."] = field(
        default_factory=dict, hash=False
    )
    sample_prompt: Annotated[
        str | None, "A prompt; the server prints the model's continuation."
    ] = None
    sample_every: Annotated[int, "Rounds between two continuations."] = 1
    sample_tokens: Annotated[int, "Tokens of a continuation."] = 64


@dataclass(frozen=True)
class LoraConfig:
    """mlx-lm's keys, with mlx-lm's defaults, and the federation's."""

    model: Annotated[str, "A model's folder, or its id on the Hugging Face hub."] = (
        "Qwen/Qwen3-0.6b"
    )
    data: Annotated[str, "A folder of jsonl files, or a dataset's id."] = "mlx-community/WikiSQL"
    fine_tune_type: Annotated[str, "lora, dora or full."] = "lora"
    optimizer: Annotated[str, "adam, adamw, muon, sgd or adafactor."] = "adam"
    optimizer_config: Annotated[dict, "Arguments of each optimizer, by its name."] = field(
        default_factory=dict, hash=False
    )
    seed: Annotated[int, "The seed of adapters, shuffling, dropout and sampling."] = 0
    num_layers: Annotated[int, "Layers to fine-tune, from the last; -1 is all."] = 16
    batch_size: Annotated[int, "Texts in an iteration."] = 4
    grad_accumulation_steps: Annotated[int, "Iterations whose gradients a step sums."] = 1
    iters: Annotated[int, "Iterations of a node in all rounds."] = 1000
    val_batches: Annotated[int, "Batches of a validation; -1 is all."] = 25
    learning_rate: Annotated[float, "The optimizer's learning rate."] = 1e-5
    lr_schedule: Annotated[dict | None, "A schedule over all iterations."] = field(
        default=None, hash=False
    )
    steps_per_report: Annotated[int, "Steps between two reports of a node."] = 10
    max_seq_length: Annotated[int, "Maximum number of tokens; longer texts are cut."] = 2048
    mask_prompt: Annotated[bool, "Leave prompts out of the loss."] = False
    grad_checkpoint: Annotated[bool, "Trade time for memory."] = False
    lora_parameters: Annotated[dict, "rank, scale, dropout and keys."] = field(
        default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0}, hash=False
    )
    resume_adapter_file: Annotated[str | None, "Adapters that the server starts from."] = None
    trust_remote_code: Annotated[bool, "Run code that comes with the model."] = False
    prompt_feature: Annotated[str, "The key of prompts in the data."] = "prompt"
    completion_feature: Annotated[str, "The key of completions."] = "completion"
    chat_feature: Annotated[str, "The key of chats."] = "messages"
    text_feature: Annotated[str, "The key of plain texts."] = "text"
    federation: LoraFederation = field(default_factory=LoraFederation)

    def local_steps(self) -> int | None:
        """Optimizer steps of a node in a round; ``None`` with ``local_epochs``."""
        if self.federation.local_epochs:
            return None
        iters = self.federation.local_iters or math.ceil(self.iters / self.federation.rounds)
        return math.ceil(iters / self.grad_accumulation_steps)

    def optimizer_arguments(self) -> dict[str, Any]:
        """Arguments of the optimizer beside the learning rate."""
        arguments = self.optimizer_config.get(self.optimizer) or {}
        return (
            {"bias_correction": True, **arguments} if self.federation.bias_correction else arguments
        )

    def rounding(self) -> str | None:
        """A sentence on iterations that are more than the file says; ``None`` if they are not."""
        steps, federation = self.local_steps(), self.federation
        name, iters, rounds = "iters", self.iters, federation.rounds
        if federation.local_iters:
            name, iters, rounds = "local_iters", federation.local_iters, 1
        total = (steps or 0) * self.grad_accumulation_steps * rounds
        if steps is None or total == iters:
            return None
        return f"{name} {iters} becomes {total}: a round has {steps} whole steps of the optimizer."

    @property
    def texts_per_step(self) -> int:
        """Texts in an optimizer step, a batch of training."""
        return self.batch_size * self.grad_accumulation_steps

    def for_mlx_lm(self) -> dict[str, Any]:
        """The configuration in the format of ``adapter_config.json``."""
        plain = asdict(self)
        if self.fine_tune_type == "full":
            plain["lora_parameters"] = None
        return plain


IDLE = {
    "adapter_path",
    "clear_cache_threshold",
    "config",
    "project_name",
    "report_to",
    "save_every",
    "steps_per_eval",
    "test",
    "test_batches",
    "train",
}
"""Keys of mlx-lm without meaning in a federation; a file may have them."""

_OF_LORA = {"rank": int, "scale": float, "dropout": float, "keys": list}
_OF_SCHEDULE = ("name", "arguments", "warmup", "warmup_init")
_ALPHAS = ("alpha", "lora_alpha")
"""Other libraries' keys for mlx-lm's scale, which is alpha / rank."""
_HINTS = {
    "epochs": "federation.local_epochs",
    "lora_dropout": "lora_parameters.dropout",
    "lora_keys": "lora_parameters.keys",
    "lora_rank": "lora_parameters.rank",
    "lora_scale": "lora_parameters.scale",
    "r": "lora_parameters.rank",
    "target_modules": "lora_parameters.keys",
    "use_dora": "fine_tune_type: dora",
    "warmup_steps": "lr_schedule.warmup",
    "weight_decay": "optimizer_config",
    **dict.fromkeys(_ALPHAS, "lora_parameters.scale, which is alpha / rank"),
}
"""mlx-lm's keys for keys of other libraries."""
_TYPO = (0.8, 0.75)
"""Similarity from which an unknown key counts as misspelled: at the top level, and in sections,
whose keys are short."""

_CHOICES = {
    "fine_tune_type": ("lora", "dora", "full"),
    "optimizer": ("adam", "adamw", "muon", "sgd", "adafactor"),
    "weighting": ("examples", "tokens"),
}
_POSITIVE = {
    "rounds",
    "local_iters",
    "local_epochs",
    "nodes",
    "sample_every",
    "sample_tokens",
    "steps_per_report",
    "batch_size",
    "grad_accumulation_steps",
    "iters",
    "max_seq_length",
}
_OR_ALL = {"num_layers": 1, "val_batches": 0}
"""Keys of which -1 is all, and their minimum otherwise."""
_SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
}


Note = Callable[[str], None]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)  # where load_config is called


def load_config(
    path: Path | str | None, flags: Mapping[str, Any] | None = None, note: Note = _warn
) -> LoraConfig:
    """Configuration from a file and options, which have precedence.

    As in mlx-lm, a key without a value has its default, and an unknown key is ignored, here with a
    note. A key that is similar to a known one is an error.

    Args:
        path (Path, optional): A YAML file.
        flags (dict, optional): Values by key, of both sections; ``None`` is no value.
        note (callable, optional): Called with a note for each key that is ignored or replaced.
            Default: a warning.

    Raises:
        ConfigError: If the file cannot be read, or a key or a value is invalid.
    """
    where = str(path) if path else "the configuration"
    notes: list[str] = []
    values = _normalize(read(Path(path)), where, "") if path else {}
    section = _section(values, where, "federation")
    for key, value in (flags or {}).items():
        if value is not None:
            (section if key in _names(LoraFederation) else values)[key] = value
    if "hf_dataset" in values:
        raise ConfigError(
            f"{where}: hf_dataset is not supported: set data to the dataset's id, and the "
            "names of its columns as prompt_feature, completion_feature, chat_feature or "
            "text_feature."
        )
    values = {k: v for k, v in values.items() if k not in IDLE}
    if isinstance(optimizer := values.get("optimizer"), str):
        values["optimizer"] = optimizer.lower()
    values["lora_parameters"] = _lora_parameters(values, where, notes)
    if (layers := values.pop("lora_layers", None)) is not None:
        notes.append("lora_layers is num_layers of older versions of mlx-lm.")
        values.setdefault("num_layers", layers)
    _remove_unknown(values, _names(LoraConfig) | IDLE, where, "", notes)
    _check(LoraConfig, values, where, "")
    _check(LoraFederation, section, where, "federation.")
    _check_schedule(values, where, section, notes)
    if "local_epochs" in section and "local_iters" in section:
        raise ConfigError(
            f"{where}: federation.local_epochs and federation.local_iters exclude each other: "
            "leave out one."
        )
    if values.get("fine_tune_type") == "full" and section.get("freeze_a"):
        raise ConfigError(
            f"{where}: federation.freeze_a needs adapters, and fine_tune_type full has none: leave "
            "it out, or use lora or dora."
        )
    config = LoraConfig(**values, federation=LoraFederation(**section))
    if section.get("bias_correction") and config.optimizer not in ("adam", "adamw"):
        raise ConfigError(
            f"{where}: federation.bias_correction is Adam's, of adam and adamw, and optimizer is "
            f"{config.optimizer}: leave it out."
        )
    if rounding := config.rounding():
        notes.append(rounding)
    for text in notes:
        note(f"{where}: {text}")
    return config


def _normalize(values: Mapping[Any, Any], where: str, section: str) -> dict[str, Any]:
    """Values by keys with underscores, without keys of no value."""
    normal: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if value is not None and normal.setdefault(name, value) != value:
            raise ConfigError(f"{where} has {section}{name} twice, with hyphens and underscores.")
    return normal


def _section(values: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    """Removes a section from all values and returns its values by key."""
    section = values.pop(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: {name} is a section of keys, not {section!r}.")
    return _normalize(section, where, f"{name}.")


def _remove_unknown(
    values: dict[str, Any], valid_keys: Iterable[str], where: str, section: str, notes: list[str]
) -> None:
    """Removes unknown keys, as mlx-lm does, with a note for each.

    Raises:
        ConfigError: If one is similar to a known key, or belongs to another section.
    """
    for key in [key for key in values if key not in valid_keys]:
        if key in _HINTS:
            hint = f" Its key is {_HINTS[key]}."
        elif not section and key in _names(LoraFederation):
            raise ConfigError(
                f"{where} has an unknown key {key}. Put it below federation: as federation.{key}."
            )
        elif matches := difflib.get_close_matches(key, sorted(valid_keys), 1, _TYPO[bool(section)]):
            raise ConfigError(
                f"{where} has an unknown key {section}{key}. Did you mean {section}{matches[0]}?"
            )
        else:
            hint = ""
        notes.append(f"mlx-lm ignores {section}{key}, and so does mlx-fed.{hint}")
        del values[key]


def nearest(key: str, names: Iterable[str]) -> str:
    """The name that is most similar to ``key``."""
    return difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.0)[0]


def _names(cls: type) -> set[str]:
    return {item.name for item in fields(cls)}


def _check(cls: type, values: Mapping[str, Any], where: str, section: str) -> None:
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if key not in kinds:  # of federation; others were removed
            raise ConfigError(f"{where} has an unknown key {section}{key}. {_suggestion(key)}")
        _check_value(where, section + key, value, kinds[key])
        if key in _CHOICES and value not in _CHOICES[key]:
            choices = ", ".join(_CHOICES[key])
            raise ConfigError(f"{where}: {section}{key} is one of {choices}, not {value!r}.")
        if key in _POSITIVE and value is not None and value < 1:
            raise ConfigError(f"{where}: {section}{key} is 1 or more, not {value}.")
        if key in _OR_ALL and value != -1 and value < (minimum := _OR_ALL[key]):
            raise ConfigError(f"{where}: {key} is {minimum} or more, or -1 for all, not {value}.")
        if key == "learning_rate" and not 0 < value < math.inf:
            raise ConfigError(f"{where}: learning_rate is above 0, not {value}.")
    if not 0 < values.get("fraction", 1) <= 1:
        share = values["fraction"]
        raise ConfigError(f"{where}: {section}fraction is above 0 and at most 1, not {share}.")


def _suggestion(key: str) -> str:
    if key in _names(LoraConfig):
        return f"Put {key} at the top, beside model and data."
    return f"Did you mean federation.{nearest(key, _names(LoraFederation))}?"


def _check_value(where: str, key: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = tuple(get_origin(k) or k for k in kinds)
    if float in kinds:
        kinds += (int,)
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return
    description = _KINDS.get(next(k for k in kinds if k is not type(None)), "a section of keys")
    raise ConfigError(f"{where}: {key} is {description}, not {value!r}.")


def _lora_parameters(values: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """mlx-lm's section ``lora_parameters`` with its defaults."""
    lora = _section(values, where, "lora_parameters")
    if isinstance(layers := lora.pop("lora_layers", None), int):
        values.setdefault("lora_layers", layers)
    elif layers is not None:
        notes.append("lora_parameters.lora_layers is read as lora_parameters.keys.")
        lora.setdefault("keys", layers)
    for name in _ALPHAS:
        if name in lora and "scale" not in lora:
            alpha, rank = lora.pop(name), lora.get("rank", LoraConfig().lora_parameters["rank"])
            _check_value(where, f"lora_parameters.{name}", alpha, float)
            _check_value(where, "lora_parameters.rank", rank, int)
            lora["scale"] = alpha / max(rank, 1)
            notes.append(
                f"lora_parameters.{name} {alpha} is a scale of {lora['scale']}: alpha / rank."
            )
    _remove_unknown(lora, _OF_LORA, where, "lora_parameters.", notes)
    lora = {**LoraConfig().lora_parameters, **lora}
    for key, value in lora.items():
        _check_value(where, f"lora_parameters.{key}", value, _OF_LORA[key])
    if lora["rank"] < 1:
        raise ConfigError(f"{where}: lora_parameters.rank is 1 or more, not {lora['rank']}.")
    if not 0 <= lora["dropout"] < 1:
        dropout = lora["dropout"]
        raise ConfigError(f"{where}: lora_parameters.dropout is from 0 to below 1, not {dropout}.")
    return lora


def _check_schedule(
    values: dict[str, Any], where: str, federation: Mapping[str, Any], notes: list[str]
) -> None:
    if not (schedule := _section(values, where, "lr_schedule")):
        return
    if federation.get("local_epochs"):
        raise ConfigError(
            f"{where}: lr_schedule counts iterations: give iters or federation.local_iters, "
            "not federation.local_epochs."
        )
    _remove_unknown(schedule, _OF_SCHEDULE, where, "lr_schedule.", notes)
    if schedule.get("name") not in _SCHEDULES or not isinstance(schedule.get("arguments"), list):
        raise ConfigError(
            f"{where}: lr_schedule has a name, one of {', '.join(_SCHEDULES)}, and a list of "
            f"arguments, such as [1e-5, 1000]; not {schedule!r}."
        )
    values["lr_schedule"] = schedule
