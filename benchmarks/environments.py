"""Virtual environments for peers whose requirements are not ours, in ``benchmarks/.venvs/``.

Made once with ``uv``, or with ``venv`` and ``pip`` where there is none, and again when the pins
change. MLX is pinned to the version that runs here.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"

MLX = f"mlx{'[cpu]' if sys.platform == 'linux' else ''}=={version('mlx')}"

REQUIREMENTS = {
    "pfl": ["pfl==0.6.0", MLX],
    "fedjax": ["fedjax==0.0.17", "jax==0.10.2", "dm-haiku==0.0.17"],
    "flower": ["flwr[simulation]==1.41.0", MLX],
}


class NotInstalled(Exception):
    """A peer's requirements that could not be installed, and why."""


def python_of(name: str) -> str:
    """The Python of an environment, which is made if need be.

    Raises:
        NotInstalled: If that fails.
    """
    folder = FOLDER / name
    python, pins = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS[name]) + "\n"
    if not (pins.exists() and pins.read_text() == wanted):
        print(f"Installing {' '.join(REQUIREMENTS[name])}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        if shutil.which("uv"):
            _run("uv", "venv", "--quiet", "--python", sys.executable, str(folder))
            install = ["uv", "pip", "install", "--quiet", "--python", str(python)]
        else:
            _run(sys.executable, "-m", "venv", str(folder))
            install = [str(python), "-m", "pip", "install", "--quiet"]
        _run(*install, *REQUIREMENTS[name])
        pins.write_text(wanted)
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NotInstalled(f"not installed: {reason[-1] if reason else command[0]}")
