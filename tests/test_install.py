"""Setting up in fresh folders, as the README says, each in its own way. Run on request:

./test.sh -m install
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A fresh clone of what is committed."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "mlx-fed")], check=True)
    return tmp_path / "mlx-fed"


@pytest.fixture
def bare() -> dict[str, str]:
    """An environment without this one's virtual environment."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    paths = inherited["PATH"].split(os.pathsep)
    kept = [path for path in paths if Path(path) != Path(sys.executable).parent]
    return {**inherited, "PATH": os.pathsep.join(kept)}


def run(clone: Path, env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_venv(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    return str(folder / ".venv" / "bin" / "python")


def check(clone: Path, env: dict[str, str], python: str) -> None:
    """What was installed is all that the example needs, MLX's backend and the digits included."""
    run(clone, env, python, "-c", "import flwr, mlx_fed; mlx_fed.Task; mlx_fed.serve")
    run(clone, env, python, "-m", "mlx_fed", "--version")
    script = "from examples.mnist import task; print(len(task({}).data(0, 3).train[0]))"
    assert run(clone, env, python, "-c", script).split()[-1] == "1333"


def test_run_sh(clone, bare):
    """On nothing but Python: makes .venv, installs, trains, and is quick the second time."""
    out = run(clone, bare, "./run.sh", "--port", "18231")
    assert "Making .venv" in out
    assert "The model: " in out
    again = run(clone, bare, "./run.sh", "--port", "18231", "--rounds", "1")
    assert "Installing" not in again


def test_test_sh(clone, bare):
    """In a folder with a space in its name, and from another than the repository's."""
    spaced = clone.rename(clone.parent / "a new folder")
    out = run(spaced.parent, bare, str(spaced / "test.sh"), "tests/arrays/test_randomness.py")
    assert "Making .venv" in out
    assert " passed" in out


def test_run_sh_after_uv(clone, bare):
    """uv makes an environment without pip; it is kept, and mended."""
    uv = shutil.which("uv") or pytest.skip("needs uv")
    run(clone, bare, uv, "venv", "-q", "--python", sys.executable, ".venv")
    out = run(clone, bare, "./run.sh", "--help")
    assert "Making .venv" not in out
    assert "--clients" in out


def test_run_sh_without_a_python(clone, bare, tmp_path):
    (tmp_path / "bin").mkdir()
    for command in ("bash", "cat", "cksum", "dirname", "tr"):
        (tmp_path / "bin" / command).symlink_to(shutil.which(command))
    env = {**bare, "PATH": str(tmp_path / "bin")}
    done = subprocess.run(["./run.sh"], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Python 3.11 or newer is needed: https://www.python.org/downloads/\n"


def test_pip_with_requirements(clone, bare):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "install", "-q", "-r", "requirements.txt")
    check(clone, bare, python)


def test_pip_with_extras(clone, bare):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "install", "-q", "-e", ".[cpu,digits]")
    check(clone, bare, python)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX needs no extra")
def test_without_an_extra_the_error_names_them(clone, bare):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "install", "-q", "-e", ".")
    command = [python, "client.py", "--node-id", "0"]
    done = subprocess.run(command, cwd=clone, env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: MLX has no backend here")
    assert 'pip install -e ".[cpu,digits]"' in said


def test_a_wheel_has_all_it_needs(clone, bare, tmp_path):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("*.whl")
    run(clone, bare, python, "-m", "pip", "install", "-q", f"{wheel}[cpu]")
    app = tmp_path / "elsewhere"
    app.mkdir()
    run(app, bare, python, "-m", "mlx_fed", "init", "my_app")
    assert (app / "my_app" / "my_app.py").exists()


def test_uv(clone, bare):
    uv = shutil.which("uv") or pytest.skip("needs uv")
    run(clone, bare, uv, "sync", "-q", "--extra", "cpu", "--extra", "digits")
    check(clone, bare, str(clone / ".venv" / "bin" / "python"))


def test_poetry(clone, bare, tmp_path):
    poetry = shutil.which("poetry") or pytest.skip("needs Poetry on PATH: pipx install poetry")
    if not has_json("https://pypi.org/pypi/flwr/1.42.0/json"):
        index = index_of_pip(make_venv(tmp_path), bare)
        source = f'name = "index"\nurl = "{index}"\npriority = "primary"'
        with (clone / "pyproject.toml").open("a") as pyproject:
            pyproject.write(f"\n[[tool.poetry.source]]\n{source}\n")
    env = {**bare, "POETRY_VIRTUALENVS_IN_PROJECT": "true"}
    run(clone, env, poetry, "install", "--no-interaction")
    run(clone, env, poetry, "run", "python3", "-c", "import flwr")
    run(clone, env, poetry, "install", "--no-interaction", "--extras", "cpu digits")
    check(clone, env, str(clone / ".venv" / "bin" / "python"))


def has_json(url: str) -> bool:
    """Poetry asks PyPI for the JSON of each version, which a mirror for pip may lack."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def index_of_pip(python: str, env: dict[str, str]) -> str:
    """The package index that pip is configured with, or PyPI's."""
    listed = run(Path.cwd(), env, python, "-m", "pip", "config", "list")
    found = re.search(r"\.index-url='([^']+)'", listed)
    return found.group(1) if found else "https://pypi.org/simple/"
