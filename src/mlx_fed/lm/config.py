"""The configuration: mlx-lm's YAML, one section for the federation, and flags over both."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from ..errors import FedError
from ..task_config import kebab_case


class ConfigError(FedError):
    """A configuration that cannot be; the message names the key."""


@dataclass(frozen=True)
class Federation:
    """The section ``federation:``."""

    rounds: Annotated[int, "Rounds to train."] = 10
    local_iters: Annotated[
        int | None, "Iterations a node takes in a round; else iters / rounds."
    ] = None
    local_epochs: Annotated[int | None, "Passes over a node's texts in a round, instead."] = None
    nodes: Annotated[int | None, "Nodes that a round needs, or clients of a simulation."] = None
    fraction: Annotated[float, "The share of nodes that train in a round."] = 1.0
    strategy: Annotated[str, "A Flower strategy's name, or MODULE:STRATEGY of your own."] = "FedAvg"
    strategy_options: Annotated[dict, "Its arguments."] = field(default_factory=dict, hash=False)
    weighting: Annotated[str, "What weighs a node in the average: examples or tokens."] = "examples"
    freeze_a: Annotated[bool, "Train and average B alone, as FFA-LoRA does."] = False
    partitioner: Annotated[str, "How a Hugging Face dataset is partitioned (see the docs)."] = "iid"
    partitioner_options: Annotated[dict, "The partitioner's arguments."] = field(
        default_factory=dict, hash=False
    )
    sample_prompt: Annotated[str | None, "A prompt that the server continues after rounds."] = None
    sample_every: Annotated[int, "After which rounds."] = 1
    sample_tokens: Annotated[int, "With how many tokens."] = 64


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
    seed: Annotated[int, "Decides initial adapters, shuffling, dropout and sampling."] = 0
    num_layers: Annotated[int, "Layers to fine-tune, from the last; -1 is all."] = 16
    batch_size: Annotated[int, "Texts in a training step."] = 4
    iters: Annotated[int, "Iterations that a node takes in all."] = 1000
    val_batches: Annotated[int, "Batches to validate on; -1 is all."] = 25
    learning_rate: Annotated[float, "The optimizer's learning rate."] = 1e-5
    lr_schedule: Annotated[dict | None, "A schedule over all iterations."] = field(
        default=None, hash=False
    )
    max_seq_length: Annotated[int, "Tokens of a text; what is longer is cut."] = 2048
    mask_prompt: Annotated[bool, "Leave prompts out of the loss."] = False
    grad_checkpoint: Annotated[bool, "Use less memory, and more time."] = False
    lora_parameters: Annotated[dict, "rank, scale, dropout and keys."] = field(
        default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0}, hash=False
    )
    resume_adapter_file: Annotated[str | None, "Adapters that the server starts from."] = None
    trust_remote_code: Annotated[bool, "Run code that comes with the model."] = False
    prompt_feature: Annotated[str, "The key of prompts in the data."] = "prompt"
    completion_feature: Annotated[str, "The key of completions."] = "completion"
    chat_feature: Annotated[str, "The key of chats."] = "messages"
    text_feature: Annotated[str, "The key of plain texts."] = "text"
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
_OR_ALL = {"num_layers": 1, "val_batches": 0}
"""Keys of which -1 is all, and the least that they may be else."""
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
    where = str(path) if path else "the configuration"
    values = _snake_case(_read(Path(path)), where) if path else {}
    section = values.pop("federation", None) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: federation is a section of keys, not {section!r}.")
    section = _snake_case(section, where)
    if isinstance(values.get("lr_schedule"), dict):
        values["lr_schedule"] = _snake_case(values["lr_schedule"], where)
    for key, value in (flags or {}).items():
        if value is not None:
            (section if key in _names(Federation) else values)[key] = value
    if values.get("grad_accumulation_steps", 1) != 1:
        raise ConfigError(f"{where}: grad_accumulation_steps is not supported yet: leave it out.")
    if "hf_dataset" in values:
        raise ConfigError(
            f"{where}: hf_dataset is not supported: give the dataset's id as data, and "
            "what its columns are called as prompt_feature, completion_feature, chat_feature or "
            "text_feature."
        )
    values = {k: v for k, v in values.items() if k not in IDLE | {"grad_accumulation_steps"}}
    _check(LoraConfig, values, where, "")
    _check(Federation, section, where, "federation.")
    _check_nested(values, where, section.get("local_epochs"))
    return LoraConfig(**values, federation=Federation(**section))


def _snake_case(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = {str(key): value for key, value in values.items()}
    return {key.replace("-", "_"): value for key, value in kebab_case(named, where).items()}


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
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
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
        if key in _OR_ALL and value != -1 and value < (least := _OR_ALL[key]):
            raise ConfigError(f"{where}: {key} is {least} or more, or -1 for all, not {value}.")
        if key == "learning_rate" and not 0 < value < math.inf:
            raise ConfigError(f"{where}: learning_rate is above 0, not {value}.")
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
    lora = {**LoraConfig().lora_parameters, **(values.get("lora_parameters") or {})}
    known = {"rank": int, "scale": float, "dropout": float, "keys": list}
    for key, value in lora.items():
        if key == "alpha":
            raise ConfigError(
                f"{where}: mlx-lm has lora_parameters.scale (alpha / rank), no alpha."
            )
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
        for key in schedule:
            if key not in (keys := ("name", "arguments", "warmup", "warmup_init")):
                raise ConfigError(
                    f"{where} has an unknown key lr_schedule.{key}. "
                    f"Did you mean lr_schedule.{nearest(str(key), keys)}?"
                )
        name = schedule.get("name")
        if name not in _SCHEDULES or not isinstance(schedule.get("arguments"), list):
            raise ConfigError(
                f"{where}: lr_schedule has a name, one of {', '.join(_SCHEDULES)}, and a list of "
                f"arguments, such as [1e-5, 1000]; not {schedule!r}."
            )
