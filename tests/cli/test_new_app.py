"""The names that a new app may have: a module's for Python, a project's for Flower and uv."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files
from packaging.requirements import Requirement

from mlx_fed import FedError
from mlx_fed.cli.new_app import write_app


@pytest.mark.parametrize("name", ["a", "my_app", "my__app", "App2", "x" * 32])
def test_a_new_app_has_a_name_that_flower_takes(name: str, tmp_path: Path):
    folder = write_app(name, tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    build_fab_from_files(files)
    project = tomllib.loads(files["pyproject.toml"].decode())["project"]["name"]
    assert Requirement(project).name == project
    compile(files[f"{name}.py"], name, "exec")


@pytest.mark.parametrize(
    "name",
    ["", "_app", "my_app_", "my-app", "my app", "1app", "class", "\u00e4pp", "x" * 33, "a\n"],
)
def test_other_names_are_refused(name: str, tmp_path: Path):
    with pytest.raises(FedError, match=r"is not valid as the name.*such as my_app"):
        write_app(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
