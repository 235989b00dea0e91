"""``mlx-fed init``: a new app that runs as it is, to be changed where it says so."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path

from ..errors import FedError

_TEMPLATES = {"app.py": "{name}.py", "pyproject.toml": "pyproject.toml", "README.md": "README.md"}
_NAME = r"[a-zA-Z]([a-zA-Z0-9_]{0,30}[a-zA-Z0-9])?"  # a module's, and a project's with "-" for "_"


def write_app(name: str, parent: Path) -> Path:
    """Writes the folder ``parent/name``.

    Raises:
        FedError: If the name is not a module's and a project's, or there is something of that
            name already.
    """
    if not re.fullmatch(_NAME, name) or keyword.iskeyword(name):
        raise FedError(
            f"{name!r} cannot be imported by Python or is no name for a project: use up to 32 "
            "letters, digits and, between them, '_', such as my_app."
        )
    folder = parent / name
    try:
        folder.mkdir()
    except OSError as error:
        raise FedError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    for template, target in _TEMPLATES.items():
        text = files(__package__).joinpath("templates", template).read_text(encoding="utf-8")
        path = folder / target.format(name=name)
        # Flower takes letters, digits and hyphens for an app's name, Python no hyphens.
        text = text.replace("{{project}}", name.replace("_", "-"))
        path.write_text(text.replace("{{name}}", name), encoding="utf-8")
    return folder
