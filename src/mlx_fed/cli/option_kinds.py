"""Kinds of command-line options: values, counts, shares and ports, as typer checks them."""

from __future__ import annotations

from typing import Any

import typer


def option(metavar: str, help: str, default: str | bool = True, *names: str, **kwargs: Any) -> Any:
    """An option that takes a value.

    Args:
        metavar (str): The value's placeholder in the help.
        help (str): The option's line in the help.
        default (str or bool): The default value in words, where the help does not show it itself.
        names (str): The option's names. Default: that of the parameter.
        kwargs (dict): Of ``typer.Option``; ``panel`` is the option's heading in the help.
    """
    panel = kwargs.pop("panel", None)
    kwargs |= {"metavar": metavar, "help": help, "show_default": default}
    return typer.Option(*names, rich_help_panel=panel, **kwargs)


def count(help: str, default: str | bool = True, *, min: int = 1, **kwargs: Any) -> Any:
    """An option that takes a whole number."""
    return option("N", help, default, min=min, **kwargs)


def share(help: str, default: str | bool = True, **kwargs: Any) -> Any:
    """An option that takes a number from 0 to 1."""
    return option("SHARE", help, default, min=0, max=1, **kwargs)


def tcp_port(help: str) -> Any:
    """An option that takes a TCP port."""
    return option("PORT", help, min=0, max=65535)
