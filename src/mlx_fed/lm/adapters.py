"""What is trained of a base model, and the folder that mlx-lm reads it from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import FedError
from ..randomness import Keys, drawing_from, drawn_from
from ..whole_files import replacing
from .config import LoraConfig, nearest

FOLDER = "adapters"
_LEAVES = ("lora_a", "lora_b", "m")
"""What mlx-lm calls the arrays of an adapter."""


class AdapterError(FedError):
    """Adapters that the base model has no place for."""


def attach(model: nn.Module, config: LoraConfig) -> None:
    """Makes what the configuration asks for trainable in a frozen base model.

    Raises:
        AdapterError: If the model has not so many layers, or none of the name that a key gives.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = model.layers
    if config.num_layers > len(layers):
        raise AdapterError(
            f"num_layers is {config.num_layers}, and the model has {len(layers)} layers: -1 is all."
        )
    chosen = layers[-max(config.num_layers, 0) :]
    if config.fine_tune_type == "full":
        for layer in chosen:
            layer.unfreeze()
    else:
        _check_keys(model, chosen, config.lora_parameters.get("keys"))
        use_dora = config.fine_tune_type == "dora"
        try:
            linear_to_lora_layers(model, config.num_layers, config.lora_parameters, use_dora)
        except ValueError as error:
            raise AdapterError(f"mlx-lm cannot adapt this model: {error}.") from error
        if config.federation.freeze_a:
            for module in model.modules():
                if "lora_a" in module:
                    module.freeze(recurse=False, keys=["lora_a"])
    if config.grad_checkpoint:
        for layer in layers:
            _checkpoint(layer)


def _check_keys(model: nn.Module, layers: list[nn.Module], keys: list[str] | None) -> None:
    if keys is None:
        return
    if not keys:
        raise AdapterError(
            "lora_parameters.keys is empty, so that nothing is trained: leave it out for all "
            "linear layers."
        )
    known = {name for layer in layers for name, _ in layer.named_modules() if name}
    known |= {name for name, _ in model.named_modules() if name}
    for key in keys:
        if key not in known:
            within = {name for layer in layers for name, _ in layer.named_modules() if name}
            raise AdapterError(
                f"lora_parameters.keys names {key!r}, which no layer has. "
                f"Did you mean {nearest(str(key), within)!r}?"
            )


def _checkpoint(layer: nn.Module) -> None:
    """Lets one layer compute its activations again in the backward pass, rather than keep them.

    mlx-lm changes the layer's class, and so all models of the process, and the dropout of its
    backward pass is another than that of the forward pass. Here both draw from the same key.
    """
    kind = type(layer)
    call: Callable[..., Any] = kind.__call__

    def checkpointed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keys, training = drawn_from(), self.training
        if keys is None:  # evaluation, which has no backward pass
            return call(self, *args, **kwargs)

        def inner(parameters: dict, key: mx.array, *args: Any, **kwargs: Any) -> Any:
            # The backward pass comes here again when the step has put back what was there.
            before, mode = self.trainable_parameters(), self.training
            self.update(parameters)
            self.train(training)
            try:
                with drawing_from(Keys(mx.stop_gradient(key))) as inside:
                    return call(self, *args, **kwargs), inside.state
            finally:
                self.update(before)
                self.train(mode)

        inputs = self.trainable_parameters(), keys.state
        output, keys.state = mx.checkpoint(inner)(*inputs, *args, **kwargs)
        return output

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": checkpointed})


def start_from(model: nn.Module, path: Path) -> None:
    """Loads adapters that were trained before.

    Raises:
        AdapterError: If the file cannot be read or does not fit.
    """
    own = dict(tree_flatten(model.parameters()))
    try:
        arrays: Any = mx.load(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"Cannot read resume_adapter_file {path}: {error}") from error
    for name, array in arrays.items():
        if name not in own or own[name].shape != array.shape:
            expected = own[name].shape if name in own else "none of that name"
            raise AdapterError(
                f"{path} has {name!r} of shape {array.shape}, the model {expected}: was it trained "
                "with the same lora_parameters and num_layers?"
            )
    model.load_weights(list(arrays.items()), strict=False)


def save(model: nn.Module, folder: Path, config: LoraConfig) -> Path:
    """Writes ``adapters.safetensors`` and ``adapter_config.json``, as mlx-lm does.

    Each file takes the place of another of its name whole or not at all.

    Raises:
        OSError: If one cannot be written.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    arrays: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    if config.fine_tune_type != "full":  # frozen ones too: FFA-LoRA's A
        whole: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        arrays = {n: array for n, array in whole.items() if n.rsplit(".", 1)[-1] in _LEAVES}
    # Through a file of Python's, whose errors say what was wrong.
    with replacing(target / "adapters.safetensors") as part, part.open("wb") as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"})
    text = json.dumps(config.for_mlx_lm(), indent=4, sort_keys=True) + "\n"
    with replacing(target / "adapter_config.json") as part:
        part.write_text(text, encoding="utf-8")
    return target
