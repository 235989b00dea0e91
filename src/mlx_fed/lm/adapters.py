"""What is trained of a base model, and the folder that mlx-lm reads it from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..arrays.randomness import Keys, current_keys, draw_keys_from
from ..errors import FedError
from ..system.atomic_files import atomic_write
from .config import LoraConfig, nearest

FOLDER = "adapters"
_CONFIG = "adapter_config.json"
_LEAVES = ("lora_a", "lora_b", "m")
"""What mlx-lm calls the arrays of an adapter."""
FULL_ON_QUANTIZED = (
    "fine_tune_type full trains the layers' own weights, and those of this base model are "
    "quantized: use lora or dora, or a base model that is not quantized."
)


class AdapterError(FedError):
    """Adapters that the base model has no place for."""


def attach(model: nn.Module, config: LoraConfig) -> None:
    """Makes what the configuration asks for trainable in a frozen base model.

    Raises:
        AdapterError: If the model has not so many layers, none of the name that a key gives, or
            quantized ones that are to be trained as a whole.
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
            if not all(mx.issubdtype(a.dtype, mx.floating) for _, a in _arrays(layer)):
                raise AdapterError(FULL_ON_QUANTIZED)
    else:
        parameters = with_full_keys(model, config)
        use_dora = config.fine_tune_type == "dora"
        try:
            linear_to_lora_layers(model, config.num_layers, parameters, use_dora)
        except ValueError as error:
            raise AdapterError(f"mlx-lm cannot adapt this model: {error}.") from error
        if config.federation.freeze_a:
            for module in model.modules():
                if _is(module):
                    module.freeze(recurse=False, keys=["lora_a"])
    if config.grad_checkpoint:
        for layer in layers:
            _checkpoint(layer)


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    arrays: Any = tree_flatten(module.parameters())
    return arrays


