"""A language model of a few thousand parameters and texts for it, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_fed as fed  # noqa: F401  before mlx.core

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

HIDDEN, LAYERS = 64, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    bits: int | None = None,
    dtype: mx.Dtype = mx.float32,
    words: Sequence[str] = (),
    **architecture: Any,
) -> Path:
    """A random Llama as mlx-lm loads it, quantized to ``bits``; ``words`` are more tokens.

    ``architecture`` are keys of config.json, which may make another model of it.
    """
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
        **architecture,
    }
    mx.random.seed(seed)
    kind, arguments = _get_classes(config)
    model = kind(arguments.from_dict(config))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, words)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str] = ()) -> None:
    """A token for each byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate([*alphabet, "<end>", *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_texts(
    folder: Path, texts: Sequence[str | dict], valid: Sequence[str | dict] = ()
) -> Path:
    """Texts as mlx-lm's jsonl, those to validate on beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", texts), ("valid", valid)):
        if rows:
            records = [row if isinstance(row, dict) else {"text": row} for row in rows]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{name}.jsonl").write_text(lines)
    return folder


def lines(speaker: str, count: int, first: int = 0) -> list[str]:
    """Short texts of about one length, another's for each speaker."""
    return [
        f"{speaker} says {number}" + "." * (number % 3) for number in range(first, first + count)
    ]
