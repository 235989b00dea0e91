"""The base model and its tokenizer: found, loaded once a process, shared by all who fine-tune it.

Of a model on the hub its config.json is downloaded first, then all that the tokenizer may need, and
then the weights: each when it is asked for.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FedError
from ..system.cache import FileStates, file_states
from ..system.hub_progress import loading_with_tqdm

if TYPE_CHECKING:
    import mlx.nn as nn


class BaseModelError(FedError):
    """A base model that is not there, or cannot be loaded."""


def require_mlx_lm() -> None:
    """Says what to install where mlx-lm is not.

    Raises:
        FedError: If it is not installed.
    """
    if find_spec("mlx_lm") is None:
        raise FedError(
            'Fine-tuning language models needs mlx-lm: pip install "mlx-fed[lm]", or '
            'pip install -e ".[lm]" in the repository (on Linux, ".[cpu,lm]").'
        )


def find(name: str) -> Path:
    """The folder of a model, which is looked at before any of its weights is downloaded or read.

    Args:
        name (str): A folder, or an id on the Hugging Face hub.

    Raises:
        BaseModelError: If it is not there, has no weights, or is of an architecture that mlx-lm
            does not know.
    """
    folder = folder_of_tokenizer(name)
    if not is_folder(name):
        folder = download(name, f"the model {name}")
    if not weight_files(folder):
        raise BaseModelError(
            f"{folder} has no weights: no file model*.safetensors. Download all of it, or make "
            "one of another format with mlx_lm.convert."
        )
    return folder


def outline(name: str) -> nn.Module | None:
    """A model's modules without its weights, for which nothing but its config.json is needed.

    Nothing of it takes memory before something is computed with it. A model that comes with code
    of its own has none.

    Args:
        name (str): As for :func:`find`.

    Raises:
        BaseModelError: If the model is not there, or of an architecture that mlx-lm does not know.
    """
    folder = folder_of_config(name)
    config = read_config(folder)
    if (kinds := classes(folder, config)) is None:
        return None
    model, arguments = kinds
    try:
        module: nn.Module = model(arguments.from_dict(config))
    except Exception as error:  # whatever values that are none bring about
        raise BaseModelError(
            f"mlx-lm cannot make a model of {folder}/config.json: {error}"
        ) from error
    return module.freeze()


def folder_of_config(name: str) -> Path:
    """The folder where a model's config.json is, and perhaps nothing else yet."""
    require_mlx_lm()
    if is_folder(name):
        return Path(name).expanduser().resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseModelError(f"There is no model in {name}: no such folder.")
    return download(name, f"the model {name}", ("config.json",))


def folder_of_tokenizer(name: str) -> Path:
    """The folder where all of a model is but perhaps its weights.

    Raises:
        BaseModelError: If it is not there, or of an architecture that mlx-lm does not know.
    """
    folder = folder_of_config(name)
    classes(folder, read_config(folder))
    if is_folder(name):
        return folder
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    small = (pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".safetensors"))
    return download(name, f"the tokenizer of {name}", tuple(small))


def is_folder(name: str) -> bool:
    """Whether a model is on this machine under its name, and nothing of it is downloaded."""
    return Path(name).expanduser().exists()


@lru_cache
def download(name: str, what: str, patterns: tuple[str, ...] | None = None) -> Path:
    """The folder of a model's files from the hub, of which a process sees one revision.

    Args:
        name (str): The model's id.
        what (str): What is downloaded, to those who watch.
        patterns (tuple, optional): Of which files. Default: of all that mlx-lm needs.

    Raises:
        BaseModelError: If they are not to be had.
    """
    from huggingface_hub.utils import tqdm
    from mlx_lm.utils import _download

    try:
        with loading_with_tqdm(f"Downloading {what}", tqdm):
            folder: Path = _download(name, allow_patterns=list(patterns) if patterns else None)
    except Exception as error:  # the hub's client has many kinds, and those of its HTTP library
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelError(
            f"There is neither a folder {name} nor a model of that name to be had from the "
            f"Hugging Face hub: {why[0]}"
        ) from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json, as mlx-lm reads it.

    Raises:
        BaseModelError: If there is none that says of what type the model is.
    """
    from mlx_lm.utils import load_config

    try:
        config: dict[str, Any] = load_config(folder)
        config["model_type"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = "it has no model_type" if isinstance(error, (KeyError, TypeError)) else error
        raise BaseModelError(f"{folder} is no model: its config.json: {why}") from error
    return config


def classes(folder: Path, config: dict[str, Any]) -> tuple[Any, Any] | None:
    """mlx-lm's classes of a model and its arguments; none where the model comes with code.

    Raises:
        BaseModelError: If mlx-lm has none.
    """
    from importlib.metadata import version

    from mlx_lm.utils import _get_classes

    if "model_file" in config:
        return None  # which mlx-lm asks trust_remote_code for
    try:
        kinds: tuple[Any, Any] = _get_classes(config)
    except (AttributeError, ValueError) as error:
        raise BaseModelError(
            f"{folder} is a model of type {config['model_type']!r}, which mlx-lm "
            f"{version('mlx-lm')} does not know: choose another, or try a newer mlx-lm."
        ) from error
    return kinds


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, as mlx-lm looks for them."""
    return sorted(folder.glob("model*.safetensors"))


def load(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The base model, of which nothing is trained, loaded once a process while its files stay.

    Arrays are read when they are first computed with.

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
    except Exception as error:  # whatever files that are not a model's bring about
        raise BaseModelError(f"mlx-lm cannot load {folder}: {error}") from error
    return model.freeze()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model, loaded once a process while its files stay.

    Raises:
        BaseModelError: If there is none that can be loaded.
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
    except Exception as error:  # transformers' many kinds
        raise BaseModelError(f"Cannot load the tokenizer in {folder}: {error}") from error


def share(model: nn.Module) -> nn.Module:
    """A copy of a module that has modules of its own and the same arrays."""
    from mlx.utils import tree_flatten

    arrays: Any = tree_flatten(model.parameters())
    shared: nn.Module = copy.deepcopy(model, {id(array): array for _, array in arrays})
    return shared
