"""A federation's folder: the server's certificates, and the allowlist of nodes.

    federation/
      ca.crt         the authority's certificate: nodes may have it
      server.crt     the server's, issued by it
      address        HOST:PORT by which nodes reach the server
      nodes.json     names and public keys of nodes, hashes of invitations
      audit.jsonl    the audit log: invitations, enrolment, revocation and runs
      secret/
        ca.key       who has it can pose as this federation's server
        server.key

The folder and all that is not a certificate are their owner's alone to read.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

from ..errors import FedError
from ..system import address
from . import certificates, private_files, tokens
from .node_list import INVITATION_TIME, Node, NodeList

DEFAULT_FOLDER = Path("federation")


class FederationError(FedError):
    """A federation's folder that a server cannot run from."""


class Federation:
    """A federation's folder, created with a certificate authority where there is none.

    Args:
        folder (Path): Its path.
        announced (str, optional): ``HOST:PORT`` by which nodes reach the server, stored for the
            commands that make tokens. Default: the stored one.
    """

    def __init__(self, folder: Path | str, announced: str | None = None):
        self.folder = Path(folder).expanduser()
        private_files.make_folder(self.folder)
        private_files.make_folder(self.folder / "secret")
        self.authority = self.folder / "ca.crt"
        self.certificate = self.folder / "server.crt"
        self.authority_key = self.folder / "secret" / "ca.key"
        self.key = self.folder / "secret" / "server.key"
        self.audit_log = self.folder / "audit.jsonl"
        self.nodes = NodeList(self.folder / "nodes.json", self.audit_log)
        if announced is not None:
            address.parse(announced)
            private_files.publish(self.folder / "address", announced.encode() + b"\n")
        if not self.authority.exists():
            self._create_authority()

    @property
    def address(self) -> str:
        """``HOST:PORT`` by which nodes reach the server.

        Raises:
            FederationError: If none is stored.
        """
        try:
            announced = (self.folder / "address").read_text().strip()
        except (OSError, ValueError):
            raise FederationError(
                f"{self.folder} does not say where its server is: start it once, or say it with "
                f"mlx-fed certs make HOST:PORT --federation {self.folder}."
            ) from None
        address.parse(announced)
        return announced

    def context(self, host: str) -> ssl.SSLContext:
        """The server's TLS context.

        The federation's own authority issues a new certificate for the current addresses.

        Raises:
            FedError: If there is no certificate, or not the key for it.
        """
        if self.authority_key.exists():
            hosts = [address.parse(self.address)[0], *certificates.local_addresses(host)]
            key = certificates.new_key()
            chain = certificates.issue(
                self.authority.read_bytes(), private_files.read(self.authority_key), key, hosts
            )
            private_files.write(self.key, certificates.key_to_pem(key))
            private_files.publish(self.certificate, chain)
        private_files.read(self.key)  # not if others can
        return certificates.server_context(self.certificate, self.key)

    def install_certificates(self, certificate: Path, key: Path, authority: Path) -> None:
        """Installs certificates of another authority in place of the federation's.

        Args:
            certificate (Path): The server's, with those between it and the authority's (PEM).
            key (Path): The key for it (PEM).
            authority (Path): The certificate that nodes shall trust (PEM).

        Raises:
            FedError: If they cannot be read or do not fit each other.
        """
        try:
            chain, secret, authority_pem = (p.read_bytes() for p in (certificate, key, authority))
        except OSError as error:
            raise FederationError(f"Cannot read {error.filename}: {error.strerror}.") from error
        certificates.server_context(certificate, key)
        certificates.client_context(authority)
        certificates.fingerprint(authority_pem)
        private_files.write(self.key, secret)
        # A node that has a token knows only the fingerprint of the authority's.
        private_files.publish(self.certificate, chain.rstrip() + b"\n" + authority_pem)
        private_files.publish(self.authority, authority_pem)
        with suppress(FileNotFoundError):
            self.authority_key.unlink()

    def invite(self, name: str, number: int | None = None, lasts: float = INVITATION_TIME) -> str:
        """A token (text) that invites one node under a name.

        Raises:
            FedError: If the name is in use.
        """
        server = self.address
        secret = tokens.new_secret()
        member = self.nodes.invite(name, secret, number, lasts)
        return self._token(server, member, secret)

    def invite_missing(self, num_nodes: int) -> dict[str, str]:
        """Tokens by node name, so that ``num_nodes`` are enrolled or invited."""
        present = [m for m in self.nodes.all() if m.state in ("enrolled", "invited")]
        names = {member.name for member in self.nodes.all() if member.state != "expired"}
        free = (name for n in count() if (name := f"node-{n}") not in names)
        return {name: self.invite(name) for name in islice(free, max(0, num_nodes - len(present)))}

    def _token(self, server: str, member: Node, secret: bytes) -> str:
        authority = certificates.fingerprint(self.authority.read_bytes())
        return tokens.encode(tokens.Token(server, authority, member.name, member.number, secret))

    def _create_authority(self) -> None:
        key = certificates.new_key()
        private_files.write(self.authority_key, certificates.key_to_pem(key))
        private_files.publish(self.authority, certificates.make_authority(key))


def announcement(announce: str | None, host: str, port: int) -> str:
    """``HOST:PORT`` by which nodes reach a server that listens on a host and port.

    Args:
        announce (str, optional): The address to announce; a host alone gets the port.

    Raises:
        FederationError: If ``announce`` is None, and this machine has no address on a network.
    """
    if announce is not None:
        named_host, default = address.parse(announce)
        return address.join(named_host, default if _has_port(announce) else port)
    ip_address = certificates.ipaddress_or_none(host)
    if ip_address is not None and ip_address.is_unspecified:
        outward = certificates.outward_address()
        if outward is None:
            raise FederationError(
                "This machine has no default route, so that the address by which nodes reach it is "
                "not known: say it with --announce HOST:PORT, or with --host."
            )
        host = outward
    return address.join(host, port)


def _has_port(announce: str) -> bool:
    return announce.rpartition(":")[2].isdigit() and (announce.count(":") == 1 or "]:" in announce)
