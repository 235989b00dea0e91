"""Strategies by name, built from arguments that are checked first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from ..errors import SettingsError
from ..settings_check import FINITE, SHARE, WHOLE, Kind, whole_number
from ..task_settings import kebab_case, nearest
from . import strategies


def find(strategy: Strategy | str | type | None = None, min_nodes: int = 2) -> Strategy:
    """The strategy of a run: one, or one of Flower's by its name.

    Args:
        strategy (Strategy or str, optional): Default: ``"FedAvg"``.
        min_nodes (int): Nodes that one which is made here waits for. Default: ``2``.

    Raises:
        SettingsError: If there is none of that name, it is no strategy, or its shares of nodes
            are none.
    """
    if strategy is None or isinstance(strategy, str):
        return make_by_name(strategy or "FedAvg", min_nodes)
    if not isinstance(strategy, Strategy):
        kind = strategy if isinstance(strategy, type) else type(strategy)
        hint = f": write {kind.__name__}()" if isinstance(strategy, type) else ""
        if kind.__module__.startswith("flwr.server."):
            hint = (
                ". It is of an older version of Flower's strategies: write from "
                f"flwr.serverapp.strategy import {kind.__name__}, whose arguments have new names "
                "(fraction_train for fraction_fit)"
            )
        raise SettingsError(
            f"strategy is one of flwr.serverapp.strategy, or its name, not {strategy!r}{hint}."
        )
    for layer in strategies.layers(strategy):
        for name in strategies.FRACTIONS:
            if (share := getattr(layer, name, None)) is not None:
                SHARE.check(type(layer).__name__, name, share)
    return strategy


def by_name(name: str) -> type[Strategy]:
    """The class of one of Flower's strategies.

    Raises:
        SettingsError: If there is none of that name.
    """
    kind = getattr(flower, name, None)
    if isinstance(kind, type) and issubclass(kind, Strategy):
        return kind
    names = [
        class_name
        for class_name in flower.__all__
        if class_name.startswith(("Bulyan", "Fed", "Krum", "Multi", "QFed"))
        and "Xgb" not in class_name
    ]
    suggestion = nearest(name, names)
    hint = f"Did you mean {suggestion}?" if suggestion else f"It has {', '.join(names)}."
    raise SettingsError(f"Flower has no strategy {name!r}. {hint}")


def make_by_name(
    name: str, min_nodes: int, options: Mapping[str, Any] = MappingProxyType({}), source: str = "-s"
) -> Strategy:
    """One of Flower's strategies, which waits for ``min_nodes`` unless its arguments say more.

    Raises:
        SettingsError: If there is none of that name, or it does not take the arguments.
    """
    maker = by_name(name)
    arguments, _ = arguments_of(maker)
    limits = {limit: min_nodes for limit in strategies.LEAST_NODES if limit in arguments}
    return make(maker, {**kebab_case(limits), **kebab_case(options, source)}, source=source)


def make(
    maker: Callable[..., Any], options: Mapping[str, Any], name: str = "", source: str = "-s"
) -> Strategy:
    """A strategy, made with arguments in kebab-case or snake_case.

    Args:
        maker (callable): A strategy's class, or a function that makes one.
        options (dict): Its arguments.
        name (str, optional): What it is called in messages. Default: its own name.
        source (str): Where the arguments are set, for messages.

    Raises:
        SettingsError: If it has no such argument, or does not take the value.
    """
    name = name or getattr(maker, "__name__", repr(maker))
    annotations, takes_any = arguments_of(maker)
    arguments = {}
    for key, value in kebab_case(options, source).items():
        argument = key.replace("-", "_")
        if argument not in annotations and not takes_any:
            names = sorted(argument.replace("_", "-") for argument in annotations) or ["none"]
            suggestion = nearest(key, names)
            hint = f"Did you mean {suggestion}?" if suggestion else f"It has {', '.join(names)}."
            raise SettingsError(f"{source}: {name} has no argument {key}. {hint}")
        if kind := _kind_of(argument, annotations.get(argument)):
            kind.check(source, key, value)
        arguments[argument] = value
    try:
        strategy = maker(**arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"Cannot make the strategy {name!r}: {error}") from error
    if not isinstance(strategy, Strategy):
        raise SettingsError(f"{name!r} gave a {type(strategy).__name__}, not a Flower strategy.")
    return find(strategy, 1)


def arguments_of(maker: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Arguments of a strategy's class with their annotations, and whether it takes any other.

    Arguments that a class hands on with ``**kwargs`` are its parents'.
    """
    makers: list[Any] = [maker]
    if isinstance(maker, type):
        makers = [vars(kind).get("__init__") for kind in maker.__mro__[:-1]]
    annotations: dict[str, Any] = {}
    for function in filter(None, makers):
        parameters = list(inspect.signature(function).parameters.values())[
            isinstance(maker, type) :
        ]
        kinds = {parameter.kind for parameter in parameters}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                annotations.setdefault(parameter.name, parameter.annotation)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return annotations, False
    return annotations, True


def _kind_of(argument: str, annotation: Any) -> Kind | None:
    """Kind of an argument's values, if its name or annotation has one."""
    if argument in strategies.FRACTIONS:
        return SHARE
    if argument in strategies.LEAST_NODES:
        return whole_number(0)
    return {"int": WHOLE, "float": FINITE}.get(getattr(annotation, "__name__", annotation))