def with_full_keys(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """The LoRA parameters, their keys names of modules as mlx-lm looks for them.

    A key may be the end of names, all of which it means then: ``q_proj`` is ``self_attn.q_proj``.

    Raises:
        AdapterError: If there are no keys at all, or one that no module's name ends with.
    """
    keys = config.lora_parameters.get("keys")
    if keys is None:
        return config.lora_parameters
    if not keys:
        raise AdapterError(
            "lora_parameters.keys is empty, so that nothing is trained: leave it out for all "
            "linear layers."
        )
    layers = model.layers[-max(config.num_layers, 0) :]
    modules = [(name, module) for layer in layers for name, module in layer.named_modules() if name]
    within = {name for name, _ in modules}
    everywhere = {name for name, _ in model.named_modules() if name}
    inside = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    outside = {name for name, module in model.named_modules() if id(module) not in inside}
    full = []
    for key in map(str, keys):
        exact = {key} & (within | everywhere)
        ends = ({n for n in names if n.endswith(f".{key}")} for names in (within, outside))
        names = next(filter(None, (exact, *ends)), None)
        if names is None:
            raise AdapterError(
                f"lora_parameters.keys names {key!r}, which no layer has. "
                f"Did you mean {nearest(key, within)!r}?"
            )
        full += sorted(names)
    return {**config.lora_parameters, "keys": full}


def adapted(model: nn.Module) -> list[str]:
    """The names of adapted modules, in the layers by their names in a layer."""
    inside = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    names = {n for layer in model.layers for n, module in layer.named_modules() if _is(module)}
    outside = {n for n, m in model.named_modules() if _is(m) and id(m) not in inside}
    return sorted(names | outside)


def _is(module: nn.Module) -> bool:
    """Whether a module is an adapter."""
    return "lora_a" in module


def _checkpoint(layer: nn.Module) -> None:
    """Lets one layer compute its activations again in the backward pass, rather than keep them.

    mlx-lm changes the layer's class, and so all models of the process, and the dropout of its
    backward pass is another than that of the forward pass. Here both draw from the same key.
    """
    kind = type(layer)
    call: Callable[..., Any] = kind.__call__

    def checkpointed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keys, training = current_keys(), self.training
        if keys is None:  # evaluation, which has no backward pass
            return call(self, *args, **kwargs)

        def inner(parameters: dict, key: mx.array, *args: Any, **kwargs: Any) -> Any:
            # The backward pass comes here again when the step has put back what was there.
            before, mode = self.trainable_parameters(), self.training
            self.update(parameters)
            self.train(training)
            try:
                with draw_keys_from(Keys(mx.stop_gradient(key))) as inside:
                    return call(self, *args, **kwargs), inside.state
            finally:
                self.update(before)
                self.train(mode)

        inputs = self.trainable_parameters(), keys.state
        output, keys.state = mx.checkpoint(inner)(*inputs, *args, **kwargs)
        return output

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": checkpointed})


def start_from(
    model: nn.Module, path: Path, config: LoraConfig, note: Callable[[str], None]
) -> None:
    """Loads adapters that were trained before.

    Args:
        model (nn.Module): A model with adapters, as :func:`attach` leaves it.
        path (Path): The file of adapters. What the ``adapter_config.json`` beside it says of how
            they were trained has to be what the configuration says.
        config (LoraConfig): How they are to be trained now.
        note (callable): Told if the scale that they were trained with is not known.

    Raises:
        AdapterError: If a file cannot be read or does not fit.
    """
    try:
        arrays: Any = mx.load(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"Cannot read resume_adapter_file {path}: {error}") from error
    beside = path.with_name(_CONFIG)
    if beside.exists():
        _check_trained_so(model, beside, config)
    elif config.fine_tune_type != "full":
        note(
            f"there is no {_CONFIG} beside {path}, so that the scale it was trained with is not "
            f"known: it is taken to be {config.lora_parameters['scale']}."
        )
    needed = {name: array.shape for name, array in _trained(model, config).items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    for name in sorted(needed.keys() | shapes.keys()):
        if needed.get(name) != shapes.get(name):
            theirs, ours = (
                f"of shape {known[name]}" if name in known else "none of that name"
                for known in (shapes, needed)
            )
            raise AdapterError(
                f"{path} does not fit: of {name!r} it has {theirs}, the model {ours}. Was it "
                "trained with the same fine_tune_type, lora_parameters and num_layers?"
            )
    model.load_weights(list(arrays.items()), strict=False)


def _check_trained_so(model: nn.Module, path: Path, config: LoraConfig) -> None:
    """Compares what an adapter_config.json says, as far as it does, with the configuration."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        before |= before.get("lora_parameters") or {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"Cannot read {path}, beside resume_adapter_file: {error}") from error
    parameters = config.lora_parameters
    now: dict[str, Any] = {"fine_tune_type": config.fine_tune_type, "num_layers": config.num_layers}
    if config.fine_tune_type != "full":
        now |= {"rank": parameters["rank"], "scale": parameters["scale"]}
        if isinstance(before.get("keys"), list):  # mlx-lm passes over those that no layer has
            modules = (module.named_modules() for module in (model, *model.layers))
            known = {name for names in modules for name, _ in names}
            now["keys"], before["keys"] = adapted(model), sorted(known & {*before["keys"]})
    for key, ours in now.items():
        theirs = before.get(key, ours)
        if key == "num_layers" and -1 in (theirs, ours):
            theirs, ours = (len(model.layers) if n == -1 else n for n in (theirs, ours))
        if theirs != ours:
            raise AdapterError(
                f"The adapters of resume_adapter_file were trained with {key} {theirs} ({path}), "
                f"and the configuration has {ours}: set the same, or start without them."
            )


def save(model: nn.Module, folder: Path, config: LoraConfig) -> Path:
    """Writes ``adapters.safetensors`` and ``adapter_config.json``, as mlx-lm does.

    Each file takes the place of another of its name whole or not at all.

    Raises:
        OSError: If one cannot be written.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    arrays = _trained(model, config)
    # Through a file of Python's, whose errors say what was wrong.
    with atomic_write(target / "adapters.safetensors") as part, part.open("wb") as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"})
    known = config.for_mlx_lm()
    if config.fine_tune_type != "full":
        known["lora_parameters"] = with_full_keys(model, config)
    text = json.dumps(known, indent=4, sort_keys=True) + "\n"
    with atomic_write(target / _CONFIG) as part:
        part.write_text(text, encoding="utf-8")
    return target


def _trained(model: nn.Module, config: LoraConfig) -> dict[str, mx.array]:
    """The arrays that a file of adapters has, by name."""
    if config.fine_tune_type == "full":
        trained: Any = tree_flatten(model.trainable_parameters())
        return dict(trained)
    # Frozen ones too: FFA-LoRA's A.
    return {name: array for name, array in _arrays(model) if name.rsplit(".", 1)[-1] in _LEAVES}
