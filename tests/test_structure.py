"""The package's folders, from the lowest: a module imports from its own folder and those before."""

import ast
import re
from pathlib import Path

import mlx_fed

ROOT = Path(mlx_fed.__file__).parent
LAYERS = [
    {"errors", "events", "tracebacks", "task_settings", "settings_check", "task"},
    {"system"},
    {"arrays"},
    {"transforms"},
    {"training", "data", "flower"},
    {"runs"},
    {"rounds"},
    {"privacy"},
    {"monitoring", "clientapp", "numpy_client"},
    {"fleet", "simulation", "lm", "serverapp"},
    {"cli"},
    {"__init__", "__main__"},
]
"""From the lowest. Folders of one layer do not import each other."""
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The files and folders directly in the package that a module imports from, late imports
    included; those for types alone (``if TYPE_CHECKING``) are not."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ("mlx_fed", *path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = tuple((node.module or "").split(".")) if node.module else ()
            above = package[: len(package) - node.level + 1] if node.level else ()
            whole = (*above, *module)
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                if whole[:1] == ("mlx_fed",) and (rest := (*whole, alias.name)[1:]):
                    names.add(rest[0] if rest[0] in LAYER_OF else "__init__")
    return names


def test_modules_import_from_their_own_layer_or_lower_ones():
    upward = []
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path) - {own}:
            is_lower = LAYER_OF[name] < LAYER_OF[own]
            if not is_lower and not (own in LAYERS[0] and name in LAYERS[0]):
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_flower_uses_arrays_and_errors_only():
    for path in (ROOT / "flower").glob("*.py"):
        assert imports(path) <= {"flower", "arrays", "errors", "tracebacks"}, path


def test_at_most_twelve_files_lie_directly_in_the_package():
    assert len([*ROOT.glob("*.py")]) <= 12


def test_no_test_file_imports_from_another():
    """What several need is in ``tests/helpers``."""
    for path in Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                is_ours = node.level or names[0] == "tests"
                assert not (is_ours and any(name.startswith("test_") for name in names)), path


def test_private_modules_of_flower_are_imported_in_one_folder():
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""] if node.level == 0 else []
            else:
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                is_private = module.split(".")[0] == "flwr" and not any(
                    f"{module}.".startswith(f"{name}.") for name in public
                )
                assert not is_private or path.parent == ROOT / "flower", f"{path}: {module}"


def test_every_module_has_a_docstring():
    for path in ROOT.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_contributing_names_files_that_exist():
    text = (ROOT.parents[1] / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([\w/]+\.py)`", text):
        places = (ROOT / name, ROOT.parents[1] / name, *ROOT.glob(f"*/{name}"))
        places = (*places, *(ROOT.parents[1] / "tests").glob(name))
        assert any(place.exists() for place in places), name
