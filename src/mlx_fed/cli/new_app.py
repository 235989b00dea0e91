"""``mlx-fed init``: a new app from templates; it runs, and its comments say what to change."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path

from ..errors import FedError, os_errors

_TEMPLATES = {"app.py": "{name}.py", "pyproject.toml": "pyproject.toml", "README.md": "README.md"}
_NAME = r"[a-zA-Z]([a-zA-Z0-9_]{0,30}[a-zA-Z0-9])?"  # a module's; a project's with "-" for "_"


def write_app(name: str, parent: Path) -> Path:
    """New app in the folder ``parent/name``.

    Raises:
        FedError: If the name is not valid for a module and a project, or the folder exists.
    """
    if not re.fullmatch(_NAME, name) or keyword.iskeyword(name):
        raise FedError(
            f"{name!r} is not valid as the name of a Python module and a project: use up to 32 "
            "letters, digits and, between them, '_', such as my_app."
        )
    folder = parent / name
    with os_errors(FedError, f"Cannot create the folder {folder}"):
        folder.mkdir()
    for template, target in _TEMPLATES.items():
        text = files(__package__).joinpath("templates", template).read_text(encoding="utf-8")
        path = folder / target.format(name=name)
        # Flower allows letters, digits and hyphens in an app's name, Python no hyphens.
        text = text.replace("{{project}}", name.replace("_", "-"))
        path.write_text(text.replace("{{name}}", name), encoding="utf-8")
    return folder
