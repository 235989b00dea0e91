"""The configuration: mlx-lm's YAML, one section for the federation, and flags over both."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import FedError


class ConfigError(FedError):
    """A configuration that cannot be; the message names the key."""


def _key(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Federation:
    """The section ``federation:``."""

    rounds: int = _key(10, "Rounds to train.")
    local_iters: int | None = _key(None, "Iterations a node takes in a round; else iters / rounds.")
    local_epochs: int | None = _key(None, "Passes over a node's texts in a round, instead.")
    nodes: int | None = _key(None, "Nodes that a round needs, or clients of a simulation.")
    fraction: float = _key(1.0, "The share of nodes that train in a round.")
    strategy: str = _key("FedAvg", "A Flower strategy's name, or MODULE:STRATEGY of your own.")
    strategy_options: dict = _key({}, "Its arguments.")
    weighting: str = _key("examples", "What weighs a node in the average: examples or tokens.")
    freeze_a: bool = _key(False, "Train and average B alone, as FFA-LoRA does.")
    partitioner: str = _key("iid", "How a Hugging Face dataset is partitioned (see the docs).")
    partitioner_options: dict = _key({}, "The partitioner's arguments.")
    sample_prompt: str | None = _key(None, "A prompt that the server continues after rounds.")
    sample_every: int = _key(1, "After which rounds.")
    sample_tokens: int = _key(64, "With how many tokens.")


@dataclass(frozen=True)
class LoraConfig:
    """mlx-lm's keys, with mlx-lm's defaults, and the federation's."""

    model: str = _key("Qwen/Qwen3-0.6b", "A model's folder, or its id on the Hugging Face hub.")
    data: str = _key("mlx-community/WikiSQL", "A folder of jsonl files, or a dataset's id.")
    fine_tune_type: str = _key("lora", "lora, dora or full.")
    optimizer: str = _key("adam", "adam, adamw, muon, sgd or adafactor.")
    optimizer_config: dict = _key({}, "Arguments of each optimizer, by its name.")
    seed: int = _key(0, "Decides initial adapters, shuffling, dropout and sampling.")
    num_layers: int = _key(16, "Layers to fine-tune, from the last; -1 is all.")
    batch_size: int = _key(4, "Texts in a training step.")
    iters: int = _key(1000, "Iterations that a node takes in all.")
    val_batches: int = _key(25, "Batches to validate on; -1 is all.")
    learning_rate: float = _key(1e-5, "The optimizer's learning rate.")
    lr_schedule: dict | None = _key(None, "A schedule over all iterations.")
    max_seq_length: int = _key(2048, "Tokens of a text; what is longer is cut.")
    mask_prompt: bool = _key(False, "Leave prompts out of the loss.")
    grad_checkpoint: bool = _key(False, "Use less memory, and more time.")
    lora_parameters: dict = _key(
        {"rank": 8, "dropout": 0.0, "scale": 20.0}, "rank, scale, dropout and keys."
    )
    resume_adapter_file: str | None = _key(None, "Adapters that the server starts from.")
    trust_remote_code: bool = _key(False, "Run code that comes with the model.")
    prompt_feature: str = _key("prompt", "The key of prompts in the data.")
    completion_feature: str = _key("completion", "The key of completions.")
    chat_feature: str = _key("messages", "The key of chats.")
    text_feature: str = _key("text", "The key of plain texts.")
    federation: Federation = field(default_factory=Federation)

    def local_steps(self) -> int | None:
        """Iterations of a node in a round; ``None`` where it takes whole epochs."""
        if self.federation.local_epochs:
            return None
        return self.federation.local_iters or math.ceil(self.iters / self.federation.rounds)

    def for_mlx_lm(self) -> dict[str, Any]:
        """The configuration as ``adapter_config.json`` has it."""
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
    "steps_per_report",
    "test",
    "test_batches",
    "train",
}
"""Keys of mlx-lm's that have no meaning in a federation; a file may have them all the same."""

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
    "batch_size",
    "iters",
    "max_seq_length",
}
_SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def load_config(path: Path | str | None, flags: Mapping[str, Any] | None = None) -> LoraConfig:
    """The configuration in a file, with flags over it.

    Args:
        path (Path, optional): A YAML file.
        flags (dict, optional): Values by key, the federation's among the others; those that are
            ``None`` were not given.

    Raises:
        ConfigError: If the file cannot be read, or a key or a value is not one that there is.
    """
    values = _read(Path(path)) if path else {}
    where = str(path) if path else "the configuration"
    section = values.pop("federation", None) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: federation is a section of keys, not {section!r}.")
    for key, value in (flags or {}).items():
        if value is not None:
            (section if key in _names(Federation) else values)[key] = value
    if values.get("grad_accumulation_steps", 1) != 1:
        raise ConfigError(f"{where}: grad_accumulation_steps is not supported yet: leave it out.")
    values = {k: v for k, v in values.items() if k not in IDLE | {"grad_accumulation_steps"}}
    _check(LoraConfig, values, where, "")
    _check(Federation, section, where, "federation.")
    _check_nested(values, where, section.get("local_epochs"))
    return LoraConfig(**values, federation=Federation(**section))


