"""Every command of the README and of the tutorial's pages with several terminals.

Each ``bash`` block is one of the sessions below, in order; a block that a page gains without one
here fails the first test. Ports and folders are changed to what a test may use; what installs
something is tried by ``test_install.py``, and all other pages by ``test_docs.py``.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from .conftest import free_port

ROOT = Path(__file__).parent.parent
TERMINALS = ("1-digits", "5-two-macs")
README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / "docs/tutorial" / f"{page}.md").read_text() for page in TERMINALS)]
BLOCKS = [
    [line.strip() for line in block.strip().splitlines()]
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
]
OWN_TASK = re.search(r"```python\n(.*?)```", README, re.S).group(1)

INSTALLS = ("git clone", "./run.sh", "pip install", "python3 -m venv")
SESSIONS = {
    "three terminals": ["python3 server.py", "python3 client.py"],
    "two Macs": [
        "mlx-fed serve examples.mnist:task",
        "mlx-fed join examples.mnist:task",
        "mlx-fed nodes",
    ],
    "your own model": ["mlx-fed serve my_task:task", "mlx-fed join my_task:task"],
    "a thousand clients": ["mlx-fed simulate my_task:task"],
    "language models": ["mlx-fed lora serve", "mlx-fed lora join"],
}


def commands(*beginnings: str) -> list[str]:
    return [line for block in BLOCKS for line in block if line.startswith(beginnings)]


def test_every_command_is_tried_somewhere():
    known = (*INSTALLS, *(beginning for session in SESSIONS.values() for beginning in session))
    unknown = [line for block in BLOCKS for line in block if not line.startswith(known)]
    assert unknown == []
    assert all(commands(beginning) for beginning in known)


class Session:
    """Runs the README's commands with a port, a place for runs and the CPU of a test."""

    def __init__(self, start, cwd: Path, runs: Path):
        self.start, self.cwd, self.runs = start, cwd, runs
        self.port = free_port()

    def __call__(self, line: str):
        line = line.replace("--host 0.0.0.0", "--host 127.0.0.1 --secure")
        words = [word for word in shlex.split(line) if word != "--gpu"]
        serves = "serve" in words or "server.py" in words
        federation = ["--federation", str(self.runs / "federation")]
        if serves:
            words += ["--port", str(self.port), "--runs", str(self.runs)]
            words += federation if "--secure" in words else []
        elif "nodes" in words:
            words += federation
        elif "mlxfed-" not in line:
            words += ["--server", f"127.0.0.1:{self.port}"]
        if words[0] == "mlx-fed":
            words = ["-m", "mlx_fed", *words[1:]]
        elif words[0] == "python3":
            words = words[1:]
        return self.start(*words, cwd=self.cwd, MLX_FED_HOME=str(self.runs / "home"))


@pytest.mark.slow
def test_three_terminals(start, tmp_path):
    session = Session(start, ROOT, tmp_path / "runs")
    servers = commands("python3 server.py")
    clients = commands("python3 client.py")
    assert len(servers) == 1
    assert len(clients) == 3
    started = [session(line) for line in servers + clients]
    assert [process.ends(120) for process in started] == [0, 0, 0, 0], started[0].text


@pytest.mark.slow
def test_two_macs(start, tmp_path):
    session = Session(start, ROOT, tmp_path / "runs")
    (serve,) = commands("mlx-fed serve examples.mnist:task")
    (join,) = commands("mlx-fed join examples.mnist:task")
    server = session(serve)
    server.line("node-1 joins with:  .*\n")
    printed = re.findall(r"joins with:  (.*) (mlxfed-\S+)\n", server.text)
    assert [before for before, _ in printed] == [join.partition(" TOKEN")[0]] * 2
    said = []
    for line in commands("mlx-fed nodes"):
        done = session(line)
        assert done.ends() == 0, done.text
        said.append(done.text)
    assert "invited until" in said[0]
    assert "another-mac joins with:  mlx-fed join" in said[1]
    assert "The token of another-mac is revoked." in said[2]
    nodes = [session(join.replace("TOKEN", token)) for _, token in printed]
    assert server.ends(120) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]


@pytest.mark.slow
def test_your_own_model(start, tmp_path):
    (tmp_path / "my_task.py").write_text(OWN_TASK)
    (serve,) = commands("mlx-fed serve my_task:task")
    joins = commands("mlx-fed join my_task:task")
    assert len(joins) == 2
    assert len(OWN_TASK.splitlines()) <= 35
    session = Session(start, tmp_path, tmp_path / "runs")
    server = session(serve)
    nodes = [session(line) for line in joins]
    assert server.ends(60) == 0, server.text
    assert [node.ends() for node in nodes] == [0, 0]
    losses = [float(loss) for loss in re.findall(r"round \d.*?   loss (\S+)", server.text)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_thousand_clients(start, tmp_path):
    (tmp_path / "my_task.py").write_text(OWN_TASK)
    lines = commands(*SESSIONS["a thousand clients"])
    assert len(lines) == 2  # with that of the dashboard
    for line in lines:
        words = shlex.split(line)[1:]
        words += ["--dashboard-port", str(free_port())] if "--dashboard" in words else []
        run = start("-m", "mlx_fed", *words, "--runs", str(tmp_path / "runs"), cwd=tmp_path)
        assert run.ends(120) == 0, run.text
        losses = [float(loss) for loss in re.findall(r"round \d.*?   loss (\S+)", run.text)]
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_language_models(start, tmp_path):
    pytest.importorskip("mlx_lm")
    from .helpers import tiny_llama

    model = tiny_llama.write_model(tmp_path / "model")
    tiny_llama.write_texts(tmp_path / "my" / "texts", tiny_llama.lines("anna", 8), ["anna says"])
    (tmp_path / "lora.yaml").write_text(
        f"model: {model}\nnum_layers: 2\niters: 8\nfederation: {{rounds: 2, nodes: 1}}\n"
    )
    session = Session(start, tmp_path, tmp_path / "runs")
    server, node = (session(line) for line in commands(*SESSIONS["language models"]))
    assert server.ends(120) == 0, server.text
    assert node.ends() == 0, node.text
    assert "-texts joined" in server.text  # by its machine and its folder


@pytest.mark.slow
def test_run_sh_starts_what_is_set_up(tmp_path):
    """./run.sh with the environment of these tests in place of one that it would make."""
    import subprocess

    for line in commands("./run.sh"):
        words = shlex.split(line)
        assert words[0] == "./run.sh"
        if "mnist" in words:
            continue  # from the hub; test_mnist.py has it from a folder
        options = ["--port", str(free_port()), "--runs", str(tmp_path / "runs")]
        command = [sys.executable, "run.py", *words[1:], *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The model: " in done.stdout
