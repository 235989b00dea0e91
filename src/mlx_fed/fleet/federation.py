"""The folder of a federation's server: who it is, and which nodes it knows.

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
    """A folder that no server can be run from."""


class Federation:
    """A federation's folder, in which all that is needed is there.

    Args:
        folder (Path): Where it is, or is made.
        announced (str, optional): ``HOST:PORT`` by which nodes reach the server; it is kept for
            the commands that make tokens. Default: what was announced before.
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
            FederationError: If it was never said.
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
        """TLS for a server that listens on this host.

        A certificate of our own authority's is made anew, with the addresses of the moment.

        Raises:
            FedError: If there is no certificate, or not the key for it.
        """
        if self.authority_key.exists():
            hosts = [address.parse(self.address)[0], *certificates.local_addresses(host)]
            key = certificates.new_key()
            issued = certificates.issue(
                self.authority.read_bytes(), private_files.read(self.authority_key), key, hosts
            )
            private_files.write(self.key, certificates.key_to_pem(key))
            private_files.publish(self.certificate, issued)
        private_files.read(self.key)  # not if others can
        return certificates.server_context(self.certificate, self.key)

    def install_certificates(self, certificate: Path, key: Path, authority: Path) -> None:
        """Takes over certificates that were issued elsewhere, in place of its own.

        Args:
            certificate (Path): The server's, with those between it and the authority's (PEM).
            key (Path): The key for it (PEM).
            authority (Path): The certificate that nodes shall trust (PEM).

        Raises:
            FedError: If they cannot be read or do not fit each other.
        """
        try:
            chain, secret, trusted = (p.read_bytes() for p in (certificate, key, authority))
        except OSError as error:
            raise FederationError(f"Cannot read {error.filename}: {error.strerror}.") from error
        certificates.server_context(certificate, key)
        certificates.client_context(authority)
        certificates.fingerprint(trusted)
        private_files.write(self.key, secret)
        # A node that has a token knows only the fingerprint of the authority's.
        private_files.publish(self.certificate, chain.rstrip() + b"\n" + trusted)
        private_files.publish(self.authority, trusted)
        with suppress(FileNotFoundError):
            self.authority_key.unlink()

    def invite(self, name: str, number: int | None = None, lasts: float = INVITATION_TIME) -> str:
        """A token for one node of this name.

        Raises:
            FedError: If the name is in use.
        """
        where = self.address
        secret = tokens.new_secret()
        member = self.nodes.invite(name, secret, number, lasts)
        return self._token(where, member, secret)

    def invite_missing(self, needed: int) -> dict[str, str]:
        """Tokens for as many nodes as are needed beside those known and invited, by name."""
        present = [m for m in self.nodes.all() if m.state in ("enrolled", "invited")]
        names = {member.name for member in self.nodes.all() if member.state != "expired"}
        free = (name for n in count() if (name := f"node-{n}") not in names)
        return {name: self.invite(name) for name in islice(free, max(0, needed - len(present)))}

    def _token(self, where: str, member: Node, secret: bytes) -> str:
        authority = certificates.fingerprint(self.authority.read_bytes())
        return tokens.encode(tokens.Token(where, authority, member.name, member.number, secret))

    def _create_authority(self) -> None:
        key = certificates.new_key()
        private_files.write(self.authority_key, certificates.key_to_pem(key))
        private_files.publish(self.authority, certificates.make_authority(key))


def announcement(given: str | None, host: str, port: int) -> str:
    """``HOST:PORT`` by which nodes reach a server that listens on a host and port.

    Args:
        given (str, optional): What was asked for; a host alone gets the port.

    Raises:
        FederationError: If none was asked for, and this machine has no address on a network.
    """
    if given is not None:
        named, default = address.parse(given)
        return address.join(named, default if _has_port(given) else port)
    written = certificates.ipaddress_or_none(host)
    if written is not None and written.is_unspecified:
        outward = certificates.outward_address()
        if outward is None:
            raise FederationError(
                "This machine has no default route, so that the address by which nodes reach it is "
                "not known: say it with --announce HOST:PORT, or with --host."
            )
        host = outward
    return address.join(host, port)


def _has_port(given: str) -> bool:
    return given.rpartition(":")[2].isdigit() and (given.count(":") == 1 or "]:" in given)
