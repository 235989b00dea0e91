"""``mlx-fed nodes`` and ``mlx-fed certs``: who may take part, and what vouches for the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import errors_as_messages
from .options import FederationFolder

if TYPE_CHECKING:
    from ..fleet.federation import Federation
    from ..fleet.members import Member

_HELP = {"help_option_names": ["-h", "--help"]}
_FOLDER = Path("federation")

nodes = typer.Typer(
    help="List, add and revoke the nodes of a federation; its server may be running.",
    no_args_is_help=True,
    context_settings=_HELP,
)
certs = typer.Typer(
    help="Certificates and keys, for those who bring or hand out their own.",
    no_args_is_help=True,
    context_settings=_HELP,
)

NodeName = Annotated[str, typer.Argument(help="The node's name.")]


@nodes.command("list")
def list_nodes(federation: FederationFolder = _FOLDER) -> None:
    """Show the nodes that are known, invited or revoked."""
    with errors_as_messages():
        members = _existing(federation).members.all()
        if not members:
            typer.echo("No nodes yet: mlx-fed nodes add NAME makes a token for one.")
            return
        width = max(len(member.name) for member in members)
        for member in members:
            typer.echo(f"{member.name:{width}}  node id {member.number:<4}  {_state(member)}")


@nodes.command()
def add(
    name: NodeName,
    node_id: Annotated[
        int | None,
        typer.Option(
            min=0, help="Which part of the data it holds.", show_default="the next that is free"
        ),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Its public key, if it has one: no token is made.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0, help="How long the token is good for.")] = 168.0,
    federation: FederationFolder = _FOLDER,
) -> None:
    """Let another node join: prints its token, or takes its public key."""
    with errors_as_messages():
        from ..flower import keys

        found = _existing(federation)
        if key is None:
            token = found.invite(name, node_id, hours * 3600)
            typer.echo(f"{name} joins with:  mlx-fed join MODULE:TASK {token}")
        else:
            member = found.members.add(name, keys.public(_read(key), key), node_id)
            typer.echo(f"{name} may join, with node id {member.number}.")


@nodes.command()
def revoke(name: NodeName, federation: FederationFolder = _FOLDER) -> None:
    """Turn a node away from now on, or take back its token."""
    with errors_as_messages():
        member = _existing(federation).members.revoke(name)
        typer.echo(f"{name} is revoked." if member.key else f"The token of {name} is revoked.")


@certs.command()
def show(federation: FederationFolder = _FOLDER) -> None:
    """Show whom nodes trust, and where the files are."""
    with errors_as_messages():
        from ..fleet import certificates

        found = _existing(federation)
        typer.echo(f"The authority:   {found.authority}")
        mark = certificates.fingerprint(found.authority.read_bytes()).hex()
        typer.echo(f"Its fingerprint: {mark}")
        own = "" if found.authority_key.exists() else "  (brought along)"
        typer.echo(f"The server's:    {found.certificate}{own}")


@certs.command()
def make(
    announce: Annotated[
        str, typer.Argument(metavar="HOST[:PORT]", help="Where nodes will reach the server.")
    ],
    federation: FederationFolder = _FOLDER,
) -> None:
    """Make a federation's folder, before its server is started."""
    with errors_as_messages():
        from ..fleet.federation import Federation, announcement

        host = announce.rpartition(":")[0] or announce
        made = Federation(federation, announcement(announce, host, 8080))
        made.context(host)
        typer.echo(f"Made {made.folder}/. {made.authority} is for nodes; secret/ is not.")


@certs.command()
def bring(
    certificate: Annotated[Path, typer.Option(help="The server's, with its chain (PEM).")],
    key: Annotated[Path, typer.Option(help="The private key for it (PEM).")],
    authority: Annotated[Path, typer.Option(help="The certificate that nodes shall trust (PEM).")],
    federation: FederationFolder = _FOLDER,
) -> None:
    """Serve with certificates that were issued elsewhere."""
    with errors_as_messages():
        from ..fleet.federation import Federation

        found = Federation(federation)
        found.bring(certificate, key, authority)
        typer.echo(f"{found.folder}/ has them now. You renew them; tokens made before are void.")


@certs.command("key")
def make_key(
    path: Annotated[Path, typer.Argument(help="Where the private key goes.")],
) -> None:
    """Make a node's key, for `nodes add --key` there and `join --key` here."""
    with errors_as_messages():
        from ..fleet.identity import make_key

        make_key(path)
        typer.echo(f"{path} is secret; {path.with_suffix('.pub')} is for the server.")


def _existing(folder: Path) -> Federation:
    from ..errors import FedError
    from ..fleet.federation import Federation

    if not (folder / "ca.crt").exists():
        raise FedError(
            f"{folder} is not a federation's folder: name it with --federation, or make it with "
            "mlx-fed serve or mlx-fed certs make."
        )
    return Federation(folder)


def _state(member: Member) -> str:
    if member.state != "invited":
        return str(member.state)
    from datetime import datetime

    until = datetime.fromtimestamp(min(member.expires, 2**32))
    return f"invited until {until:%Y-%m-%d %H:%M}"


def _read(path: Path) -> bytes:
    from ..errors import FedError

    try:
        return path.read_bytes()
    except OSError as error:
        raise FedError(f"Cannot read {path}: {error.strerror or error}.") from error
