"""What commands are given: tasks and strategies by name, settings as text; and how they fail."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import typer

from ..errors import FedError
from ..task_settings import TracedConfig

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..task import TaskSource


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turns our errors into one message and their exit code, those of a task's own code into its
    traceback, and Ctrl-C into exit code 130.

    To be ended by SIGTERM is to end as cleanly: nodes and workers are told, and the terminal is
    left as it was.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except FedError as error:
        from ..system.printable import printable

        shown = "\n".join(printable(line) for line in str(error).splitlines())
        typer.secho(f"Error: {shown}", fg="red", err=True)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise SystemExit(130) from None
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise  # typer's own, which it shows itself
    except Exception as error:
        from ..tracebacks import user_traceback

        typer.echo(user_traceback(error), err=True)
        raise SystemExit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def find_task(name: str) -> TaskSource:
    """The task, or the function that makes one, of ``module:task``.

    Raises:
        FedError: If there is no such module or name.
    """
    found: TaskSource = _find(name, "a task", "examples.mnist:task")
    return found


def find_strategy(
    name: str, min_nodes: int, options: dict[str, Any], source: str = "-s"
) -> Strategy:
    """One of Flower's strategies by its name, or ``module:strategy``: one, or what makes one.

    Args:
        name (str): The name.
        min_nodes (int): Nodes that one of Flower's waits for, unless its arguments say more.
        options (dict): Its arguments.
        source (str): Where these are set, for messages.

    Raises:
        FedError: If there is no such strategy, or it does not take the options.
    """
    from flwr.serverapp.strategy import Strategy

    from ..flower.log import silence_flower
    from ..rounds import named_strategies

    silence_flower()
    if ":" not in name:
        return named_strategies.make_by_name(name, min_nodes, options, source)
    named = _find(name, "a strategy", "my_app:strategy")
    if not isinstance(named, Strategy):
        return named_strategies.make(named, options, name, source)
    if options:
        raise FedError(
            f"{name!r} is a strategy already, with its arguments: leave out {', '.join(options)}."
        )
    return named_strategies.find(named, min_nodes)


def find_test(name: str, config: dict[str, Any]) -> Any:
    """The held-out examples that ``module:function`` gives for the settings.

    Raises:
        FedError: If there is no such function.
    """
    return _find(name, "a function that gives test examples", "examples.mnist:central_test")(config)


def parse_settings(settings: list[str] | None, source: str = "-c") -> TracedConfig:
    """``{"learning-rate": 0.1}`` of ``["learning-rate=0.1"]``: numbers, true and false, or text.

    Args:
        settings (list, optional): As they stand on the command line; of one that stands there
            twice, the last.
        source (str): The option, for messages.

    Raises:
        FedError: If one is not KEY=VALUE.
    """
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise FedError(f"{setting!r} is not KEY=VALUE, such as learning-rate=0.1.")
        parsed[key] = _value(value)
    return TracedConfig(parsed, source)


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _find(name: str, what: str, example: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise FedError(f"{name!r} does not name {what}: it is MODULE:NAME, such as {example}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise FedError(
                f"There is no module {module_name!r}, neither in {Path.cwd()} nor installed."
            ) from error
        raise
    if not hasattr(module, attribute):
        raise FedError(f"The module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute)
