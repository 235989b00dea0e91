"""Units for systemd and launchd, whose commands run as they are written."""

import configparser
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fed.fleet.service import ServiceError, install_service, service_command

from ..conftest import command

TASK = "tests.helpers.tasks:moons"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def read_unit(path: Path) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(path)
    return unit


def test_a_unit_runs_the_command_in_this_folder(home):
    run = command("service", "install", "node-1", "--", "join", TASK, "--node-id", 1, "-c", "a=b")
    assert run.code == 0, run.text
    path = home / ".config/systemd/user/mlx-fed-node-1.service"
    assert str(path) in run.text
    assert "systemctl --user enable --now mlx-fed-node-1" in run.text
    service = read_unit(path)["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[1:] == ["-m", "mlx_fed", "join", TASK, "--node-id", "1", "-c", "a=b"]
    assert service["WorkingDirectory"] == str(Path.cwd())
    assert service["RestartPreventExitStatus"] == "2 3 4"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_unit(home):
    path, _ = install_service("server", ["serve", TASK, "-c", 'odd=a "b" $c %d'], platform="linux")
    run = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_agent_of_launchd(home):
    path, (start,) = install_service("server", ["join", TASK], platform="darwin")
    assert path == home / "Library/LaunchAgents/mlx-fed.server.plist"
    agent = plistlib.loads(path.read_bytes())
    assert agent["ProgramArguments"][1:] == ["-m", "mlx_fed", "join", TASK]
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert start.startswith("launchctl bootstrap gui/")


def test_a_unit_is_its_owners_to_read(home):
    path, _ = install_service("node", ["join", TASK, "-c", "password=x"], platform="linux")
    assert path.stat().st_mode & 0o077 == 0
    path.unlink()
    path.symlink_to(home / "elsewhere")
    install_service("node", ["join", TASK], platform="linux")
    assert not (home / "elsewhere").exists()
    assert not path.is_symlink()


ODD = ["a b", 'a"b', "a'b", "a\\b", "a%db", "a$HOME", "a;b", "\u00e9", "--x=[1]", ""]


@pytest.mark.parametrize("word", ODD)
def test_odd_words_reach_the_command_as_they_are(word):
    """systemd's own quoting: C escapes, ``%%`` and ``$$``."""
    path, _ = install_service("node", ["join", TASK, "-c", word], platform="linux")
    line = read_unit(path)["Service"]["ExecStart"]
    words = [
        re.sub(r"\\(.)", r"\1", text).replace("%%", "%").replace("$$", "$")
        for text in re.findall(r'"((?:[^"\\]|\\.)*)"', line)
    ]
    assert words[1:] == ["-m", "mlx_fed", "join", TASK, "-c", word]


def test_the_environment_is_taken_as_it_is(monkeypatch):
    monkeypatch.setenv("MLX_FED_HOME", "/srv/$x 100%")
    path, _ = install_service("node", ["join", TASK], platform="linux")
    assert 'Environment="MLX_FED_HOME=/srv/$x 100%%"' in path.read_text()
    path, _ = install_service("node", ["join", TASK], platform="darwin")
    agent = plistlib.loads(path.read_bytes())
    assert agent["EnvironmentVariables"]["MLX_FED_HOME"] == "/srv/$x 100%"


@pytest.mark.parametrize("folder", ["a\nExecStartPre=evil", "ends\\", "ends "])
def test_a_folder_that_a_unit_cannot_name_is_refused(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(ServiceError):
        install_service("node", ["join", TASK], platform="linux")


@pytest.mark.parametrize("runs", ["runs", "other runs"])
def test_a_server_starts_its_run_and_resumes_it(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    options = [] if runs == "runs" else ["--runs", runs]
    shell, flag, text = service_command("study", ["serve", TASK, *options])
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    text = text.replace(shlex.quote(sys.executable), "./python")

    def words() -> str:
        run = subprocess.run([shell, flag, text], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    assert words().endswith("--name study")
    (tmp_path / runs / "study").mkdir(parents=True)
    (tmp_path / runs / "study" / "settings.json").write_text("{}")
    assert words().endswith("--resume study")
    if options:
        assert service_command("study", ["serve", TASK, f"--runs={runs}"])[2].count("settings.json")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("a", ["simulate", TASK], "`serve` or `join`"),
        ("a", ["serve", TASK, "--name", "b"], "Leave out --name"),
        ("a", ["serve", TASK, "--resume=b"], "Leave out --name"),
        ("../a", ["serve", TASK], "letters, digits"),
        ("a\n", ["serve", TASK], "letters, digits"),
        ("a", ["join", TASK, "-c", "a=b\nExecStartPre=/bin/evil"], "control characters"),
        ("a", ["join", TASK, "-c", "a=\x1b[2J"], "control characters"),
        ("a", ["join", TASK, "mlxfed-AbC"], "give @FILE"),
        ("a", ["join", TASK, "--token=mlxfed-AbC"], "give @FILE"),
    ],
)
def test_what_is_no_service_is_refused(name, arguments, words):
    with pytest.raises(ServiceError, match=words):
        install_service(name, arguments)
