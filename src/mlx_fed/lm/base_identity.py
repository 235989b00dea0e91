"""What a base model and a tokenizer are known by, so that a federation has but one of each."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import base_model

_SAMPLES = 16
"""Places in each array of a base model that its identity looks at."""
_IDLE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a config.json that change nothing of what a model computes."""
_LONGEST = 100
"""Characters of a value in a config.json that are shown."""
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.\n\n\tdef f(x): return x ** 2",
    "Zwölf Boxkämpfer, œuvre, Привет мир, 你好世界, こんにちは, مرحبا, 🙂",
)


def of_weights(folder: Path) -> str:
    """A hash of the names, shapes, dtypes and a sample of the values of a model's weights.

    It is read from the files, a few bytes of each array, so that it costs the same for a model of
    any size; how many files the arrays are spread over does not matter.

    Raises:
        BaseModelError: If a file is not safetensors.
    """
    arrays: dict[str, bytes] = {}
    for path in base_model.weight_files(folder):
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
            raise base_model.BaseModelError(
                f"{path} cannot be read as safetensors: {error}"
            ) from error
    return _short(b"".join(name.encode() + arrays[name] for name in sorted(arrays)))


def of_config(folder: Path) -> dict[str, str]:
    """What a model's config.json says of how it computes, by key, as mlx-lm understands it.

    What is left out is there as mlx-lm's default, and what mlx-lm passes over is not. Values that
    hold others have them under keys with dots.
    """
    config = base_model.read_config(folder)
    kinds = base_model.classes(folder, config)
    known = vars(kinds[1].from_dict(config)) if kinds else config
    found = {key: shown(value) for key, value in _flat(known) if not _says_nothing(key)}
    quantization = config.get("quantization") or config.get("quantization_config")
    return {"model_type": shown(config.get("model_type")), **found} | {
        "quantization": shown(quantization)
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        value = vars(value) if hasattr(value, "__dict__") else value
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{inner}", held) for inner, held in _flat(value))
        else:
            yield str(key), value


def _says_nothing(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in _IDLE or key.endswith("_token_id")


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long, with a hash of all of it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 10000.0 in one file is the 10000 in another
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({_short(text.encode())})"


def of_tokenizer(tokenizer: Any) -> str:
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
