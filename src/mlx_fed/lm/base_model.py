"""Base model and tokenizer: downloaded on demand, loaded once a process, shared by its clients.

Of a model on the hub, config.json is downloaded first, then the tokenizer's files, then the
weights, each at its first use.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FedError, install_command
from ..system.cache import FileStates, file_states
from ..system.hub_progress import loading_with_tqdm

if TYPE_CHECKING:
    import mlx.nn as nn


class BaseModelError(FedError):
    """A base model that is missing or cannot be loaded."""


def require_mlx_lm() -> None:
    """Checks that mlx-lm is installed.

    Raises:
        FedError: If it is not installed.
    """
    if find_spec("mlx_lm") is None:
        raise FedError(
            f"Fine-tuning language models needs mlx-lm: {install_command('lm')} (on Linux, "
            '".[cpu,lm]").'
        )


def find(name: str) -> Path:
    """The folder of a model with its weights; config.json is checked before they are downloaded.

    Args:
        name (str): A folder, or an id on the Hugging Face hub.

    Raises:
        BaseModelError: If the model is missing, has no weights, or has an architecture that
            mlx-lm does not support.
    """
    folder = folder_of_tokenizer(name)
    if not is_folder(name):
        folder = download(name, f"the model {name}")
    if not weight_files(folder):
        raise BaseModelError(
            f"{folder} has no weights: no file model*.safetensors. Download the whole model, or "
            "convert one of another format with mlx_lm.convert."
        )
    return folder


def outline(name: str) -> nn.Module | None:
    """A model's modules without weights, from its config.json; ``None`` for a model with code.

    Its arrays are lazy and take no memory.

    Args:
        name (str): As for :func:`find`.

    Raises:
        BaseModelError: If the model is missing or mlx-lm does not support its architecture.
    """
    folder = folder_of_config(name)
    config = read_config(folder)
    if (kinds := classes(folder, config)) is None:
        return None
    model, arguments = kinds
    try:
        module: nn.Module = model(arguments.from_dict(config))
    except Exception as error:  # any error that invalid values cause
        raise BaseModelError(
            f"mlx-lm cannot create a model from {folder}/config.json: {error}"
        ) from error
    return module.freeze()


def folder_of_config(name: str) -> Path:
    """The folder with a model's config.json; other files may be missing yet."""
    require_mlx_lm()
    if is_folder(name):
        return Path(name).expanduser().resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseModelError(f"There is no model in {name}: no such folder.")
    return download(name, f"the model {name}", ("config.json",))


def folder_of_tokenizer(name: str) -> Path:
    """The folder with a model's config.json and tokenizer; weights may be missing yet.

    Raises:
        BaseModelError: If the model is missing or mlx-lm does not support its architecture.
    """
    folder = folder_of_config(name)
    classes(folder, read_config(folder))
    if is_folder(name):
        return folder
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    small = (pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".safetensors"))
    return download(name, f"the tokenizer of {name}", tuple(small))


def is_folder(name: str) -> bool:
    """Whether a model's name is a local path, so that nothing is downloaded."""
    return Path(name).expanduser().exists()


@lru_cache
def download(name: str, what: str, patterns: tuple[str, ...] | None = None) -> Path:
    """The folder of a model's files from the hub; a process uses one revision.

    Args:
        name (str): The model's id.
        what (str): The text of the progress bar.
        patterns (tuple, optional): Patterns of file names. Default: all files of mlx-lm.

    Raises:
        BaseModelError: If they cannot be downloaded.
    """
    from huggingface_hub.utils import tqdm
    from mlx_lm.utils import _download

    try:
        with loading_with_tqdm(f"Downloading {what}", tqdm):
            folder: Path = _download(name, allow_patterns=list(patterns) if patterns else None)
    except Exception as error:  # of the hub's client or its HTTP library
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelError(
            f"There is no folder {name}, and the Hugging Face hub does not provide a model of "
            f"that name: {lines[0]}"
        ) from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, by mlx-lm.

    Raises:
        BaseModelError: If there is none with the model's type.
    """
    from mlx_lm.utils import load_config

    try:
        config: dict[str, Any] = load_config(folder)
        config["model_type"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        cause = "it has no model_type" if isinstance(error, (KeyError, TypeError)) else error
        raise BaseModelError(f"{folder} is no model: its config.json: {cause}") from error
    return config


def classes(folder: Path, config: dict[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's classes of a model and its arguments; ``None`` for a model with code.

    Raises:
        BaseModelError: If mlx-lm has none.
    """
    from importlib.metadata import version

    from mlx_lm.utils import _get_classes

    if "model_file" in config:
        return None  # mlx-lm requires trust_remote_code
    try:
        kinds: tuple[Any, Any] = _get_classes(config)
    except (AttributeError, ValueError) as error:
        raise BaseModelError(
            f"{folder} is a model of type {config['model_type']!r}, which mlx-lm "
            f"{version('mlx-lm')} does not support: choose another, or try a newer mlx-lm."
        ) from error
    return kinds


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, by mlx-lm's pattern."""
    return sorted(folder.glob("model*.safetensors"))


def load(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The frozen base model, loaded once a process unless its files change.

    Arrays are read lazily.

    Raises:
        BaseModelError: If mlx-lm cannot load it.
    """
    files = file_states(*folder.glob("*.json"), *folder.glob("*.py"), *weight_files(folder))
    return _load(folder, trust_remote_code, files)


@lru_cache(maxsize=1)
def _load(folder: Path, trust_remote_code: bool, files: FileStates) -> nn.Module:
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # any error that invalid files cause
        raise BaseModelError(f"mlx-lm cannot load {folder}: {error}") from error
    return model.freeze()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model, loaded once a process unless its files change.

    Raises:
        BaseModelError: If it cannot be loaded.
    """
    files = (path for path in folder.glob("*") if path.suffix != ".safetensors" and path.is_file())
    state = file_states(*files, folder / "additional_chat_templates")
    return _load_tokenizer(folder, trust_remote_code, state)


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, trust_remote_code: bool, files: FileStates) -> Any:
    from mlx_lm.utils import load_tokenizer as load

    eos = read_config(folder).get("eos_token_id")
    try:
        return load(folder, {"trust_remote_code": trust_remote_code}, eos_token_ids=eos)
    except Exception as error:  # of transformers
        raise BaseModelError(f"Cannot load the tokenizer in {folder}: {error}") from error


def share(model: nn.Module) -> nn.Module:
    """A copy of a module tree that shares the arrays."""
    from mlx.utils import tree_flatten

    arrays: Any = tree_flatten(model.parameters())
    module: nn.Module = copy.deepcopy(model, {id(array): array for _, array in arrays})
    return module
