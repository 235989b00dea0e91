"""``mlx-fed nodes`` and ``mlx-fed certs``: the nodes and certificates of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FedError, os_errors
from .application import App
from .option_kinds import count, option
from .options import FederationFolder

if TYPE_CHECKING:
    from ..fleet.federation import Federation
    from ..fleet.node_list import Node

_FOLDER = Path("federation")

nodes_app = App("List, add and revoke the nodes of a federation.")
certs_app = App("Create, show and import certificates and keys.")

NodeName = Annotated[str, typer.Argument(metavar="NAME", help="The node's name.")]


@nodes_app.command("list")
def list_nodes(federation: FederationFolder = _FOLDER) -> None:
    """List the nodes: joined, invited or revoked."""
    members = _open(federation).nodes.all()
    if not members:
        typer.echo("No nodes yet: mlx-fed nodes add NAME creates a token for one.")
        return
    width = max(len(member.name) for member in members)
    for member in members:
        typer.echo(f"{member.name:{width}}  node id {member.number:<4}  {_state(member)}")


@nodes_app.command()
def add(
    name: NodeName,
    node_id: Annotated[
        int | None, count("The node's partition of the data.", "the next free one", min=0)
    ] = None,
    key: Annotated[
        Path | None, option("FILE", "The node's public key, in place of a token.")
    ] = None,
    hours: Annotated[float, option("HOURS", "Time until the token expires.", min=0)] = 168.0,
    federation: FederationFolder = _FOLDER,
) -> None:
    """Add a node: print its token, or register its public key."""
    from ..flower import keys

    files = _open(federation)
    if key is None:
        token = files.invite(name, node_id, hours * 3600)
        typer.echo(f"{name} joins with:  mlx-fed join MODULE:TASK {token}")
    else:
        with os_errors(FedError, f"Cannot read {key}"):
            public_key = key.read_bytes()
        member = files.nodes.add(name, keys.load_public(public_key, key), node_id)
        typer.echo(f"{name} may join, with node id {member.number}.")


@nodes_app.command()
def revoke(name: NodeName, federation: FederationFolder = _FOLDER) -> None:
    """Revoke a node or its token."""
    member = _open(federation).nodes.revoke(name)
    typer.echo(f"{name} is revoked." if member.key else f"The token of {name} is revoked.")


@certs_app.command()
def show(federation: FederationFolder = _FOLDER) -> None:
    """Show the certificates' files and the authority's fingerprint."""
    from ..fleet import certificates

    files = _open(federation)
    typer.echo(f"The authority:   {files.authority}")
    digest = certificates.fingerprint(files.authority.read_bytes()).hex()
    typer.echo(f"Its fingerprint: {digest}")
    origin = "" if files.authority_key.exists() else "  (imported)"
    typer.echo(f"The server's:    {files.certificate}{origin}")


@certs_app.command()
def make(
    announce: Annotated[
        str,
        typer.Argument(metavar="HOST[:PORT]", help="The address at which nodes reach the server."),
    ],
    federation: FederationFolder = _FOLDER,
) -> None:
    """Create a federation's folder before the first start of its server."""
    from ..fleet.federation import Federation, announcement

    host = announce.rpartition(":")[0] or announce
    files = Federation(federation, announcement(announce, host, 8080))
    files.context(host)
    typer.echo(f"Created {files.folder}/. Copy {files.authority} to nodes; keep secret/ secret.")


@certs_app.command()
def bring(
    certificate: Annotated[Path, option("FILE", "The server's certificate, with its chain (PEM).")],
    key: Annotated[Path, option("FILE", "The certificate's private key (PEM).")],
    authority: Annotated[Path, option("FILE", "The authority's certificate (PEM).")],
    federation: FederationFolder = _FOLDER,
) -> None:
    """Import certificates that another authority issued."""
    from ..fleet.federation import Federation

    files = Federation(federation)
    files.install_certificates(certificate, key, authority)
    typer.echo(f"Imported into {files.folder}/. Renew them yourself; old tokens are invalid.")


@certs_app.command("key")
def make_key(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The private key's file.")],
) -> None:
    """Create a node's key pair, in place of a token."""
    from ..fleet.identity import make_key

    make_key(path)
    typer.echo(
        f"Created {path}: keep it secret, and copy {path.with_suffix('.pub')} to the server."
    )


def _open(folder: Path) -> Federation:
    from ..fleet.federation import Federation

    if not (folder / "ca.crt").exists():
        raise FedError(
            f"{folder} is not a federation's folder: name it with --federation, or create it with "
            "mlx-fed serve or mlx-fed certs make."
        )
    return Federation(folder)


def _state(member: Node) -> str:
    if member.state != "invited":
        return str(member.state)
    from datetime import datetime

    expiry = datetime.fromtimestamp(min(member.expires, 2**32))
    return f"invited until {expiry:%Y-%m-%d %H:%M}"