def nearest(key: str, known: Iterable[str]) -> str:
    """The known name that is most like ``key``."""
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]


def _names(cls: type) -> set[str]:
    return {item.name for item in fields(cls)}


def _read(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """As mlx-lm's: ``1e-5`` is a number, which YAML 1.1 takes for text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a safe one
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} has no keys: it is a file such as mlx-lm's lora_config.yaml.")
    return values


def _check(cls: type, values: Mapping[str, Any], where: str, section: str) -> None:
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if key not in kinds or (key == "federation" and not section):
            raise ConfigError(f"{where} has an unknown key {section}{key}. {_meant(key, section)}")
        _check_value(where, section + key, value, kinds[key])
        if key in _CHOICES and value not in _CHOICES[key]:
            choices = ", ".join(_CHOICES[key])
            raise ConfigError(f"{where}: {section}{key} is one of {choices}, not {value!r}.")
        if key in _POSITIVE and value is not None and value < 1:
            raise ConfigError(f"{where}: {section}{key} is 1 or more, not {value}.")
    if not 0 < values.get("fraction", 1) <= 1:
        share = values["fraction"]
        raise ConfigError(f"{where}: {section}fraction is above 0 and at most 1, not {share}.")


def _meant(key: str, section: str) -> str:
    if not section and key in _names(Federation):
        return f"Put it below federation: as federation.{key}."
    if section and key in _names(LoraConfig):
        return f"Put {key} at the top, beside model and data."
    known = _names(Federation) if section else _names(LoraConfig) | IDLE
    return f"Did you mean {section}{nearest(str(key), known)}?"


def _check_value(where: str, key: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = tuple(get_origin(k) or k for k in kinds)
    if float in kinds:
        kinds += (int,)
    if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
        return
    named = _KINDS.get(next(k for k in kinds if k is not type(None)), "a section of keys")
    raise ConfigError(f"{where}: {key} is {named}, not {value!r}.")


def _check_nested(values: dict[str, Any], where: str, local_epochs: int | None) -> None:
    """Checks the sections in mlx-lm's own part, and fills in what they leave out."""
    lora = {**_default("lora_parameters"), **(values.get("lora_parameters") or {})}
    known = {"rank": int, "scale": float, "dropout": float, "keys": list}
    for key, value in lora.items():
        if key == "alpha":
            raise ConfigError(f"{where}: mlx-lm has lora_parameters.scale (alpha / rank), no alpha.")
        if key not in known:
            meant = nearest(str(key), known)
            raise ConfigError(
                f"{where} has an unknown key lora_parameters.{key}. "
                f"Did you mean lora_parameters.{meant}?"
            )
        _check_value(where, f"lora_parameters.{key}", value, known[key])
    if lora["rank"] < 1:
        raise ConfigError(f"{where}: lora_parameters.rank is 1 or more, not {lora['rank']}.")
    if not 0 <= lora["dropout"] < 1:
        dropout = lora["dropout"]
        raise ConfigError(f"{where}: lora_parameters.dropout is from 0 to below 1, not {dropout}.")
    values["lora_parameters"] = lora
    if schedule := values.get("lr_schedule"):
        if local_epochs:
            raise ConfigError(
                f"{where}: lr_schedule counts iterations: give iters or federation.local_iters, "
                "not federation.local_epochs."
            )
        name = schedule.get("name")
        if name not in _SCHEDULES or not isinstance(schedule.get("arguments"), list):
            raise ConfigError(
                f"{where}: lr_schedule has a name, one of {', '.join(_SCHEDULES)}, and a list of "
                f"arguments, such as [1e-5, 1000]; not {schedule!r}."
            )


def _default(name: str) -> Any:
    item = next(item for item in fields(LoraConfig) if item.name == name)
    return item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
