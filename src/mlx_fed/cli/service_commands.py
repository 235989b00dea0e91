"""``mlx-fed service``: servers and nodes that systemd or launchd starts."""

from __future__ import annotations

from typing import Annotated

import typer

from .application import App

service_app = App("Run a server or a node as a service of this machine.")


@service_app.command(context_settings={"ignore_unknown_options": True})
def install(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The service's name.")],
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- serve|join ...", help="The command, without `mlx-fed`."),
    ],
    system: Annotated[
        bool, typer.Option("--system", help="With systemd: for the machine, not for this user.")
    ] = False,
) -> None:
    """Write a unit for systemd or launchd that runs a command in this folder.

    It is started again after a crash; a server then resumes its run, which has the service's name.
    """
    from ..fleet.service import install_service

    path, commands = install_service(name, arguments, system)
    typer.echo(f"Wrote {path}. To start it:")
    for command in commands:
        typer.echo(f"  {command}")
