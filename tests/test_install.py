"""Setting up in fresh folders, as the README says, each in its own way. Run on request:

./test.sh -m install
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def make_venv(clone: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", str(clone / ".venv")], check=True)
    return str(clone / ".venv" / "bin" / "python")


def check(clone: Path, env: dict[str, str], python: str) -> None:
    """What was installed serves and joins: one round of the new app, in its own processes."""
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


def test_pip_with_requirements(clone, bare):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "install", "-q", "-r", "requirements.txt")
    check(clone, bare, python)


def test_pip_with_extras(clone, bare):
    python = make_venv(clone)
    run(clone, bare, python, "-m", "pip", "install", "-q", "-e", ".[cpu,digits]")
    check(clone, bare, python)


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


def test_poetry(clone, bare):
    poetry = shutil.which("poetry") or pytest.skip("needs Poetry")
    env = {**bare, "POETRY_VIRTUALENVS_IN_PROJECT": "true"}
    run(clone, env, poetry, "install", "--no-interaction", "--extras", "cpu digits")
    run(clone, env, poetry, "run", "python3", "-c", "import flwr")
    check(clone, env, str(clone / ".venv" / "bin" / "python"))
