"""Adapters (LoRA, DoRA) or full layers of a base model, and their folder in mlx-lm's format."""

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
"""mlx-lm's names of an adapter's arrays."""
FULL_ON_QUANTIZED = (
    "fine_tune_type full trains the layers' own weights, and those of this base model are "
    "quantized: use lora or dora, or a base model that is not quantized."
)


class AdapterError(FedError):
    """Adapters that do not fit the base model."""


def attach(model: nn.Module, config: LoraConfig) -> None:
    """Adds the configuration's adapters to a frozen base model, or unfreezes its layers.

    Raises:
        AdapterError: If the model has fewer layers, no layer with a key's name, or quantized
            layers with ``fine_tune_type: full``.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = model.layers
    if config.num_layers > len(layers):
        raise AdapterError(
            f"num_layers is {config.num_layers}, and the model has {len(layers)} layers: -1 is all."
        )
    trained_layers = layers[-max(config.num_layers, 0) :]
    if config.fine_tune_type == "full":
        for layer in trained_layers:
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
                if _is_adapter(module):
                    module.freeze(recurse=False, keys=["lora_a"])
    if config.grad_checkpoint:
        for layer in layers:
            _checkpoint(layer)


def _arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    arrays: Any = tree_flatten(module.parameters())
    return arrays


def with_full_keys(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """LoRA parameters with full names of modules as keys, as mlx-lm needs them.

    A key may be the end of names and selects all of them: ``q_proj`` is ``self_attn.q_proj``.

    Raises:
        AdapterError: If the list of keys is empty, or no module's name ends with a key.
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
    layer_names = {name for name, _ in modules}
    all_names = {name for name, _ in model.named_modules() if name}
    layer_modules = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    other_names = {
        name for name, module in model.named_modules() if id(module) not in layer_modules
    }
    full = []
    for key in map(str, keys):
        exact = {key} & (layer_names | all_names)
        ends = ({n for n in names if n.endswith(f".{key}")} for names in (layer_names, other_names))
        names = next(filter(None, (exact, *ends)), None)
        if names is None:
            raise AdapterError(
                f"lora_parameters.keys names {key!r}, which no layer has. "
                f"Did you mean {nearest(key, layer_names)!r}?"
            )
        full += sorted(names)
    return {**config.lora_parameters, "keys": full}


def adapted_modules(model: nn.Module) -> list[str]:
    """Names of the modules with adapters; of modules in layers, the name within the layer."""
    layer_modules = {id(module) for layer in model.layers for _, module in layer.named_modules()}
    names = {
        n for layer in model.layers for n, module in layer.named_modules() if _is_adapter(module)
    }
    other_names = {
        n for n, m in model.named_modules() if _is_adapter(m) and id(m) not in layer_modules
    }
    return sorted(names | other_names)


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module has a LoRA or DoRA adapter."""
    return "lora_a" in module


def _checkpoint(layer: nn.Module) -> None:
    """Gradient checkpointing of one layer: the backward pass computes its activations again.

    mlx-lm's function changes the layer's class, and so all models of the process, and the dropout
    masks of its backward pass differ from those of the forward pass. Here both use the same key.
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


def load_adapters(
    model: nn.Module, path: Path, config: LoraConfig, note: Callable[[str], None]
) -> None:
    """Loads trained adapters.

    Args:
        model (nn.Module): A model after :func:`attach`.
        path (Path): The file of adapters. The ``adapter_config.json`` in the same folder must
            have the configuration's values.
        config (LoraConfig): The configuration.
        note (callable): Called with a note if the adapters' scale is unknown.

    Raises:
        AdapterError: If a file cannot be read or does not fit.
    """
    try:
        arrays: Any = mx.load(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"Cannot read resume_adapter_file {path}: {error}") from error
    config_path = path.with_name(_CONFIG)
    if config_path.exists():
        _check_adapter_config(model, config_path, config)
    elif config.fine_tune_type != "full":
        note(
            f"there is no {_CONFIG} beside {path}, so that the scale it was trained with is not "
            f"known: it is taken to be {config.lora_parameters['scale']}."
        )
    expected_shapes = {name: array.shape for name, array in _adapter_arrays(model, config).items()}
    file_shapes = {name: array.shape for name, array in arrays.items()}
    for name in sorted(expected_shapes.keys() | file_shapes.keys()):
        if expected_shapes.get(name) != file_shapes.get(name):
            theirs, ours = (
                f"of shape {shapes[name]}" if name in shapes else "none of that name"
                for shapes in (file_shapes, expected_shapes)
            )
            raise AdapterError(
                f"{path} does not fit: of {name!r} it has {theirs}, the model {ours}. Was it "
                "trained with the same fine_tune_type, lora_parameters and num_layers?"
            )
    model.load_weights(list(arrays.items()), strict=False)


def _check_adapter_config(model: nn.Module, path: Path, config: LoraConfig) -> None:
    """Compares the keys that an adapter_config.json has with the configuration."""
    try:
        config_of_file = json.loads(path.read_text(encoding="utf-8"))
        config_of_file |= config_of_file.get("lora_parameters") or {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"Cannot read {path}, beside resume_adapter_file: {error}") from error
    parameters = config.lora_parameters
    expected_config: dict[str, Any] = {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
    }
    if config.fine_tune_type != "full":
        expected_config |= {"rank": parameters["rank"], "scale": parameters["scale"]}
        if isinstance(
            config_of_file.get("keys"), list
        ):  # mlx-lm passes over those that no layer has
            modules = (module.named_modules() for module in (model, *model.layers))
            module_names = {name for names in modules for name, _ in names}
            expected_config["keys"], config_of_file["keys"] = (
                adapted_modules(model),
                sorted(module_names & {*config_of_file["keys"]}),
            )
    for key, value in expected_config.items():
        file_value = config_of_file.get(key, value)
        if key == "num_layers" and -1 in (file_value, value):
            file_value, value = (len(model.layers) if n == -1 else n for n in (file_value, value))
        if file_value != value:
            raise AdapterError(
                f"The adapters of resume_adapter_file were trained with {key} {file_value} "
                f"({path}), and the configuration has {value}: set the same, or start without them."
            )


def save(model: nn.Module, folder: Path, config: LoraConfig) -> Path:
    """Writes ``adapters.safetensors`` and ``adapter_config.json`` in mlx-lm's format.

    Each file is replaced atomically.

    Raises:
        OSError: If one cannot be written.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    arrays = _adapter_arrays(model, config)
    # A Python file, whose errors name the cause.
    with atomic_write(target / "adapters.safetensors") as temporary, temporary.open("wb") as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"})
    adapter_config = config.for_mlx_lm()
    if config.fine_tune_type != "full":
        adapter_config["lora_parameters"] = with_full_keys(model, config)
    text = json.dumps(adapter_config, indent=4, sort_keys=True) + "\n"
    with atomic_write(target / _CONFIG) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _adapter_arrays(model: nn.Module, config: LoraConfig) -> dict[str, mx.array]:
    """The arrays of an adapter file, by name."""
    if config.fine_tune_type == "full":
        parameters: Any = tree_flatten(model.trainable_parameters())
        return dict(parameters)
    # Frozen ones too: FFA-LoRA's A.
    return {name: array for name, array in _arrays(model) if name.rsplit(".", 1)[-1] in _LEAVES}
