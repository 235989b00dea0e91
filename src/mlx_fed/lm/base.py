"""The base model: found, loaded once a process, shared by all who fine-tune it, and identified."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import FedError

if TYPE_CHECKING:
    import mlx.nn as nn

_SAMPLES = 16
"""Places in each array of a base model that its identity looks at."""
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.\n\n\tdef f(x): return x ** 2",
    "Zwölf Boxkämpfer, œuvre, Привет мир, 你好世界, こんにちは, مرحبا, 🙂",
)


class BaseModelError(FedError):
    """A base model that is not there, or cannot be loaded."""


class Base(NamedTuple):
    """A base model in memory: its module, of which nothing is trained, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


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


@lru_cache
def find(name: str) -> Path:
    """The folder of a model, which is looked at before any of its weights is downloaded or read.

    Args:
        name (str): A folder, or an id on the Hugging Face hub.

    Raises:
        BaseModelError: If it is not there, has no weights, or is of an architecture that mlx-lm
            does not know.
    """
    require_mlx_lm()
    folder = Path(name).expanduser()
    if folder.exists():
        _check_architecture(folder)
        if not weight_files(folder):
            raise BaseModelError(f"{folder} has no weights: no file model*.safetensors.")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseModelError(f"There is no model in {name}: no such folder.")
    _check_architecture(_download(name, ["config.json"]))
    return _download(name, None)


def _download(name: str, patterns: list[str] | None) -> Path:
    from mlx_lm.utils import _download as download

    try:
        folder: Path = download(name, allow_patterns=patterns)
    except Exception as error:  # the hub's client has many kinds, and those of its HTTP library
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelError(
            f"There is neither a folder {name} nor a model of that name to be had from the "
            f"Hugging Face hub: {why[0]}"
        ) from error
    return folder


def _check_architecture(folder: Path) -> None:
    from mlx_lm.utils import _get_classes, load_config

    try:
        config = load_config(folder)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder} is no model: its config.json: {error}") from error
    if "model_file" in config:
        return  # code of its own, which mlx-lm asks trust_remote_code for
    try:
        _get_classes(config)
    except (KeyError, ValueError) as error:
        kind = config.get("model_type")
        raise BaseModelError(
            f"{folder} is a model of type {kind!r}, which mlx-lm does not know: {error}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, as mlx-lm looks for them."""
    return sorted(folder.glob("model*.safetensors"))


@lru_cache(maxsize=1)
def load(folder: Path, trust_remote_code: bool = False) -> Base:
    """The base model and its tokenizer, loaded once a process.

    Arrays are read when they are first computed with.

    Raises:
        BaseModelError: If mlx-lm cannot load it.
    """
    from mlx_lm.utils import load_model

    try:
        model, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever files that are not a model's bring about
        raise BaseModelError(f"mlx-lm cannot load {folder}: {error}") from error
    model.freeze()
    return Base(model, load_tokenizer(folder, trust_remote_code, config.get("eos_token_id")))


def load_tokenizer(folder: Path, trust_remote_code: bool = False, eos: Any = None) -> Any:
    """The tokenizer alone.

    Raises:
        BaseModelError: If there is none that can be loaded.
    """
    from mlx_lm.utils import load_tokenizer as load

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


def identity(folder: Path) -> str:
    """A hash of the names, shapes, dtypes and a sample of the values of a model's weights.

    It is read from the files, a few bytes of each array, so that it costs the same for a model of
    any size; how many files the arrays are spread over does not matter.

    Raises:
        BaseModelError: If a file is not safetensors.
    """
    arrays: dict[str, bytes] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                header.pop("__metadata__", None)
                for name, array in header.items():
                    begin, end = array["data_offsets"]
                    digest = hashlib.sha256(repr((array["dtype"], array["shape"])).encode())
                    for place in range(_SAMPLES):
                        file.seek(8 + size + begin + (end - begin) * place // _SAMPLES)
                        digest.update(file.read(min(16, (end - begin) // _SAMPLES + 1)))
                    arrays[name] = digest.digest()
        except (OSError, ValueError, KeyError, struct.error, MemoryError) as error:
            raise BaseModelError(f"{path} cannot be read as safetensors: {error}") from error
    return _short(b"".join(name.encode() + arrays[name] for name in sorted(arrays)))


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of the vocabulary, the chat template, and how some text is split."""
    known = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
        "probes": [tokenizer.encode(text) for text in _PROBES],
    }
    return _short(json.dumps(known, sort_keys=True, default=str).encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
