"""Fingerprints of a base model and a tokenizer, which must be the same on all nodes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import base_model

_SAMPLES = 16
"""Samples of each array."""
_IDLE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a config.json without influence on the model's output."""
_LONGEST = 100
"""Characters of a value in a message."""
_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.\n\n\tdef f(x): return x ** 2",
    "Zwölf Boxkämpfer, œuvre, Привет мир, 你好世界, こんにちは, مرحبا, 🙂",
)


def hash_weights(folder: Path) -> str:
    """SHA-256 of the names, shapes, dtypes and samples of the values of a model's weights.

    It reads a few bytes of each array, so that its time does not depend on the model's size. The
    distribution of arrays over files has no influence.

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
                    for number in range(_SAMPLES):
                        file.seek(8 + size + begin + (end - begin) * number // _SAMPLES)
                        digest.update(file.read(min(16, (end - begin) // _SAMPLES + 1)))
                    arrays[name] = digest.digest()
        except (OSError, ValueError, KeyError, struct.error, MemoryError) as error:
            raise base_model.BaseModelError(
                f"{path} cannot be read as safetensors: {error}"
            ) from error
    return _short(b"".join(name.encode() + arrays[name] for name in sorted(arrays)))


def describe_config(folder: Path) -> dict[str, str]:
    """The keys of a model's config.json with influence on its output, as mlx-lm reads them.

    Missing keys have mlx-lm's defaults; keys that mlx-lm ignores are absent. Nested values have
    keys with dots.
    """
    config = base_model.read_config(folder)
    kinds = base_model.classes(folder, config)
    values = vars(kinds[1].from_dict(config)) if kinds else config
    texts = {key: describe(value) for key, value in _flat(values) if not _is_idle(key)}
    quantization = config.get("quantization") or config.get("quantization_config")
    return {"model_type": describe(config.get("model_type")), **texts} | {
        "quantization": describe(quantization)
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        value = vars(value) if hasattr(value, "__dict__") else value
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _flat(value))
        else:
            yield str(key), value


def _is_idle(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in _IDLE or key.endswith("_token_id")


def describe(value: Any) -> str:
    """A value as JSON; a long one is cut and has a hash of its full text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 10000.0 in one file equals 10000 in another
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({_short(text.encode())})"


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, the chat template, and the tokens of sample texts."""
    contents = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "end": tokenizer.eos_token_id,
        "probes": [tokenizer.encode(text) for text in _PROBES],
    }
    return _short(json.dumps(contents, sort_keys=True, default=str).encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
