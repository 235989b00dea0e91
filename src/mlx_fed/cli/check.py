"""``mlx-fed check``: whether a node or a server is ready for a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import find_task, parse_settings
from .option_kinds import option
from .options import (
    FederationFolder,
    JoinOptions,
    NodeId,
    NumPartitions,
    RunsFolder,
    Settings,
    TaskName,
    TokenArgument,
    with_options,
)

if TYPE_CHECKING:
    from ..fleet.findings import Finding


@with_options
def check(
    *,
    task: TaskName,
    token: TokenArgument = None,
    node_id: NodeId = None,
    num_partitions: NumPartitions = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Compute on the GPU.")] = False,
    config: Settings = None,
    as_server: Annotated[
        bool, typer.Option("--as-server", help="Check what `serve` needs, not what `join` needs.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --as-server: the address to listen on.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="With --as-server: the port to listen on.")] = 8080,
    announce: Annotated[
        str | None, option("HOST:PORT", "With --as-server: where nodes reach it.")
    ] = None,
    federation: FederationFolder = Path("federation"),
    runs: RunsFolder = Path("runs"),
    join_options: JoinOptions,
) -> None:
    """Check that a server or a node can start on this machine.

    It checks task, data, keys, clock, address, port, disk and memory, and trains one step.
    Nothing is changed: the node does not join, and the server does not start.
    """
    from ..fleet import preflight

    settings = parse_settings(config)
    device = "gpu" if gpu else "cpu"
    if as_server:
        findings = preflight.check_server(
            lambda: find_task(task),
            host=host,
            port=port,
            announce=announce,
            federation=federation,
            runs=runs,
            config=settings,
            device=device,
        )
    else:
        findings = preflight.check_node(
            lambda: find_task(task),
            join_options.server,
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            config=settings,
            device=device,
            identity=join_options.identity,
            root_certificates=join_options.root_certificates,
            key=join_options.key,
            policy=join_options.policy,
        )
    if _show(findings):
        raise typer.Exit(1)


def _show(findings: Iterable[Finding]) -> int:
    """Prints findings as they come, and counts the faults."""
    from ..system.printable import printable

    faults = 0
    for finding in findings:
        mark = "FAULT" if finding.is_fault else "ok   "
        typer.echo(f"{mark}  {finding.name}: {printable(finding.text)}")
        if finding.advice:
            typer.echo(f"       {printable(finding.advice)}")
        faults += finding.is_fault
    typer.echo("Ready." if not faults else f"{faults} fault{'s'[: faults > 1]} found.")
    return faults
