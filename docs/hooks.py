"""Hooks of MkDocs: the reference of the commands, and links to files outside of docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
import typer

REPOSITORY = "https://github.com/mlx-fed/mlx-fed/blob/main"
COMMANDS = "<!-- commands -->"
_COLUMNS = 88


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page's text with the commands in place of their marker, and links that the site has."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_sections()))
    depth = page.file.src_uri.count("/")
    outside = "../" * (depth + 1)
    return re.sub(rf"\]\({re.escape(outside)}(?!\.\./)", f"]({REPOSITORY}/", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A page's HTML without the roles of docstrings, and with the short names of their targets."""
    html = re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)
    return re.sub(r"<code>~(?:\w+\.)+(\w+)</code>", r"<code>\1</code>", html)


def command_sections() -> Iterator[str]:
    """Markdown of each command: a heading, and the help that ``--help`` prints."""
    from mlx_fed.cli.main import app

    yield from _sections(typer.main.get_command(app), "mlx-fed", None)


def _sections(command: Any, name: str, parent: click.Context | None) -> Iterator[str]:
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=_COLUMNS, max_content_width=_COLUMNS
    )
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for child_name in command.list_commands(context) if hasattr(command, "commands") else ():
        yield from _sections(command.commands[child_name], child_name, context)
