"""Real processes for the tests: started with a fixture, and ended by it whatever happens."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MNIST = ROOT.parent / "shared" / "data" / "mnist"


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A process with its output in a file."""

    def __init__(self, command: list[str], output: Path, cwd: Path, env: dict[str, str]):
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def line(self, pattern: str, timeout: float = 60) -> re.Match:
        """Waits until the output has the pattern."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.text):
                return found
            if self.process.poll() is not None and not re.search(pattern, self.text):
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} is not in the output:\n{self.text}")

    def ends(self, timeout: float = 60) -> int:
        """The exit code, once the process has ended by itself."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text}") from None

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded datasets of the tests stay out of the user's cache; processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_FED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a Python command in the repository, such as ``start("server.py", "--port", "0")``."""
    yield from starting(tmp_path)


def starting(folder: Path) -> Iterator[Callable[..., Started]]:
    """What starts processes, whose output goes to the folder; in the end it ends them."""
    started: list[Started] = []

    def start(*arguments: object, cwd: Path = ROOT, **env: str) -> Started:
        command = [sys.executable, *map(str, arguments)]
        output = folder / f"output-{len(started)}.txt"
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "100", **env}
        started.append(Started(command, output, cwd, environment))
        return started[-1]

    yield start
    for process in started:
        process.end()


def python(code: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, in which nothing is imported yet."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_FED_BLAS"} | env
    command = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


class Ended(NamedTuple):
    """What came of a command: its exit code, and all that it printed."""

    code: int
    text: str


def command(*arguments: object, columns: int = 100) -> Ended:
    """Runs ``mlx-fed`` in this process, which spares seconds of imports."""
    from typer.testing import CliRunner

    from mlx_fed.cli.main import app

    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    if not isinstance(result.exception, (SystemExit, type(None))):
        raise result.exception  # what a process would show as a traceback
    return Ended(result.exit_code, result.output)


@pytest.fixture
def little_room() -> Iterator[None]:
    """Files of this process may have 64 KiB."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def mnist() -> Path:
    """The folder with the full MNIST as parquet, where there is one."""
    if not MNIST.is_dir():
        pytest.skip("needs the full MNIST in ../shared/data/mnist")
    return MNIST


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model of a few thousand parameters."""
    from .helpers.tiny_llama import write_model

    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Many different programs, each run a few times, are not worth compiling.

    A machine that has not run them before calls its C++ compiler for half a second or more for
    each piece. Processes that are started do without as well.
    """
    import mlx.core as mx

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DISABLE_COMPILE", "1")
        mx.disable_compile()
        yield
        mx.enable_compile()
