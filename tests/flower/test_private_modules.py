"""The list of Flower's private modules in ``mlx_fed.flower``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mlx_fed
from mlx_fed import flower

ROOT = Path(mlx_fed.__file__).parent
PUBLIC = {"flwr.app", "flwr.serverapp"}


def private_modules(path: Path) -> set[str]:
    """The private modules of Flower that a file imports; ``flwr.proto`` stands for all in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    private = {name for name in names if name.partition(".")[0] == "flwr"} - PUBLIC
    return {"flwr.proto" if name.startswith("flwr.proto.") else name for name in private}


def test_the_list_of_private_modules_is_what_is_imported():
    listed = re.findall(r"^    ``(flwr[\w.]*)``:", flower.__doc__, re.MULTILINE)
    imported = set().union(*(private_modules(path) for path in (ROOT / "flower").rglob("*.py")))
    assert sorted(listed) == sorted(imported)
