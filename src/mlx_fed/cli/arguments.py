"""Command-line arguments as objects: tasks and strategies by name, settings as text."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FedError
from ..task_settings import TracedConfig, nearest

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..task import TaskSource


def find_task(name: str) -> TaskSource:
    """The task ``module:task``, or the function of that name that returns one.

    Raises:
        FedError: If there is no such module or name.
    """
    task: TaskSource = _import(name, "a task", "examples.mnist:task")
    return task


def find_strategy(
    name: str, min_nodes: int, options: dict[str, Any], source: str = "-s"
) -> Strategy:
    """Flower's strategy of that name, or ``module:strategy``: an instance, or a function or class.

    Args:
        name (str): The name.
        min_nodes (int): Nodes that Flower's strategies wait for, unless their arguments set it.
        options (dict): The strategy's arguments.
        source (str): The option or key of the arguments, for messages.

    Raises:
        FedError: If there is no such strategy, or it does not accept the arguments.
    """
    from flwr.serverapp.strategy import Strategy

    from ..flower.log import silence_flower
    from ..rounds import named_strategies

    silence_flower()
    if ":" not in name:
        return named_strategies.make_by_name(name, min_nodes, options, source)
    strategy = _import(name, "a strategy", "my_app:strategy")
    if not isinstance(strategy, Strategy):
        return named_strategies.make(strategy, options, name, source)
    if options:
        raise FedError(
            f"{name!r} is a strategy already, with its arguments: leave out {', '.join(options)}."
        )
    return named_strategies.find(strategy, min_nodes)


def load_test(name: str | None, config: dict[str, Any]) -> Any:
    """Test examples that the function ``module:function`` returns for the settings.

    Raises:
        FedError: If there is no such function.
    """
    if name is None:
        return None
    return _import(name, "a function that gives test examples", "examples.mnist:central_test")(
        config
    )


def parse_settings(settings: list[str] | None, source: str = "-c") -> TracedConfig:
    """``{"learning-rate": 0.1}`` of ``["learning-rate=0.1"]``: numbers, true and false, or text,
    which may be in quotes: ``'"12"'``.

    Args:
        settings (list, optional): ``KEY=VALUE`` each; of a repeated key the last one counts.
        source (str): The option, for messages.

    Raises:
        FedError: If one is not KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise FedError(f"{setting!r} is not KEY=VALUE, such as learning-rate=0.1.")
        values[key] = _value(value)
    return TracedConfig(values, source)


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _import(name: str, kind: str, example: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise FedError(f"{name!r} does not name {kind}: it is MODULE:NAME, such as {example}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            if module_name.endswith(".py"):
                module_name = module_name.removesuffix(".py").strip("./").replace("/", ".")
                raise FedError(
                    f"{name!r} names a file: write the module, {module_name}:{attribute}."
                ) from error
            raise FedError(
                f"There is no module {module_name!r}, neither in {Path.cwd()} nor installed."
            ) from error
        raise
    if not hasattr(module, attribute):
        match = nearest(attribute, vars(module))
        hint = f" Did you mean {match}?" if match else ""
        raise FedError(f"The module {module_name!r} has no {attribute!r}.{hint}")
    return getattr(module, attribute)
