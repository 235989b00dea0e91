"""Units that let systemd or launchd start a server or a node, and start it again after a crash."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import FedError, os_errors
from . import private_files

_FINAL = (2, 3, 4)
"""Exit codes after which another start would end in the same way: see docs/reliability.md."""
_PAUSE = 10
"""Seconds before it is started again."""


class ServiceError(FedError):
    """A service that cannot be installed."""


def service_command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command that a service runs: a server resumes its run if there is one.

    Args:
        name (str): The service's, and a server's run's.
        arguments (list): Those of ``mlx-fed``: ``["serve", "MODULE:TASK", ...]`` or
            ``["join", "MODULE:TASK", ...]``.

    Raises:
        ServiceError: If they are neither, or name the run.
    """
    words = list(arguments)
    lm = words[:1] == ["lora"]
    verb = words[1:2] if lm else words[:1]
    if verb not in (["serve"], ["join"]):
        raise ServiceError(
            "A service runs `serve` or `join`: mlx-fed service install NAME -- serve MODULE:TASK."
        )
    command = [sys.executable, "-m", "mlx_fed", *words]
    if verb == ["join"]:
        return command
    if any(re.match(r"--(name|resume)\b", word) for word in words):
        raise ServiceError("Leave out --name and --resume: the service's name is the run's.")
    runs = "runs"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--runs":
            runs = following
        elif word.startswith("--runs="):
            runs = word.removeprefix("--runs=")
    settings_file = shlex.quote(str(Path(runs) / name / "settings.json"))
    text = (
        f"test -f {settings_file} && exec {shlex.join([*command, '--resume', name])} "
        f"|| exec {shlex.join([*command, '--name', name])}"
    )
    return ["/bin/sh", "-c", text]


def systemd_unit(name: str, command: Sequence[str], folder: Path, system: bool) -> str:
    """The text of a systemd unit.

    Args:
        name (str): The service's.
        command (list): Of :func:`service_command`.
        folder (Path): The working folder.
        system (bool): For the machine rather than for the user.
    """
    command_line = " ".join(_systemd_word(word.replace("$", "$$")) for word in command)
    environment = "".join(
        f"Environment={_systemd_word(f'{key}={value}')}\n" for key, value in _environment().items()
    )
    return f"""[Unit]
Description=mlx-fed {name}
Wants=network-online.target
After=network-online.target

[Service]
WorkingDirectory={str(folder).replace("%", "%%")}
ExecStart={command_line}
{environment}Restart=on-failure
RestartSec={_PAUSE}
RestartPreventExitStatus={" ".join(map(str, _FINAL))}
KillSignal=SIGTERM
TimeoutStopSec=60
NoNewPrivileges=true
UMask=0077

[Install]
WantedBy={"multi-user.target" if system else "default.target"}
"""


def launchd_plist(name: str, command: Sequence[str], folder: Path) -> bytes:
    """The property list of a launchd agent.

    launchd has no list of final exit codes: it starts the command again unless it ended with 0.

    Args:
        name (str): The service's.
        command (list): Of :func:`service_command`.
        folder (Path): The working folder, in which ``NAME.log`` is written.
    """
    log = str(folder / f"{name}.log")
    return plistlib.dumps(
        {
            "Label": f"mlx-fed.{name}",
            "ProgramArguments": [*command],
            "WorkingDirectory": str(folder),
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _PAUSE,
            "RunAtLoad": True,
            "StandardOutPath": log,
            "StandardErrorPath": log,
            "EnvironmentVariables": _environment(),
        }
    )


def install_service(
    name: str, arguments: Sequence[str], system: bool = False, platform: str = sys.platform
) -> tuple[Path, list[str]]:
    """Writes the unit of a service; the commands that start it are the user's to run.

    Args:
        name (str): The service's: letters, digits, ``-`` and ``_``.
        arguments (list): Those of ``mlx-fed``.
        system (bool): Under systemd for the machine rather than for the user.
        platform (str): As ``sys.platform``.

    Returns:
        tuple: The unit's file, and the commands that start the service.

    Raises:
        ServiceError: If the name or the arguments cannot be, or the file cannot be written.
        SecretFileError: If the file cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ServiceError(f"A service's name has letters, digits, - and _, not {name!r}.")
    command, folder = service_command(name, arguments), Path.cwd()
    _require_plain([*arguments, *_environment().values(), str(folder)])
    if str(folder).endswith(("\\", " ")):
        raise ServiceError(f"systemd cannot work in a folder of this name: {str(folder)!r}.")
    if platform == "darwin":
        path = Path.home() / "Library" / "LaunchAgents" / f"mlx-fed.{name}.plist"
        content = launchd_plist(name, command, folder)
        commands = [f"launchctl bootstrap gui/{os.getuid()} {shlex.quote(str(path))}"]
    else:
        base = Path("/etc/systemd/system") if system else Path.home() / ".config/systemd/user"
        path = base / f"mlx-fed-{name}.service"
        content = systemd_unit(name, command, folder, system).encode()
        scope = "systemctl" if system else "systemctl --user"
        commands = [f"{scope} daemon-reload", f"{scope} enable --now mlx-fed-{name}"]
        if not system:
            commands.append("loginctl enable-linger    # so that it runs while nobody is logged in")
    with os_errors(ServiceError, f"Cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        private_files.write(path, content)
    return path, commands


def _systemd_word(word: str) -> str:
    literal = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{literal}"'


def _environment() -> dict[str, str]:
    """What a service has of this process' environment."""
    names = ("MLX_FED_HOME", "MLX_FED_CACHE", "PYTHONPATH")
    values = {name: os.environ[name] for name in names if name in os.environ}
    return {**values, "PYTHONUNBUFFERED": "1"}


def _require_plain(words: Sequence[str]) -> None:
    """Refuses what would end a line of a unit, and secrets, which every user can read there."""
    for word in words:
        if not word.isprintable():
            raise ServiceError(f"A unit has no control characters: {word!r:.200}.")
        if "mlxfed-" in word:
            raise ServiceError(
                "All users of a machine can see a unit's command: write the token to a file that "
                "only you can read (chmod 600), and give @FILE."
            )
