"""mlx-lm's YAML file of a configuration, as keys and values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import FedError


class ConfigError(FedError):
    """An invalid configuration; the message names the key."""


def read(path: Path) -> dict[str, Any]:
    """Keys and values of a file.

    Raises:
        ConfigError: If it cannot be read, or is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Like mlx-lm's: ``1e-5`` is a number, in YAML 1.1 it is a text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} has no keys: it is a file such as mlx-lm's lora_config.yaml.")
    return values
