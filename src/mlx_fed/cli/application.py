"""Typer applications of the project's commands: help by group of options, errors, Ctrl-C."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import click
import typer
from typer.core import TyperArgument, TyperCommand

from ..errors import FedError
from ..system.printable import printable

_NUMBERS = {click.IntRange: "whole number", click.FloatRange: "number"}


class Command(TyperCommand):
    """Command whose help lists its options by group, and whose errors are messages."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        assert self.callback is not None
        annotations = get_type_hints(inspect.unwrap(self.callback), include_extras=True)
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            if isinstance(parameter, TyperArgument):
                panel = "Arguments"
                # click 8.5 overwrites the help that typer 0.20 sets.
                parameter.help = parameter.help or annotations[parameter.name].__metadata__[0].help
            if entry := parameter.get_help_record(ctx):
                name, text = entry
                # typer escapes brackets for rich, and adds parentheses to texts of defaults.
                text = re.sub(
                    r"default: \((.*?)\)(?=[;\]])", r"default: \1", text.replace("\\[", "[")
                )
                groups.setdefault(panel, []).append((name, text))
        for name in sorted(groups, key=lambda name: (name != "Arguments", name != "Options")):
            with formatter.section(name):
                formatter.write_dl(groups[name])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for parameter in self.params:
            for kind, name in _NUMBERS.items():  # in messages: "'ten' is not a valid whole number"
                if isinstance(parameter.type, kind):
                    parameter.type.name = name
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


class App(typer.Typer):
    """Typer application of such commands.

    Args:
        help (str, optional): Its line in the help.
    """

    def __init__(self, help: str | None = None):
        super().__init__(
            help=help,
            no_args_is_help=True,
            add_completion=False,
            rich_markup_mode=None,
            suggest_commands=False,  # click suggests
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, cls=Command, **options)


_OF_A_NEW_RUN = ("--name", "--resume", "--weights", "--change")
"""Options that the command which resumes a run does not have, or has anew."""


def run_command(function: Callable[..., None], program: str | None = None) -> None:
    """Runs a function as the only command of a program, with the arguments in ``sys.argv``.

    Args:
        function (callable): The command.
        program (str, optional): The program's name in messages. Default: that of its file.
    """
    app = App()
    app.command()(function)
    app(prog_name=program)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Ends the process with a message and an exit code, in place of a traceback of our own code.

    - :class:`~mlx_fed.errors.FedError`: its text and its exit code.
    - Ctrl-C: one line with the command that resumes the run, and 130. SIGTERM: the same, and 143.
    - An exception of the user's code: its traceback, and 1.
    """
    sigterm_handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sigint_handler = signal.getsignal(signal.SIGINT)
    if sigint_handler is signal.SIG_DFL:  # so that imports end without a traceback
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except FedError as error:
        text = "\n".join(printable(line) for line in str(error).splitlines())
        typer.secho(f"Error: {text}", fg="red", err=True)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        typer.echo(_interruption(interrupt), err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as interrupt:
        if interrupt.code == 128 + signal.SIGTERM:
            typer.echo(_interruption(interrupt, "Stopped."), err=True)
        raise
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise  # click prints them
    except Exception as error:
        from ..tracebacks import user_traceback

        typer.echo(user_traceback(error), err=True)
        raise SystemExit(1) from error
    finally:
        signal.signal(signal.SIGTERM, sigterm_handler)
        signal.signal(signal.SIGINT, sigint_handler)


def _interruption(interrupt: BaseException, word: str = "Interrupted.") -> str:
    """The line after Ctrl-C or SIGTERM; :func:`~mlx_fed.monitoring.listeners.run_listeners` notes
    the folder of the run, if it has started."""
    for folder in getattr(interrupt, "__notes__", ()):
        return f"{word} To resume: {resume_command(folder, sys.argv)}"
    return word


def resume_command(folder: str, arguments: Sequence[str]) -> str:
    """The command line that resumes a run.

    Args:
        folder (str): The run's folder.
        arguments (list): The command line that started it, such as ``sys.argv``. The environment
            variable ``MLX_FED_COMMAND``, which ``run.py`` sets, has precedence.
    """
    program, *words = shlex.split(os.environ.get("MLX_FED_COMMAND", "")) or arguments
    name = Path(program).name
    command = ["mlx-fed"] if name == "__main__.py" else ["python3", name]
    command = command if name.endswith(".py") else [program if program.startswith("./") else name]
    options = iter(words)
    for word in options:
        if word in _OF_A_NEW_RUN:
            next(options, None)
        elif word.partition("=")[0] not in _OF_A_NEW_RUN:
            command.append(word)
    return shlex.join([*command, "--resume", folder])
